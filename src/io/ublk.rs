//! The ublk frontend: a real block device `/dev/ublkbN`, served from user space. All of libublk is behind this module.
//!
//! # Threads
//!
//! Each device has one control thread and one thread per queue. The control thread alone issues the control commands of its
//! device (libublk's control ring is thread-local and panics elsewhere), from ADD_DEV to DEL_DEV, and owns the `UblkCtrl`,
//! whose drop deletes the device. A caller never waits for that thread without a time limit: after it, the caller gets an error
//! that names the step, and the thread finishes or undoes its work by itself whenever the kernel answers.
//!
//! A queue thread owns one ring ([`UblkQueue`] is its [`Frontend`](crate::io::ring::Frontend)): ublk's commands and
//! everything the worker pushes run on it. It is an I/O flusher (`PR_SET_IO_FLUSHER`): its allocations never wait for writeback
//! to the very device it serves; without that no device is made. All other threads of the daemon inherit it from the first one.
//!
//! # Start
//!
//! ADD_DEV; open `/dev/ublkcN`; each queue thread opens its queue and submits a FETCH per tag; only when *all* have said so
//! does the control thread send START_DEV. (libublk's own start waits for ever for a queue that died early.) The partition
//! scan inside START_DEV already reads from the device, so the workers are serving by then.
//!
//! # Stop
//!
//! [`UblkDevice::stop`] claims the block device (`O_EXCL`, which a mount, swap or device-mapper holds too), so nothing can
//! mount it any more; sends STOP_DEV, in which the kernel removes the disk and waits until the workers have completed every
//! request; then each tag's command comes back aborted. When the last one has, `is_up` is false and the worker ends: it closes
//! its links, reaps its own operations with `turn`, and returns. Then the rest is closed and DEL_DEV is sent, in its form that does
//! not wait for others who still hold the dead disk.
//!
//! A worker that returns while its queue is up, with an error or not, ends the whole device: its operations are cancelled and
//! reaped, what it held and all that still comes is answered with EIO, and the control thread stops the device. A tag's buffer is never
//! freed, nor its request completed, while an operation that may point at it is outstanding. A worker that panics
//! ends the process: what it pushed points at memory that the unwinding has freed.
//!
//! # Death
//!
//! A dead daemon's device waits, with all its requests, for the next one ([`UblkDevice::recover`]: START_USER_RECOVERY, which answers when the
//! kernel has noticed the death; the queues fetch; END_USER_RECOVERY, and the requests that the dead one had come again). [`leftovers`] finds
//! such devices of dst (the kernel remembers a mark that ADD_DEV gave it) and [`delete_leftover`] removes them: then requests end with EIO.
//! From START_USER_RECOVERY on a failure ends the process: the commands of its queues could be taken back only together with the device.
//! If the daemon dies while all tags of a queue are with it, a kernel before 6.16 notices only by its request timer;
//! so that timer is set to [`UBLK_BLOCK_TIMEOUT`](crate::limits::UBLK_BLOCK_TIMEOUT).
//!
//! A death that is planned can be prepared where the driver has UBLK_F_QUIESCE (6.16): with [`UblkDevice::quiesce`] the kernel keeps new
//! requests back and aborts idle tags, while requests in flight end; then the process does. What has not ended within the limit, the next
//! daemon gets again, as after any death. If the kernel refuses (EBUSY) the device is marked all the same: new requests wait in the kernel, and
//! only the next daemon frees them. So nothing but the end of the process follows, whatever the answer was.
//!
//! # Size
//!
//! [`UblkDevice::resize`] makes a device larger under its users where the driver has UBLK_F_UPDATE_SIZE (6.16). GET_PARAMS tells the new size from then on, so that
//! the next daemon's check of the device holds. One that died after its array had grown and before its device had, has left a smaller device:
//! that is served, and made larger.
//!
//! Both features are asked for when a device is made and read back from it. It keeps what it was given then, whoever serves it later.
//!
//! # What libublk 0.4.8 does, and why it cannot bite
//!
//! - A result given as `Err` may be dropped, and the request hangs for ever: results are always `Ok(Result(number))`.
//! - `EBUSY` comes back as `Ok(-16)` from every control verb: all answers pass `answered`.
//! - A queue that has seen an abort counts as stopping for it, and it drops commits in silence, also when the device is only left: from
//!   then on the queue pushes them itself.
//! - Its futures lose errors, leak when dropped and never resolve on a stopping queue: none is used, only the callback loop.
//! - Its loop counts a completion without bit 63 as its own: `push` asserts the bit, and `Owner::user_data` sets it.
//! - A full submission queue makes it `unwrap` a submit: there is always room before it pushes.
//! - `UblkCtrl` deletes its device when dropped, and only on its own thread: it lives and dies on the control thread.
//! - It waits for ever for a queue that failed early: START_DEV is sent only after each queue has reported.
//! - It panics when a device has another number of queues than asked for: ADD_DEV's answer is compared first.
//! - Its default completion queue holds `depth` entries: the ring is ours, eight times that.
//! - `DEFER_TASKRUN` needs `TASKRUN_FLAG`, or a turn that does not wait sees nothing: both are set.
//! - A second set of fixed files on a ring is refused: sockets and files are pushed as plain descriptors.
//! - For a device that it did not make it looks for that record, and complains on standard error that there is none: nothing depends on it.
//! - It writes its own record of the device to a directory that everyone may write (`/run/ublksrvd`): it is not asked to.
//! - START_DEV names this process as the server: fork before `create`, never after.
//! - The daemon must not be the last process in a mount namespace in which its own device is mounted, or its exit writes to a device
//!   that nobody serves any more: `io/mounts` gives it a namespace of its own.

