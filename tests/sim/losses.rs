//! Machines that lose what they had acknowledged while the array's device lives on: what a start makes of what servers tell, as the
//! owner of arrays does, and the operator who accepts what cannot be had back.
//!
//! Contract: nothing that was acknowledged may be missing while those who used the device live. Where all copies have lost something
//! nothing is served, until the operator says so; then it is as if the device had died.

use dst::engine::losses::{Losses, Past, Ruling, Verdict, Witness, judge};
use dst::engine::replicas::Standing;
use dst::engine::steer::{Arrival, Steer};
use dst::units::Id;

use crate::operator::somewhere;
use crate::server::id_of;
use crate::world::{Event, MILLI, Phase, World};

/// Targets in sync, what is to become of each, and whether none of its node is there.
type Ruled = Vec<(usize, Verdict, bool)>;

impl World {
    fn boot(&self) -> Id {
        Id([self.daemon.boot; 16])
    }

    /// Whether those who used the device live.
    pub(crate) fn device_lives(&self) -> bool {
        self.daemon.is_up() || self.record.memory.has_outlived(self.boot()) || self.hosts.is_starting()
    }

    fn device(&self, target: usize) -> u16 {
        u16::try_from(self.plan.node_of(target)).unwrap_or(0)
    }

    /// A target's machine has lost its memory while the device lives.
    pub(crate) fn loses(&mut self, target: usize) {
        (self.lossy[target], self.accepted[target]) = (true, false);
        if self.plan.copies == 1 {
            self.judge.excuses.lost(self.now, self.device(target), true);
        }
    }

    /// If nobody is left who used the device, nobody misses anything.
    pub(crate) fn device_dies(&mut self) {
        if !self.device_lives() {
            (0..self.nodes.len()).for_each(|target| self.forgive(target));
        }
    }

    pub(crate) fn forgive(&mut self, target: usize) {
        if std::mem::take(&mut self.lossy[target]) {
            let device = self.device(target);
            self.judge.device_had_died(device);
        }
        // What is known to be lost stays so until it is accepted.
        let lost = |target: usize| self.record.memory.has_lost(id_of(target)) && !self.accepted[target];
        if !self.targets_of(self.plan.node_of(target)).any(lost) {
            let device = self.device(target);
            self.judge.excuses.lost(self.now, device, false);
        }
    }

    /// What the server of a target tells of losses, if it is there.
    pub(crate) fn told(&self, target: usize) -> Option<u64> {
        let node = &self.nodes[target];
        self.servers[node.server].up.then(|| node.kept.losses_told(self.plan.write_through))
    }

    /// What a start makes of what servers tell: the nodes that it goes on without. `None`: somebody is waited for.
    pub(crate) fn muster(&mut self) -> Option<Vec<usize>> {
        let past = self.past();
        let judged = (0..self.plan.volumes.len()).map(|node| self.judge_node(past, node));
        let judged: Vec<(Option<Ruled>, bool)> = judged.collect();
        let missed = |node: &usize| matches!(judged[*node], (None, _) | (_, true)) && self.may_be_late(past, *node);
        let mut late: Vec<usize> = (0..judged.len()).filter(missed).collect();
        if late.len() == judged.len() {
            late.clear();
        }
        let mut all = Vec::new();
        for (node, (ruled, nobody)) in judged.into_iter().enumerate().filter(|(node, _)| !late.contains(node)) {
            // Of one that is not there it is not known what it has.
            all.push((node, ruled.filter(|_| !nobody || past.outlived)?));
        }
        all.iter().for_each(|(node, ruled)| self.minted(past, *node, ruled));
        self.record.memory.shown = Some(self.boot());
        Some(late)
    }

    fn past(&self) -> Past {
        Past { outlived: self.record.memory.has_outlived(self.boot()), clean: self.record.clean }
    }

    /// What is to become of the targets of a node that are in sync, or that one is to be waited for; and whether nobody is there.
    fn judge_node(&self, past: Past, node: usize) -> (Option<Ruled>, bool) {
        let in_sync = self.in_sync(node);
        let witness = |target: &usize| Witness {
            known: self.record.memory.volumes.get(&id_of(*target)).copied(),
            told: self.told(*target),
        };
        let witnesses: Vec<Witness> = in_sync.iter().map(witness).collect();
        let nobody = witnesses.iter().all(|witness| witness.told.is_none());
        let ruled = match judge(past, &witnesses) {
            Ruling::Go(verdicts) => Some(in_sync.into_iter().zip(verdicts).map(|(at, of)| (at, of, nobody)).collect()),
            Ruling::Wait(_) => None,
        };
        (ruled, nobody)
    }

