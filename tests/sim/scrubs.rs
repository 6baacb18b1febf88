//! Scrubs that the operator asks for, and disks that change silently what they hold, for them to find.
//!
//! Contract: what changes silently is a sector that nothing is being written to, on a disk that counts as in sync; nobody is told. From then on the judge has no opinion
//! about what a read of it shows, as nobody could have one. What a scrub says is compared with what was done: a region that it
//! calls different has such a sector; one that had it all the time is among those that it calls different; and what it calls
//! repaired is.

use std::collections::BTreeSet;

use dst::engine::replicas::Standing;
use dst::engine::scrub::{Repair, Wrong};
use dst::engine::steer::{ScrubOrder, Scrubbed, Steer};
use dst::engine::view::Role;
use dst::units::Extent;

use crate::rng::Rng;
use crate::server::id_of;
use crate::world::World;

/// What a disk holds that has lied: nobody's data.
pub(crate) const FLIPPED: u64 = u64::MAX - 2;

/// A sector that a disk has changed by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flip {
    target: usize,
    /// On its node.
    sector: u64,
    at: u64,
}

/// What is known of scrubs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scrubs {
    flips: Vec<Flip>,
    /// By node: since when one is under way, and what it is to do.
    under_way: Vec<Option<(u64, Repair)>>,
    /// By node: when something was last copied there.
    copied: Vec<u64>,
    /// Those that have compared everything, regions that differed, and those that were put right.
    pub(crate) done: u64,
    pub(crate) found: u64,
    pub(crate) repaired: u64,
}

impl Scrubs {
    pub(crate) fn new(nodes: usize) -> Scrubs {
        Scrubs { under_way: vec![None; nodes], copied: vec![0; nodes], ..Scrubs::default() }
    }

    /// With the daemon they end.
    pub(crate) fn interrupted(&mut self) {
        self.under_way.fill(None);
    }
}

impl World {
    /// The node's sectors that some disk of it has ever changed by itself.
    pub(crate) fn flipped(&self, node: usize) -> BTreeSet<u64> {
        let flips = self.scrubs.flips.iter();
        flips.filter(|flip| self.plan.node_of(flip.target) == node).map(|flip| flip.sector).collect()
    }

    fn holds_flip(&self, target: usize, sector: u64) -> bool {
        self.nodes[target].content()[usize::try_from(sector).unwrap_or(0)] == FLIPPED
    }

    fn members(&self, node: usize) -> Vec<usize> {
        let Some(owner) = &self.daemon.owner else { return Vec::new() };
        self.targets_of(node).filter(|target| owner.rules.role(*target) == Role::InSync).collect()
    }

    /// A disk changes silently what it holds in one place.
    pub(crate) fn flip(&mut self, of: usize) {
        // Mostly where most is written.
        let (node, sector) = if self.rng.percent(60) {
            self.plan.locate(self.plan.hot.0 + self.rng.below(self.plan.hot.1))
        } else {
            let node = self.plan.node_of(of);
            (node, self.rng.below(self.plan.used[node]))
        };
        let members = self.members(node);
        if members.is_empty() {
            return;
        }
        let target = self.rng.pick(&members);
        let extent = Extent::new(sector, 1);
        let repairing = self.scrubs.under_way[node].is_some_and(|(_, repair)| repair != Repair::No);
        let counts = self.record.standings[target] == Standing::InSync;
        if !counts || repairing || !self.nodes[target].is_still(extent) || self.flipped(node).contains(&sector) {
            return;
        }
        self.trace.say(self.now, || format!("!! target {target} changes sector {sector} of node {node} silently"));
        self.nodes[target].flip(sector);
        self.scrubs.flips.push(Flip { target, sector, at: self.now });
        self.judge.ignore(self.plan.array_sector(node, sector));
    }

    /// The operator wants the replicas of a node compared.
    pub(crate) fn begin_scrub(&mut self, node: usize, repair: bool) {
        if self.scrubs.under_way[node].is_some() {
            return;
        }
        let flips = self.scrubs.flips.clone();
        let clean = |target: &usize| {
            let lies =
                flips.iter().filter(|flip| flip.target == *target).any(|flip| self.holds_flip(*target, flip.sector));
            !lies
        };
        let good: Vec<usize> = self.in_sync(node).into_iter().filter(clean).collect();
        let repair = match (repair, good.is_empty()) {
            (false, _) => Repair::No,
            (true, _) if self.plan.copies > 2 && self.rng.percent(50) => Repair::Majority,
            (true, true) => Repair::No,
            (true, false) => Repair::From(id_of(self.rng.pick(&good))),
        };
        let rate = self.rng.pick(&[0, 0, 1 << 20]);
        self.scrubs.under_way[node] = Some((self.now, repair));
        self.steer(Steer::Scrub(ScrubOrder { node, repair, rate }));
    }

