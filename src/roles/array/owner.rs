//! The loop that owns arrays: events in, effects out, work in threads of its own, a snapshot published after every turn.
//!
//! Readers take the snapshot and never wait for the loop. Whatever blocks runs in at most `limits::OWNER_HELPERS_MAX` threads;
//! more work waits in line, at most one piece for each array.

use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, PoisonError, RwLock};

use crate::control::command::{Command, Refusal};
use crate::control::device::Device;
use crate::control::status::{ArrayStatus, State};
use crate::control::upgrade::{Upgrade, Upgraded};
use crate::control::why::{Why, explain};
use crate::engine::array::{Effect, Event, JobId, Outcome, Owner, Ticket, Work};
use crate::errno::Errno;
use crate::io::boot::boot_id;
use crate::io::clock;
use crate::io::http::{Reply, Service};
use crate::io::notify::Notifier;
use crate::limits;
use crate::roles::array::devices;
use crate::roles::array::keeper::{Tell, Told};
use crate::roles::array::perform::{Performer, Running, quiesce};
use crate::roles::array::pulse::Beat;
use crate::roles::array::targets;
use crate::roles::array::upgrade::{self, Seen};
use crate::units::{Id, Time};
use crate::wire::volume::Claim;

/// What reaches the loop.
enum Message {
    Ask(Command, Id, Reply),
    Event(Event),
}

/// One array as published.
type Shown = (ArrayStatus, Option<Arc<dyn Running>>);

/// Seconds since 1970.
fn wall() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// With what its data path says now.
fn live((status, running): &Shown) -> ArrayStatus {
    match running {
        Some(running) => status.clone().with_live(running.live()),
        None => status.clone(),
    }
}

/// The way to the owner, for everybody else.
#[derive(Clone)]
pub struct Handle {
    /// Whether the process may go on as another program: it is the array daemon's alone.
    upgrades: bool,
    messages: SyncSender<Message>,
    published: Arc<RwLock<Arc<Vec<Shown>>>>,
}

impl Handle {
    /// The same, with upgrades allowed or not.
    pub fn upgradable(self, upgrades: bool) -> Handle {
        Handle { upgrades, ..self }
    }

    fn seen(&self) -> Vec<Seen> {
        let shown = Arc::clone(&self.published.read().unwrap_or_else(PoisonError::into_inner));
        let see = |(status, running): &Shown| Seen {
            status: status.clone(),
            clients: running.as_ref().map_or(0, |running| running.clients()),
            waited_us: running.as_ref().and_then(|running| running.waited_us()),
        };
        shown.iter().map(see).collect()
    }

    /// Leaves the devices with nothing in flight, as far as that goes: the process ends now, and the next one serves them on.
    pub fn quiesce(&self) {
        let shown = Arc::clone(&self.published.read().unwrap_or_else(PoisonError::into_inner));
        let running: Vec<_> = shown.iter().filter_map(|(_, running)| running.clone()).collect();
        quiesce(&running);
    }

    /// Asks the owner to halt everything and end.
    pub fn shut_down(&self) {
        // If the loop has ended already there is nothing to do.
        let _ = self.messages.send(Message::Event(Event::Shutdown));
    }
}

impl Service for Handle {
    fn list(&self) -> Vec<ArrayStatus> {
        let shown = Arc::clone(&self.published.read().unwrap_or_else(PoisonError::into_inner));
        shown.iter().map(live).collect()
    }

    fn get(&self, name: &str) -> Option<ArrayStatus> {
        let shown = Arc::clone(&self.published.read().unwrap_or_else(PoisonError::into_inner));
        shown.iter().find(|(status, _)| status.name == name).map(live)
    }

    fn why(&self, name: &str) -> Option<Why> {
        let shown = Arc::clone(&self.published.read().unwrap_or_else(PoisonError::into_inner));
        let shown = shown.iter().find(|(status, _)| status.name == name)?;
        let heard = shown.1.as_ref().map(|running| running.why()).unwrap_or_default();
        Some(explain(&live(shown), &heard, wall()))
    }

