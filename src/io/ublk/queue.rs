//! One queue of a device, and the ring of its thread.
//!
//! Contract: made, used and dropped on one thread. libublk's loop primitive (`flush_and_wake_io_tasks`) submits and waits; every
//! completion is either ublk's (bit 63 clear: a request has arrived, or the command was aborted) or the worker's. Requests are
//! committed as a plain result, never as an `Err`, which libublk drops in silence; a success is the whole length, since a short
//! one is sent again by the kernel for ever. Once the queue is stopping libublk pushes no more commits; at a stop the kernel then has
//! none left to wait for. When the device is left (`leave`) it has: from the first abort on the queue does without libublk, commits by
//! itself and stays up, so that what its worker has in hand ends.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use io_uring::IoUring;
use io_uring::cqueue;
use io_uring::opcode;
use io_uring::squeue;
use io_uring::types;
use io_uring::types::CancelBuilder;
use io_uring::types::Timespec;
use libublk::UblkIORes;
use libublk::helpers::IoBuf;
use libublk::io::BufDesc;
use libublk::io::BufDescList;
use libublk::io::UblkDev;
use libublk::sys;

use super::UblkError;
use super::errno_of;
use super::leave::Leave;
use crate::engine::request::Request;
use crate::engine::request::RequestOp;
use crate::engine::request::Tag;
use crate::errno;
use crate::errno::Errno;
use crate::io::ring::Completion;
use crate::io::ring::FOREIGN;
use crate::io::ring::Frontend;
use crate::io::ring::Ring;
use crate::io::ring::busy::BusyPoll;
use crate::io::ring::is_transient;
use crate::limits;
use crate::units::Extent;

/// The submission queue holds this many times the depth: a commit per tag, and what the worker pushes for it.
const SQ_PER_TAG: u32 = 4;
/// The completion queue holds this many times the depth.
const CQ_PER_TAG: u32 = 8;

/// A queue of a ublk device: the frontend of one I/O thread.
pub struct UblkQueue<'d> {
    inner: libublk::io::UblkQueue<'d>,
    index: u16,
    /// One per tag. Leaked when an operation that may point at one of them did not end.
    buffers: ManuallyDrop<Vec<IoBuf<u8>>>,
    buffer_bytes: u32,
    /// Arrived and not yet asked for.
    arrived: VecDeque<u16>,
    /// Per tag, while the worker holds it: what a success returns.
    held: Vec<Option<i32>>,
    /// How many it holds.
    holding: usize,
    /// ublk commands that the kernel has.
    commands: usize,
    /// The worker's operations whose last completion was not seen.
    foreign: usize,
    /// All commands were aborted: nothing comes any more.
    down: bool,
    /// The device is being left and libublk takes the queue for stopping: it is asked no more.
    apart: bool,
    leave: Arc<Leave>,
    /// Asks the control thread to stop the device.
    ask_to_stop: Box<dyn Fn() + 'd>,
    busy: BusyPoll,
}

