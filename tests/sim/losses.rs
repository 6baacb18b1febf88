//! Machines that lose what they had acknowledged while the array's device lives on: what a start makes of what servers tell, as the
//! owner of arrays does, and the operator who accepts what cannot be had back.
//!
//! Contract: nothing that was acknowledged may be missing while those who used the device live. Where all copies have lost something
//! nothing is served, until the operator says so; then it is as if the device had died.

use dst::engine::losses::{Losses, Past, Ruling, Verdict, Witness, judge};
use dst::engine::replicas::Standing;
use dst::engine::steer::Steer;
use dst::units::Id;

use crate::server::id_of;
use crate::world::{MILLI, Phase, World};

impl World {
    fn boot(&self) -> Id {
        Id([self.daemon.boot; 16])
    }

    /// Whether those who used the device live.
    pub(crate) fn device_lives(&self) -> bool {
        self.daemon.is_up() || self.record.memory.has_outlived(self.boot())
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

    fn forgive(&mut self, target: usize) {
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
    fn told(&self, target: usize) -> Option<u64> {
        let node = &self.nodes[target];
        self.servers[node.server].up.then(|| node.kept.losses_told(self.plan.write_through))
    }

    /// What a start makes of what servers tell. Whether it goes on; else somebody is waited for.
    pub(crate) fn muster(&mut self) -> bool {
        let past = Past { outlived: self.record.memory.has_outlived(self.boot()), clean: self.record.clean };
        let mut ruled = Vec::new();
        for node in 0..self.plan.volumes.len() {
            let in_sync = self.in_sync(node);
            let witness = |target: &usize| Witness {
                known: self.record.memory.volumes.get(&id_of(*target)).copied(),
                told: self.told(*target),
            };
            let witnesses: Vec<Witness> = in_sync.iter().map(witness).collect();
            let nobody = witnesses.iter().all(|witness| witness.told.is_none());
            match judge(past, &witnesses) {
                // Of one that is not there it is not known what it has.
                Ruling::Go(_) if nobody && !past.outlived => return false,
                Ruling::Go(verdicts) => {
                    ruled.extend(in_sync.into_iter().zip(verdicts).map(|(at, of)| (at, of, nobody)))
                }
                Ruling::Wait(_) => return false,
            }
        }
        self.minted(past, &ruled);
        true
    }

    /// It is in the record before anything is served.
    fn minted(&mut self, past: Past, ruled: &[(usize, Verdict, bool)]) {
        for target in 0..self.nodes.len() {
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
        self.record.memory.shown = Some(self.boot());
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
        if !self.plan.mortal || !self.device_lives() || life % 3 != 1 || self.phase != Phase::Work {
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