    fn devices(&self) -> Result<Vec<Device>, Refusal> {
        devices::list(&self.list())
    }

    fn delete_device(&self, id: u32, force: bool) -> Result<Device, Refusal> {
        devices::delete(&self.list(), id, force)
    }

    fn upgrade(&self, force: bool) -> Result<Upgrade, Refusal> {
        if !self.upgrades {
            let text = "this is 'dstd up', which cannot go on as another program: end it and start it again";
            return Err(Refusal::new(Errno::EOPNOTSUPP, text));
        }
        upgrade::begin(&self.seen(), force)
    }

    fn upgraded(&self) -> Upgraded {
        upgrade::tell(self.seen())
    }

    fn submit(&self, command: Command, reply: Reply) {
        let fresh = match targets::random_id() {
            Ok(fresh) => fresh,
            Err(refusal) => return reply(Err(refusal)),
        };
        let (message, refusal) = match self.messages.try_send(Message::Ask(command, fresh, reply)) {
            Ok(()) => return,
            Err(TrySendError::Full(message)) => {
                (message, Refusal::new(Errno::EAGAIN, "dstd has too many commands waiting: try again"))
            }
            Err(TrySendError::Disconnected(message)) => {
                (message, Refusal::new(Errno::ESHUTDOWN, "dstd is ending: try again when it runs"))
            }
        };
        if let Message::Ask(_, _, reply) = message {
            reply(Err(refusal));
        }
    }
}

/// The loop's own state.
pub struct OwnerLoop {
    owner: Owner,
    performer: Arc<Performer>,
    handle: Handle,
    messages: Receiver<Message>,
    replies: BTreeMap<Ticket, Reply>,
    next_ticket: u64,
    waiting: VecDeque<(JobId, Work)>,
    helpers: usize,
    logged: BTreeMap<String, (State, Option<String>)>,
    exit: bool,
    beat: Option<Beat>,
}

impl OwnerLoop {
    /// An owner that performs its work with `performer`, and feeds the watchdog of `notifier`.
    pub fn new(performer: Performer, notifier: Option<Arc<Notifier>>) -> OwnerLoop {
        let (sender, messages) = sync_channel(limits::OWNER_EVENTS_MAX);
        let handle = Handle { upgrades: false, messages: sender, published: Arc::default() };
        OwnerLoop {
            owner: Owner::default(),
            performer: Arc::new(performer),
            handle,
            messages,
            replies: BTreeMap::new(),
            next_ticket: 0,
            waiting: VecDeque::new(),
            helpers: 0,
            logged: BTreeMap::new(),
            exit: false,
            beat: Beat::new(notifier, clock::now()),
        }
    }

    /// The way to this owner.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Takes over what the state directory holds, so that all of it is shown; what is to be done about it is done in the background.
    pub fn boot(&mut self) -> Result<(), Refusal> {
        let records = self.performer.state.load().map_err(|error| Refusal::new(error.errno, error.text))?;
        self.performer.clear_away(&records);
        let host = self.performer.state.host();
        // Without the kernel's word it is always the same boot: what is lost is asked about too often, never forgotten.
        let boot = boot_id().unwrap_or(host);
        self.turn(Event::Boot { host, boot, wall: wall(), records });
        Ok(())
    }

