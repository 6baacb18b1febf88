//! A node on this machine: a file or block device, driven by completions on its thread's ring.
//!
//! To the shard it is a link that is always up. Each part becomes one operation, or a few in a row: a zeroing that the
//! filesystem cannot do is written out, a FUA zeroing is followed by a sync. A local operation cannot be taken back: a part
//! past its deadline completes when the kernel has answered, and not before.
//!
//! Descriptors that carry I/O hold `flock` LOCK_SH; [`LocalFile::open`] takes LOCK_EX first, so that it waits for what a dead
//! predecessor still has in flight (the contract, 1.3).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::sys::statfs;

use crate::engine::link::{LinkEvent, Terms};
use crate::engine::shard::{Body, Shard};
use crate::errno::{self, Errno};
use crate::io::ring::{Frontend, Owner, beside, pack, sqe_length};
use crate::limits;
use crate::units::{Id, SECTOR_BYTES, Time};
use crate::wire::digest::Hasher;
use crate::wire::frame::{Header, Op};

/// Alignment of buffers for direct I/O, bytes.
const ALIGN: usize = 4096;
/// In the place of a part: the end of a rest.
const REST_TAG: u32 = u32::MAX;

/// An open local target, shared by the threads of an array.
#[derive(Clone, Debug)]
pub struct LocalFile {
    file: Arc<Flock<File>>,
    /// Where it is.
    pub path: PathBuf,
    /// Its size when it was opened, sectors.
    pub sectors: u64,
    /// It lies in memory: reading and writing it is copying. A little is copied at once.
    in_memory: bool,
}

/// A buffer aligned for direct I/O.
#[repr(C, align(4096))]
struct Aligned([u8; ALIGN]);

impl LocalFile {
    /// Opens `path` for direct I/O, or for buffered where direct I/O cannot serve 512-byte requests. Waits until no
    /// predecessor's I/O is in flight on it.
    pub fn open(path: &Path) -> io::Result<LocalFile> {
        let buffered = File::options().read(true).write(true).open(path)?;
        let direct = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
        let file = match direct {
            Ok(file) if serves_sectors(&file) => file,
            _ => buffered,
        };
        let bytes = size_of_target(&file)?;
        let lock = |file, arg| Flock::lock(file, arg).map_err(|(_, error)| io::Error::from(error));
        let exclusive = lock(file, FlockArg::LockExclusive)?;
        exclusive.relock(FlockArg::LockShared).map_err(io::Error::from)?;
        let in_memory = is_in_memory(&exclusive);
        Ok(LocalFile { file: Arc::new(exclusive), path: path.to_owned(), sectors: bytes / SECTOR_BYTES, in_memory })
    }
}

/// Size of a file or block device, bytes.
fn size_of_target(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::from_raw_os_error(Errno::EINVAL.raw()));
    }
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

/// Whether a file's data lies on a tmpfs. A device's does not, although its node does. What cannot be asked is taken as no.
fn is_in_memory(file: &File) -> bool {
    let plain = file.metadata().is_ok_and(|metadata| metadata.is_file());
    plain && statfs::fstatfs(file).is_ok_and(|stat| stat.filesystem_type() == statfs::TMPFS_MAGIC)
}

/// Whether a direct read of one sector at an odd sector works.
fn serves_sectors(file: &File) -> bool {
    use std::os::unix::fs::FileExt;
    let mut buffer = Box::new(Aligned([0; ALIGN]));
    file.read_at(&mut buffer.0[..512], SECTOR_BYTES).is_ok()
}

/// What the operation in flight for a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Reading, writing, zeroing by the filesystem, syncing.
    Main,
    /// Writing zeros, this many bytes are done.
    Zeros,
    /// Making a zeroing durable.
    Sync,
}

#[derive(Clone, Copy, Debug)]
struct Job {
    request: Header,
    step: Step,
    /// Where the data is; null for operations without.
    buffer: *mut u8,
    done: usize,
}

/// What is asked of the kernel.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Sync,
    Read { to: *mut u8, length: usize, at: u64 },
    Write { from: *mut u8, length: usize, at: u64, flags: libc::c_int },
    Allocate { mode: libc::c_int, at: u64, length: u64 },
}

impl Operation {
    /// For the ring.
    fn entry(self, fd: types::Fd) -> squeue::Entry {
        match self {
            Operation::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Read { to, length, at } => opcode::Read::new(fd, to, sqe_length(length)).offset(at).build(),
            Operation::Write { from, length, at, flags } => {
                opcode::Write::new(fd, from, sqe_length(length)).offset(at).rw_flags(flags).build()
            }
            Operation::Allocate { mode, at, length } => {
                opcode::Fallocate::new(fd, length).offset(at).mode(mode).build()
            }
        }
    }

