//! Whether ublk can be used on this machine, and if not, what the user can do about it.

use std::fs;
use std::fs::File;
use std::io;
use std::path::Path;

use io_uring::IoUring;
use libublk::sys;

use super::UblkError;
use super::command;
use super::queue::become_io_flusher;
use crate::errno::Errno;
use crate::limits;

/// What every dead end has in common.
const OTHERWISE: &str = "or use the NBD frontend (--frontend nbd:ADDR), which needs no kernel module";

/// Checks the kernel's version, the module, the permissions, io_uring and the driver's features, before anything is made.
pub fn check() -> Result<(), UblkError> {
    features().map(drop)
}

/// The same, and what features the driver has.
pub(super) fn features() -> Result<u64, UblkError> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    kernel_is_fit(release.trim()).map_err(UblkError::Unavailable)?;
    match File::options().read(true).write(true).open(command::CONTROL) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(UblkError::Unavailable(module_is_missing(release.trim())));
        }
        Err(error) => {
            return Err(UblkError::Unavailable(format!(
                "{}: {error}; run dstd as root, {OTHERWISE}",
                command::CONTROL
            )));
        }
    }
    if let Err(error) = IoUring::new(2) {
        return Err(UblkError::Unavailable(format!(
            "io_uring is refused by this system ({error}); see sysctl kernel.io_uring_disabled and, in a container, its seccomp profile"
        )));
    }
    // This thread may wait for the device as well.
    if !become_io_flusher() {
        return Err(UblkError::Unavailable(format!(
            "a thread of dstd may not become an I/O flusher, and without that the device would stall under memory pressure; give dstd CAP_SYS_RESOURCE, {OTHERWISE}"
        )));
    }
    let features = command::features().map_err(|error| match error.errno() {
        Errno::EPERM | Errno::EACCES => error,
        _ => UblkError::Unavailable(format!(
            "the ublk driver does not tell its features ({error}); use a newer kernel, {OTHERWISE}"
        )),
    })?;
    let needed = u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE) | super::control::FEATURES;
    if features & needed != needed {
        return Err(UblkError::Unavailable(format!(
            "the ublk driver is too old (features {features:#x}), {OTHERWISE}"
        )));
    }
    Ok(features)
}

/// How many queues the driver would give to a device that asks for `wanted`: one per possible CPU at most.
pub fn usable_queues(wanted: u16) -> u16 {
    let possible = fs::read_to_string("/sys/devices/system/cpu/possible").ok().and_then(|list| cpus_of(&list));
    let cpus = possible
        .or_else(|| std::thread::available_parallelism().ok().and_then(|cpus| u16::try_from(cpus.get()).ok()))
        .unwrap_or(1);
    let most = u16::try_from(limits::QUEUES_MAX).unwrap_or(u16::MAX);
    wanted.clamp(1, cpus.clamp(1, most))
}

/// The number of CPUs in a list such as `0-3`: one more than the last.
fn cpus_of(list: &str) -> Option<u16> {
    let last = list.trim().rsplit([',', '-']).next()?;
    last.parse::<u16>().ok()?.checked_add(1)
}

/// The control device is not there: is the module on this machine at all?
fn module_is_missing(release: &str) -> String {
    if Path::new("/sys/module/ublk_drv").exists() {
        return format!("{} does not exist although ublk_drv is loaded; is /dev a devtmpfs?", command::CONTROL);
    }
    let known = fs::read_to_string(format!("/lib/modules/{release}/modules.dep"))
        .is_ok_and(|list| list.contains("/ublk_drv.ko"));
    if known {
        "the kernel module ublk_drv is not loaded; run: modprobe ublk_drv".to_owned()
    } else {
        format!(
            "the running kernel {release} has no ublk_drv module (CONFIG_BLK_DEV_UBLK); boot one that has it, {OTHERWISE}"
        )
    }
}

/// Refuses kernels that are too old, and those whose ADD_DEV crashes the driver and never returns.
fn kernel_is_fit(release: &str) -> Result<(), String> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let (major, minor, patch) = (numbers.next(), numbers.next(), numbers.next());
    // A release that cannot be read is not held against the kernel.
    let (Some(major), Some(minor)) = (major, minor) else { return Ok(()) };
    if (major, minor) < (6, 12) {
        return Err(format!(
            "kernel {release} is older than 6.12, the oldest on which dst uses ublk; boot a newer one, {OTHERWISE}"
        ));
    }
    let bad_mainline = (major, minor) == (6, 18) && matches!(patch, Some(4 | 5));
    let bad_ubuntu = (major, minor, patch) == (6, 17, Some(0))
        && (release.ends_with("-azure") || release.ends_with("-aws"))
        && numbers.next().is_some_and(|build| (1015..=1018).contains(&build));
    if bad_mainline || bad_ubuntu {
        return Err(format!(
            "kernel {release} has a bug that crashes its ublk driver when a device is added; boot another one, {OTHERWISE}"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_judged_by_their_release() {
        for fit in [
            "6.12.0",
            "6.12.57+deb13-amd64",
            "6.18.3",
            "6.18.6",
            "6.18.40",
            "7.2.12",
            "6.17.0-1019-azure",
            "6.17.0-1015-generic",
            "odd",
        ] {
            assert_eq!(kernel_is_fit(fit), Ok(()), "{fit}");
        }
        for unfit in
            ["6.1.0-40-amd64", "5.15.0", "6.11.9", "6.18.4", "6.18.5-arch1", "6.17.0-1015-azure", "6.17.0-1018-aws"]
        {
            assert!(kernel_is_fit(unfit).is_err(), "{unfit}");
        }
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(cpus_of("0-3\n"), Some(4));
        assert_eq!(cpus_of("0\n"), Some(1));
        assert_eq!(cpus_of("0,2-7"), Some(8));
        assert_eq!(cpus_of(""), None);
    }

    #[test]
    fn at_least_one_queue_and_at_most_a_cpu_each() {
        assert_eq!(usable_queues(0), 1);
        assert_eq!(usable_queues(1), 1);
        assert!(usable_queues(u16::MAX) as usize <= limits::QUEUES_MAX);
    }
}
