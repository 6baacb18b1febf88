//! The directory where the records of arrays live, one file each: `arrays/NAME.json`. One daemon at a time.
//!
//! Beside them lies `host`, the random id of this directory, made once: volumes remember it with each claim, so that another
//! machine, or a copy of the disks under a new directory, is told apart from this daemon's next life.
//!
//! A record is replaced whole: written beside the old one, synced, renamed over it, and the directory synced. So a crash leaves
//! the old or the new record, and when `save` returns the new one is durable. What cannot be read is reported by its name and
//! never touched. The lock of the directory ends with the process.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::control::record;
use crate::control::spec::ArraySpec;
use crate::errno::Errno;
use crate::limits;
use crate::units::{Id, check_name};

/// A failure, with the path and what to do in its words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateError {
    /// For branching.
    pub errno: Errno,
    /// For people.
    pub text: String,
}

impl std::fmt::Display for StateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for StateError {}

fn failed(what: &str, path: &Path, error: &io::Error) -> StateError {
    let errno = Errno::from(error);
    let next = match errno {
        Errno::EACCES | Errno::EPERM => ": run dstd as root, or choose another --state-dir",
        Errno::ENOSPC | Errno::EDQUOT => ": make room there",
        Errno::EROFS => ": mount it writable, or choose another --state-dir",
        _ => "",
    };
    StateError { errno, text: format!("cannot {what} {}: {}{next}", path.display(), errno.text()) }
}

/// The records of one daemon.
pub struct StateDir {
    arrays: PathBuf,
    host: Id,
    _lock: Flock<File>,
}

/// A record that was found: its array's name, and the record or why it cannot be read.
pub type Loaded = (String, Result<ArraySpec, String>);

impl StateDir {
    /// Makes the directory where there is none, and locks it.
    pub fn open(root: &Path) -> Result<StateDir, StateError> {
        let arrays = root.join("arrays");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&arrays)
            .map_err(|error| failed("make the state directory", &arrays, &error))?;
        let path = root.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| failed("open", &path, &error))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            nix::Error::EWOULDBLOCK => StateError {
                errno: Errno::EBUSY,
                text: format!(
                    "the state directory {} is in use by another dstd: stop that one, or choose another --state-dir",
                    root.display()
                ),
            },
            other => failed("lock", &path, &io::Error::from(other)),
        })?;
        let host = host(root)?;
        Ok(StateDir { arrays, host, _lock: lock })
    }

    /// What tells this directory apart from every other.
    pub fn host(&self) -> Id {
        self.host
    }

    /// Reads every record, and clears away what an interrupted `save` left. At most `limits::ARRAYS_MAX` are read.
    pub fn load(&self) -> Result<Vec<Loaded>, StateError> {
        let entries = fs::read_dir(&self.arrays).map_err(|error| failed("read", &self.arrays, &error))?;
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| failed("read", &self.arrays, &error))?.path();
            let file_name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if file_name.starts_with('.') && file_name.ends_with(".tmp") {
                // Left by a crash before the rename. If it stays, nothing is lost.
                let _ = fs::remove_file(&path);
                continue;
            }
            let Some(name) = file_name.strip_suffix(".json").filter(|name| check_name(name).is_ok()) else {
                continue;
            };
            found.push((name.to_owned(), read(name, &path)));
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        if found.len() > limits::ARRAYS_MAX {
            let text =
                format!("{} has {} records: the most is {}", self.arrays.display(), found.len(), limits::ARRAYS_MAX);
            return Err(StateError { errno: Errno::EOVERFLOW, text });
        }
        Ok(found)
    }

    /// Stores a record durably in place of the array's former one.
    pub fn save(&self, spec: &ArraySpec) -> Result<(), StateError> {
        let path = self.path(&spec.name);
        let temporary = self.arrays.join(format!(".{}.tmp", spec.name));
        let bytes = spec.encode().map_err(|bad| StateError {
            errno: Errno::EINVAL,
            text: format!("the record of '{}' cannot be written: it is {bad}", spec.name),
        })?;
        let stored = write_synced(&temporary, &bytes)
            .and_then(|()| fs::rename(&temporary, &path))
            .and_then(|()| self.sync())
            .map_err(|error| failed("write", &path, &error));
        if stored.is_err() {
            // Nothing depends on it.
            let _ = fs::remove_file(&temporary);
        }
        stored
    }

    /// Removes a record durably; none there is fine.
    pub fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("remove", &path, &error)),
        }
        self.sync().map_err(|error| failed("sync", &self.arrays, &error))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.arrays.join(format!("{name}.json"))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.arrays)?.sync_all()
    }
}