    /// Reads or writes at once, as the ring would tell it; `None` for anything else, which may take long. A file in memory is as
    /// durable as it gets when it is written.
    fn perform(self, fd: RawFd) -> Option<i32> {
        let offset = |at: u64| i64::try_from(at).unwrap_or(i64::MAX);
        let result = match self {
            // SAFETY: the job's buffer is the shard's alone while its part is in flight, and has room for so much.
            Operation::Read { to, length, at } => unsafe { libc::pread(fd, to.cast(), length, offset(at)) },
            // SAFETY: as above.
            Operation::Write { from, length, at, .. } => unsafe { libc::pwrite(fd, from.cast(), length, offset(at)) },
            Operation::Sync | Operation::Allocate { .. } => return None,
        };
        let failed = || io::Error::last_os_error().raw_os_error().map_or(-libc::EIO, |error| -error);
        Some(i32::try_from(result).ok().filter(|result| *result >= 0).unwrap_or_else(failed))
    }
}

/// One local target on one thread.
pub struct Local {
    target: usize,
    file: LocalFile,
    volume: Id,
    /// By part, the tag of its request frame.
    jobs: Vec<Option<Job>>,
    in_flight: usize,
    closing: bool,
    /// Bytes that were copied at once since the last rest.
    copied: usize,
    /// Nothing more is begun until the ring had its turn.
    resting: bool,
    /// What zeros are written from.
    zeros: Box<[Aligned]>,
}

// SAFETY: the pointers in `jobs` are used by the one thread that owns the target's ring; it is moved there before the first job.
unsafe impl Send for Local {}

impl Local {
    /// The target at index `target`, whose volume id is known to be `volume`.
    pub fn new(target: usize, file: LocalFile, volume: Id, parts: usize) -> Local {
        let zeros = (0..16).map(|_| Aligned([0; ALIGN])).collect();
        Local {
            target,
            file,
            volume,
            jobs: vec![None; parts],
            in_flight: 0,
            closing: false,
            copied: 0,
            resting: false,
            zeros,
        }
    }

