//! What an operator does while the array is in use: suspends nodes, moves them to other targets, adds and removes replicas.
//!
//! Contract: what is asked is durable in the record before the data path is told, as the owner of arrays does; a daemon that dies
//! finds it there and goes on. A volume that is used for the first time holds rubbish, or zeros if that was said.

use std::time::Duration;

use dst::control::target::Target;
use dst::engine::replicas::{Event as Told, FreezeState, Standing};
use dst::engine::steer::{Move, MoveError, News, Steer};
use dst::engine::view::Role;
use dst::units::{Extent, Id, Lba};

use crate::plan::Deed;
use crate::server::id_of;
use crate::world::{Event, MILLI, World};

/// What the record knows of what the operator has asked for.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// Nodes that are suspended, and by how many deeds.
    pub(crate) frozen: Vec<u32>,
    /// The data path has said that nothing is in flight there.
    told_frozen: Vec<bool>,
    /// Open moves.
    pub(crate) moves: Vec<Option<Move>>,
    /// Moves that have ended well.
    pub(crate) moved: u64,
}

impl Asked {
    pub(crate) fn new(nodes: usize) -> Asked {
        Asked { frozen: vec![0; nodes], told_frozen: vec![false; nodes], moves: vec![None; nodes], moved: 0 }
    }
}

pub(crate) fn somewhere() -> Target {
    Target::Local("/sim".into())
}

impl World {
    /// The targets of a node.
    pub(crate) fn targets_of(&self, node: usize) -> impl Iterator<Item = usize> + use<> {
        let (copies, spares, nodes) = (self.plan.copies, self.plan.spares, self.plan.volumes.len());
        (node * copies..(node + 1) * copies).chain(nodes * copies + node * spares..nodes * copies + (node + 1) * spares)
    }

    /// Those that have everything, as far as is durably known.
    pub(crate) fn in_sync(&self, node: usize) -> Vec<usize> {
        self.targets_of(node).filter(|target| self.record.standings[*target] == Standing::InSync).collect()
    }

    fn candidate(&self, node: usize) -> Option<usize> {
        self.targets_of(node).find(|target| self.record.standings[*target].is_candidate())
    }

    /// A target of a node that is not in use, neither durably nor by the data path.
    fn spare_target(&self, node: usize) -> Option<usize> {
        let owner = self.daemon.owner.as_ref()?;
        let view = owner.rules.view();
        // A slot that is about to be free would be taken first.
        let freed = |target: &usize| view.role(*target) == Role::Absent && !view.targets[*target].volume.is_nil();
        if view.nodes[node].targets.iter().any(freed) {
            return None;
        }
        let first = view.nodes[node].targets.iter().copied().find(|target| view.targets[*target].volume.is_nil())?;
        (self.record.standings[first] == Standing::Absent).then_some(first)
    }

    /// The operator does something. Whether it lasts.
    pub(crate) fn operate(&mut self, deed: Deed, target: usize) -> bool {
        let node = self.plan.node_of(target);
        let late = self.daemon.owner.as_ref().is_some_and(|owner| owner.rules.is_late(node));
        if !self.daemon.is_up() || self.daemon.paused > 0 || late {
            return false;
        }
        match deed {
            Deed::Suspend => {
                self.record.asked.frozen[node] += 1;
                self.steer(Steer::Freeze { node });
                return true;
            }
            Deed::Move { verify, keep } => self.begin_move(node, verify, keep),
            Deed::Undo => self.undo_move(node),
            Deed::Abort => self.steer(Steer::Abort { node }),
            Deed::Pause => {
                self.steer(Steer::Pause { node, paused: true });
                return true;
            }
            Deed::Add => {
                if let Some(target) = self.spare_target(node) {
                    self.record.standings[target] = Standing::Filling { from: Lba(0) };
                    self.steer(Steer::Attach { node, target: somewhere(), volume: id_of(target) });
                }
            }
            Deed::Scrub { repair } => self.begin_scrub(node, repair),
            Deed::EndScrub => self.steer(Steer::EndScrub { node }),
            Deed::Remove => self.remove_replica(node),
            Deed::Release => {
                if let Some(mirror) = self.candidate(node).filter(|_| self.move_of(node).is_none()) {
                    self.steer(Steer::Detach { node, volume: id_of(mirror) });
                }
            }
        }
        false
    }

