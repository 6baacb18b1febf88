//! What a device shall be, checked before the kernel sees it, and the driver's own structure made of it.

use libublk::sys;

use super::UblkError;
use crate::limits;
use crate::units::SECTOR_BYTES;

/// Bytes of a page, and of the physical block that the device reports.
const PAGE_BYTES: u32 = 4096;

/// A device as it shall be. The number of queues is that of the workers given to `UblkDevice::create`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UblkConfig {
    /// The array's name: for thread names and the log.
    pub name: String,
    /// A number that the kernel keeps with the device and that [`leftovers`](super::leftovers) gives back; for example a hash of the name.
    pub owner: u32,
    /// `N` of `/dev/ublkbN`; `None` leaves it to the kernel.
    pub id: Option<u32>,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Data buffer of each request, bytes: the largest read or write.
    pub buffer_bytes: u32,
    /// Size of the device, sectors.
    pub sectors: u64,
    /// Logical block, bytes: 512 or 4096.
    pub block_bytes: u32,
    /// A good size for small requests, bytes: the chunk. The kernel splits nothing at its borders, the engine does: a request that
    /// the kernel had to split it would refuse to a program that does not want to wait (io_uring), and have a worker make it again.
    /// 0: nothing is told.
    pub minimum_bytes: u64,
    /// A good size for large requests, bytes: the full stripe. The kernel is told the largest power of two that divides it; 0: nothing.
    pub optimal_bytes: u64,
    /// Largest discard, sectors; 0: no discard.
    pub max_discard_sectors: u32,
    /// Largest write-zeroes, sectors; 0: the kernel writes pages of zeros instead.
    pub max_write_zeroes_sectors: u32,
}

impl UblkConfig {
    /// Says what is wrong with it.
    pub fn check(&self) -> Result<(), UblkError> {
        let block_sectors = u64::from(self.block_bytes) / SECTOR_BYTES;
        let wrong = if !matches!(self.block_bytes, 512 | 4096) {
            format!("a logical block of {} bytes: it must be 512 or 4096", self.block_bytes)
        } else if self.depth == 0 || usize::from(self.depth) > limits::DEPTH_MAX {
            format!("a queue depth of {}: it must be 1 to {}", self.depth, limits::DEPTH_MAX)
        } else if self.buffer_bytes < PAGE_BYTES
            || !self.buffer_bytes.is_multiple_of(PAGE_BYTES)
            || self.buffer_bytes > limits::PAYLOAD_BYTES_MAX
        {
            format!(
                "a buffer of {} bytes: it must be a multiple of {PAGE_BYTES} up to {}",
                self.buffer_bytes,
                limits::PAYLOAD_BYTES_MAX
            )
        } else if self.sectors == 0 || self.sectors > limits::ARRAY_SECTORS_MAX {
            format!("a size of {} sectors: it must be 1 to {}", self.sectors, limits::ARRAY_SECTORS_MAX)
        } else if !self.sectors.is_multiple_of(block_sectors) {
            format!("a size of {} sectors, which are no whole blocks of {} bytes", self.sectors, self.block_bytes)
        } else {
            return Ok(());
        };
        Err(UblkError::Config(format!("ublk device '{}' cannot have {wrong}", self.name)))
    }

    /// Whether a device with these parameters and features is the one that is described, and its size: its users keep that and its blocks.
    /// It may be smaller only if it can grow yet: the former daemon died on the way there. The kernel tells the size that
    /// UPDATE_SIZE gave it last.
    pub(super) fn same_disk(&self, found: &sys::ublk_params, features: u64) -> Result<u64, UblkError> {
        let wanted = self.params();
        let (found, wanted) = (&found.basic, &wanted.basic);
        let differs = |what: &str, found: u64, wanted: u64| {
            (found != wanted).then(|| {
                UblkError::Config(format!(
                    "the device that a dead daemon of '{}' has left has {what} {found}, not {wanted}: it is not served; 'dst device delete' removes it",
                    self.name
                ))
            })
        };
        let can_grow = features & u64::from(sys::UBLK_F_UPDATE_SIZE) != 0;
        let expected = if can_grow { wanted.dev_sectors.min(found.dev_sectors) } else { wanted.dev_sectors };
        let wrong = differs("sectors:", found.dev_sectors, expected)
            .or_else(|| differs("a block shift of", found.logical_bs_shift.into(), wanted.logical_bs_shift.into()))
            .or_else(|| differs("requests of", found.max_sectors.into(), wanted.max_sectors.into()));
        wrong.map_or(Ok(found.dev_sectors), Err)
    }

