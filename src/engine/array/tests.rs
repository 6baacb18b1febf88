//! The owner against a world in memory: every command in every state, every failure, a crash after every step.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::control::member::MemberLabel;
use crate::control::replica::ReplicaState;
use crate::control::spec::Alg;
use crate::control::status::State;
use crate::engine::replicas::Saved;
use crate::engine::steer;
use crate::engine::steer::{Move, MoveError, News, Steer};
use crate::units::Epoch;

use self::suspend::news;
use self::world::{Volume, World, fresh};

mod background;
mod claims;
mod create;
mod grow;
mod import;
mod late;
mod losses;
mod nodes;
mod regroup;

mod live;
mod path;
mod replicas;
mod resume;
mod scrub;
mod suspend;
mod transfer;
mod two;

mod world;

/// A daemon's life in a world.
struct Daemon {
    owner: Owner,
    todo: VecDeque<(JobId, Work)>,
    replies: BTreeMap<u64, Result<Answer, Refusal>>,
    tickets: u64,
    now: Time,
    exited: bool,
    /// What data paths were told of the changes that they had asked for.
    regrouped: Vec<Saved>,
    /// What was asked of them.
    steered: Vec<Steer>,
}

impl Daemon {
    fn boot(world: &World) -> Daemon {
        let (owner, todo, replies) = (Owner::default(), VecDeque::new(), BTreeMap::new());
        let mut daemon = Daemon {
            owner,
            todo,
            replies,
            tickets: 0,
            now: Time(0),
            exited: false,
            regrouped: Vec::new(),
            steered: Vec::new(),
        };
        let decode = |(name, bytes): (&String, &Vec<u8>)| {
            (name.clone(), ArraySpec::decode(name, bytes).map_err(|bad| format!("its record is {bad}")))
        };
        let wall = world.wall;
        daemon.event(Event::Boot {
            host: world.host,
            boot: world.boot,
            wall,
            records: world.records.iter().map(decode).collect(),
        });
        daemon
    }

    fn event(&mut self, event: Event) {
        for effect in self.owner.handle(event, self.now) {
            match effect {
                Effect::Reply(ticket, result) => {
                    assert!(self.replies.insert(ticket.0, result).is_none(), "one answer each");
                }
                Effect::Work(job, work) => self.todo.push_back((job, work)),
                Effect::Regrouped(_, saved) => self.regrouped.push(saved),
                Effect::Steer(_, steer) => self.steered.push(steer),
                Effect::Exit => self.exited = true,
            }
        }
    }

    fn ask(&mut self, command: Command) -> u64 {
        self.tickets += 1;
        self.event(Event::Command { ticket: Ticket(self.tickets), command, fresh: fresh() });
        self.tickets
    }

    /// Performs one piece of work; `false` when there is none.
    fn step(&mut self, world: &mut World) -> bool {
        let Some((job, work)) = self.todo.pop_front() else { return false };
        let outcome = world.perform(work);
        self.event(Event::Done { job, outcome, fresh: fresh() });
        true
    }

    fn settle(&mut self, world: &mut World) {
        while self.step(world) {}
    }

    fn run(&mut self, world: &mut World, command: Command) -> Result<Answer, Refusal> {
        let ticket = self.ask(command);
        self.settle(world);
        self.replies.remove(&ticket).expect("an answer")
    }

    fn error(&mut self, world: &mut World, command: Command) -> String {
        self.run(world, command).unwrap_err().text
    }

    /// Lets the back-off pass.
    fn pass(&mut self, world: &mut World) {
        self.now = self.owner.next_wake();
        assert_ne!(self.now, Time::NEVER);
        self.event(Event::Tick);
        self.settle(world);
    }

    fn state(&self, name: &str) -> Option<State> {
        self.owner.view().into_iter().find(|array| array.name == name).map(|array| array.state)
    }

    fn why(&self, name: &str) -> String {
        self.owner.view().into_iter().find(|array| array.name == name).and_then(|array| array.why).unwrap_or_default()
    }
}

fn create(targets: &[&str]) -> Command {
    let targets = targets.iter().map(|target| (*target).to_owned()).collect();
    Command::Create(Create {
        name: "a".to_owned(),
        alg: Alg::Striped,
        chunk: None,
        block: 512,
        replicas: 1,
        targets,
        size: None,
    })
}

fn start() -> Command {
    start_on(Terms::default())
}

fn start_on(terms: Terms) -> Command {
    Command::Start { name: "a".to_owned(), run: RunOptions { queues: 3, ..RunOptions::default() }, terms }
}

fn stop(force: bool) -> Command {
    Command::Stop { name: "a".to_owned(), force }
}

fn remove(force: bool) -> Command {
    Command::Remove { name: "a".to_owned(), force }
}

/// The machine of most daemons here.
const HOST: Id = Id([200; 16]);
const THREE: [&str; 3] = ["s1:1/v", "s2:1/v", "s3:1/v"];

