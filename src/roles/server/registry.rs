//! The server's volumes by name: what the volume messages do, and how a HELLO finds its volume's owner thread.
//!
//! Contract: one change of a volume at a time, and none while a HELLO for it is under way; different volumes never wait for
//! each other. A change is durable before it is answered. Calls to the filesystem run on threads that may wait.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::errno::Errno;
use crate::io::disk::DataFile;
use crate::io::pool::{DirPool, Found};
use crate::limits;
use crate::roles::server::connection::Counted;
use crate::roles::server::host::Shown;
use crate::roles::server::owner::{Arrival, Mail, Opened, Question};
use crate::roles::server::rude::Rude;
use crate::store::pool as rules;
use crate::store::pool::Refusal;
use crate::store::record::Record;
use crate::store::region::{Layout, Log};
use crate::store::session::Claim;
use crate::store::state;
use crate::store::state::{Book, State};
use crate::store::volume::Told;
use crate::units::{Id, check_name};
use crate::wire::frame::Header;
use crate::wire::session::Hello;
use crate::wire::volume as wire;
use crate::wire::volume::{Assign, Create, LabelPut, List, Named, Page, RegionPage, Regions, Resize, Volume};

/// How often a volume's file is asked whether its dead predecessor's I/O has ended.
const PREDECESSOR_POLL: Duration = Duration::from_millis(10);

/// What is known under a name.
#[derive(Clone)]
enum Known {
    /// It is being made or was removed: there is no volume.
    Nothing,
    Volume(Record),
    Damaged(String),
}

struct Entry {
    name: String,
    known: Mutex<Known>,
    connections: Arc<AtomicU32>,
    /// What the volume's owner thread has made durable, once it has its files.
    shown: Shown,
    /// Held while the volume is changed or attached; says whether its owner thread has its files.
    gate: tokio::sync::Mutex<bool>,
}

/// All volumes.
pub(crate) struct Registry {
    pool: DirPool,
    entries: Mutex<BTreeMap<String, Arc<Entry>>>,
    owners: Vec<mpsc::Sender<Mail>>,
    rude: Rude,
    /// This boot of the machine.
    boot: Id,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is replaced whole, so a panic elsewhere cannot have left it half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    fn new(name: &str, known: Known) -> Arc<Entry> {
        let connections = Arc::default();
        Arc::new(Entry {
            name: name.to_owned(),
            known: Mutex::new(known),
            connections,
            shown: Arc::default(),
            gate: tokio::sync::Mutex::new(false),
        })
    }

    fn known(&self) -> Known {
        locked(&self.known).clone()
    }

    fn set(&self, known: Known) {
        *locked(&self.known) = known;
    }

    fn connections(&self) -> u32 {
        self.connections.load(Ordering::Acquire)
    }

    /// The record, or why there is none.
    fn record(&self) -> Result<Record, Refusal> {
        match self.known() {
            Known::Volume(record) => Ok(record),
            Known::Nothing => Err(missing(&self.name)),
            Known::Damaged(why) => Err((Errno::EIO, format!("volume '{}' is damaged: {why}", self.name))),
        }
    }
}

fn stopping() -> Refusal {
    (Errno::ESHUTDOWN, "the server is stopping; try again when it is back".to_owned())
}

fn missing(name: &str) -> Refusal {
    (Errno::ENOENT, format!("there is no volume '{}' on this server; see 'dst volume list'", name.escape_default()))
}

impl Registry {
    /// Opens the pool and takes its volumes into the list.
    pub(crate) fn open(path: &Path, boot: Id, owners: Vec<mpsc::Sender<Mail>>) -> Result<Registry, Refusal> {
        let (pool, found) = DirPool::open(path)?;
        let mut entries = BTreeMap::new();
        for (name, found) in found {
            let known = match found {
                Found::Good(record) => Known::Volume(record),
                Found::Damaged(why) => {
                    warn!(volume = name, "not served: {why}");
                    Known::Damaged(why)
                }
            };
            entries.insert(name.clone(), Entry::new(&name, known));
        }
        Ok(Registry { pool, entries: Mutex::new(entries), owners, rude: Rude::default(), boot })
    }

