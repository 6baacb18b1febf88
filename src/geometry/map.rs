//! Where an array's sectors live: extent -> (node, extent on its volume), and the exact inverse. Pure arithmetic.
//!
//! Invariants, tested as properties: the map covers every array sector exactly once; `unmap(map(x)) == x`; the pieces of an
//! extent lie end to end; a node's `span` of an extent is exactly the sectors of the extent that live on that node.

use crate::geometry::linear::Linear;
use crate::geometry::striped::Striped;
use crate::limits;
use crate::units::{Extent, Lba};

/// A part of an extent that lies on one node, without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the node.
    pub node: usize,
    /// Where on the node's volume.
    pub extent: Extent,
}

/// How an array is laid out over its nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Geometry {
    /// Nodes end to end.
    Linear(Linear),
    /// Chunks dealt out in turn.
    Striped(Striped),
}

/// Why there is no such layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadGeometry {
    /// No node, or more than `limits::NODES_MAX`.
    NodeCount(usize),
    /// A chunk that is not a power of two within its limits; sectors.
    Chunk(u64),
    /// The node at this index has no room for anything.
    TooSmall(usize),
    /// The array would be larger than `limits::ARRAY_SECTORS_MAX`.
    TooLarge,
}

impl std::fmt::Display for BadGeometry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BadGeometry::NodeCount(count) => write!(f, "an array has 1 to {} nodes, not {count}", limits::NODES_MAX),
            BadGeometry::Chunk(sectors) => write!(
                f,
                "a chunk is a power of two from {} to {} KiB, not {} bytes",
                limits::CHUNK_BYTES_MIN >> 10,
                limits::CHUNK_BYTES_MAX >> 10,
                sectors.saturating_mul(crate::units::SECTOR_BYTES)
            ),
            BadGeometry::TooSmall(node) => write!(f, "target {} is too small to hold anything", node + 1),
            BadGeometry::TooLarge => write!(f, "an array has at most {} sectors", limits::ARRAY_SECTORS_MAX),
        }
    }
}

impl std::error::Error for BadGeometry {}

impl Geometry {
    /// Nodes of `sectors[i]` sectors, end to end.
    pub fn linear(sectors: &[u64]) -> Result<Geometry, BadGeometry> {
        Linear::new(sectors).map(Geometry::Linear)
    }

    /// Chunks of `chunk_sectors` dealt out in turn; each node gives as many whole chunks as the smallest has.
    pub fn striped(chunk_sectors: u64, sectors: &[u64]) -> Result<Geometry, BadGeometry> {
        Striped::new(chunk_sectors, sectors).map(Geometry::Striped)
    }

    /// Size of the array, sectors.
    pub fn sectors(&self) -> u64 {
        match self {
            Geometry::Linear(linear) => linear.sectors(),
            Geometry::Striped(striped) => striped.sectors(),
        }
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        match self {
            Geometry::Linear(linear) => linear.nodes(),
            Geometry::Striped(striped) => striped.nodes(),
        }
    }

    /// The lowest array sector of a node, which names it.
    pub fn node_start(&self, node: usize) -> Lba {
        match self {
            Geometry::Linear(linear) => linear.node_start(node),
            Geometry::Striped(striped) => striped.node_start(node),
        }
    }

    /// Sectors of a node's volume that the array uses.
    pub fn node_sectors(&self, node: usize) -> u64 {
        match self {
            Geometry::Linear(linear) => linear.node_sectors(node),
            Geometry::Striped(striped) => striped.node_sectors(),
        }
    }

    /// The chunk, sectors; `None` where requests need not be split at any regular border.
    pub fn chunk_sectors(&self) -> Option<u64> {
        match self {
            Geometry::Linear(_) => None,
            Geometry::Striped(striped) => Some(striped.chunk_sectors()),
        }
    }

    /// The first piece of `extent`, which must be within the array and not empty: as long as it stays on one node without a gap.
    pub fn piece(&self, extent: Extent) -> Piece {
        match self {
            Geometry::Linear(linear) => linear.piece(extent),
            Geometry::Striped(striped) => striped.piece(extent),
        }
    }

    /// What of `extent` lives on `node`: always one run of its volume.
    pub fn span(&self, extent: Extent, node: usize) -> Option<Extent> {
        match self {
            Geometry::Linear(linear) => linear.span(extent, node),
            Geometry::Striped(striped) => striped.span(extent, node),
        }
    }

    /// The array sector that lives at `lba` of `node`'s volume; `None` for the unused rest of a volume.
    pub fn unmap(&self, node: usize, lba: Lba) -> Option<Lba> {
        if node >= self.nodes() || lba.0 >= self.node_sectors(node) {
            return None;
        }
        Some(match self {
            Geometry::Linear(linear) => Lba(linear.node_start(node).0 + lba.0),
            Geometry::Striped(striped) => striped.unmap(node, lba),
        })
    }
}