    /// What lasts ends.
    pub(crate) fn operated(&mut self, deed: Deed, target: usize) {
        let node = self.plan.node_of(target);
        match deed {
            Deed::Suspend => {
                let frozen = &mut self.record.asked.frozen[node];
                *frozen = frozen.saturating_sub(1);
                if *frozen == 0 {
                    self.record.asked.told_frozen[node] = false;
                    self.steer(Steer::Thaw { node });
                }
            }
            Deed::Pause => self.steer(Steer::Pause { node, paused: false }),
            _ => {}
        }
    }

    fn move_of(&self, node: usize) -> Option<&Move> {
        self.record.asked.moves[node].as_ref()
    }

    fn begin_move(&mut self, node: usize, verify: bool, keep: bool) {
        let in_sync = self.in_sync(node);
        let (None, Some(to)) = (self.move_of(node), self.spare_target(node)) else { return };
        if in_sync.is_empty() || self.candidate(node).is_some() {
            return;
        }
        let from = self.rng.pick(&in_sync);
        let fresh = self.nodes[to].is_blank();
        let rate = self.rng.pick(&[0, 0, 1 << 20]);
        let max_freeze = Duration::from_nanos(self.rng.pick(&[20, 200, 1000]) * MILLI);
        let (from, target, at) = (id_of(from), somewhere(), id_of(to));
        let target_timeout = Duration::from_nanos(self.plan.patience);
        let copied = Lba(0);
        let spec = Move { node, from, to: at, target, rate, verify, max_freeze, target_timeout, keep, fresh, copied };
        self.record.standings[to] = Standing::Candidate { from: copied };
        self.record.asked.moves[node] = Some(spec.clone());
        self.steer(Steer::Move(spec));
    }

    /// The former target of a move takes its place again.
    fn undo_move(&mut self, node: usize) {
        let (None, Some(mirror)) = (self.move_of(node), self.candidate(node)) else { return };
        let in_sync = self.in_sync(node);
        if in_sync.is_empty() {
            return;
        }
        let from = id_of(self.rng.pick(&in_sync));
        let (to, target, max_freeze) = (id_of(mirror), somewhere(), Duration::from_millis(50));
        let target_timeout = Duration::from_nanos(self.plan.patience);
        let (rate, verify, keep, fresh, copied) = (0, true, false, false, Lba(0));
        let spec = Move { node, from, to, target, rate, verify, max_freeze, target_timeout, keep, fresh, copied };
        self.record.asked.moves[node] = Some(spec.clone());
        self.steer(Steer::Move(spec));
    }

    fn remove_replica(&mut self, node: usize) {
        let in_sync = self.in_sync(node);
        let lacks =
            |target: &usize| matches!(self.record.standings[*target], Standing::Stale | Standing::Filling { .. });
        let stale = self.targets_of(node).find(lacks);
        let least = if self.plan.copies == 1 { 1 } else { 2 };
        if self.move_of(node).is_some() {
            return;
        }
        let chosen = stale.or_else(|| (in_sync.len() > least).then(|| self.rng.pick(&in_sync)));
        if let Some(target) = chosen.filter(|_| !in_sync.is_empty()) {
            // It may get no write any more from now on.
            self.spoil(target);
            self.steer(Steer::Detach { node, volume: id_of(target) });
        }
    }

    /// Asks the data path for something.
    pub(crate) fn steer(&mut self, steer: Steer) {
        if self.daemon.is_up() {
            self.trace.say(self.now, || format!("!! asked: {steer:?}"));
            let life = self.daemon.life;
            self.owner_hears(life, Told::Steer(steer));
        }
    }