    /// Serves until it was asked to shut down and everything has ended, or `limits::SHUTDOWN_MAX` later.
    pub fn run(mut self) -> Result<(), Refusal> {
        let mut give_up = Time::NEVER;
        while !self.exit {
            let now = clock::now();
            if now >= give_up {
                return Err(Refusal::new(Errno::ETIMEDOUT, "not everything could be halted in time"));
            }
            if let Some(beat) = &mut self.beat {
                beat.feed(now, || self.performer.running().values().all(|running| running.goes_round()));
            }
            let wake = self.owner.next_wake().min(give_up).min(self.beat.as_ref().map_or(Time::NEVER, Beat::next));
            let message = if wake == Time::NEVER {
                self.messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.messages.recv_timeout(wake.since(now))
            };
            match message {
                Ok(Message::Ask(command, fresh, reply)) => {
                    self.next_ticket += 1;
                    let ticket = Ticket(self.next_ticket);
                    tracing::debug!(?command, "asked");
                    self.replies.insert(ticket, reply);
                    self.turn(Event::Command { ticket, command, fresh });
                }
                Ok(Message::Event(event)) => {
                    if matches!(event, Event::Shutdown) && give_up == Time::NEVER {
                        tracing::info!("ending: what runs is halted");
                        give_up = clock::now().after(limits::SHUTDOWN_MAX);
                    }
                    if matches!(event, Event::Done { .. }) {
                        self.helpers -= 1;
                    }
                    self.turn(event);
                }
                Err(RecvTimeoutError::Timeout) => self.turn(Event::Tick),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        // Until now they were served.
        self.performer.quiesce_left();
        Ok(())
    }

    fn turn(&mut self, event: Event) {
        let effects = self.owner.handle(event, clock::now());
        let mut replies = Vec::new();
        for effect in effects {
            match effect {
                Effect::Reply(ticket, result) => replies.push((ticket, result)),
                Effect::Regrouped(name, saved) => {
                    if let Some(running) = self.performer.running().get(&name) {
                        running.regrouped(saved);
                    }
                }
                Effect::Steer(name, steer) => {
                    if let Some(running) = self.performer.running().get(&name) {
                        running.steer(steer);
                    }
                }
                Effect::Work(job, work) => self.waiting.push_back((job, work)),
                Effect::Exit => self.exit = true,
            }
        }
        self.publish();
        // Whoever has the answer also sees what it says.
        for (ticket, result) in replies {
            if let Some(reply) = self.replies.remove(&ticket) {
                reply(result);
            }
        }
        while self.helpers < limits::OWNER_HELPERS_MAX
            && let Some((job, work)) = self.waiting.pop_front()
        {
            self.help(job, work);
        }
    }

    fn publish(&mut self) {
        let mut running = self.performer.running();
        let view = self.owner.view();
        self.log(&view);
        let shown = view.into_iter().map(|status| {
            let live = status.device.is_some().then(|| running.remove(&status.name)).flatten();
            (status, live)
        });
        let shown = Arc::new(shown.collect());
        *self.handle.published.write().unwrap_or_else(PoisonError::into_inner) = shown;
    }

    /// One line for each change of state.
    fn log(&mut self, view: &[ArrayStatus]) {
        self.logged.retain(|name, _| {
            let there = view.iter().any(|array| array.name == *name);
            if !there {
                tracing::info!(array = %name, "gone");
            }
            there
        });
        for array in view {
            let now = (array.state, array.why.clone());
            if self.logged.get(&array.name) == Some(&now) {
                continue;
            }
            let (name, state) = (&array.name, array.state.word());
            match (&array.why, &array.device) {
                (Some(why), _) => tracing::warn!(array = %name, why = %why, "{state}"),
                (None, Some(device)) => tracing::info!(array = %name, device = %device, "{state}"),
                (None, None) => tracing::info!(array = %name, "{state}"),
            }
            self.logged.insert(name.clone(), now);
        }
    }

    /// Performs work in a thread of its own. Whatever happens to it, its end is reported.
    fn help(&mut self, job: JobId, work: Work) {
        let performer = Arc::clone(&self.performer);
        let messages = self.handle.messages.clone();
        let given = work.clone();
        let act = move || {
            let died = death_notice(&messages, &work);
            let regroup = tell(&messages, &work);
            let failed = failure(&work, "a defect of dstd: see its log");
            let (fresh, outcome) = match targets::random_id() {
                Ok(fresh) => {
                    let done = std::panic::catch_unwind(AssertUnwindSafe(|| performer.perform(work, died, regroup)));
                    (fresh, done.unwrap_or(failed))
                }
                Err(why) => (Id::NIL, failure(&work, &why.text)),
            };
            // If the loop has ended, nobody wants to know.
            let _ = messages.send(Message::Event(Event::Done { job, outcome, fresh }));
        };
        self.helpers += 1;
        let thread = std::thread::Builder::new().name("dst-helper".to_owned()).stack_size(limits::THREAD_STACK_BYTES);
        if let Err(error) = thread.spawn(act) {
            self.helpers -= 1;
            let outcome = failure(&given, &format!("there is no thread for it: {error}"));
            self.turn(Event::Done { job, outcome, fresh: Id::NIL });
        }
    }
}

/// What a data path that is launched calls when it ends by itself.
fn death_notice(messages: &SyncSender<Message>, work: &Work) -> Box<dyn FnOnce(String) + Send> {
    let Work::Launch(spec, ..) = work else { return Box::new(|_| {}) };
    let (messages, name, epoch) = (messages.clone(), spec.name.clone(), spec.epoch);
    Box::new(move |why| {
        let _ = messages.send(Message::Event(Event::Died { name, epoch, why }));
    })
}

/// What a data path that is launched calls when it has something to tell.
fn tell(messages: &SyncSender<Message>, work: &Work) -> Tell {
    let Work::Launch(spec, ..) = work else { return Arc::new(|_| {}) };
    let (messages, name, epoch) = (messages.clone(), spec.name.clone(), spec.epoch);
    Arc::new(move |told| {
        let name = name.clone();
        let event = match told {
            Told::News(news) => Event::News { name, epoch, news },
            Told::Save(standings, losses) => Event::Regroup { name, epoch, standings, losses, fresh: random_id() },
        };
        let _ = messages.send(Message::Event(event));
    })
}

/// 128 random bits, however long it takes: nothing may go on without them.
fn random_id() -> Id {
    loop {
        match targets::random_id() {
            Ok(fresh) => return fresh,
            Err(_) => std::thread::sleep(limits::REGROUP_RETRY),
        }
    }
}

/// The outcome of work that could not be performed at all.
fn failure(work: &Work, why: &str) -> Outcome {
    let refusal = Refusal::new(Errno::EIO, why);
    match work {
        Work::Survey(targets) => Outcome::Surveyed(targets.iter().map(|_| Err(refusal.clone())).collect()),
        Work::Assign(members) => Outcome::Assigned(members.iter().map(|_| Err(refusal.clone())).collect()),
        Work::Free(_, targets) => Outcome::Each(targets.iter().map(|_| Err(refusal.clone())).collect()),
        Work::Discard(_, targets) => Outcome::Each(targets.iter().map(|_| Err(refusal.clone())).collect()),
        Work::Join(_, _, targets) => Outcome::Each(targets.iter().map(|_| Err(refusal.clone())).collect()),
        Work::Make(..) | Work::Resize(..) => Outcome::Each(vec![Err(refusal)]),
        Work::Regroup(..) => Outcome::Regrouped(Err(refusal), Vec::new()),
        Work::Save(_) | Work::Forget(_) => Outcome::Saved(Err(refusal)),
        Work::Halt { .. } => Outcome::Halted(Err(refusal)),
        Work::Claim(_, epoch, targets) => {
            let claim = Claim { epoch: *epoch, owner: Id::NIL, host: Id::NIL };
            Outcome::Claimed(claim, targets.iter().map(|_| Err(refusal.clone())).collect())
        }
        Work::Label(_, _, labels) => Outcome::Each(labels.iter().map(|_| Err(refusal.clone())).collect()),
        Work::Launch(..) => Outcome::Launched(Err(refusal)),
    }
}
