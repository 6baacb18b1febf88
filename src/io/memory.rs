//! The memory of a daemon that serves block devices: what writeback goes through must never wait for memory that only writeback can free.

use std::io;

use nix::libc;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// `CAP_IPC_LOCK`, as a bit of `CapEff`.
const CAP_IPC_LOCK: u32 = 14;

/// Keeps what this process has in memory from now on in memory: nothing that was touched is swapped out or, if it is code, forgotten.
/// Call it before any thread is started.
///
/// What is mapped is locked when it is first touched (`MCL_ONFAULT`): whoever must not wait for a page touches it first, as the buffers of
/// ublk's queues are. All of it counts as locked all the same, so the allocator is told to make no arena for each thread (64 MiB of
/// addresses), and threads have small stacks ([`THREAD_STACK_BYTES`](crate::limits::THREAD_STACK_BYTES)).
pub fn lock() -> io::Result<()> {
    const ONE_ARENA: i32 = 1;
    // SAFETY: it takes two numbers, and no other thread uses the allocator yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ONE_ARENA) };
    let raised =
        getrlimit(Resource::RLIMIT_MEMLOCK).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard));
    let unlimited = raised.is_ok() && getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == RLIM_INFINITY);
    // With a limit it is not tried: later mappings would fail, those of an array that is to start among them.
    if !unlimited && !has_capability(&std::fs::read_to_string("/proc/self/status")?, CAP_IPC_LOCK) {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    // SAFETY: it takes a number, and changes no memory.
    match unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a `/proc/PID/status` has this capability among the effective ones.
fn has_capability(status: &str, capability: u32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> capability & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read() {
        let status = "Name:\tdstd\nCapPrm:\tffffffffffffffff\nCapEff:\t0000000000004000\n";
        assert!(has_capability(status, CAP_IPC_LOCK));
        assert!(!has_capability(status, CAP_IPC_LOCK + 1));
        assert!(!has_capability("Name:\tdstd\n", CAP_IPC_LOCK));
    }
}