    /// Whether one is under way that has to end by itself.
    pub(crate) fn is_scrubbing(&self, node: usize) -> bool {
        self.scrubs.under_way[node].is_some()
    }

    /// At the end every node is compared once more.
    pub(crate) fn scrub_all(&mut self) {
        if self.plan.scrubs && self.daemon.is_up() {
            (0..self.plan.volumes.len()).for_each(|node| self.begin_scrub(node, false));
        }
    }

    /// A scrub has ended: what it says is so.
    pub(crate) fn scrubbed(&mut self, node: usize, scrubbed: &Scrubbed) {
        let Some((since, _)) = self.scrubs.under_way[node].take() else { return };
        let (findings, grain) = (&scrubbed.findings, self.plan.region);
        let flipped = self.flipped(node);
        for finding in findings.list.iter().filter(|finding| finding.wrong == Wrong::Different) {
            for start in (finding.extent.start.0..finding.extent.end().0).step_by(usize::try_from(grain).unwrap_or(1)) {
                if flipped.range(start..start + grain).next().is_none() {
                    let text = format!("sectors {start}+{grain} of node {node} are said to differ, and never did");
                    return self.fail("8.5", text);
                }
            }
            let mut inside = flipped.range(finding.extent.start.0..finding.extent.end().0).copied();
            if let Some(sector) = inside.find(|sector| finding.repaired && !self.is_right(node, *sector)) {
                return self.fail("8.5", format!("sector {sector} of node {node} is said to be put right, and is not"));
            }
        }
        if scrubbed.error.is_some() {
            return;
        }
        self.scrubs.done += 1;
        self.scrubs.found += findings.different;
        self.scrubs.repaired += findings.repaired;
        let members = self.members(node);
        // What a power cut has brought back nobody could see while it was looked at.
        if findings.more || members.iter().any(|target| self.lossy[*target]) {
            return;
        }
        let told = |sector: u64| findings.list.iter().any(|finding| finding.extent.overlaps(Extent::new(sector, 1)));
        let alone = |sector: u64| members.iter().any(|other| !self.holds_flip(*other, sector));
        // What was copied since may be on all of them; a write on its way makes it one's own again for a moment.
        let missed = self.scrubs.flips.iter().find(|flip| {
            flip.at < since
                && flip.at > self.scrubs.copied[node]
                && members.contains(&flip.target)
                && self.holds_flip(flip.target, flip.sector)
                && alone(flip.sector)
                && !told(flip.sector)
        });
        if let Some(flip) = missed {
            let text = format!("{flip:?} of node {node} was not found by a scrub that began later");
            self.fail("8.5", text);
        }
    }

    /// A node's target begins to be copied to, or ends: what a disk has changed until now may be on others, and for good.
    pub(crate) fn copies(&mut self, node: usize) {
        self.scrubs.copied[node] = self.now;
    }

    /// Whether a sector that was put right is.
    fn is_right(&self, node: usize, sector: u64) -> bool {
        let flip =
            self.scrubs.flips.iter().find(|flip| self.plan.node_of(flip.target) == node && flip.sector == sector);
        // While nothing was copied one disk alone lies, and it is not the one that is gone by.
        let alone = flip.is_some_and(|flip| flip.at > self.scrubs.copied[node]);
        !alone || !self.members(node).into_iter().any(|target| self.holds_flip(target, sector))
    }

    /// Whether nothing can be said about how a node's targets compare.
    pub(crate) fn has_flips(&self, node: usize) -> bool {
        !self.flipped(node).is_empty()
    }
}

/// What the operator does about disks that lie, and which do; decided by a generator of its own.
pub(crate) fn plan(rng: &mut Rng, plan: &mut crate::plan::Plan) {
    use crate::plan::{Deed, Fault, Kind};
    if plan.copies < 2 || rng.percent(60) {
        return;
    }
    plan.scrubs = true;
    let flips = rng.percent(70);
    for _ in 0..rng.range(2, 12) {
        let kind = match rng.below(10) {
            0 => Kind::Deed(Deed::EndScrub),
            1..5 if flips => Kind::Flip,
            1..7 => Kind::Deed(Deed::Scrub { repair: false }),
            _ => Kind::Deed(Deed::Scrub { repair: true }),
        };
        let (after, node) = (rng.below(plan.requests), rng.index(plan.server_of.len()));
        plan.faults.push(Fault { after, kind, node, lasts: 0 });
        if kind == Kind::Flip && rng.percent(60) {
            let kind = Kind::Deed(Deed::Scrub { repair: true });
            let soon = after + rng.range(1, 10);
            (0..plan.volumes.len() * plan.copies).step_by(plan.copies).for_each(|node| {
                plan.faults.push(Fault { after: soon, kind, node, lasts: 0 });
            });
        }
    }
    plan.faults.sort_by_key(|fault| fault.after);
}
