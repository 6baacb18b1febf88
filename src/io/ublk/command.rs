//! Control commands for devices that are not ours to own: questions to the driver, and the removal of leftovers.
//!
//! libublk's verbs for such devices read a world-writable JSON file first and have no time limit, so these few commands are
//! sent by hand. The kernel runs each in a worker of its own; here is only waited, never longer than `limit`. A command that has not
//! ended by then keeps its ring and its buffer: they are leaked.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use io_uring::IoUring;
use io_uring::opcode;
use io_uring::squeue;
use io_uring::types;
use libublk::sys;

use super::UblkError;
use crate::errno::Errno;
use crate::limits;

/// The driver's control device.
pub(super) const CONTROL: &str = "/dev/ublk-control";

/// No device: for questions about the driver itself.
const NO_DEVICE: u32 = u32::MAX;

/// The bits of `UBLK_F_*` that the driver knows.
pub(super) fn features() -> Result<u64, UblkError> {
    let answer = send("GET_FEATURES", sys::UBLK_U_CMD_GET_FEATURES, NO_DEVICE, [0; 1], limits::UBLK_COMMAND)?;
    Ok(answer[0])
}

/// What the driver knows of a device.
pub(super) fn device_info(id: u32) -> Result<sys::ublksrv_ctrl_dev_info, UblkError> {
    const WORDS: usize = size_of::<sys::ublksrv_ctrl_dev_info>() / 8;
    let words = send("GET_DEV_INFO", sys::UBLK_U_CMD_GET_DEV_INFO, id, [0; WORDS], limits::UBLK_COMMAND)?;
    // SAFETY: the structure consists of integers alone, so that any bytes are a value of it, and has the array's length.
    Ok(unsafe { std::mem::transmute::<[u64; WORDS], sys::ublksrv_ctrl_dev_info>(words) })
}

/// Takes the disk away and waits for its requests.
pub(super) fn stop(id: u32) -> Result<(), UblkError> {
    send("STOP_DEV", sys::UBLK_U_CMD_STOP_DEV, id, [], limits::UBLK_STOP).map(drop)
}

/// Removes a device; its number is free when the last user of the dead disk has closed it.
pub(super) fn delete(id: u32) -> Result<(), UblkError> {
    send("DEL_DEV_ASYNC", sys::UBLK_U_CMD_DEL_DEV_ASYNC, id, [], limits::UBLK_COMMAND).map(drop)
}

/// Sends one command with a buffer of `WORDS` words and returns the buffer.
fn send<const WORDS: usize>(
    step: &str,
    op: u32,
    device: u32,
    buffer: [u64; WORDS],
    limit: Duration,
) -> Result<[u64; WORDS], UblkError> {
    let refused = |error: io::Error| UblkError::Refused { step: step.to_owned(), errno: Errno::from(&error) };
    let control = File::options().read(true).write(true).open(Path::new(CONTROL)).map_err(refused)?;
    let ring: IoUring<squeue::Entry128> = IoUring::builder().build(2).map_err(refused)?;
    let mut pending = ManuallyDrop::new((ring, control, Box::new(buffer)));
    let (ring, control, buffer) = &mut *pending;

    let bytes = u16::try_from(size_of::<[u64; WORDS]>()).unwrap_or(0);
    let command = sys::ublksrv_ctrl_cmd {
        dev_id: device,
        queue_id: u16::MAX,
        len: bytes,
        addr: if bytes == 0 { 0 } else { buffer.as_mut_ptr() as u64 },
        ..Default::default()
    };
    let mut payload = [0; 80];
    // SAFETY: the structure is plain integers without padding (its last 8 bytes are named), and shorter than the payload.
    payload[..size_of_val(&command)].copy_from_slice(unsafe {
        std::slice::from_raw_parts((&raw const command).cast::<u8>(), size_of_val(&command))
    });
    let sqe = opcode::UringCmd80::new(types::Fd(control.as_raw_fd()), op).cmd(payload).build();
    // SAFETY: the ring, the file and the boxed buffer live until the completion was seen; without it they are leaked.
    if unsafe { ring.submission().push(&sqe) }.is_err() {
        return Err(UblkError::Refused { step: step.to_owned(), errno: Errno::EBUSY });
    }

    let answer = wait(ring, limit).map_err(|error| match Errno::from(&error) {
        Errno::ETIMEDOUT => UblkError::TimedOut { step: step.to_owned(), after: limit },
        errno => UblkError::Refused { step: step.to_owned(), errno },
    })?;
    let (_, _, buffer) = ManuallyDrop::into_inner(pending);
    if answer < 0 {
        return Err(UblkError::Refused { step: step.to_owned(), errno: Errno::from_raw(answer.saturating_abs()) });
    }
    Ok(*buffer)
}

/// Submits and waits for the one completion, at most `limit`.
fn wait(ring: &mut IoUring<squeue::Entry128>, limit: Duration) -> io::Result<i32> {
    let start = std::time::Instant::now();
    loop {
        if let Some(cqe) = ring.completion().next() {
            return Ok(cqe.result());
        }
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(io::Error::from_raw_os_error(Errno::ETIMEDOUT.raw()));
        }
        let left = types::Timespec::from(left);
        match ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&left)) {
            Ok(_) => {}
            // ETIME ends the wait, EINTR interrupts it: the clock above decides.
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ETIME | nix::libc::EINTR)) => {}
            Err(error) => return Err(error),
        }
    }
}
