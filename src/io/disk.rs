//! The data file of one volume: a few operations on it, and their form on a ring.
//!
//! Contract: every operation is on whole sectors, takes its buffer along and gives it back, and either does all of what was
//! asked or fails; there are no short reads or writes. An operation goes on to its end even when nobody waits for it any more,
//! and keeps its buffer for that long. Each descriptor that carries I/O holds a shared flock (CONTRACT 1.3), which the kernel
//! keeps until the last operation of a killed process has ended.

pub mod aside;

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;

use io_uring::{opcode, squeue, types};
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::statfs;
use tokio_uring::buf::{BoundedBuf, IoBuf, IoBufMut};

use crate::errno::Errno;
use crate::io::buffer::{Buffer, PAGE_BYTES};
use crate::io::disk::aside::Aside;
use crate::io::ring::{beside, reactor, sqe_length};
use crate::limits;
use crate::wire::digest::Hasher;

/// Questions about holes for one digest: a range in more pieces than this is taken as if its rest were allocated.
const HOLES_MAX: usize = 256;

/// What a volume's rules ask of its disk.
pub trait Disk: 'static {
    /// Whether the data lies in memory, so that reading and writing is copying: [`Disk::read_now`] and [`Disk::write_now`] do it at
    /// once, for a little; [`Disk::read_at`] and [`Disk::write_at`] beside the calling thread. Others are never asked for the former.
    fn is_in_memory(&self) -> bool {
        false
    }

    /// [`Disk::read_at`] at once.
    fn read_now(&self, _buffer: &mut [u8], _offset: u64) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    /// [`Disk::write_at`] at once: as durable as it gets.
    fn write_now(&self, _buffer: &[u8], _offset: u64) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    /// Fills the first `bytes` bytes of the buffer from byte `offset`.
    fn read_at(&self, buffer: Buffer, bytes: usize, offset: u64) -> impl Future<Output = (Result<(), Errno>, Buffer)>;

    /// Writes the first `bytes` bytes of the buffer to byte `offset`; with `durable`, not only to a cache.
    fn write_at(
        &self,
        buffer: Buffer,
        bytes: usize,
        offset: u64,
        durable: bool,
    ) -> impl Future<Output = (Result<(), Errno>, Buffer)>;

    /// Makes whatever was done durable.
    fn sync(&self) -> impl Future<Output = Result<(), Errno>>;

    /// The range reads as zeros and keeps its space.
    fn zero(&self, offset: u64, bytes: u64) -> impl Future<Output = Result<(), Errno>>;

    /// The range reads as zeros and gives its space back.
    fn punch(&self, offset: u64, bytes: u64) -> impl Future<Output = Result<(), Errno>>;

    /// Reads the range piece by piece through the buffer, whose start holds its encoded digest then.
    fn digest(&self, buffer: Buffer, offset: u64, bytes: u64) -> impl Future<Output = (Result<(), Errno>, Buffer)>;
}

// SAFETY: a buffer's memory stays where it is while the buffer moves, and is always initialised.
unsafe impl IoBuf for Buffer {
    fn stable_ptr(&self) -> *const u8 {
        self.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.len()
    }

    fn bytes_total(&self) -> usize {
        self.len()
    }
}

// SAFETY: as above; nothing needs to be noted about what is initialised.
unsafe impl IoBufMut for Buffer {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.as_ptr()
    }

    unsafe fn set_init(&mut self, _: usize) {}
}

/// An open data file, not yet on a ring.
#[derive(Debug)]
pub struct DataFile {
    /// Reads, plain writes, syncs.
    plain: File,
    /// O_DSYNC. A descriptor of its own, because a failed writeback is told once per descriptor: a durable write that fails must
    /// not take away the error that the next flush has to see.
    durable: File,
    direct: bool,
    /// It lies on a tmpfs.
    in_memory: bool,
}

impl DataFile {
    /// Opens a data file once a dead predecessor's I/O on it has ended. `None`: it has not yet, ask again later.
    pub fn open(path: &Path) -> io::Result<Option<DataFile>> {
        let direct = allows_direct(path)?;
        let flags = if direct { OFlag::O_DIRECT } else { OFlag::empty() } | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let open = |flags: OFlag| OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(path);
        let plain = open(flags)?;
        match lock(&plain, libc::LOCK_EX) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            other => other?,
        }
        lock(&plain, libc::LOCK_SH)?;
        let durable = open(flags | OFlag::O_DSYNC)?;
        lock(&durable, libc::LOCK_SH)?;
        let in_memory = statfs::fstatfs(&plain).is_ok_and(|stat| stat.filesystem_type() == statfs::TMPFS_MAGIC);
        Ok(Some(DataFile { plain, durable, direct, in_memory }))
    }

    /// Whether it bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }
}