    /// A node that does not move may be late, while those live who used the device. Here a volume has its slot for ever, and those that come
    /// are given slots in order: so only where they are the first ones.
    fn may_be_late(&self, past: Past, node: usize) -> bool {
        let standings = || self.targets_of(node).map(|target| self.record.standings[target]);
        let still = self.record.asked.moves[node].is_none() && !standings().any(Standing::is_candidate);
        let first = standings().skip_while(|of| *of != Standing::Absent).all(|of| of == Standing::Absent);
        past.outlived && !past.clean && still && first
    }

    /// A late node is looked at.
    pub(crate) fn look_for_late(&mut self, life: u32, node: usize) {
        if life != self.daemon.life || !self.hears(Event::LookForLate { life, node }) {
            return;
        }
        let past = self.past();
        let (ruled, nobody) = self.judge_node(past, node);
        let waited_for = self.in_sync(node).iter().any(|target| self.told(*target).is_none()) && self.rng.percent(70);
        let Some(ruled) = ruled.filter(|_| !nobody && !waited_for) else {
            let at = self.now + MILLI + self.rng.below(100 * MILLI);
            return self.queue.push(at, Event::LookForLate { life, node });
        };
        // The record is written, then they are claimed and told: any of them may die meanwhile.
        self.minted(past, node, &ruled);
        let at = self.now + self.rng.below(20 * MILLI);
        self.queue.push(at, Event::LateComes { life, node });
    }

    /// A late node was claimed, unless its server has died again.
    pub(crate) fn late_comes(&mut self, life: u32, node: usize) {
        if life != self.daemon.life || !self.hears(Event::LateComes { life, node }) {
            return;
        }
        if self.in_sync(node).iter().any(|target| self.told(*target).is_none()) {
            return self.queue.push(self.now, Event::LookForLate { life, node });
        }
        let there = self.targets_of(node).filter(|target| self.record.standings[*target] != Standing::Absent);
        let arrival = |target: usize| Arrival {
            target: somewhere(),
            volume: id_of(target),
            standing: self.record.standings[target],
            losses: self.record.memory.volumes.get(&id_of(target)).copied(),
        };
        let replicas = there.map(arrival).collect();
        self.steer(Steer::Arrive { node, replicas });
    }

    /// It is in the record before anything of the node is served.
    fn minted(&mut self, past: Past, node: usize, ruled: &[(usize, Verdict, bool)]) {
        for target in self.targets_of(node) {
            match self.told(target).filter(|_| self.record.standings[target] != Standing::Absent) {
                Some(told) => drop(self.record.memory.volumes.insert(id_of(target), Losses { told, lost: false })),
                None if !past.outlived => drop(self.record.memory.volumes.remove(&id_of(target))),
                None => {}
            }
        }
        for (target, verdict, nobody) in ruled.iter().copied() {
            let away = self.told(target).is_none() && !nobody;
            if away || verdict == Verdict::Behind {
                self.record.standings[target] = Standing::Stale;
            }
            if verdict == Verdict::Lost {
                self.trace.say(self.now, || format!("  v{target} has lost what was acknowledged"));
                self.record.memory.volumes.entry(id_of(target)).or_default().lost = true;
                if self.accepted[target] && !self.lossy[target] {
                    self.fail("8.3", format!("v{target} is said to have lost something, and that was accepted"));
                }
            }
        }
        self.condemn();
    }

    /// The operator finds nodes that serve nothing because all that have everything have lost something.
    pub(crate) fn accept_losses(&mut self) {
        for node in 0..self.plan.volumes.len() {
            let in_sync = self.in_sync(node);
            let lost = |target: &usize| self.record.memory.has_lost(id_of(*target));
            if in_sync.is_empty() || !in_sync.iter().all(lost) || !self.daemon.is_up() {
                continue;
            }
            let working = self.phase == Phase::Work;
            if working && !self.rng.one_in(32) {
                continue;
            }
            self.trace.say(self.now, || format!("!! what node {node} has lost is accepted"));
            for target in self.targets_of(node) {
                self.record.memory.accept(id_of(target));
                self.accepted[target] = true;
                self.forgive(target);
            }
            self.steer(Steer::AcceptLoss { node });
            if working && self.rng.percent(50) {
                self.kill_daemon(10 * MILLI, false);
            }
        }
    }

    /// The daemon has died, and its device lives: a machine, or each of them, boots again before the next one.
    pub(crate) fn reboot_meanwhile(&mut self, lasts: u64) {
        let life = self.daemon.life;
        if self.hosts.is_former()
            || !self.plan.mortal
            || !self.device_lives()
            || life % 3 != 1
            || self.phase != Phase::Work
        {
            return;
        }
        let every = if life % 6 == 1 { 1 } else { 2 };
        for server in (0..self.servers.len()).step_by(every) {
            // Some are back later than the daemon.
            let lasts = if server % 3 == 2 { lasts * 2 } else { lasts / 2 };
            self.kill_server(server, lasts, true);
        }
    }
}