/// A world with the array, stopped.
fn made() -> (World, Daemon) {
    let mut world = World::new(&THREE);
    let mut daemon = Daemon::boot(&world);
    daemon.run(&mut world, create(&THREE)).unwrap();
    (world, daemon)
}

fn started() -> (World, Daemon) {
    let (mut world, mut daemon) = made();
    daemon.run(&mut world, start()).unwrap();
    (world, daemon)
}

/// Another machine.
const OTHER: Id = Id([201; 16]);
const FOUR: [&str; 4] = ["s1:1/v", "s2:1/v", "s3:1/v", "s4:1/v"];
const TAKE: Terms = Terms { take_over: true, force: false };
const FORCE: Terms = Terms { take_over: true, force: true };

/// Two nodes of two replicas, stopped.
fn pairs() -> (World, Daemon) {
    let mut world = World::new(&FOUR);
    let mut daemon = Daemon::boot(&world);
    let targets = ["s1:1/v,s2:1/v".to_owned(), "s3:1/v,s4:1/v".to_owned()].to_vec();
    let (name, alg) = ("a".to_owned(), Alg::Linear);
    let command = Command::Create(Create { name, alg, chunk: None, block: 512, replicas: 2, targets, size: None });
    daemon.run(&mut world, command).unwrap();
    (world, daemon)
}

/// The same record on another machine, whose daemon has just started.
fn copied(world: &mut World) -> Daemon {
    let records = world.records.clone();
    world.go_to(OTHER);
    world.records = records;
    Daemon::boot(world)
}

/// The data path of the array's first life asks for this to be made durable.
fn regrouped(standings: Vec<(Id, Standing)>) -> Event {
    Event::Regroup { name: "a".to_owned(), epoch: Epoch(1), standings, losses: Vec::new(), fresh: fresh() }
}

fn states(world: &World) -> Vec<ReplicaState> {
    world.spec().replicas().map(|(_, replica)| replica.state).collect()
}

const IN: ReplicaState = ReplicaState::InSync;
const OUT: ReplicaState = ReplicaState::Stale;

#[test]
fn the_whole_life() {
    let mut world = World::new(&THREE);
    world.volumes.get_mut(THREE[2]).unwrap().sectors = 1900;
    let mut daemon = Daemon::boot(&world);
    let Ok(Answer::Array(array)) = daemon.run(&mut world, create(&THREE)) else { panic!() };
    assert_eq!((array.state, array.nodes[1].name.as_str()), (State::Stopped, "n-128"));
    assert_eq!(array.spec.unwrap().size, 3 * (1900 / 128) * 128 * 512);
    assert_eq!(world.volumes[THREE[1]].member.as_ref().unwrap().node, "n-128");
    let Ok(Answer::Array(array)) = daemon.run(&mut world, start()) else { panic!() };
    assert_eq!((array.state, array.device.as_deref()), (State::Started, Some("/dev/ublkb0")));
    assert_eq!(array.spec.unwrap().run.queues, 3);
    daemon.run(&mut world, stop(false)).unwrap();
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(world.running["a"], Epoch(2));
    daemon.run(&mut world, stop(false)).unwrap();
    let Ok(Answer::Removed(removed)) = daemon.run(&mut world, remove(false)) else { panic!() };
    assert!(removed.warnings.is_empty());
    assert!(world.records.is_empty() && world.volumes.values().all(|volume| volume.member.is_none()));
    assert!(daemon.error(&mut world, start()).contains("there is no array 'a'"));
}

#[test]
fn a_start_is_refused_while_a_node_is_missing() {
    let (mut world, mut daemon) = made();
    world.volumes.get_mut(THREE[1]).unwrap().reachable = false;
    world.volumes.get_mut(THREE[2]).unwrap().reachable = false;
    let error = daemon.error(&mut world, start());
    assert_eq!(error, "array 'a' cannot start: node n-128 (s2:1/v): connection refused (and 1 more node)");
    assert_eq!(daemon.state("a"), Some(State::Stopped));
    world.volumes.get_mut(THREE[1]).unwrap().reachable = true;
    world.volumes.get_mut(THREE[2]).unwrap().reachable = true;
    world.volumes.get_mut(THREE[1]).unwrap().sectors = 8;
    assert!(daemon.error(&mut world, start()).contains("too small"));
    world.volumes.get_mut(THREE[1]).unwrap().member = None;
    assert!(daemon.error(&mut world, start()).contains("not assigned to this array any more"));
    world.volumes.remove(THREE[1]);
    assert!(daemon.error(&mut world, start()).contains("no such volume"));
    assert!(world.epochs.is_empty());
}

#[test]
fn a_start_that_fails_is_as_if_it_had_not_been() {
    let (mut world, mut daemon) = made();
    world.broken.insert("launch");
    assert!(daemon.error(&mut world, start()).contains("it broke"));
    assert_eq!(daemon.state("a"), Some(State::Stopped));
    let spec = ArraySpec::decode("a", &world.records["a"]).unwrap();
    assert_eq!((spec.phase, spec.epoch), (Phase::Stopped, Epoch(1)));
    for broken in ["claim", "label"] {
        world.broken = BTreeSet::from([broken]);
        let error = daemon.error(&mut world, start());
        assert!(error.contains("it broke"), "{broken}: {error}");
        assert_eq!(daemon.state("a"), Some(State::Stopped), "{broken}");
    }
    world.broken = BTreeSet::from(["save"]);
    assert!(daemon.error(&mut world, start()).contains("it broke"));
    world.broken.clear();
    daemon.run(&mut world, start()).unwrap();
}

