//! Devices that a dead daemon has left behind.
//!
//! ADD_DEV gives each device a mark that the kernel keeps ([`MARK`] and the owner's number), so devices of other programs are never
//! touched, whatever files lie around.

use std::path::Path;

use libublk::sys;

use super::UblkError;
use super::command;
use crate::errno::Errno;

/// The upper half of a device's target flags: "dst1".
const MARK: u64 = 0x6473_7431;

/// A device of dst whose daemon is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// `N` of `/dev/ublkcN`.
    pub id: u32,
    /// As given in [`UblkConfig`](super::UblkConfig).
    pub owner: u32,
    /// Whether the kernel still has a disk for it: whoever uses that waits for the next daemon.
    pub live: bool,
    /// How many queues it has.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Data buffer of each request, bytes.
    pub buffer_bytes: u32,
}

/// The target flags for a device of `owner`.
pub(super) fn mark(owner: u32) -> u64 {
    MARK << 32 | u64::from(owner)
}

/// The devices of dst whose daemon is dead.
pub fn leftovers() -> Result<Vec<Leftover>, UblkError> {
    Ok(devices()?.into_iter().filter(|(_, served)| served.is_none()).map(|(device, _)| device).collect())
}

/// All devices of dst by number, and the process that serves each. A device that vanishes meanwhile is none.
pub fn devices() -> Result<Vec<(Leftover, Option<u32>)>, UblkError> {
    let Ok(entries) = std::fs::read_dir("/sys/class/ublk-char") else { return Ok(Vec::new()) };
    let ids =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse::<u32>().ok());
    let mut found = Vec::new();
    for id in ids {
        match command::device_info(id) {
            Ok(info) => {
                let served = is_served(&info).then(|| u32::try_from(info.ublksrv_pid).ok()).flatten();
                found.extend(leftover_of(&info, false).map(|device| (device, served)));
            }
            Err(error) if matches!(error.errno(), Errno::ENODEV | Errno::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by_key(|(device, _)| device.id);
    Ok(found)
}

/// Removes what a dead daemon has left, if it still is that. A disk that is still mounted keeps its number until it is unmounted.
pub fn delete_leftover(leftover: Leftover) -> Result<(), UblkError> {
    let gone = |error: UblkError| match error.errno() {
        Errno::ENODEV | Errno::ENOENT => Ok(()),
        _ => Err(error),
    };
    let info = match command::device_info(leftover.id) {
        Ok(info) => info,
        Err(error) => return gone(error),
    };
    let Some(now) = leftover_of(&info, is_served(&info)) else { return Ok(()) };
    if now.owner != leftover.owner {
        return Ok(());
    }
    if now.live {
        command::stop(now.id).or_else(gone)?;
    }
    command::delete(now.id).or_else(gone)
}

fn leftover_of(info: &sys::ublksrv_ctrl_dev_info, served: bool) -> Option<Leftover> {
    let owner = u32::try_from(info.ublksrv_flags & u64::from(u32::MAX)).ok()?;
    if info.ublksrv_flags >> 32 != MARK || served {
        return None;
    }
    Some(Leftover {
        id: info.dev_id,
        owner,
        live: is_live(info),
        queues: info.nr_hw_queues,
        depth: info.queue_depth,
        buffer_bytes: info.max_io_buf_bytes,
    })
}

fn is_live(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    u32::from(info.state) != sys::UBLK_S_DEV_DEAD
}

/// Whether the process that the driver names is still its daemon. One that was started is served by who has it open: the number of a
/// dead process may be another one's by now. One that was only added has its maker there, who opens it next; a stopped one has -1.
fn is_served(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    let pid = info.ublksrv_pid;
    if !is_live(info) {
        return pid > 0 && Path::new(&format!("/proc/{pid}")).exists();
    }
    let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let device = format!("/dev/ublkc{}", info.dev_id);
    files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok()).any(|file| file == Path::new(&device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_marked_devices_of_dead_daemons_are_leftovers() {
        let ours = sys::ublksrv_ctrl_dev_info { dev_id: 3, ublksrv_flags: mark(9), ..Default::default() };
        let left = Leftover { id: 3, owner: 9, live: false, queues: 0, depth: 0, buffer_bytes: 0 };
        assert_eq!(leftover_of(&ours, false), Some(left));
        assert_eq!(leftover_of(&ours, true), None);
        let live = sys::ublksrv_ctrl_dev_info { state: 1, ..ours };
        assert_eq!(leftover_of(&live, false), Some(Leftover { live: true, ..left }));
        let foreign = sys::ublksrv_ctrl_dev_info { ublksrv_flags: 0, ..ours };
        assert_eq!(leftover_of(&foreign, false), None);
    }

    #[test]
    fn a_process_serves_what_it_has_open_or_is_about_to_open() {
        let own = i32::try_from(std::process::id()).unwrap();
        let added = sys::ublksrv_ctrl_dev_info { dev_id: 4_000_000, ublksrv_pid: own, ..Default::default() };
        assert!(is_served(&added));
        assert!(!is_served(&sys::ublksrv_ctrl_dev_info { state: 1, ..added }), "another process has the number by now");
        assert!(!is_served(&sys::ublksrv_ctrl_dev_info { ublksrv_pid: -1, ..added }));
    }
}