    /// Whether nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0 && !self.resting
    }

    /// A local target is there at once. It may have become larger since it was opened.
    pub fn connect(&mut self, now: Time, shard: &mut Shard) {
        let terms = Terms {
            sectors: size_of_target(&self.file.file).map_or(self.file.sectors, |bytes| bytes / SECTOR_BYTES),
            volume: self.volume,
            losses: 0,
            requests_max: limits::LINK_REQUESTS_MAX,
            bytes_max: limits::LINK_BYTES_MAX,
        };
        self.closing = false;
        shard.handle_link(now, self.target, LinkEvent::Up(terms));
    }

    /// `Down` follows when the kernel has answered everything.
    pub fn close(&mut self, now: Time, shard: &mut Shard) {
        self.closing = true;
        self.finish_close(now, shard);
    }

    fn finish_close(&mut self, now: Time, shard: &mut Shard) {
        if self.closing && self.in_flight == 0 {
            self.closing = false;
            shard.handle_link(now, self.target, LinkEvent::Down(Errno::ECANCELED));
        }
    }

    /// Starts what the shard offers.
    pub fn pump<F: Frontend>(&mut self, now: Time, shard: &mut Shard, frontend: &mut F) {
        while !self.closing && !self.resting {
            let Some(outgoing) = shard.poll_send(self.target) else { return };
            if outgoing.header.op == Op::Keepalive {
                let _ = shard.handle_reply(now, self.target, &outgoing.header.reply(Ok(())), Body::Good);
                continue;
            }
            let request = outgoing.header;
            let data = match request.op {
                // A read's place is what its answer will be expected at.
                Op::Read | Op::Digest => shard.place(&request),
                _ => outgoing.data,
            };
            let buffer = data.map_or(std::ptr::null_mut(), |data| frontend.buffer(data.tag).wrapping_add(data.offset));
            self.in_flight += 1;
            if let Some(result) = self.start(Job { request, step: Step::Main, buffer, done: 0 }, frontend) {
                self.handle(now, request.tag, result, shard, frontend);
                self.rest(request.length as usize, frontend);
            }
        }
    }

    /// After so much work the ring has its turn: what is ready is sent, and its receiver has something to do.
    fn rest<F: Frontend>(&mut self, bytes: usize, frontend: &mut F) {
        self.copied += bytes;
        if self.copied >= limits::AT_ONCE_BYTES {
            (self.copied, self.resting) = (0, true);
            let entry = opcode::Nop::new().build();
            frontend.push(entry.user_data(Owner::Disk.user_data(pack(self.target, REST_TAG))));
        }
    }

    /// Asks the ring for a job's next operation, or does it at once: then its result.
    fn start<F: Frontend>(&mut self, job: Job, frontend: &mut F) -> Option<i32> {
        let operation = self.operation(&job);
        self.jobs[job.request.tag as usize] = Some(job);
        let fd = self.file.file.as_raw_fd();
        // Zeros may be many.
        if self.file.in_memory
            && job.step == Step::Main
            && u64::from(job.request.length) < limits::WORKER_BYTES_MIN
            && let Some(result) = operation.perform(fd)
        {
            return Some(result);
        }
        let sqe = operation.entry(types::Fd(fd)).flags(beside(self.file.in_memory));
        frontend.push(sqe.user_data(Owner::Disk.user_data(pack(self.target, job.request.tag))));
        None
    }

    fn operation(&self, job: &Job) -> Operation {
        let length = job.request.length as usize;
        let offset = job.request.lba.bytes();
        let rest = length - job.done;
        let at = offset + job.done as u64;
        let zeros = self.zeros.as_ptr().cast::<u8>().cast_mut();
        match (job.step, job.request.op) {
            (Step::Sync, _) | (Step::Main, Op::Flush) => Operation::Sync,
            (Step::Zeros, _) => {
                let length = rest.min(self.zeros.len() * ALIGN);
                Operation::Write { from: zeros, length, at, flags: 0 }
            }
            (Step::Main, Op::Read | Op::Digest) => {
                Operation::Read { to: job.buffer.wrapping_add(job.done), length: rest, at }
            }
            (Step::Main, Op::Write) => {
                let flags = if job.request.is_fua() { libc::RWF_DSYNC } else { 0 };
                Operation::Write { from: job.buffer.wrapping_add(job.done), length: rest, at, flags }
            }
            (Step::Main, op) => {
                let how = if op == Op::Discard { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
                Operation::Allocate { mode: how | libc::FALLOC_FL_KEEP_SIZE, at: offset, length: length as u64 }
            }
        }
    }

    /// Takes a completion of one of this target's operations.
    pub fn handle<F: Frontend>(&mut self, now: Time, tag: u32, result: i32, shard: &mut Shard, frontend: &mut F) {
        if tag == REST_TAG {
            self.resting = false;
            return;
        }
        let mut last = Some(result);
        while let Some(result) = last {
            last = self.advance(now, tag, result, shard, frontend);
        }
    }

    /// Takes one result. The next one, if there is one already.
    fn advance<F: Frontend>(
        &mut self,
        now: Time,
        tag: u32,
        result: i32,
        shard: &mut Shard,
        frontend: &mut F,
    ) -> Option<i32> {
        let mut job = self.jobs.get_mut(tag as usize).and_then(Option::take)?;
        let outcome = if result < 0 { Err(Errno::from_raw(-result)) } else { Ok(result.unsigned_abs() as usize) };
        let zeroes = matches!(job.request.op, Op::Discard | Op::WriteZeroes);
        let next = match (job.step, outcome) {
            (_, Err(Errno::EINTR | Errno::EAGAIN)) => Some(job.step),
            (Step::Main, Err(Errno::EOPNOTSUPP | Errno::ENODEV | Errno::ENOSYS)) if zeroes => Some(Step::Zeros),
            (_, Err(_)) | (Step::Sync, _) => None,
            (Step::Main, Ok(_)) if job.request.op == Op::Flush => None,
            (Step::Main, Ok(_)) if zeroes => job.request.is_fua().then_some(Step::Sync),
            (Step::Main | Step::Zeros, Ok(0)) => {
                // The end of the file: it was cut behind our back.
                self.finish(now, &job, Err(Errno::EIO), shard);
                return None;
            }
            (step, Ok(bytes)) => {
                job.done += bytes;
                if job.done < job.request.length as usize {
                    Some(step)
                } else {
                    (step == Step::Zeros && job.request.is_fua()).then_some(Step::Sync)
                }
            }
        };
        let Some(step) = next else {
            self.finish(now, &job, outcome.map(|_| ()), shard);
            return None;
        };
        job.step = step;
        self.start(job, frontend)
    }

    fn finish(&mut self, now: Time, job: &Job, result: Result<(), Errno>, shard: &mut Shard) {
        self.in_flight -= 1;
        if job.request.op == Op::Digest && result.is_ok() {
            // SAFETY: the range was read here, and nothing else touches the tag's buffer before it is told.
            let bytes = unsafe { std::slice::from_raw_parts_mut(job.buffer, job.request.length as usize) };
            let mut hasher = Hasher::default();
            hasher.update(bytes);
            let digest = hasher.finish(u64::from(job.request.length)).encode();
            bytes[..digest.len()].copy_from_slice(&digest);
        }
        let reply = job.request.reply(result.map_err(errno::disk_to_wire));
        if let Err(error) = result {
            tracing::warn!(path = %self.file.path.display(), op = ?job.request.op, lba = job.request.lba.0, %error, "local I/O failed");
        }
        let told = shard.handle_reply(now, self.target, &reply, Body::Good);
        debug_assert!(told.is_ok(), "a local answer always has its part");
        self.finish_close(now, shard);
    }
}