impl<'d> UblkQueue<'d> {
    /// Makes the ring and the buffers and fetches each tag. On return the kernel has the FETCH commands.
    pub(super) fn open(
        device: &'d UblkDev,
        index: u16,
        ask_to_stop: Box<dyn Fn() + 'd>,
        leave: Arc<Leave>,
    ) -> Result<Self, UblkError> {
        let step = |what: &str| format!("queue {index}: {what}");
        let depth = device.dev_info.queue_depth;
        let ring = make_ring(u32::from(depth))
            .map_err(|error| UblkError::Refused { step: step("making the ring"), errno: Errno::from(&error) })?;
        libublk::ublk_init_task_ring(|cell| {
            cell.set(RefCell::new(ring)).map_err(|_| libublk::UblkError::OtherError(-Errno::EEXIST.raw()))
        })
        .map_err(UblkError::refused(step("one ring per thread")))?;

        let mut buffers = device.alloc_queue_io_bufs();
        buffers.iter_mut().for_each(IoBuf::zero_buf);
        let inner = libublk::io::UblkQueue::new(index, device)
            .and_then(|queue| queue.submit_fetch_commands_unified(BufDescList::Slices(Some(&buffers))))
            .map_err(UblkError::refused(step("opening")))?;
        let queue = UblkQueue {
            inner,
            index,
            buffers: ManuallyDrop::new(buffers),
            buffer_bytes: device.dev_info.max_io_buf_bytes,
            arrived: VecDeque::with_capacity(usize::from(depth)),
            held: vec![None; usize::from(depth)],
            holding: 0,
            commands: usize::from(depth),
            foreign: 0,
            down: false,
            apart: false,
            leave,
            ask_to_stop,
            busy: BusyPoll::default(),
        };
        libublk::with_task_io_ring_mut(|ring| ring.submit())
            .map_err(|error| UblkError::Refused { step: step("FETCH_REQ"), errno: Errno::from(&error) })?;
        Ok(queue)
    }

    /// Which queue of the device this is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Requests in flight at most: tags are below this.
    pub fn depth(&self) -> u16 {
        self.inner.dev.dev_info.queue_depth
    }

