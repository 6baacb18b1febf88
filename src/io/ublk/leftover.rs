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
    /// Whether the kernel still has a disk for it.
    pub live: bool,
}

/// The target flags for a device of `owner`.
pub(super) fn mark(owner: u32) -> u64 {
    MARK << 32 | u64::from(owner)
}

/// The devices of dst whose daemon is dead. A device that vanishes meanwhile is none.
pub fn leftovers() -> Result<Vec<Leftover>, UblkError> {
    let Ok(entries) = std::fs::read_dir("/sys/class/ublk-char") else { return Ok(Vec::new()) };
    let ids =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse::<u32>().ok());
    let mut found = Vec::new();
    for id in ids {
        match command::device_info(id) {
            Ok(info) => found.extend(leftover_of(&info, process_is_alive(info.ublksrv_pid))),
            Err(error) if matches!(error.errno(), Errno::ENODEV | Errno::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
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
    let Some(now) = leftover_of(&info, process_is_alive(info.ublksrv_pid)) else { return Ok(()) };
    if now.owner != leftover.owner {
        return Ok(());
    }
    if now.live {
        command::stop(now.id).or_else(gone)?;
    }
    command::delete(now.id).or_else(gone)
}

fn leftover_of(info: &sys::ublksrv_ctrl_dev_info, daemon_is_alive: bool) -> Option<Leftover> {
    let owner = u32::try_from(info.ublksrv_flags & u64::from(u32::MAX)).ok()?;
    if info.ublksrv_flags >> 32 != MARK || daemon_is_alive {
        return None;
    }
    Some(Leftover { id: info.dev_id, owner, live: u32::from(info.state) != sys::UBLK_S_DEV_DEAD })
}

/// A stopped device has -1 here; one that was added and not yet started has its maker.
fn process_is_alive(pid: i32) -> bool {
    pid > 0 && Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_marked_devices_of_dead_daemons_are_leftovers() {
        let ours = sys::ublksrv_ctrl_dev_info { dev_id: 3, ublksrv_flags: mark(9), ..Default::default() };
        assert_eq!(leftover_of(&ours, false), Some(Leftover { id: 3, owner: 9, live: false }));
        assert_eq!(leftover_of(&ours, true), None);
        let live = sys::ublksrv_ctrl_dev_info { state: 1, ..ours };
        assert_eq!(leftover_of(&live, false), Some(Leftover { id: 3, owner: 9, live: true }));
        let foreign = sys::ublksrv_ctrl_dev_info { ublksrv_flags: 0, ..ours };
        assert_eq!(leftover_of(&foreign, false), None);
    }

    #[test]
    fn processes() {
        assert!(process_is_alive(i32::try_from(std::process::id()).unwrap()));
        assert!(!process_is_alive(-1));
        assert!(!process_is_alive(0));
    }
}
