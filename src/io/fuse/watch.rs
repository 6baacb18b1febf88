//! Open files: what each reader has seen, and the thread that tells those who wait for something else.
//!
//! Values are looked at again only while somebody waits: nothing runs otherwise.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use fuser::PollNotifier;

use crate::control::command::Refusal;
use crate::control::status::ArrayStatus;
use crate::control::tree;
use crate::errno::Errno;
use crate::io::fuse::Source;
use crate::limits;

/// One open file.
struct Open {
    path: String,
    /// What its reader was given last; `None`: nothing yet.
    seen: Option<Result<String, Errno>>,
    /// Its reader waits.
    waiting: Option<PollNotifier>,
}

#[derive(Default)]
struct Table {
    open: BTreeMap<u64, Open>,
    last: u64,
    ended: bool,
}

/// See the module's description.
pub(super) struct Watch {
    pub(super) source: Arc<dyn Source>,
    table: Mutex<Table>,
    changed: Condvar,
}

impl Watch {
    pub(super) fn new(source: Arc<dyn Source>) -> Watch {
        Watch { source, table: Mutex::default(), changed: Condvar::new() }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The arrays that a path is about.
    pub(super) fn about(&self, path: &str) -> Vec<ArrayStatus> {
        tree::array_of(path).and_then(|name| self.source.array(name)).into_iter().collect()
    }

    /// The bytes of a file as it is now.
    fn show(&self, path: &str) -> Result<String, Errno> {
        tree::show(&self.about(path), path).map(|value| value + "\n").map_err(|refusal| refusal.errno)
    }

    /// A new open file; `None`: there are too many.
    pub(super) fn open(&self, path: &str) -> Option<u64> {
        let mut table = self.table();
        if table.open.len() >= limits::TREE_FILES_MAX {
            return None;
        }
        table.last += 1;
        let handle = table.last;
        table.open.insert(handle, Open { path: path.to_owned(), seen: None, waiting: None });
        Some(handle)
    }

    pub(super) fn close(&self, handle: u64) {
        self.table().open.remove(&handle);
    }

    /// What a reader gets: the value of now at the beginning, and the rest of that one further on.
    pub(super) fn read(&self, handle: u64, from: u64) -> Result<Vec<u8>, Errno> {
        let mut table = self.table();
        let open = table.open.get_mut(&handle).ok_or(Errno::EIO)?;
        if from == 0 || open.seen.is_none() {
            open.seen = Some(self.show(&open.path));
        }
        match &open.seen {
            Some(Ok(text)) => {
                let from = usize::try_from(from).unwrap_or(usize::MAX).min(text.len());
                Ok(text.as_bytes()[from..].to_vec())
            }
            Some(Err(errno)) => Err(*errno),
            None => Ok(Vec::new()),
        }
    }

    /// Whether the value is another than its reader has seen. If not, `waiting` is told when it is.
    pub(super) fn poll(&self, handle: u64, waiting: Option<PollNotifier>) -> Result<bool, Errno> {
        let mut table = self.table();
        let open = table.open.get_mut(&handle).ok_or(Errno::EIO)?;
        if open.seen.is_none() || open.seen != Some(self.show(&open.path)) {
            return Ok(true);
        }
        if waiting.is_some() {
            open.waiting = waiting;
            self.changed.notify_all();
        }
        Ok(false)
    }

    /// Hands on what was written to a file.
    pub(super) fn write(&self, path: &str, data: &[u8], done: super::Done) {
        let value = std::str::from_utf8(data).map_err(|_| Refusal::new(Errno::EINVAL, "this is not text"));
        match value.and_then(|value| tree::store(&self.about(path), path, value)) {
            Ok(command) => self.source.submit(command, done),
            Err(refusal) => done(Err(refusal)),
        }
    }

    /// Tells those who wait, until the end.
    pub(super) fn run(&self) {
        let mut table = self.table();
        while !table.ended {
            if table.open.values().all(|open| open.waiting.is_none()) {
                table = self.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let mut now: BTreeMap<String, Result<String, Errno>> = BTreeMap::new();
            for open in table.open.values_mut().filter(|open| open.waiting.is_some()) {
                let shown = now.entry(open.path.clone()).or_insert_with(|| self.show(&open.path));
                if open.seen.as_ref() != Some(shown)
                    && let Some(waiting) = open.waiting.take()
                    && let Err(error) = waiting.notify()
                {
                    tracing::debug!(path = open.path, %error, "a reader that waits cannot be told");
                }
            }
            let waited = self.changed.wait_timeout(table, limits::TREE_LOOK);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn end(&self) {
        self.table().ended = true;
        self.changed.notify_all();
    }
}