    /// Makes the queue fit to be dropped after its worker has returned: cancels and reaps what the worker left, answers with EIO
    /// whatever still comes, and returns when the kernel has aborted the last command.
    pub(super) fn wind_down(&mut self) {
        if self.leave.has_begun() {
            // What it had in hand is the next daemon's. Its buffers are kept.
            return;
        }
        let mut completions = Vec::new();
        if self.foreign != 0 {
            tracing::warn!(queue = self.index, operations = self.foreign, "ublk: the worker left operations behind");
            // An error says that some could not be cancelled; they are waited for below.
            let _ = libublk::with_task_io_ring_mut(|ring| {
                ring.submit()?;
                ring.submitter()
                    .register_sync_cancel(Some(Timespec::from(Duration::from_secs(1))), CancelBuilder::any())
            });
            let start = Instant::now();
            while self.foreign != 0 && start.elapsed() < limits::UBLK_REAP {
                if self.turn(false, &mut completions).is_err() {
                    break;
                }
                completions.clear();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if self.foreign == 0 {
            for tag in (0..self.held.len()).filter_map(|tag| u16::try_from(tag).ok()) {
                if self.held[usize::from(tag)].is_some() {
                    self.complete(Tag(tag), Err(Errno::EIO));
                }
            }
        } else {
            tracing::error!(
                queue = self.index,
                operations = self.foreign,
                "ublk: operations did not end; their requests stay open"
            );
        }
        // A lost tag fails one turn; a ring that fails more often than there are tags is broken.
        let mut failures_left = self.depth();
        while !self.down && failures_left != 0 {
            while let Some((tag, _)) = self.next_request() {
                self.complete(tag, Err(Errno::EIO));
            }
            if let Err(error) = self.turn(true, &mut completions) {
                tracing::error!(queue = self.index, %error, "ublk: the queue's ring has failed");
                failures_left -= 1;
            }
            completions.clear();
        }
    }

    /// Tells the kernel a request's result and asks for the tag's next one.
    fn commit(&mut self, tag: u16, result: i32) {
        if self.apart {
            return self.commit_apart(tag, result);
        }
        // libublk unwraps its own submit when the submission queue is full, so there must be room.
        libublk::with_task_io_ring_mut(make_room);
        if !self.inner.is_stopping() {
            self.commands += 1;
        }
        let buffer = BufDesc::RawAddress(self.buffers[usize::from(tag)].as_ptr());
        let committed = self.inner.complete_io_cmd_unified(tag, buffer, Ok(UblkIORes::Result(result)));
        debug_assert!(committed.is_ok(), "a raw address fits every device");
    }

    /// The same without libublk. There is no next one: the command stays with the kernel until the ring ends.
    fn commit_apart(&mut self, tag: u16, result: i32) {
        let buffer = self.buffers[usize::from(tag)].as_ptr();
        let command = sys::ublksrv_io_cmd { q_id: self.index, tag, result, addr: buffer as u64 };
        // SAFETY: the structure is four integers without padding, and has the array's length.
        let command = unsafe { std::mem::transmute::<sys::ublksrv_io_cmd, [u8; 16]>(command) };
        // libublk has put /dev/ublkcN first among the ring's files.
        let sqe = opcode::UringCmd16::new(types::Fixed(0), sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ).cmd(command);
        let sqe = sqe.build().user_data(u64::from(tag));
        self.commands += 1;
        libublk::with_task_io_ring_mut(|ring: &mut IoUring| {
            make_room(ring);
            // SAFETY: the buffer lives until no command of its tag is left, or for ever; see `drop`.
            let pushed = unsafe { ring.submission().push(&sqe) };
            debug_assert!(pushed.is_ok(), "there is room");
        });
    }

    /// The ring without libublk, which would only say that the queue is down. When the last command is gone there is nothing to wait for but
    /// what the worker pushes; when the device is left, the end of the process.
    fn turn_bare(&mut self, wait: bool, completions: &mut Vec<Completion>) -> io::Result<()> {
        let UblkQueue { arrived, commands, foreign, .. } = self;
        let wait = wait && if self.apart { arrived.is_empty() } else { *foreign != 0 };
        let mut refused = None;
        libublk::with_task_io_ring_mut(|ring| {
            let want = usize::from(wait && ring.completion().is_empty());
            match ring.submit_and_wait(want) {
                Ok(_) => {}
                Err(error) if is_transient(Errno::from(&error)) => {}
                Err(error) => return Err(error),
            }
            for cqe in ring.completion() {
                if cqe.user_data() & FOREIGN != 0 {
                    deliver(&cqe, foreign, completions);
                } else if let Some(error) = take(&cqe, commands, arrived) {
                    refused = Some(error);
                }
            }
            Ok(())
        })?;
        refused.map_or(Ok(()), Err)
    }

    /// Requests that have arrived and are not complete.
    fn show_load(&self) {
        self.leave.show(self.index, self.arrived.len() + self.holding);
    }

    /// Waits, with libublk or without.
    fn turn_either(&mut self, wait: bool, completions: &mut Vec<Completion>) -> io::Result<()> {
        if self.down || self.apart {
            return self.turn_bare(wait, completions);
        }
        let UblkQueue { inner, busy, arrived, commands, foreign, .. } = self;
        let wait = wait && arrived.is_empty();
        if wait {
            libublk::with_task_io_ring_mut(|ring| busy.look(ring));
        }
        let mut refused = None;
        let turned = inner.flush_and_wake_io_tasks(
            |user_data, cqe, _| {
                if user_data & FOREIGN != 0 {
                    deliver(cqe, foreign, completions);
                } else if let Some(error) = take(cqe, commands, arrived) {
                    refused = Some(error);
                }
            },
            usize::from(wait),
        );
        // The aborts of a device that is left are no end.
        self.apart = self.inner.is_stopping() && self.leave.has_begun();
        self.down = self.inner.is_stopping() && self.commands == 0 && !self.apart;
        match turned {
            Ok(_) => {}
            Err(libublk::UblkError::QueueIsDown) => self.down = !self.apart,
            Err(error) if is_transient(errno_of(&error)) => {}
            Err(error) => return Err(io::Error::from_raw_os_error(errno_of(&error).raw())),
        }
        refused.map_or(Ok(()), Err)
    }
}

impl Ring for UblkQueue<'_> {
    fn push(&mut self, sqe: squeue::Entry) {
        debug_assert!(sqe.get_user_data() & FOREIGN != 0);
        self.foreign += 1;
        libublk::with_task_io_ring_mut(|ring: &mut IoUring| {
            make_room(ring);
            // SAFETY: by the ring module's contract the pusher keeps the buffers of the SQE alive until its completion.
            let pushed = unsafe { ring.submission().push(&sqe) };
            debug_assert!(pushed.is_ok(), "there is room");
        });
    }

    fn turn(&mut self, wait: bool, completions: &mut Vec<Completion>) -> io::Result<()> {
        self.show_load();
        let turned = self.turn_either(wait, completions);
        self.show_load();
        turned
    }
}

impl Frontend for UblkQueue<'_> {
    fn handle(&mut self, _value: u64, _result: i32) {
        // This frontend pushes nothing of its own: requests are ublk's commands, which `turn` has taken already.
    }

