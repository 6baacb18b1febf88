//! A data path in memory: does what it is steered to, as the real one answers.

use super::*;
use crate::engine::scrub::Findings;
use crate::units::Lba;

/// What becomes of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is carried out at once.
    Done,
    /// It goes on for ever.
    Slow,
    /// It fails.
    Fails(MoveError),
}

/// What is to be told when the change before it is durable.
#[derive(Clone, Debug)]
enum Then {
    Tell(News),
    Nothing,
}

/// The targets of a running array.
pub(super) struct Path {
    pub(super) fate: Fate,
    targets: BTreeMap<Id, (usize, Standing)>,
    moving: BTreeMap<usize, Move>,
    waiting: VecDeque<(Vec<(Id, Standing)>, Then)>,
    asked: bool,
    heard: usize,
    seen: usize,
}

pub(super) fn moved() -> steer::Moved {
    steer::Moved { regions: 1, copied: 1, root: Some([7; 32]), freeze_nanos: 1500, rolled_back: 2 }
}

impl Path {
    /// That of an array that has just been launched by this daemon for the first time.
    pub(super) fn new(daemon: &Daemon, world: &World) -> Path {
        let mut path = Path {
            fate: Fate::Done,
            targets: BTreeMap::new(),
            moving: BTreeMap::new(),
            waiting: VecDeque::new(),
            asked: false,
            heard: daemon.regrouped.len(),
            seen: 0,
        };
        for (at, node) in world.spec().nodes.iter().enumerate() {
            for replica in &node.replicas {
                let standing = if replica.state.is_in_sync() { Standing::InSync } else { Standing::Stale };
                path.targets.insert(replica.volume, (at, standing));
            }
        }
        path
    }

    fn change(&mut self, changes: &[(Id, usize, Standing)], then: Then) {
        for (volume, node, standing) in changes {
            self.targets.insert(*volume, (*node, *standing));
        }
        let standings = self.targets.iter().map(|(volume, (_, standing))| (*volume, *standing)).collect();
        self.targets.retain(|_, (_, standing)| *standing != Standing::Absent);
        self.waiting.push_back((standings, then));
    }

    fn steer(&mut self, daemon: &mut Daemon, world: &World, steer: Steer) {
        match steer {
            Steer::Freeze { node } => news(daemon, world, News::Frozen { node, flushed: true }),
            Steer::Thaw { .. } | Steer::Fail { .. } | Steer::Pause { .. } | Steer::AcceptLoss { .. } => {}
            Steer::Scrub(_) => {}
            Steer::Grow(_) => news(daemon, world, News::Grown { done: true }),
            Steer::EndScrub { node } => {
                let error = Some(steer::ScrubError::Aborted);
                let scrubbed = steer::Scrubbed { regions: 2, compared: 1, findings: Findings::default(), error };
                news(daemon, world, News::Scrubbed { node, scrubbed });
            }
            Steer::Attach { node, volume, .. } => self.change(&[(volume, node, Standing::Stale)], Then::Nothing),
            Steer::Detach { node, volume } => {
                self.change(&[(volume, node, Standing::Absent)], Then::Tell(News::Detached { node, volume }));
            }
            Steer::Move(order) => {
                world.check_handed_over(&order);
                self.targets.insert(order.to, (order.node, Standing::Candidate { from: order.copied }));
                self.moving.insert(order.node, order.clone());
                match self.fate {
                    Fate::Slow => {}
                    Fate::Fails(error) => self.end(order.node, error),
                    Fate::Done => self.commit(order.node),
                }
            }
            Steer::Replace { node, from, to, .. } => {
                let changes = [(from, node, Standing::Absent), (to, node, Standing::InSync)];
                self.change(&changes, Then::Tell(News::Moved { node, result: Ok(moved()) }));
            }
            Steer::Abort { node } if self.moving.contains_key(&node) => self.end(node, MoveError::Aborted),
            // Too late: it is told how it ends.
            Steer::Abort { .. } if !self.waiting.is_empty() => {}
            Steer::Stay { node } => world.stays(node),
            Steer::Arrive { node, .. } => news(daemon, world, News::Arrived { node, result: Ok(()) }),
            Steer::Abort { node } => news(daemon, world, News::Moved { node, result: Err(MoveError::Refused) }),
        }
    }

    /// A move ends; the node stays.
    pub(super) fn end(&mut self, node: usize, error: MoveError) {
        let order = self.moving.remove(&node).expect("a move");
        let told = Then::Tell(News::Moved { node, result: Err(error) });
        self.change(&[(order.to, node, Standing::Absent)], told);
    }