#[test]
fn what_is_in_use_is_refused() {
    let (mut world, mut daemon) = started();
    assert!(daemon.error(&mut world, start()).contains("started already, as /dev/ublkb0"));
    assert!(daemon.error(&mut world, remove(true)).contains("'dst stop a' first"));
    world.busy = true;
    assert!(daemon.error(&mut world, stop(false)).contains("mounted on /mnt"));
    assert_eq!(daemon.state("a"), Some(State::Started));
    daemon.run(&mut world, stop(true)).unwrap();
    assert!(daemon.error(&mut world, stop(false)).contains("is not started"));
    assert!(world.running.is_empty());
}

#[test]
fn removal_wants_every_server_or_force() {
    let (mut world, mut daemon) = made();
    world.volumes.get_mut(THREE[1]).unwrap().reachable = false;
    let error = daemon.error(&mut world, remove(false));
    assert!(error.contains("is not removed: node n-128 (s2:1/v): connection refused"), "{error}");
    assert_eq!(daemon.state("a"), Some(State::Stopped));
    assert!(world.volumes.values().all(|volume| volume.member.is_some()));
    let Ok(Answer::Removed(removed)) = daemon.run(&mut world, remove(true)) else { panic!() };
    assert_eq!(removed.warnings.len(), 1);
    assert!(removed.warnings[0].contains("s2:1/v stays assigned to 'a'"), "{:?}", removed.warnings);
    assert!(daemon.state("a").is_none() && world.records.is_empty());
}

#[test]
fn a_corrupt_record_holds_its_name_and_nothing_else() {
    let (mut world, _) = made();
    world.records.get_mut("a").unwrap()[40] ^= 1;
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Corrupt));
    for command in [create(&THREE), start(), stop(true), remove(true)] {
        let error = daemon.error(&mut world, command);
        assert!(error.contains("its record is damaged"), "{error}");
    }
    assert!(world.records.contains_key("a"));
}

#[test]
fn a_second_command_finds_the_array_busy() {
    let (mut world, mut daemon) = made();
    let first = daemon.ask(start());
    for command in [create(&THREE), start(), stop(false), remove(false)] {
        let ticket = daemon.ask(command);
        assert!(daemon.replies.remove(&ticket).unwrap().is_err());
    }
    daemon.settle(&mut world);
    assert!(daemon.replies[&first].is_ok());
}

#[test]
fn the_end_halts_what_runs_and_keeps_its_record() {
    let (mut world, mut daemon) = started();
    world.busy = true;
    daemon.event(Event::Shutdown);
    assert!(!daemon.exited);
    assert!(daemon.error(&mut world, stop(false)).contains("dstd is ending"));
    assert!(daemon.exited && world.running.is_empty());
    assert_eq!(ArraySpec::decode("a", &world.records["a"]).unwrap().phase, Phase::Started);
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Started));
}

/// The daemon dies after `steps` pieces of work of `command`; the next one goes on. Whatever was asked, the array is then either
/// whole or gone.
fn crash(make: fn() -> (World, Daemon), command: Command, steps: usize) -> bool {
    let (mut world, mut daemon) = make();
    daemon.ask(command);
    for _ in 0..steps {
        if !daemon.step(&mut world) {
            return false;
        }
    }
    drop(daemon);
    world.running.clear();
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    match daemon.state("a") {
        Some(State::Stopped | State::Started) => {
            let id = ArraySpec::decode("a", &world.records["a"]).unwrap().id;
            assert!(world.volumes.values().all(|volume| volume.member.as_ref().is_some_and(|m| m.id == id)));
            if daemon.state("a") == Some(State::Stopped) {
                daemon.run(&mut world, start()).unwrap();
            }
            daemon.run(&mut world, stop(false)).unwrap();
        }
        None => {
            assert!(world.records.is_empty() && world.volumes.values().all(|volume| volume.member.is_none()));
            daemon.run(&mut world, create(&THREE)).unwrap();
        }
        state => panic!("{state:?} after {steps} steps"),
    }
    true
}

#[test]
fn a_crash_after_every_step_ends_whole_or_gone() {
    fn empty() -> (World, Daemon) {
        let world = World::new(&THREE);
        let daemon = Daemon::boot(&world);
        (world, daemon)
    }
    type Make = fn() -> (World, Daemon);
    let cases: [(Make, Command); 4] =
        [(empty, create(&THREE)), (made, start()), (started, stop(false)), (made, remove(false))];
    for (make, command) in cases {
        let crashes = (0..10).take_while(|steps| crash(make, command.clone(), *steps)).count();
        assert!(crashes >= 3, "{command:?}");
    }
}