/// Checks what both layouts share: the number of nodes.
pub(crate) fn check_nodes(sectors: &[u64]) -> Result<(), BadGeometry> {
    if sectors.is_empty() || sectors.len() > limits::NODES_MAX {
        return Err(BadGeometry::NodeCount(sectors.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_geometry() -> impl Strategy<Value = Geometry> {
        let linear = prop::collection::vec(1u64..200, 1..8).prop_map(|sizes| Geometry::linear(&sizes).unwrap());
        let striped = (prop::collection::vec(8u64..200, 1..8), 3u32..6)
            .prop_filter_map("room", |(sizes, shift)| Geometry::striped(1 << shift, &sizes).ok());
        prop_oneof![linear, striped]
    }

    fn extent_in(geometry: &Geometry, a: u64, b: u64) -> Extent {
        let start = a % geometry.sectors();
        Extent::new(start, 1 + b % (geometry.sectors() - start))
    }

    proptest! {
        #[test]
        fn every_sector_is_covered_once_and_inverts(geometry in any_geometry()) {
            let mut seen = std::collections::BTreeSet::new();
            for lba in 0..geometry.sectors() {
                let piece = geometry.piece(Extent::new(lba, 1));
                prop_assert!(piece.extent.within(geometry.node_sectors(piece.node)));
                prop_assert!(seen.insert((piece.node, piece.extent.start)));
                prop_assert_eq!(geometry.unmap(piece.node, piece.extent.start), Some(Lba(lba)));
            }
            let used: u64 = (0..geometry.nodes()).map(|node| geometry.node_sectors(node)).sum();
            prop_assert_eq!(used, geometry.sectors());
            for node in 0..geometry.nodes() {
                prop_assert_eq!(geometry.unmap(node, Lba(geometry.node_sectors(node))), None);
                prop_assert_eq!(geometry.unmap(node, Lba(0)), Some(geometry.node_start(node)));
            }
        }

        #[test]
        fn pieces_lie_end_to_end(geometry in any_geometry(), a: u64, b: u64) {
            let extent = extent_in(&geometry, a, b);
            let mut at = extent.start.0;
            while at < extent.end().0 {
                let piece = geometry.piece(Extent::new(at, extent.end().0 - at));
                prop_assert!(piece.extent.sectors > 0);
                for offset in 0..piece.extent.sectors {
                    let lba = Lba(piece.extent.start.0 + offset);
                    prop_assert_eq!(geometry.unmap(piece.node, lba), Some(Lba(at + offset)));
                }
                at += piece.extent.sectors;
            }
            prop_assert_eq!(at, extent.end().0);
        }

        #[test]
        fn spans_are_exactly_the_extent(geometry in any_geometry(), a: u64, b: u64) {
            let extent = extent_in(&geometry, a, b);
            let mut found = std::collections::BTreeSet::new();
            for node in 0..geometry.nodes() {
                let Some(span) = geometry.span(extent, node) else { continue };
                prop_assert!(span.sectors > 0);
                for lba in span.start.0..span.end().0 {
                    found.insert(geometry.unmap(node, Lba(lba)).unwrap().0);
                }
            }
            prop_assert!(found.into_iter().eq(extent.start.0..extent.end().0));
        }
    }

    #[test]
    fn bad_layouts_are_named() {
        assert_eq!(Geometry::linear(&[]), Err(BadGeometry::NodeCount(0)));
        assert_eq!(Geometry::linear(&[1; 1025]), Err(BadGeometry::NodeCount(1025)));
        assert_eq!(Geometry::linear(&[8, 0]), Err(BadGeometry::TooSmall(1)));
        assert_eq!(Geometry::linear(&[limits::ARRAY_SECTORS_MAX, 1]), Err(BadGeometry::TooLarge));
        assert_eq!(Geometry::linear(&[u64::MAX, u64::MAX]), Err(BadGeometry::TooLarge));
        for chunk in [0, 4, 7, 12, 4096] {
            assert_eq!(Geometry::striped(chunk, &[1 << 20]), Err(BadGeometry::Chunk(chunk)));
        }
        assert_eq!(Geometry::striped(128, &[1280, 127]), Err(BadGeometry::TooSmall(1)));
        assert_eq!(Geometry::striped(8, &[u64::MAX, u64::MAX]), Err(BadGeometry::TooLarge));
    }

    #[test]
    fn node_names_follow_the_old_tree() {
        let linear = Geometry::linear(&[800, 800]).unwrap();
        assert_eq!((linear.node_start(0), linear.node_start(1)), (Lba(0), Lba(800)));
        let striped = Geometry::striped(128, &[1000, 900, 2000]).unwrap();
        assert_eq!(striped.node_start(2), Lba(256));
        assert_eq!((striped.node_sectors(0), striped.sectors()), (896, 2688));
    }
}