    /// What lies below a sector is copied and flushed.
    pub(super) fn keep(&mut self, world: &World, node: usize, below: u64) {
        let to = self.moving[&node].to;
        world.kept.borrow_mut().insert(to, (node, below));
        self.change(&[(to, node, Standing::Candidate { from: Lba(below) })], Then::Nothing);
    }

    /// A move is carried out.
    pub(super) fn commit(&mut self, node: usize) {
        let order = self.moving.remove(&node).expect("a move");
        let from = if order.keep { Standing::Candidate { from: Lba(0) } } else { Standing::Absent };
        let told = Then::Tell(News::Moved { node, result: Ok(moved()) });
        self.change(&[(order.from, node, from), (order.to, node, Standing::InSync)], told);
    }

    /// What was asked so far is of an earlier path, or is answered by the test.
    pub(super) fn skip(&mut self, daemon: &Daemon) {
        self.seen = daemon.steered.len();
    }

    /// A target that was kept fails.
    pub(super) fn lose(&mut self, node: usize, volume: Id) {
        self.change(&[(volume, node, Standing::Absent)], Then::Tell(News::Detached { node, volume }));
    }

    /// Does one thing; false: there is nothing to do.
    pub(super) fn step(&mut self, daemon: &mut Daemon, world: &World) -> bool {
        if self.asked && daemon.regrouped.len() > self.heard {
            let durable = daemon.regrouped[self.heard] == Saved::All;
            self.heard += 1;
            self.asked = false;
            if durable && let Some((standings, then)) = self.waiting.pop_front() {
                world.no_more(&standings);
                if let Then::Tell(told) = then {
                    news(daemon, world, told);
                }
            }
            return true;
        }
        if !self.asked
            && let Some((standings, _)) = self.waiting.front()
        {
            self.asked = true;
            let (name, epoch, standings) = ("a".to_owned(), world.spec().epoch, standings.clone());
            daemon.event(Event::Regroup { name, epoch, standings, losses: Vec::new(), fresh: fresh() });
            return true;
        }
        if self.seen < daemon.steered.len() {
            let steer = daemon.steered[self.seen].clone();
            self.seen += 1;
            self.steer(daemon, world, steer);
            return true;
        }
        false
    }

    /// Lets so many things happen, or as many as can.
    pub(super) fn steps(&mut self, daemon: &mut Daemon, world: &mut World, steps: usize) {
        for _ in 0..steps {
            let _ = self.step(daemon, world) || daemon.step(world);
        }
    }

    /// Lets everything happen that can.
    pub(super) fn settle(&mut self, daemon: &mut Daemon, world: &mut World) {
        while daemon.step(world) || self.step(daemon, world) {}
    }

    /// The same up to an answer.
    pub(super) fn run(
        &mut self,
        daemon: &mut Daemon,
        world: &mut World,
        command: Command,
    ) -> Result<ArrayStatus, Refusal> {
        let ticket = daemon.ask(command);
        self.settle(daemon, world);
        match daemon.replies.remove(&ticket).expect("an answer")? {
            Answer::Array(array) => Ok(*array),
            other => panic!("{other:?}"),
        }
    }
}

/// The next daemon, with its data path.
pub(super) fn reboot(world: &mut World, fate: Fate) -> (Daemon, Path) {
    world.running.clear();
    let mut daemon = Daemon::boot(world);
    while daemon.state("a") == Some(State::Starting) && daemon.step(world) {}
    assert_eq!(daemon.state("a"), Some(State::Started), "{}", daemon.why("a"));
    let mut path = Path::new(&daemon, world);
    path.fate = fate;
    path.settle(&mut daemon, world);
    (daemon, path)
}

/// Lets what is tried again succeed, and checks that every volume is the array's that its record has, and no other.
pub(super) fn tidy(daemon: &mut Daemon, path: &mut Path, world: &mut World) {
    for _ in 0..20 {
        path.settle(daemon, world);
        if daemon.owner.next_wake() == Time::NEVER {
            break;
        }
        daemon.now = daemon.owner.next_wake();
        daemon.event(Event::Tick);
    }
    let spec = world.spec();
    let held: BTreeSet<String> = spec.held().map(|(_, target)| target.to_string()).collect();
    let members = world.volumes.iter().filter(|(_, volume)| volume.member.as_ref().is_some_and(|of| of.id == spec.id));
    let members: BTreeSet<String> = members.map(|(name, _)| name.clone()).collect();
    assert_eq!(held, members);
    assert!(spec.debts.is_empty(), "{:?}", spec.debts);
    assert!(daemon.owner.view()[0].why.is_none(), "{}", daemon.why("a"));
}