    /// A daemon that begins goes on with what was asked of the former one.
    pub(crate) fn go_on_with_asked(&mut self) {
        if self.hosts.is_former() {
            return;
        }
        self.scrubs.interrupted();
        for node in 0..self.plan.volumes.len() {
            self.record.asked.told_frozen[node] = false;
            if self.record.asked.moves[node].is_some() {
                // Its destination is asked what it is, claimed and told first; it may be away.
                let longest = self.rng.pick(&[1, 20, 200, 1000]) * MILLI;
                let (life, at) = (self.daemon.life, self.now + self.rng.below(longest));
                self.queue.push(at, Event::MoveGoesOn { life, node });
            }
        }
    }

    /// The destination of a move that was under way when the former daemon died has come back.
    pub(crate) fn move_goes_on(&mut self, life: u32, node: usize) {
        if life != self.daemon.life || !self.hears(Event::MoveGoesOn { life, node }) {
            return;
        }
        let Some(spec) = self.record.asked.moves[node].clone() else { return };
        if self.daemon.owner.as_ref().is_some_and(|owner| owner.rules.move_shown(node).is_some()) {
            // That one was ended, and this is another one, which the data path has.
            return;
        }
        match self.target_of(spec.to).map(|to| self.record.standings[to]) {
            Some(Standing::Candidate { from: copied }) => {
                self.stats.resumed += u64::from(copied > Lba(0));
                // What it holds by now is not what a new volume does.
                self.steer(Steer::Move(Move { fresh: false, copied, ..spec }));
            }
            // It was in place already, or given up, and nobody was told.
            _ => self.record.asked.moves[node] = None,
        }
    }

    /// Destinations of moves, each with its node, that a daemon which begins has not attached yet. Here a volume has its slot for ever, and
    /// those that come are given slots in order: so only where that is the first one; the others are attached from the beginning.
    pub(crate) fn awaited(&self) -> Vec<(usize, usize)> {
        let moving = |node: usize| {
            let to = self.target_of(self.record.asked.moves[node].as_ref()?.to)?;
            let ours = |target: usize| self.record.standings[target] != Standing::Absent;
            let first = self.targets_of(node).take_while(|target| *target != to).all(ours);
            (self.record.standings[to].is_candidate() && first).then_some((node, to))
        };
        (0..self.plan.volumes.len()).filter_map(moving).collect()
    }

    pub(crate) fn target_of(&self, volume: Id) -> Option<usize> {
        (0..self.nodes.len()).find(|target| id_of(*target) == volume)
    }

    /// The data path tells something.
    pub(crate) fn hears_news(&mut self, news: News) {
        self.trace.say(self.now, || format!("  told: {news:?}"));
        if let News::Fenced { volume } = news {
            return self.is_fenced(volume);
        }
        if self.hosts.is_former() {
            return;
        }
        match news {
            News::Frozen { node, flushed } => {
                self.record.asked.told_frozen[node] = self.record.asked.frozen[node] > 0;
                self.check_flushed(node, flushed);
            }
            News::Scrubbed { node, scrubbed } => self.scrubbed(node, &scrubbed),
            News::Arrived { .. } => self.stats.came += 1,
            News::Detached { volume, .. } => {
                // It may have been refused before it was ever attached: then no record follows.
                let target = self.target_of(volume).filter(|target| self.record.standings[*target].is_candidate());
                if let Some(target) = target {
                    self.record.standings[target] = Standing::Absent;
                }
            }
            // Its nodes are never asked to grow.
            News::Grown { .. } => {}
            News::Fenced { .. } => {}
            News::Moved { node, result } => {
                let Some(spec) = self.record.asked.moves[node].take() else { return };
                let Some(to) = self.target_of(spec.to) else { return };
                match result {
                    Ok(_) => {
                        self.record.asked.moved += 1;
                        if self.record.standings[to] != Standing::InSync {
                            self.fail("6.1", format!("node {node} has moved, and its record does not say so"));
                        }
                    }
                    Err(MoveError::Different(_)) if self.has_flips(node) => {}
                    Err(MoveError::Different(at)) => {
                        self.fail("6.2", format!("the two targets of node {node} differ at {at}"));
                    }
                    Err(MoveError::Refused) => {
                        self.steer(Steer::Detach { node, volume: spec.to });
                        self.steer(Steer::Stay { node });
                    }
                    Err(_) => {}
                }
            }
        }
    }