    fn next_request(&mut self) -> Option<(Tag, Request)> {
        while let Some(tag) = self.arrived.pop_front() {
            let descriptor = *self.inner.get_iod(tag);
            match request_of(&descriptor, self.buffer_bytes) {
                Ok((request, result)) => {
                    self.held[usize::from(tag)] = Some(result);
                    self.holding += 1;
                    return Some((Tag(tag), request));
                }
                Err(errno) => self.commit(tag, -errno.raw()),
            }
        }
        None
    }

    fn buffer(&self, tag: Tag) -> *mut u8 {
        self.buffers[usize::from(tag.0)].as_mut_ptr()
    }

    fn buffer_bytes(&self) -> usize {
        self.buffer_bytes as usize
    }

    fn complete(&mut self, tag: Tag, result: Result<(), Errno>) {
        let Some(success) = self.held.get_mut(usize::from(tag.0)).and_then(Option::take) else {
            debug_assert!(false, "tag {} is not held", tag.0);
            tracing::error!(queue = self.index, tag = tag.0, "ublk: a tag was completed that is not held");
            return;
        };
        self.holding -= 1;
        self.commit(tag.0, result.map_or_else(|error| -errno::to_ublk(error).raw(), |()| success));
    }

    fn is_up(&self) -> bool {
        !self.down
    }

    fn shut_down(&mut self) {
        (self.ask_to_stop)();
    }
}

impl Drop for UblkQueue<'_> {
    fn drop(&mut self) {
        if self.down && self.foreign == 0 {
            // SAFETY: the field is not used again.
            unsafe { ManuallyDrop::drop(&mut self.buffers) };
        } else {
            tracing::error!(
                queue = self.index,
                "ublk: the queue ended with operations in the kernel; its buffers are kept"
            );
        }
    }
}

/// Marks the calling thread as one that does I/O for a block device: its allocations do not wait for writeback. False where the kernel
/// refuses (it needs CAP_SYS_RESOURCE).
pub fn become_io_flusher() -> bool {
    const PR_SET_IO_FLUSHER: i32 = 57;
    const PR_GET_IO_FLUSHER: i32 = 58;
    // SAFETY: both commands take plain numbers and touch nothing but a flag of the calling thread.
    unsafe {
        nix::libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0 && nix::libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1
    }
}

/// A ring for one thread, whose completions are delivered only while it is inside `turn`.
fn make_ring(depth: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_cqsize(depth * CQ_PER_TAG)
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .build(depth * SQ_PER_TAG)
}

/// Submits until the submission queue has room.
fn make_room(ring: &mut IoUring) {
    while ring.submission().is_full() {
        // EBUSY and EINTR leave the entries queued, and the next try finds room.
        let _ = ring.submit();
    }
}

/// Hands a completion of the worker's to it.
fn deliver(cqe: &cqueue::Entry, foreign: &mut usize, completions: &mut Vec<Completion>) {
    if !cqueue::more(cqe.flags()) {
        *foreign = foreign.saturating_sub(1);
    }
    completions.push(Completion { user_data: cqe.user_data(), result: cqe.result(), flags: cqe.flags() });
}