/// Locks an open file without waiting. The lock ends with the last user of the descriptor: operations in flight count, and that
/// is the point, so nothing here ever unlocks.
fn lock(file: &File, operation: libc::c_int) -> io::Result<()> {
    // SAFETY: a system call on an open descriptor.
    match unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether O_DIRECT takes any whole sector from any of our buffers. What the kernel does not tell is taken as no.
fn allows_direct(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    // SAFETY: `statx` is plain numbers, for which zero is a value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the empty path with AT_EMPTY_PATH means the descriptor itself, `stat` is ours.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
    };
    let told = result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    let offsets = 1..=512;
    let memory = 1..=PAGE_BYTES;
    Ok(told && offsets.contains(&stat.stx_dio_offset_align) && memory.contains(&(stat.stx_dio_mem_align as usize)))
}

/// A data file on the calling thread's reactor.
pub struct UringDisk {
    plain: Rc<File>,
    durable: Rc<File>,
    /// It lies on a tmpfs: reading and writing it is copying.
    in_memory: bool,
    /// Does what takes long.
    aside: Rc<Aside>,
    /// The filesystem can do it: found out by trying.
    can_zero: Cell<bool>,
    can_punch: Cell<bool>,
}

impl UringDisk {
    /// Puts the file on the ring of the calling thread.
    pub fn new(file: DataFile, aside: Rc<Aside>) -> UringDisk {
        UringDisk {
            plain: Rc::new(file.plain),
            durable: Rc::new(file.durable),
            in_memory: file.in_memory,
            aside,
            can_zero: Cell::new(true),
            can_punch: Cell::new(true),
        }
    }

    /// Reads or writes the first `bytes` bytes of a buffer; `entry` makes the operation for those that are left after others.
    async fn transfer(
        &self,
        file: &Rc<File>,
        mut buffer: Buffer,
        bytes: usize,
        entry: impl Fn(types::Fd, *mut u8, u32, u64) -> squeue::Entry,
    ) -> (Result<(), Errno>, Buffer) {
        let flags = beside(self.in_memory);
        let mut done = 0;
        while done < bytes {
            let left = sqe_length(buffer[done..bytes].len());
            let entry =
                entry(types::Fd(file.as_raw_fd()), buffer.as_ptr().wrapping_add(done), left, done as u64).flags(flags);
            // SAFETY: the rest of the buffer was checked to lie in it, and its memory stays where it is; the descriptor is the file's.
            let (result, (back, _)) = unsafe { reactor::submit((buffer, Rc::clone(file)), entry) }.await;
            buffer = back;
            if let Err(error) = progress(result, &mut done) {
                return (Err(error), buffer);
            }
        }
        (Ok(()), buffer)
    }

    /// Has the thread beside this one do something with the file: one more descriptor of the same open file, locked as it is.
    async fn aside<T, F>(&self, job: impl FnOnce(tokio_uring::fs::File) -> F + Send + 'static) -> Result<T, Errno>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let file = self.plain.try_clone().map_err(|error| Errno::from(&error))?;
        Ok(self.aside.run(move || job(tokio_uring::fs::File::from_std(file))).await)
    }

    /// Changes a range as a whole, or by writing zeros where the filesystem cannot.
    async fn clear(&self, offset: u64, bytes: u64, mode: libc::c_int, can: &Cell<bool>) -> Result<(), Errno> {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        if can.get() {
            let done = self.aside(move |file| async move { file.fallocate(offset, bytes, mode).await });
            match done.await?.map_err(|error| Errno::from(&error)) {
                Err(Errno::EOPNOTSUPP) => can.set(false),
                other => return other,
            }
        }
        self.aside(move |file| write_zeros(file, offset, bytes)).await?
    }
}

/// Zeros by writing them, where the filesystem has no better way.
async fn write_zeros(file: tokio_uring::fs::File, offset: u64, bytes: u64) -> Result<(), Errno> {
    let mut buffer = Buffer::new(1 << 20);
    let mut done = 0;
    while done < bytes {
        let part = usize::try_from(bytes - done).map_or(buffer.len(), |left| left.min(buffer.len()));
        let (result, back) = file.write_all_at(buffer.slice(..part), offset + done).await;
        result.map_err(|error| Errno::from(&error))?;
        (buffer, done) = (back.into_inner(), done + part as u64);
    }
    Ok(())
}

