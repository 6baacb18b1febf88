//! Chunks dealt out to the nodes in turn: array chunk c lives on node c mod n, as its chunk c / n.

use crate::bugs::{Bug, planted};
use crate::geometry::map::{BadGeometry, Piece, check_nodes};
use crate::limits;
use crate::units::{Extent, Lba, SECTOR_BYTES};

/// Chunks dealt out in turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Striped {
    /// log2 of the chunk in sectors.
    shift: u32,
    nodes: u64,
    /// Chunks that each node gives.
    chunks: u64,
}

impl Striped {
    pub(crate) fn new(chunk_sectors: u64, sectors: &[u64]) -> Result<Striped, BadGeometry> {
        check_nodes(sectors)?;
        let bytes = chunk_sectors.saturating_mul(SECTOR_BYTES);
        if !chunk_sectors.is_power_of_two() || !(limits::CHUNK_BYTES_MIN..=limits::CHUNK_BYTES_MAX).contains(&bytes) {
            return Err(BadGeometry::Chunk(chunk_sectors));
        }
        let shift = chunk_sectors.trailing_zeros();
        if let Some(node) = sectors.iter().position(|sectors| sectors >> shift == 0) {
            return Err(BadGeometry::TooSmall(node));
        }
        let nodes = sectors.len() as u64;
        let chunks = sectors.iter().map(|sectors| sectors >> shift).min().unwrap_or(0);
        let total = (chunks << shift).checked_mul(nodes);
        total.filter(|total| *total <= limits::ARRAY_SECTORS_MAX).ok_or(BadGeometry::TooLarge)?;
        Ok(Striped { shift, nodes, chunks })
    }

    pub(crate) fn sectors(&self) -> u64 {
        (self.chunks << self.shift) * self.nodes
    }

    pub(crate) fn nodes(&self) -> usize {
        // At most NODES_MAX.
        usize::try_from(self.nodes).unwrap_or(usize::MAX)
    }

    pub(crate) fn chunk_sectors(&self) -> u64 {
        1 << self.shift
    }

    pub(crate) fn node_start(&self, node: usize) -> Lba {
        Lba((node as u64) << self.shift)
    }

    pub(crate) fn node_sectors(&self) -> u64 {
        self.chunks << self.shift
    }

    pub(crate) fn piece(&self, extent: Extent) -> Piece {
        let chunk = extent.start.0 >> self.shift;
        let within = extent.start.0 & (self.chunk_sectors() - 1);
        let (row, node) = (chunk / self.nodes, chunk % self.nodes);
        // On a single node consecutive chunks are neighbours, so nothing needs to be split.
        let room = self.chunk_sectors() - within + u64::from(planted(Bug::StripeOffByOne));
        let sectors = if self.nodes == 1 { extent.sectors } else { extent.sectors.min(room) };
        let node = usize::try_from(node).unwrap_or(usize::MAX);
        Piece { node, extent: Extent::new((row << self.shift) + within, sectors) }
    }

    pub(crate) fn span(&self, extent: Extent, node: usize) -> Option<Extent> {
        if extent.sectors == 0 {
            return None;
        }
        let start = self.volume_end(extent.start.0, node as u64);
        let end = self.volume_end(extent.end().0, node as u64);
        (start < end).then(|| Extent::new(start, end - start))
    }

    pub(crate) fn unmap(&self, node: usize, lba: Lba) -> Lba {
        let (row, within) = (lba.0 >> self.shift, lba.0 & (self.chunk_sectors() - 1));
        Lba(((row * self.nodes + node as u64) << self.shift) + within)
    }

    /// How many sectors of `node`'s volume belong to array sectors below `lba`.
    fn volume_end(&self, lba: u64, node: u64) -> u64 {
        let chunk = lba >> self.shift;
        let (row, turn) = (chunk / self.nodes, chunk % self.nodes);
        let rest = match turn.cmp(&node) {
            std::cmp::Ordering::Less => 0,
            std::cmp::Ordering::Equal => lba & (self.chunk_sectors() - 1),
            std::cmp::Ordering::Greater => self.chunk_sectors(),
        };
        (row << self.shift) + rest
    }
}