/// The end of a ublk command: a request has arrived, or the command was aborted. An error means that the tag is lost, and with it a request of
/// the kernel: only the end of its queue frees it.
fn take(cqe: &cqueue::Entry, commands: &mut usize, arrived: &mut VecDeque<u16>) -> Option<io::Error> {
    *commands -= 1;
    let tag = cqe.user_data() & u64::from(u16::MAX);
    match cqe.result() {
        0 => arrived.extend(u16::try_from(tag).ok()),
        sys::UBLK_IO_RES_ABORT => {}
        other => return Some(io::Error::other(format!("ublk refused the command of tag {tag} with {other}"))),
    }
    None
}

/// Reads the driver's description of a request, and what its success returns.
fn request_of(descriptor: &sys::ublksrv_io_desc, buffer_bytes: u32) -> Result<(Request, i32), Errno> {
    let fua = descriptor.op_flags & sys::UBLK_IO_F_FUA != 0;
    let (op, data) = match descriptor.op_flags & 0xff {
        sys::UBLK_IO_OP_READ => (RequestOp::Read, true),
        sys::UBLK_IO_OP_WRITE => (RequestOp::Write { fua }, true),
        sys::UBLK_IO_OP_FLUSH => return Ok((Request::new(RequestOp::Flush, Extent::default()), 0)),
        sys::UBLK_IO_OP_DISCARD => (RequestOp::Discard, false),
        sys::UBLK_IO_OP_WRITE_ZEROES => {
            (RequestOp::WriteZeroes { keep: descriptor.op_flags & sys::UBLK_IO_F_NOUNMAP != 0, fua }, false)
        }
        _ => return Err(Errno::EOPNOTSUPP),
    };
    let extent = Extent::new(descriptor.start_sector, u64::from(descriptor.nr_sectors));
    if extent.sectors == 0 || data && extent.bytes() > u64::from(buffer_bytes) {
        return Err(Errno::EINVAL);
    }
    let success = if data { i32::try_from(extent.bytes()).map_err(|_| Errno::EINVAL)? } else { 0 };
    Ok((Request::new(op, extent), success))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(op_flags: u32, start_sector: u64, nr_sectors: u32) -> Result<(Request, i32), Errno> {
        request_of(&sys::ublksrv_io_desc { op_flags, nr_sectors, start_sector, addr: 0 }, 128 << 10)
    }

    #[test]
    fn requests_are_read_from_descriptors() {
        let extent = Extent::new(8, 16);
        for (flags, op, success) in [
            (0, RequestOp::Read, 8192),
            (1, RequestOp::Write { fua: false }, 8192),
            (1 | 1 << 13, RequestOp::Write { fua: true }, 8192),
            (1 | 1 << 11 | 1 << 8, RequestOp::Write { fua: false }, 8192),
            (3, RequestOp::Discard, 0),
            (5, RequestOp::WriteZeroes { keep: false, fua: false }, 0),
            (5 | 1 << 15 | 1 << 13, RequestOp::WriteZeroes { keep: true, fua: true }, 0),
        ] {
            assert_eq!(parse(flags, 8, 16), Ok((Request::new(op, extent), success)), "{flags:#x}");
        }
        assert_eq!(parse(2, 77, 0), Ok((Request::new(RequestOp::Flush, Extent::default()), 0)));
    }

    #[test]
    fn what_no_worker_could_serve_is_refused() {
        assert_eq!(parse(13, 0, 8), Err(Errno::EOPNOTSUPP));
        assert_eq!(parse(0, 0, 0), Err(Errno::EINVAL));
        assert_eq!(parse(1, 0, 257), Err(Errno::EINVAL));
        assert!(parse(1, 0, 256).is_ok());
        assert!(parse(3, 0, u32::MAX).is_ok(), "a discard has no buffer");
    }

    #[test]
    fn this_thread_can_become_a_flusher_or_is_told_so() {
        // In a container without the capability the answer is no; it must not be a crash.
        let _ = std::thread::spawn(become_io_flusher).join().unwrap();
    }
}