    /// Where peers that do not speak the protocol are told of.
    pub(crate) fn rude(&self) -> &Rude {
        &self.rude
    }

    /// How many volumes there are, and how many connections to them.
    pub(crate) fn counts(&self) -> (usize, u32) {
        let entries = locked(&self.entries);
        (entries.len(), entries.values().map(|entry| entry.connections()).sum())
    }

    fn entry(&self, name: &str) -> Result<Arc<Entry>, Refusal> {
        check_name(name).map_err(|text| (Errno::EINVAL, text))?;
        locked(&self.entries).get(name).cloned().ok_or_else(|| missing(name))
    }

    fn owner(&self, volume: Id) -> Option<&mpsc::Sender<Mail>> {
        // An id is random: any of its bytes spreads the volumes.
        self.owners.get(usize::from(volume.0[0]) % self.owners.len().max(1))
    }

    async fn tell(&self, volume: Id, mail: Mail) -> Result<(), Refusal> {
        self.owner(volume).ok_or_else(stopping)?.send(mail).await.map_err(|_| stopping())
    }

    /// Runs something that waits for the filesystem.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Registry>,
        work: impl FnOnce(&DirPool) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let registry = Arc::clone(self);
        let failed = |_| (Errno::EIO, "the server failed at this; look at its log".to_owned());
        tokio::task::spawn_blocking(move || work(&registry.pool)).await.map_err(failed)?
    }

    /// What is kept of a volume: as its owner thread has it, or from its file.
    fn state(&self, entry: &Entry, record: &Record) -> Option<State> {
        let shown = locked(&entry.shown).clone();
        let found = || state::load(&self.pool.read_state(&entry.name).ok()?, record.id);
        shown.or_else(|| found().map(|(_, state)| state))
    }

    fn describe(&self, entry: &Entry, record: Record) -> Volume {
        let found = self.state(entry, &record);
        let blank = found.as_ref().is_some_and(State::is_blank);
        let lost = |state: &State| !record.write_through && state.has_lost(self.boot);
        let losses = found.as_ref().map_or(0, |state| state.losses + u64::from(lost(state)));
        // Without a claim of its array there is nothing that is the array's.
        let is_ours = |claim: &Claim| record.array.as_ref().is_some_and(|member| member.id == claim.array);
        let kept = found.as_ref().and_then(|state| state.label.clone());
        let state = found.filter(|state| state.claim.as_ref().is_some_and(is_ours)).unwrap_or_default();
        // One that was freed may say where the data of its former array has gone.
        let label = if record.array.is_none() { kept } else { state.label };
        let told = |claim: Claim| wire::Claim { epoch: claim.epoch, owner: claim.session, host: claim.host };
        Volume {
            name: entry.name.clone(),
            id: record.id,
            size: record.size,
            sparse: record.sparse,
            write_through: record.write_through,
            allocated: self.pool.allocated(&entry.name),
            blank,
            array: record.array,
            connections: entry.connections(),
            losses,
            claim: state.claim.map(told),
            label,
            problem: None,
        }
    }

    /// Makes a volume.
    pub(crate) async fn create(self: &Arc<Registry>, ask: Create) -> Result<Volume, Refusal> {
        let id = random_id()?;
        let record = rules::create(&ask, id)?;
        let entry = Entry::new(&ask.name, Known::Nothing);
        let _gate = entry.gate.lock().await;
        {
            let mut entries = locked(&self.entries);
            if entries.contains_key(&ask.name) {
                let text = format!("there is a volume '{}' already; choose another name, or remove it first", ask.name);
                return Err((Errno::EEXIST, text));
            }
            entries.insert(ask.name.clone(), Arc::clone(&entry));
        }
        let (name, new) = (ask.name.clone(), record.clone());
        if let Err(refusal) =
            self.blocking(move |pool| pool.create(&name, &new, &state::fresh(new.id, rules::layout(new.size)))).await
        {
            locked(&self.entries).remove(&ask.name);
            return Err(refusal);
        }
        entry.set(Known::Volume(record.clone()));
        info!(volume = ask.name, size = record.size, sparse = record.sparse, "created");
        Ok(self.describe(&entry, record))
    }

    /// Part of the list.
    pub(crate) async fn list(self: &Arc<Registry>, ask: List) -> Result<Page, Refusal> {
        let after = ask.after.unwrap_or_default();
        let range = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
        let mut part: Vec<_> = locked(&self.entries)
            .range::<String, _>(range)
            .map(|(_, entry)| Arc::clone(entry))
            .filter(|entry| !matches!(entry.known(), Known::Nothing))
            .take(limits::LIST_PAGE_MAX + 1)
            .collect();
        let more = part.len() > limits::LIST_PAGE_MAX;
        part.truncate(limits::LIST_PAGE_MAX);
        let registry = Arc::clone(self);
        self.blocking(move |_| {
            // Labels have no room in a page.
            let brief = |entry: &Arc<Entry>| Volume { label: None, ..registry.describe_any(entry) };
            let volumes = part.iter().map(brief).collect();
            Ok(Page { volumes, more })
        })
        .await
    }

    fn describe_any(&self, entry: &Entry) -> Volume {
        match entry.known() {
            Known::Volume(record) => self.describe(entry, record),
            other => {
                let problem = match other {
                    Known::Damaged(why) => why,
                    _ => "it was removed".to_owned(),
                };
                let nothing = Record { id: Id::NIL, size: 0, sparse: false, write_through: false, array: None };
                Volume { problem: Some(problem), ..self.describe(entry, nothing) }
            }
        }
    }

    /// One volume.
    pub(crate) async fn stat(self: &Arc<Registry>, ask: Named) -> Result<Volume, Refusal> {
        let entry = self.entry(&ask.name)?;
        if let Known::Nothing = entry.known() {
            return Err(missing(&ask.name));
        }
        let registry = Arc::clone(self);
        self.blocking(move |_| Ok(registry.describe_any(&entry))).await
    }

    /// Another size.
    pub(crate) async fn resize(self: &Arc<Registry>, ask: Resize) -> Result<Volume, Refusal> {
        let entry = self.entry(&ask.name)?;
        let mut gate = entry.gate.lock().await;
        let from = entry.record()?;
        let to = rules::resize(&ask, &from, entry.connections())?;
        if to.size < from.size {
            // A dead predecessor's write behind the new end would make the file long again.
            self.open_entry(&entry, &mut gate, &from).await?;
        }
        let (name, old, new) = (entry.name.clone(), from, to.clone());
        let growth = state::growth(rules::layout(old.size), rules::layout(new.size));
        self.blocking(move |pool| {
            if let Some((offset, pages)) = growth {
                pool.grow_state(&name, offset, &pages)?;
            }
            pool.resize(&name, &old, &new)
        })
        .await?;
        entry.set(Known::Volume(to.clone()));
        self.tell(to.id, Mail::Resized { volume: to.id, bytes: to.size }).await?;
        // Mail is read in order: who hears that the volume is larger may use all of it.
        let (asked, read) = oneshot::channel();
        self.tell(to.id, Mail::Mark(asked)).await?;
        read.await.map_err(|_| stopping())?;
        info!(volume = ask.name, size = to.size, "resized");
        Ok(self.describe(&entry, to))
    }

    /// Removes a volume and its data.
    pub(crate) async fn remove(self: &Arc<Registry>, ask: Named) -> Result<Volume, Refusal> {
        let entry = self.entry(&ask.name)?;
        let _gate = entry.gate.lock().await;
        let id = match entry.known() {
            Known::Volume(record) => {
                rules::remove(&ask, &record, entry.connections())?;
                Some(record.id)
            }
            Known::Damaged(_) if ask.force => None,
            Known::Damaged(why) => {
                let text = format!("volume '{}' is damaged: {why}; to remove what is left of it use --force", ask.name);
                return Err((Errno::EIO, text));
            }
            Known::Nothing => return Err(missing(&ask.name)),
        };
        let last = self.describe_any(&entry);
        let name = ask.name.clone();
        self.blocking(move |pool| pool.remove(&name)).await?;
        entry.set(Known::Nothing);
        locked(&self.entries).remove(&ask.name);
        if let Some(id) = id {
            self.tell(id, Mail::Forget { volume: id }).await?;
        }
        info!(volume = ask.name, "removed");
        Ok(last)
    }

    /// Gives a volume to an array.
    pub(crate) async fn assign(self: &Arc<Registry>, ask: Assign) -> Result<Volume, Refusal> {
        let entry = self.entry(&ask.name)?;
        let _gate = entry.gate.lock().await;
        let to = rules::assign(&ask, &entry.record()?)?;
        info!(volume = ask.name, array = ask.array.name, node = ask.array.node, "assigned");
        self.change(&entry, to).await
    }

    /// Takes a volume from its array.
    pub(crate) async fn free(self: &Arc<Registry>, ask: Named) -> Result<Volume, Refusal> {
        let entry = self.entry(&ask.name)?;
        let mut gate = entry.gate.lock().await;
        let from = entry.record()?;
        let to = rules::free(&ask, &from, entry.connections())?;
        self.open_entry(&entry, &mut gate, &from).await?;
        let freed = self.change(&entry, to).await?;
        // The claim means nothing without its array, so a crash in between does no harm.
        self.ask(freed.id, Question::Free).await?;
        info!(volume = ask.name, "freed");
        Ok(freed)
    }

    /// Stores a label.
    pub(crate) async fn put_label(self: &Arc<Registry>, ask: LabelPut) -> Result<Volume, Refusal> {
        let entry = self.entry(&ask.name)?;
        let mut gate = entry.gate.lock().await;
        let record = entry.record()?;
        self.open_entry(&entry, &mut gate, &record).await?;
        self.ask(record.id, Question::Label(ask)).await?;
        let registry = Arc::clone(self);
        let described = Arc::clone(&entry);
        self.blocking(move |_| Ok(registry.describe(&described, record))).await
    }

    /// Tells which regions are marked.
    pub(crate) async fn regions(self: &Arc<Registry>, ask: Regions) -> Result<RegionPage, Refusal> {
        let entry = self.entry(&ask.name)?;
        let mut gate = entry.gate.lock().await;
        let record = entry.record()?;
        self.open_entry(&entry, &mut gate, &record).await?;
        match self.ask(record.id, Question::Regions(ask)).await? {
            Told::Regions(page) => Ok(page),
            Told::Done => Err(stopping()),
        }
    }

    /// Asks a volume's owner thread, which has its files.
    async fn ask(&self, volume: Id, question: Question) -> Result<Told, Refusal> {
        let (asker, answer) = oneshot::channel();
        self.tell(volume, Mail::Ask { volume, question, asker }).await?;
        answer.await.unwrap_or_else(|_| Err(stopping()))
    }

    async fn change(self: &Arc<Registry>, entry: &Entry, to: Record) -> Result<Volume, Refusal> {
        let (name, new) = (entry.name.clone(), to.clone());
        self.blocking(move |pool| pool.change_record(&name, &new)).await?;
        entry.set(Known::Volume(to.clone()));
        Ok(self.describe(entry, to))
    }

    /// Hands a connection that said HELLO to its volume's owner thread, which answers it.
    pub(crate) async fn attach(
        self: &Arc<Registry>,
        stream: impl FnOnce() -> io::Result<TcpStream>,
        peer: SocketAddr,
        hello: Hello,
        header: Header,
    ) -> Result<(), Refusal> {
        let entry = self.entry(&hello.volume)?;
        let mut gate = entry.gate.lock().await;
        let record = entry.record()?;
        let (_, connections) = self.counts();
        if connections >= limits::SERVER_CONNECTIONS_MAX {
            let text = format!("this server has {connections} connections and takes no more; try again later");
            return Err((Errno::EBUSY, text));
        }
        let files = if *gate { None } else { Some(self.open_files(&entry, &record).await?) };
        let counted = Counted::new(Arc::clone(&entry.connections));
        let broken = |error: io::Error| (Errno::from(&error), "the connection failed".to_owned());
        let stream = stream().map_err(broken)?;
        let arrival = Arrival { stream, peer, hello, header, record: record.clone(), files, counted };
        self.tell(record.id, Mail::Arrival(Box::new(arrival))).await?;
        *gate = true;
        Ok(())
    }

    /// Sees to it that a volume's owner thread has its files.
    async fn open_entry(
        self: &Arc<Registry>,
        entry: &Arc<Entry>,
        opened: &mut bool,
        record: &Record,
    ) -> Result<(), Refusal> {
        if !*opened {
            let files = self.open_files(entry, record).await?;
            self.tell(record.id, Mail::Opened(Box::new(files))).await?;
            *opened = true;
        }
        Ok(())
    }

    /// Opens a volume's files; waits until a dead predecessor's I/O on them has ended.
    async fn open_files(self: &Arc<Registry>, entry: &Arc<Entry>, record: &Record) -> Result<Opened, Refusal> {
        let name = &entry.name;
        let (volume, id, layout) = (name.clone(), record.id, rules::layout(record.size));
        self.blocking(move |pool| pool.ensure_state(&volume, || state::fresh(id, layout))).await?;
        let data = self.open_file(name, DirPool::data_path).await?;
        let state = self.open_file(name, DirPool::state_path).await?;
        let (volume, registry) = (name.clone(), Arc::clone(self));
        let (book, log) = self.blocking(move |_| registry.load_state(&volume, id, layout)).await?;
        let (name, record, shown) = (name.clone(), record.clone(), Arc::clone(&entry.shown));
        Ok(Opened { name, record, data, state, book, log, shown })
    }

    fn load_state(&self, name: &str, id: Id, layout: Option<Layout>) -> Result<(Book, Option<Log>), Refusal> {
        let path = self.pool.state_path(name);
        let bytes = self.pool.read_state(name).map_err(|error| unreadable(name, &error))?;
        let found = state::load(&bytes, id).ok_or_else(|| {
            let text = format!(
                "the state of volume '{name}' is damaged: neither half of '{}' can be used. It says who has the volume and whether a flush \
                 has failed. If the array is stopped and the data is known to be good, move the file away: the volume then starts without",
                path.display()
            );
            (Errno::EIO, text)
        })?;
        let pages = bytes.get(state::SLOTS_BYTES..).unwrap_or_default();
        Ok((Book::new(id, found), layout.map(|layout| Log::load(pages, layout))))
    }

    async fn open_file(
        self: &Arc<Registry>,
        name: &str,
        path: fn(&DirPool, &str) -> PathBuf,
    ) -> Result<DataFile, Refusal> {
        let mut told = false;
        loop {
            let volume = name.to_owned();
            let open =
                move |pool: &DirPool| DataFile::open(&path(pool, &volume)).map_err(|error| unreadable(&volume, &error));
            if let Some(file) = self.blocking(open).await? {
                return Ok(file);
            }
            if !told {
                info!(volume = name, "waiting for what a former server has on the disk");
                told = true;
            }
            tokio::time::sleep(PREDECESSOR_POLL).await;
        }
    }
}

fn unreadable(name: &str, error: &io::Error) -> Refusal {
    let errno = Errno::from(error);
    (errno, format!("the data of volume '{name}' cannot be opened: {errno}; look at the server's pool"))
}

/// 128 bits of the system's randomness.
pub(crate) fn random_id() -> Result<Id, Refusal> {
    let mut id = [0; 16];
    match getrandom::fill(&mut id) {
        Ok(()) => Ok(Id(id)),
        Err(error) => Err((Errno::EIO, format!("the system gives no random numbers: {error}"))),
    }
}
