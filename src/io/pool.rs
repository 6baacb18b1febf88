//! A pool in a directory: for volume `v` the data file `v`, bare bytes, its metadata `v.dst` ([`Record`]), and its state `.v.state`.
//!
//! Contract: whatever instant the process dies at, the next [`DirPool::open`] finds each volume whole or not at all. Names that
//! start with a dot are the pool's own: `.lock`, `.v.new` (data of a volume being made), `.v.dst.new` (a record being written),
//! `.v.gone` (data of a volume being removed), `.v.state` and `.v.dst.state` (one being made). The record's rename is what makes a volume; the data's rename to `.gone` is what
//! removes one. Nothing is ever deleted that is not known to be such a remainder. All calls block; none is on the data path.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;

use crate::errno::Errno;
use crate::limits;
use crate::store::record::{Record, check_volume_name};
use crate::units::format_size;

/// What was found under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A volume.
    Good(Record),
    /// Something that is not served, and why.
    Damaged(String),
}

/// A failure: for branching, and for people.
pub type Failure = (Errno, String);

/// An open, locked pool.
#[derive(Debug)]
pub struct DirPool {
    path: PathBuf,
    /// Locked for as long as this process lives.
    _lock: File,
}

impl DirPool {
    /// Locks the pool, tidies up after a crash, and tells what is there. Makes the directory if there is none.
    pub fn open(path: &Path) -> Result<(DirPool, BTreeMap<String, Found>), Failure> {
        let failed = |what: &str, error: io::Error| {
            let errno = Errno::from(&error);
            (errno, format!("{what} the pool '{}': {}; check the directory and its permissions", path.display(), errno))
        };
        fs::create_dir_all(path).map_err(|error| failed("cannot create", error))?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path.join(".lock"));
        let lock = lock.map_err(|error| failed("cannot lock", error))?;
        // SAFETY: a system call on an open descriptor.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::WouldBlock {
                let text = format!(
                    "the pool '{}' is in use by another dstd server; stop that one, or choose another directory",
                    path.display()
                );
                return Err((Errno::EBUSY, text));
            }
            return Err(failed("cannot lock", error));
        }
        let pool = DirPool { path: path.to_owned(), _lock: lock };
        pool.tidy_up().map_err(|error| failed("cannot tidy up", error))?;
        let found = pool.scan().map_err(|error| failed("cannot read", error))?;
        Ok((pool, found))
    }

    /// The data file of a volume.
    pub fn data_path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The state file of a volume.
    pub fn state_path(&self, name: &str) -> PathBuf {
        self.own_path(name, "state")
    }

    /// What is in the state file; empty where there is none.
    pub fn read_state(&self, name: &str) -> io::Result<Vec<u8>> {
        match fs::read(self.state_path(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other,
        }
    }

    /// Makes the state file of a volume that has none.
    pub fn ensure_state(&self, name: &str, content: impl FnOnce() -> Vec<u8>) -> Result<(), Failure> {
        if self.state_path(name).exists() {
            return Ok(());
        }
        let content = content();
        let failed = |error| {
            self.explain(&format!("the state file of volume '{name}' cannot be made"), content.len() as u64, &error)
        };
        self.store_state(name, &content).map_err(failed)
    }

    /// Makes the state file longer, before the volume grows.
    pub fn grow_state(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let grown = || -> io::Result<()> {
            let file = OpenOptions::new().write(true).open(self.state_path(name))?;
            file.write_all_at(bytes, offset)?;
            file.sync_all()
        };
        match grown() {
            // It is made as long as it must be when the volume is attached.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            grown => grown.map_err(|error| {
                self.explain(&format!("the state file of volume '{name}' cannot grow"), bytes.len() as u64, &error)
            }),
        }
    }

    /// Its space is taken by writing it, so no later write of it needs any.
    fn store_state(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let temporary = self.own_path(name, "dst.state");
        let written = write_synced(&temporary, content).and_then(|()| fs::rename(&temporary, self.state_path(name)));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written?;
        self.sync_directory()
    }

    fn record_path(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.dst"))
    }

    fn own_path(&self, name: &str, suffix: &str) -> PathBuf {
        self.path.join(format!(".{name}.{suffix}"))
    }

    /// Makes a volume, or leaves nothing behind.
    pub fn create(&self, name: &str, record: &Record, state: &[u8]) -> Result<(), Failure> {
        for path in [self.data_path(name), self.record_path(name)] {
            if path.symlink_metadata().is_ok() {
                let text = format!(
                    "volume '{name}' cannot be created: '{}' exists already; choose another name, or move the file away",
                    path.display()
                );
                return Err((Errno::EEXIST, text));
            }
        }
        let data = self.own_path(name, "new");
        let made = self.make_data(&data, record).and_then(|()| self.store_state(name, state));
        if let Err(error) = made.and_then(|()| self.store_record(name, record)) {
            let _ = fs::remove_file(&data);
            let _ = fs::remove_file(self.state_path(name));
            return Err(self.explain(&format!("volume '{name}' cannot be created"), record.size, &error));
        }
        // The record is there, so the volume is; a crash here is finished by `tidy_up`.
        let placed = fs::rename(&data, self.data_path(name)).and_then(|()| self.sync_directory());
        placed.map_err(|error| self.explain(&format!("volume '{name}' cannot be put in its place"), 0, &error))
    }

    fn make_data(&self, path: &Path, record: &Record) -> io::Result<()> {
        let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).mode(0o600).open(path)?;
        grow(&file, 0, record)?;
        file.sync_all()
    }

    /// Replaces the record of a volume, durably.
    pub fn store_record(&self, name: &str, record: &Record) -> io::Result<()> {
        let bytes = record.encode().map_err(io::Error::other)?;
        let temporary = self.own_path(name, "dst.new");
        let written = write_synced(&temporary, &bytes).and_then(|()| fs::rename(&temporary, self.record_path(name)));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written?;
        self.sync_directory()
    }

    /// Replaces the record, with words for the failure.
    pub fn change_record(&self, name: &str, record: &Record) -> Result<(), Failure> {
        self.store_record(name, record)
            .map_err(|error| self.explain(&format!("the record of volume '{name}' cannot be written"), 0, &error))
    }

    /// Changes the size of data and record: the record never promises more than the data has.
    pub fn resize(&self, name: &str, from: &Record, to: &Record) -> Result<(), Failure> {
        let resized = || -> io::Result<()> {
            let file = OpenOptions::new().read(true).write(true).open(self.data_path(name))?;
            if to.size >= from.size {
                // What lies behind the end is from a change that was not finished: it must read as zeros.
                file.set_len(from.size)?;
                if let Err(error) = grow(&file, from.size, to) {
                    file.set_len(from.size)?;
                    return Err(error);
                }
                file.sync_all()?;
                return self.store_record(name, to);
            }
            self.store_record(name, to)?;
            file.set_len(to.size)?;
            file.sync_all()
        };
        let more = to.size.saturating_sub(from.size);
        resized().map_err(|error| self.explain(&format!("volume '{name}' cannot be resized"), more, &error))
    }

    /// Removes a volume and its data.
    pub fn remove(&self, name: &str) -> Result<(), Failure> {
        let gone = self.own_path(name, "gone");
        let removed = || -> io::Result<()> {
            match fs::rename(self.data_path(name), &gone) {
                // A damaged volume may have no data.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.sync_directory()?,
            }
            remove_if_there(&self.record_path(name))?;
            self.sync_directory()?;
            remove_if_there(&self.state_path(name))?;
            remove_if_there(&gone)
        };
        removed().map_err(|error| self.explain(&format!("volume '{name}' cannot be removed"), 0, &error))
    }

    /// Space that the data takes on the disk, bytes.
    pub fn allocated(&self, name: &str) -> u64 {
        fs::metadata(self.data_path(name)).map_or(0, |data| data.blocks() * 512)
    }

    /// Ends what a crash interrupted.
    fn tidy_up(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let file = entry?.file_name();
            let Some(own) = file.to_str().and_then(|file| file.strip_prefix('.')) else { continue };
            if let Some(name) = own.strip_suffix(".dst.state") {
                remove_if_there(&self.own_path(name, "dst.state"))?;
            } else if let Some(name) = own.strip_suffix(".state") {
                // Where the data is left without its record, somebody may bring the record back.
                if !self.record_path(name).exists() && !self.data_path(name).exists() {
                    remove_if_there(&self.state_path(name))?;
                }
            } else if let Some(name) = own.strip_suffix(".dst.new") {
                remove_if_there(&self.own_path(name, "dst.new"))?;
            } else if let Some(name) = own.strip_suffix(".new") {
                let new = self.own_path(name, "new");
                if self.record_path(name).exists() && !self.data_path(name).exists() {
                    fs::rename(new, self.data_path(name))?;
                } else {
                    remove_if_there(&new)?;
                }
            } else if let Some(name) = own.strip_suffix(".gone") {
                if !self.data_path(name).exists() {
                    remove_if_there(&self.record_path(name))?;
                    remove_if_there(&self.state_path(name))?;
                }
                remove_if_there(&self.own_path(name, "gone"))?;
            }
        }
        self.sync_directory()
    }

    fn scan(&self) -> io::Result<BTreeMap<String, Found>> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let file = entry.file_name();
            let Some(file) = file.to_str().filter(|file| !file.starts_with('.')) else { continue };
            if let Some(name) = file.strip_suffix(".dst").filter(|name| check_volume_name(name).is_ok()) {
                found.insert(name.to_owned(), self.inspect(name));
            } else if check_volume_name(file).is_ok()
                && entry.file_type()?.is_file()
                && !self.record_path(file).exists()
            {
                let text =
                    format!("it has data but no metadata file '{file}.dst'; restore that file, or move the data away");
                found.insert(file.to_owned(), Found::Damaged(text));
            }
        }
        Ok(found)
    }

    fn inspect(&self, name: &str) -> Found {
        let wrong = |why: String| {
            let path = self.record_path(name);
            Found::Damaged(format!(
                "its metadata file '{}' cannot be used: {why}; restore it from a copy",
                path.display()
            ))
        };
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            File::open(self.record_path(name))?.take(limits::VOLUME_RECORD_BYTES_MAX).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let record =
            match read().map_err(|error| Errno::from(&error).to_string()).and_then(|bytes| Record::decode(&bytes)) {
                Ok(record) => record,
                Err(why) => return wrong(why),
            };
        match fs::metadata(self.data_path(name)) {
            Ok(data) if data.len() >= record.size => Found::Good(record),
            Ok(data) => Found::Damaged(format!(
                "its data file has {} bytes where its metadata says {}; restore the data from a copy",
                data.len(),
                record.size
            )),
            Err(error) => Found::Damaged(format!("its data file cannot be used: {}", Errno::from(&error))),
        }
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn explain(&self, what: &str, needed: u64, error: &io::Error) -> Failure {
        let errno = Errno::from(error);
        let next = match errno {
            Errno::ENOSPC | Errno::EDQUOT => match nix::sys::statvfs::statvfs(&self.path) {
                Ok(space) => format!(
                    "; {} are needed and the pool '{}' has {} left: free some, or use --sparse",
                    format_size(needed),
                    self.path.display(),
                    format_size(space.blocks_available() * space.fragment_size())
                ),
                Err(_) => "; free some space, or use --sparse".to_owned(),
            },
            Errno::EOPNOTSUPP => "; the pool's filesystem cannot take space in advance: use --sparse".to_owned(),
            _ => format!("; look at the pool '{}' and the kernel's log", self.path.display()),
        };
        (errno, format!("{what}: {}{next}", errno.text()))
    }
}

/// Makes a data file as long as its record says, with its space unless it is sparse.
fn grow(file: &File, from: u64, record: &Record) -> io::Result<()> {
    if record.sparse {
        return file.set_len(record.size);
    }
    let offset = |bytes: u64| i64::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG));
    if record.size == from {
        return Ok(());
    }
    fallocate(file, FallocateFlags::empty(), offset(from)?, offset(record.size - from)?).map_err(io::Error::from)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
