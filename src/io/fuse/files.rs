//! What the kernel asks of the tree.

use std::ffi::OsStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenAccMode,
    OpenFlags, PollEvents, PollFlags, PollNotifier, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyPoll, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::control::command::Refusal;
use crate::control::tree;
use crate::control::tree::Kind;
use crate::errno::Errno;
use crate::io::fuse::names::Names;
use crate::io::fuse::watch::Watch;

/// Nothing is remembered by the kernel: every look is a new one.
const ALWAYS_ASK: Duration = Duration::ZERO;
/// What a file says its size is, as in sysfs; how much there is to read is known when it is read.
const FILE_BYTES: u64 = 4096;
/// In a list of names: the number is told at the look-up.
const NO_NUMBER: INodeNo = INodeNo(u32::MAX as u64);

/// See the module's description.
pub(super) struct Files {
    watch: Arc<Watch>,
    names: Mutex<Names>,
}

impl Files {
    pub(super) fn new(watch: Arc<Watch>) -> Files {
        Files { watch, names: Mutex::new(Names::new()) }
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, number: INodeNo) -> Result<String, fuser::Errno> {
        self.names().path(number.0).ok_or(fuser::Errno::ENOENT)
    }

    /// The path with a number, and what is there now.
    fn look(&self, number: INodeNo) -> Result<(String, Kind), fuser::Errno> {
        let path = self.path(number)?;
        let kind = tree::find(&self.watch.about(&path), &path).map_err(refused)?;
        Ok((path, kind))
    }

    fn look_up(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, fuser::Errno> {
        let name = name.to_str().ok_or(fuser::Errno::ENOENT)?;
        let path = join(&self.path(parent)?, name);
        let kind = tree::find(&self.watch.about(&path), &path).map_err(refused)?;
        Ok(attributes(self.names().tell(&path), kind))
    }

    fn open_file(&self, number: INodeNo, flags: OpenFlags) -> Result<FileHandle, fuser::Errno> {
        let (path, kind) = self.look(number)?;
        let (reads, writes) = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => (true, false),
            OpenAccMode::O_WRONLY => (false, true),
            OpenAccMode::O_RDWR => (true, true),
        };
        match kind {
            Kind::Directory => Err(fuser::Errno::EISDIR),
            Kind::Shown if writes => Err(fuser::Errno::EPERM),
            Kind::WriteOnly if reads => Err(fuser::Errno::EPERM),
            Kind::Shown | Kind::Writable | Kind::WriteOnly => {
                self.watch.open(&path).map(FileHandle).ok_or(fuser::Errno::ENFILE)
            }
        }
    }

    fn names_in(&self, number: INodeNo) -> Result<Vec<(String, Kind)>, fuser::Errno> {
        let path = self.path(number)?;
        // Only here all of them are needed.
        let arrays = if path == tree::DEVICES { self.watch.source.arrays() } else { self.watch.about(&path) };
        tree::list(&arrays, &path).map_err(refused)
    }
}

fn refused(refusal: Refusal) -> fuser::Errno {
    number(refusal.errno)
}

fn number(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.raw())
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") }
}

fn file_type(kind: Kind) -> FileType {
    if kind == Kind::Directory { FileType::Directory } else { FileType::RegularFile }
}

fn attributes(number: u64, kind: Kind) -> FileAttr {
    let (perm, size) = match kind {
        Kind::Directory => (0o555, 0),
        Kind::Shown => (0o444, FILE_BYTES),
        Kind::Writable => (0o644, FILE_BYTES),
        Kind::WriteOnly => (0o200, FILE_BYTES),
    };
    let time = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(kind),
        perm,
        nlink: 1,
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.look_up(parent, name) {
            Ok(attributes) => reply.entry(&ALWAYS_ASK, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn forget(&self, _: &Request, number: INodeNo, times: u64) {
        self.names().forget(number.0, times);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.look(number) {
            Ok((_, kind)) => reply.attr(&ALWAYS_ASK, &attributes(number.0, kind)),
            Err(error) => reply.error(error),
        }
    }

    /// Only what comes with opening a file for writing: truncation, which means nothing here.
    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.look(number) {
            Ok((_, kind)) if mode.is_none() && uid.is_none() && gid.is_none() => {
                reply.attr(&ALWAYS_ASK, &attributes(number.0, kind));
            }
            Ok(_) => reply.error(fuser::Errno::EPERM),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.open_file(number, flags) {
            Ok(handle) => reply.opened(handle, FopenFlags::FOPEN_DIRECT_IO),
            Err(error) => reply.error(error),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.watch.close(handle.0);
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        from: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.watch.read(handle.0, from) {
            Ok(mut bytes) => {
                bytes.truncate(usize::try_from(size).unwrap_or(usize::MAX));
                reply.data(&bytes);
            }
            Err(errno) => reply.error(number(errno)),
        }
    }

    /// Wherever in the file it is written, and however much of it: a value is written at once.
    fn write(
        &self,
        _: &Request,
        file: INodeNo,
        _: FileHandle,
        _: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let path = match self.path(file) {
            Ok(path) => path,
            Err(error) => return reply.error(error),
        };
        let written = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let shown = path.clone();
        let answer = move |result: Result<(), Refusal>| match result {
            Ok(()) => reply.written(written),
            Err(refusal) => {
                tracing::info!(path = shown, errno = ?refusal.errno, "a write to the control tree is refused: {refusal}");
                reply.error(refused(refusal));
            }
        };
        self.watch.write(&path, data, Box::new(answer));
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, from: u64, mut reply: ReplyDirectory) {
        let names = match self.names_in(number) {
            Ok(names) => names,
            Err(error) => return reply.error(error),
        };
        let own = [(".".to_owned(), Kind::Directory), ("..".to_owned(), Kind::Directory)];
        for (at, (name, kind)) in
            (1..).zip(own.into_iter().chain(names)).skip(usize::try_from(from).unwrap_or(usize::MAX))
        {
            if reply.add(NO_NUMBER, at, file_type(kind), name) {
                break;
            }
        }
        reply.ok();
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        waiting: PollNotifier,
        _: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        let always = PollEvents::POLLIN | PollEvents::POLLOUT | PollEvents::POLLRDNORM | PollEvents::POLLWRNORM;
        let waiting = flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY).then_some(waiting);
        match self.watch.poll(handle.0, waiting) {
            Ok(true) => reply.poll(always | PollEvents::POLLPRI | PollEvents::POLLERR),
            Ok(false) => reply.poll(always),
            Err(errno) => reply.error(number(errno)),
        }
    }
}