mod claim;
mod command;
mod config;
mod control;
mod device;
mod leave;
mod leftover;
mod preflight;
mod queue;

use std::fmt;
use std::time::Duration;

use crate::errno::Errno;

pub use claim::{BlockUse, in_use};
pub use config::UblkConfig;
pub use device::{QueueMain, UblkDevice, UblkEnd};
pub use leftover::{Leftover, delete_leftover, devices, leftovers};
pub use preflight::{check, usable_queues};
pub use queue::{UblkQueue, become_io_flusher};

/// Why something could not be done with a ublk device. The text is for the user and says what to do next.
#[derive(Debug)]
pub enum UblkError {
    /// ublk cannot be used on this machine, and what would change that.
    Unavailable(String),
    /// The kernel cannot do that with this device, and what can be done instead.
    Unsupported(String),
    /// A parameter is not one that the driver takes.
    Config(String),
    /// The kernel refused a step.
    Refused {
        /// The control command or file.
        step: String,
        /// Its answer.
        errno: Errno,
    },
    /// A step has not ended. It goes on in its own thread; what it makes is undone.
    TimedOut {
        /// The control command or what is waited for.
        step: String,
        /// How long was waited.
        after: Duration,
    },
    /// Requests of a device that is left have not ended; the next daemon gets them again.
    InFlight {
        /// How many.
        requests: usize,
        /// How long was waited.
        after: Duration,
    },
    /// The device is mounted, held by another device or open.
    InUse(BlockUse),
}

impl UblkError {
    /// The error number, for branching and for the API.
    pub fn errno(&self) -> Errno {
        match self {
            UblkError::Unavailable(_) => Errno::ENODEV,
            UblkError::Unsupported(_) => Errno::EOPNOTSUPP,
            UblkError::Config(_) => Errno::EINVAL,
            UblkError::Refused { errno, .. } => *errno,
            UblkError::TimedOut { .. } | UblkError::InFlight { .. } => Errno::ETIMEDOUT,
            UblkError::InUse(_) => Errno::EBUSY,
        }
    }

    fn refused(step: impl Into<String>) -> impl FnOnce(libublk::UblkError) -> UblkError {
        |error| UblkError::Refused { step: step.into(), errno: errno_of(&error) }
    }
}

impl fmt::Display for UblkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UblkError::Unavailable(why) | UblkError::Unsupported(why) | UblkError::Config(why) => f.write_str(why),
            UblkError::Refused { step, errno } => {
                write!(f, "ublk: {step}: {errno}")?;
                match *errno {
                    Errno::EPERM | Errno::EACCES => f.write_str("; run dstd as root (CAP_SYS_ADMIN)"),
                    Errno::EEXIST => {
                        f.write_str("; a device with that number exists already, leave the number to the kernel")
                    }
                    Errno::ENOSPC => {
                        f.write_str("; too many ublk devices, raise /sys/module/ublk_drv/parameters/ublks_max")
                    }
                    _ => Ok(()),
                }
            }
            UblkError::TimedOut { step, after } => write!(
                f,
                "ublk: {step} has not ended after {} s; it goes on in the background, see the kernel's log (dmesg)",
                after.as_secs()
            ),
            UblkError::InFlight { requests, after } => write!(
                f,
                "ublk: {requests} request(s) have not ended within {} ms; the next daemon makes them again",
                after.as_millis()
            ),
            UblkError::InUse(block_use) => write!(f, "{block_use}"),
        }
    }
}

impl std::error::Error for UblkError {}

/// The number in an error of libublk.
fn errno_of(error: &libublk::UblkError) -> Errno {
    match error {
        libublk::UblkError::UringIOError(number) | libublk::UblkError::OtherError(number) => {
            Errno::from_raw(number.saturating_abs())
        }
        libublk::UblkError::IOError(error) => Errno::from(error),
        libublk::UblkError::InvalidVal => Errno::EINVAL,
        libublk::UblkError::QueueIsDown => Errno::ENODEV,
        libublk::UblkError::UringTimeout => Errno::ETIMEDOUT,
        _ => Errno::EIO,
    }
}

/// What a control command of libublk answered, made honest: a negative number comes back as `Ok(-EBUSY)` from every verb.
fn answered(step: &str, answer: Result<i32, libublk::UblkError>) -> Result<(), UblkError> {
    match answer {
        Ok(number) if number < 0 => {
            Err(UblkError::Refused { step: step.to_owned(), errno: Errno::from_raw(number.saturating_abs()) })
        }
        Ok(_) => Ok(()),
        Err(error) => Err(UblkError::refused(step)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_below_zero_is_an_error() {
        let busy = answered("STOP_DEV", Ok(-16)).unwrap_err();
        assert_eq!(busy.errno(), Errno::EBUSY);
        assert!(busy.to_string().contains("STOP_DEV"));
        assert!(answered("STOP_DEV", Ok(0)).is_ok());
        let gone = answered("STOP_DEV", Err(libublk::UblkError::UringIOError(-19))).unwrap_err();
        assert_eq!(gone.errno(), Errno::ENODEV);
    }
}