/// Reads the id of the directory, or makes it, durably.
fn host(root: &Path) -> Result<Id, StateError> {
    let path = root.join("host");
    let unusable = |errno, why: &str| StateError {
        errno,
        text: format!(
            "{} is {why}: put a good copy in its place; if there is none, remove it, and the next start of each array needs \
             --take-over",
            path.display()
        ),
    };
    match fs::read(&path) {
        Ok(bytes) => match record::decode::<Id>("host", 1, &bytes) {
            Ok(id) if !id.is_nil() => Ok(id),
            Ok(_) => Err(unusable(Errno::EIO, "empty")),
            Err(bad) => Err(unusable(Errno::EIO, &bad.to_string())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut id = Id::NIL;
            getrandom::fill(&mut id.0)
                .map_err(|error| unusable(Errno::EIO, &format!("not there, and has no random numbers: {error}")))?;
            let bytes = record::encode("host", 1, &id).map_err(|bad| unusable(Errno::EIO, &bad.to_string()))?;
            let temporary = root.join(".host.tmp");
            write_synced(&temporary, &bytes)
                .and_then(|()| fs::rename(&temporary, &path))
                .and_then(|()| File::open(root)?.sync_all())
                .map_err(|error| failed("write", &path, &error))?;
            Ok(id)
        }
        Err(error) => Err(failed("read", &path, &error)),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn read(name: &str, path: &Path) -> Result<ArraySpec, String> {
    let size = fs::metadata(path).map(|metadata| metadata.len());
    if size.is_ok_and(|size| size > limits::RECORD_BYTES_MAX) {
        return Err(format!("its record {} is larger than a record can be", path.display()));
    }
    let bytes = fs::read(path).map_err(|error| format!("its record {} cannot be read: {error}", path.display()))?;
    ArraySpec::decode(name, &bytes).map_err(|bad| {
        format!(
            "its record {} is {bad}. Put a good copy in its place, or move it away (its volumes keep their data), \
             then start dstd again",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::replica::{Generation, ReplicaSpec, ReplicaState};
    use crate::control::spec::{Alg, NodeSpec, Phase, RunOptions};
    use crate::engine::losses::Memory;
    use crate::units::{Epoch, Lba, NodeId};

    /// A directory that goes away with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("dst-state-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn spec(name: &str) -> ArraySpec {
        let target = "h:1/v".parse().unwrap();
        let replicas = vec![ReplicaSpec { target, volume: Id([1; 16]), state: ReplicaState::InSync }];
        let generation = Generation::first(Id([7; 16]));
        ArraySpec {
            name: name.to_owned(),
            id: Id([7; 16]),
            phase: Phase::Stopped,
            alg: Alg::Linear,
            chunk: 0,
            block: 512,
            epoch: Epoch(0),
            nodes: vec![NodeSpec {
                start: NodeId(Lba(0)),
                sectors: 8,
                replicas,
                generation,
                suspend: None,
                transfer: None,
                scrub: None,
            }],
            debts: Vec::new(),
            migrations: Vec::new(),
            migrated: 0,
            grow: false,
            clean: false,
            memory: Memory::default(),
            run: RunOptions::default(),
        }
    }

    #[test]
    fn records_come_back() {
        let scratch = Scratch::new("back");
        let state = StateDir::open(&scratch.0).unwrap();
        state.save(&spec("b")).unwrap();
        state.save(&spec("a")).unwrap();
        state.save(&ArraySpec { epoch: Epoch(2), ..spec("a") }).unwrap();
        fs::write(scratch.0.join("arrays/.c.tmp"), "half").unwrap();
        let loaded = state.load().unwrap();
        assert_eq!(loaded[0].1.as_ref().unwrap().epoch, Epoch(2));
        assert_eq!(loaded.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(!scratch.0.join("arrays/.c.tmp").exists());
        state.remove("a").unwrap();
        state.remove("a").unwrap();
        assert_eq!(state.load().unwrap().len(), 1);
    }

    #[test]
    fn a_damaged_record_is_named_and_kept() {
        let scratch = Scratch::new("damaged");
        let state = StateDir::open(&scratch.0).unwrap();
        state.save(&spec("a")).unwrap();
        let path = scratch.0.join("arrays/a.json");
        let mut bytes = fs::read(&path).unwrap();
        bytes[60] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let (name, record) = state.load().unwrap().remove(0);
        let why = record.unwrap_err();
        assert!(name == "a" && why.contains("a.json is damaged: its checksum does not match"), "{why}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn a_directory_keeps_its_name() {
        let (scratch, other) = (Scratch::new("host"), Scratch::new("other-host"));
        let id = StateDir::open(&scratch.0).unwrap().host();
        assert!(!id.is_nil() && StateDir::open(&scratch.0).unwrap().host() == id);
        assert_ne!(StateDir::open(&other.0).unwrap().host(), id);
        let path = scratch.0.join("host");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        let error = StateDir::open(&scratch.0).err().unwrap().text;
        assert!(error.contains("host is damaged") && error.contains("--take-over"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "it is never made anew behind one's back");
    }

    #[test]
    fn one_daemon_at_a_time() {
        let scratch = Scratch::new("lock");
        let first = StateDir::open(&scratch.0).unwrap();
        let error = StateDir::open(&scratch.0).err().unwrap();
        assert!(error.errno == Errno::EBUSY && error.text.contains("another dstd"), "{error}");
        drop(first);
        StateDir::open(&scratch.0).unwrap();
    }
}