/// Reads a range; its digest is at the start of the buffer.
async fn digest(
    file: tokio_uring::fs::File,
    mut buffer: Buffer,
    offset: u64,
    bytes: u64,
) -> (Result<(), Errno>, Buffer) {
    let mut hasher = Hasher::default();
    let mut done = 0;
    while done < bytes {
        let most = buffer.len().min(limits::PAYLOAD_BYTES_MAX as usize);
        let part = usize::try_from(bytes - done).map_or(most, |left| left.min(most));
        let (result, back) = file.read_exact_at(buffer.slice(..part), offset + done).await;
        buffer = back.into_inner();
        if let Err(error) = result {
            return (Err(Errno::from(&error)), buffer);
        }
        hasher.update(&buffer[..part]);
        done += part as u64;
    }
    let digest = hasher.finish(allocated(file.as_raw_fd(), offset, bytes)).encode();
    buffer[..digest.len()].copy_from_slice(&digest);
    (Ok(()), buffer)
}

/// What is left of a transfer after `result` bytes of it.
fn progress(result: Result<usize, Errno>, done: &mut usize) -> Result<(), Errno> {
    match result {
        // The file is shorter than its volume, or the disk takes nothing.
        Ok(0) => Err(Errno::EIO),
        Ok(part) => {
            *done += part;
            Ok(())
        }
        Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Looks for holes with a bounded number of questions.
fn allocated(file: RawFd, offset: u64, bytes: u64) -> u64 {
    let (mut at, end, mut sum) = (offset, offset + bytes, 0);
    for _ in 0..HOLES_MAX {
        let Some(data) = seek(file, at, libc::SEEK_DATA) else { break };
        let from = data.min(end);
        if from == end {
            return sum;
        }
        let Some(hole) = seek(file, from, libc::SEEK_HOLE) else { break };
        at = hole.clamp(from, end);
        sum += at - from;
        if at == end {
            return sum;
        }
    }
    sum + (end - at)
}

/// Where the next data or hole is; the end of the data is far away. `None`: the filesystem does not say.
fn seek(file: RawFd, from: u64, what: libc::c_int) -> Option<u64> {
    let from = i64::try_from(from).ok()?;
    // SAFETY: a system call on an open descriptor. Nobody uses its position.
    match unsafe { libc::lseek(file, from, what) } {
        -1 if io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) => Some(u64::MAX),
        found => u64::try_from(found).ok(),
    }
}

impl Disk for UringDisk {
    fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    fn read_now(&self, buffer: &mut [u8], offset: u64) -> Result<(), Errno> {
        if !self.in_memory {
            return Err(Errno::EOPNOTSUPP);
        }
        self.plain.read_exact_at(buffer, offset).map_err(|error| Errno::from(&error))
    }

    fn write_now(&self, buffer: &[u8], offset: u64) -> Result<(), Errno> {
        if !self.in_memory {
            return Err(Errno::EOPNOTSUPP);
        }
        self.plain.write_all_at(buffer, offset).map_err(|error| Errno::from(&error))
    }

    async fn read_at(&self, buffer: Buffer, bytes: usize, offset: u64) -> (Result<(), Errno>, Buffer) {
        let read = |file, to, left, done| opcode::Read::new(file, to, left).offset(offset + done).build();
        self.transfer(&self.plain, buffer, bytes, read).await
    }

    async fn write_at(&self, buffer: Buffer, bytes: usize, offset: u64, durable: bool) -> (Result<(), Errno>, Buffer) {
        let write =
            |file, from: *mut u8, left, done| opcode::Write::new(file, from, left).offset(offset + done).build();
        self.transfer(if durable { &self.durable } else { &self.plain }, buffer, bytes, write).await
    }

    async fn sync(&self) -> Result<(), Errno> {
        let file = Rc::clone(&self.plain);
        let entry = opcode::Fsync::new(types::Fd(file.as_raw_fd())).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: the entry has no buffer; the descriptor is the file's.
        unsafe { reactor::submit(file, entry) }.await.0.map(drop)
    }

    async fn zero(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        self.clear(offset, bytes, libc::FALLOC_FL_ZERO_RANGE, &self.can_zero).await
    }

    async fn punch(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        self.clear(offset, bytes, libc::FALLOC_FL_PUNCH_HOLE, &self.can_punch).await
    }

    async fn digest(&self, buffer: Buffer, offset: u64, bytes: u64) -> (Result<(), Errno>, Buffer) {
        let most = buffer.len();
        match self.aside(move |file| digest(file, buffer, offset, bytes)).await {
            Ok(done) => done,
            Err(error) => (Err(error), Buffer::new(most)),
        }
    }
}
