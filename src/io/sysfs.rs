//! What the kernel says of a block device in `/sys/class/block`: size, limits, requests in flight. For `status` and for tests.
//!
//! Read through sysfs-class, except where it is wrong: its partition functions do not understand names such as `ublkb0p1`, and `stat`
//! is parsed as one number.

use std::io;

use serde::Serialize;
use sysfs_class::Block;
use sysfs_class::SysClass;

/// A block device as the kernel shows it. All sizes in bytes unless the name says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockInfo {
    /// Size of the device, 512-byte sectors.
    pub sectors: u64,
    /// The unit of addressing.
    pub logical_block_bytes: u64,
    /// The unit of writing without read-modify-write.
    pub physical_block_bytes: u64,
    /// Smallest good request.
    pub io_min_bytes: u64,
    /// Good size for large requests; 0: not told.
    pub io_opt_bytes: u64,
    /// Largest request.
    pub max_io_bytes: u64,
    /// Reads and writes do not cross multiples of this; 0: anywhere. Sectors.
    pub chunk_sectors: u64,
    /// Largest discard; 0: none.
    pub discard_max_bytes: u64,
    /// Unit of discard.
    pub discard_granularity_bytes: u64,
    /// Largest write-zeroes; 0: none.
    pub write_zeroes_max_bytes: u64,
    /// Whether there is a volatile cache, so that flushes are sent.
    pub write_back: bool,
    /// Whether writes with FUA are sent as such.
    pub fua: bool,
    /// Requests that the block layer admits.
    pub nr_requests: u64,
    /// Reads in flight.
    pub reads_in_flight: u64,
    /// Writes in flight.
    pub writes_in_flight: u64,
}

impl BlockInfo {
    /// Reads about `/sys/class/block/NAME`.
    pub fn read(name: &str) -> io::Result<BlockInfo> {
        let block = Block::new(name)?;
        let (reads_in_flight, writes_in_flight) = pair_of(&block.inflight()?)?;
        Ok(BlockInfo {
            sectors: block.size()?,
            logical_block_bytes: block.queue_logical_block_size()?,
            physical_block_bytes: block.queue_physical_block_size()?,
            io_min_bytes: block.queue_minimum_io_size()?,
            io_opt_bytes: block.queue_optimal_io_size()?,
            max_io_bytes: block.queue_max_sectors_kb()? * 1024,
            chunk_sectors: block.queue_chunk_sectors()?,
            discard_max_bytes: block.queue_discard_max_bytes()?,
            discard_granularity_bytes: block.queue_discard_granularity()?,
            write_zeroes_max_bytes: block.queue_write_zeroes_max_bytes()?,
            write_back: block.queue_write_cache()?.trim() == "write back",
            fua: block.queue_fua()? != 0,
            nr_requests: block.queue_nr_requests()?,
            reads_in_flight,
            writes_in_flight,
        })
    }
}

/// The two numbers of `inflight`.
fn pair_of(text: &str) -> io::Result<(u64, u64)> {
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(reads)), Some(Ok(writes))) => Ok((reads, writes)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("inflight is '{}'", text.escape_default()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_in_flight() {
        assert_eq!(pair_of("       3        1\n").unwrap(), (3, 1));
        assert!(pair_of("3").is_err());
        assert!(pair_of("a b").is_err());
    }

    #[test]
    fn a_block_device_of_this_machine_reads_whole() {
        // Any whole disk will do; a machine without one has nothing to read.
        let Ok(entries) = std::fs::read_dir("/sys/class/block") else { return };
        let whole = entries.flatten().find(|entry| entry.path().join("queue").exists());
        let Some(whole) = whole else { return };
        let info = BlockInfo::read(whole.file_name().to_str().unwrap()).unwrap();
        assert!(info.logical_block_bytes >= 512);
    }
}