    /// What is said to be durable is.
    fn check_flushed(&mut self, node: usize, flushed: bool) {
        let Some(owner) = &self.daemon.owner else { return };
        // What nobody was told may still be on its way: its connection is gone, and it is sent again at the resume.
        if self.daemon.hosts.iter().take(self.plan.shards).any(|host| host.shard.has_exposed(node)) {
            return;
        }
        let all = Extent::new(0, self.plan.used[node]);
        let loose = |target: &usize| {
            owner.rules.role(*target) == Role::InSync && !self.lossy[*target] && !self.nodes[*target].is_settled(all)
        };
        if let Some(target) = self.targets_of(node).filter(|_| flushed).find(loose) {
            self.fail("9.2", format!("node {node} is suspended as flushed, and target {target} is not"));
        }
    }

    /// When one target takes the place of another the two are the same.
    pub(crate) fn check_commit(&mut self, standings: &[(Id, Standing)]) {
        for node in 0..self.plan.volumes.len() {
            let Some(spec) = self.record.asked.moves[node].clone() else { continue };
            let (Some(from), Some(to)) = (self.target_of(spec.from), self.target_of(spec.to)) else { continue };
            let commits = standings.contains(&(spec.to, Standing::InSync));
            if !commits || !self.record.standings[to].is_candidate() {
                continue;
            }
            if !self.servers[self.nodes[from].server].up {
                // What a power cut has taken from it, which nobody has noticed yet, a sibling has given.
                continue;
            }
            let used = usize::try_from(self.plan.used[node]).unwrap_or(0);
            let (one, other) = (self.nodes[from].content(), self.nodes[to].content());
            let flipped = self.flipped(node);
            let counts = |sector: usize| !flipped.contains(&(sector as u64));
            if let Some(sector) = (0..used).find(|sector| one[*sector] != other[*sector] && counts(*sector)) {
                let text = format!("node {node} moves from target {from} to {to}, and they differ in sector {sector}");
                self.fail("6.3", text);
            }
        }
    }

    /// A request is sent: not to a node of which it was said that nothing is in flight.
    pub(crate) fn check_sent(&mut self, shard: usize, target: usize) {
        let node = self.plan.node_of(target);
        let of_frontend = shard < self.plan.shards;
        if of_frontend && self.record.asked.told_frozen[node] {
            self.fail("9", format!("something is sent to target {target} of node {node}, which is suspended"));
        }
    }

    /// At the end nothing that was asked for is left undone.
    pub(crate) fn check_asked(&mut self) {
        let Some(owner) = &self.daemon.owner else { return };
        let mut found = None;
        for node in 0..self.plan.volumes.len() {
            let shown = owner.rules.move_shown(node);
            // Shards that take a view late make a cut-over longer than some of them may be.
            let late = shown.is_some_and(|shown| shown.rolled_back > 3);
            let up = self.targets_of(node).all(|target| self.has_rejoined(target));
            if self.record.asked.moves[node].is_some() && up && !self.is_failing(node) && !late {
                found = Some(format!("the move of node {node} has not ended: {shown:?}"));
            }
            if self.is_scrubbing(node) && up && !self.is_failing(node) && !late {
                let shown = owner.rules.scrub_shown(node).map(|scrub| (scrub.map.left(), scrub.waits));
                found = Some(format!("the scrub of node {node} has not ended: {shown:?}"));
            }
            if owner.rules.freeze_state(node) != FreezeState::Open {
                found = Some(format!("node {node} is still suspended"));
            }
        }
        if let Some(text) = found {
            self.fail("liveness", text);
        }
    }

    /// Whether flushes of a node's targets fail for ever, so that nothing there need come to an end.
    fn is_failing(&self, node: usize) -> bool {
        self.plan.rates.sync_eio > 0 || self.targets_of(node).any(|target| self.lossy[target])
    }
}