    /// The driver's parameters. Flush and FUA reach a server only with both VOLATILE_CACHE and FUA.
    pub(super) fn params(&self) -> sys::ublk_params {
        let mut params = sys::ublk_params {
            types: sys::UBLK_PARAM_TYPE_BASIC,
            basic: sys::ublk_param_basic {
                attrs: sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA,
                logical_bs_shift: shift_of(u64::from(self.block_bytes)),
                physical_bs_shift: shift_of(u64::from(PAGE_BYTES)),
                io_min_shift: shift_of(self.minimum_bytes),
                io_opt_shift: shift_of(self.optimal_bytes),
                max_sectors: self.buffer_bytes / 512,
                dev_sectors: self.sectors,
                ..Default::default()
            },
            ..Default::default()
        };
        if self.max_discard_sectors != 0 || self.max_write_zeroes_sectors != 0 {
            params.types |= sys::UBLK_PARAM_TYPE_DISCARD;
            params.discard = sys::ublk_param_discard {
                discard_granularity: PAGE_BYTES,
                max_discard_sectors: self.max_discard_sectors,
                max_write_zeroes_sectors: self.max_write_zeroes_sectors,
                max_discard_segments: 1,
                ..Default::default()
            };
        }
        params
    }
}

/// The exponent of the largest power of two that divides `bytes`, at least a page (also for 0) unless `bytes` is a sector, and
/// below what fits the driver's 32 bits.
fn shift_of(bytes: u64) -> u8 {
    match bytes {
        512 => 9,
        0 => 12,
        _ => u8::try_from(bytes.trailing_zeros().clamp(12, 30)).unwrap_or(12),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> UblkConfig {
        UblkConfig {
            name: "a".to_owned(),
            owner: 1,
            id: None,
            depth: 128,
            buffer_bytes: 128 << 10,
            sectors: 1 << 21,
            block_bytes: 4096,
            minimum_bytes: 64 << 10,
            optimal_bytes: 3 * (64 << 10),
            max_discard_sectors: 1 << 21,
            max_write_zeroes_sectors: 1 << 21,
        }
    }

    #[test]
    fn parameters_the_driver_would_refuse_are_refused_first() {
        assert!(good().check().is_ok());
        for bad in [
            UblkConfig { block_bytes: 1024, ..good() },
            UblkConfig { depth: 0, ..good() },
            UblkConfig { depth: 4096, ..good() },
            UblkConfig { buffer_bytes: 512, ..good() },
            UblkConfig { buffer_bytes: 4097, ..good() },
            UblkConfig { buffer_bytes: 2 << 20, ..good() },
            UblkConfig { sectors: 0, ..good() },
            UblkConfig { sectors: 9, ..good() },
            UblkConfig { sectors: u64::MAX, ..good() },
        ] {
            let error = bad.check().unwrap_err();
            assert_eq!(error.errno(), crate::errno::Errno::EINVAL, "{bad:?}");
        }
        assert!(UblkConfig { block_bytes: 512, sectors: 9, ..good() }.check().is_ok());
    }

    #[test]
    fn another_disk_is_not_taken_for_this_one() {
        assert_eq!(good().same_disk(&good().params(), 0).unwrap(), 1 << 21);
        for other in [
            UblkConfig { sectors: 1 << 20, ..good() },
            UblkConfig { block_bytes: 512, ..good() },
            UblkConfig { buffer_bytes: 64 << 10, ..good() },
        ] {
            let error = good().same_disk(&other.params(), 0).unwrap_err();
            assert!(error.to_string().contains("dst device delete"), "{error}");
        }
        // One that a former version has left may still be split by the kernel.
        let mut split = good().params();
        split.basic.chunk_sectors = 128;
        assert_eq!(good().same_disk(&split, 0).unwrap(), 1 << 21);
    }

    #[test]
    fn a_disk_may_be_smaller_if_it_can_grow_and_never_larger() {
        let features = u64::from(sys::UBLK_F_UPDATE_SIZE);
        let sized = |sectors| UblkConfig { sectors, ..good() }.params();
        assert_eq!(good().same_disk(&sized(1 << 20), features).unwrap(), 1 << 20);
        assert_eq!(good().same_disk(&sized(1 << 21), features).unwrap(), 1 << 21);
        let larger = good().same_disk(&sized(1 << 22), features).unwrap_err();
        assert!(larger.to_string().contains("4194304, not 2097152"), "{larger}");
        let other = UblkConfig { sectors: 1 << 20, buffer_bytes: 64 << 10, ..good() };
        assert!(good().same_disk(&other.params(), features).is_err());
    }

    #[test]
    fn the_stripe_is_told_as_a_power_of_two() {
        let params = good().params();
        assert_eq!(params.basic.io_min_shift, 16);
        assert_eq!(params.basic.io_opt_shift, 16, "192 KiB is not a power of two");
        assert_eq!(UblkConfig { optimal_bytes: 256 << 10, ..good() }.params().basic.io_opt_shift, 18);
        assert_eq!(UblkConfig { optimal_bytes: 0, minimum_bytes: 0, ..good() }.params().basic.io_opt_shift, 12);
        assert_eq!(params.basic.logical_bs_shift, 12);
        assert_eq!(UblkConfig { block_bytes: 512, ..good() }.params().basic.logical_bs_shift, 9);
        assert_eq!(params.basic.max_sectors, 256);
    }
}
