//! Nodes end to end, of any sizes.

use crate::bugs::{Bug, planted};
use crate::geometry::map::{BadGeometry, Piece, check_nodes};
use crate::limits;
use crate::units::{Extent, Lba};

/// Nodes end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    /// First array sector of each node, then the size of the array: one more than there are nodes.
    starts: Vec<u64>,
}

impl Linear {
    pub(crate) fn new(sectors: &[u64]) -> Result<Linear, BadGeometry> {
        check_nodes(sectors)?;
        let mut starts = vec![0];
        let mut end = 0u64;
        for (node, sectors) in sectors.iter().enumerate() {
            if *sectors == 0 {
                return Err(BadGeometry::TooSmall(node));
            }
            end = end
                .checked_add(*sectors)
                .filter(|end| *end <= limits::ARRAY_SECTORS_MAX)
                .ok_or(BadGeometry::TooLarge)?;
            starts.push(end);
        }
        Ok(Linear { starts })
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.starts[self.nodes()]
    }

    pub(crate) fn nodes(&self) -> usize {
        self.starts.len() - 1
    }

    pub(crate) fn node_start(&self, node: usize) -> Lba {
        Lba(self.starts[node])
    }

    pub(crate) fn node_sectors(&self, node: usize) -> u64 {
        self.starts[node + 1] - self.starts[node]
    }

    pub(crate) fn piece(&self, extent: Extent) -> Piece {
        // The node whose successor is the first to start after the extent's first sector.
        let node = self.starts.partition_point(|start| *start <= extent.start.0) - 1;
        let offset = extent.start.0 - self.starts[node];
        let room = self.starts[node + 1] - extent.start.0;
        let sectors = if planted(Bug::LinearBorder) { extent.sectors } else { extent.sectors.min(room) };
        Piece { node, extent: Extent::new(offset, sectors) }
    }

    pub(crate) fn span(&self, extent: Extent, node: usize) -> Option<Extent> {
        let start = extent.start.0.max(self.starts[node]);
        let end = extent.end().0.min(self.starts[node + 1]);
        (start < end).then(|| Extent::new(start - self.starts[node], end - start))
    }
}
