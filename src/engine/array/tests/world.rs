//! Everything outside the owner, in memory: volumes on servers, records, data paths.

use std::cell::RefCell;

use super::*;
use crate::control::member::TransferRole;
use crate::control::transfer::Stage;

/// A volume of the world.
#[derive(Clone, Debug)]
pub(super) struct Volume {
    pub(super) sectors: u64,
    pub(super) id: Id,
    pub(super) member: Option<Member>,
    pub(super) claim: Option<Claim>,
    pub(super) label: Option<String>,
    pub(super) reachable: bool,
    /// Nothing was ever written to it.
    pub(super) blank: bool,
    /// How often its machine has come back without what was not flushed.
    pub(super) losses: u64,
}

/// Everything outside the owner: volumes, records, data paths. It outlives the daemon.
#[derive(Clone, Default)]
pub(super) struct World {
    /// The machine that the next daemon lives on.
    pub(super) host: Id,
    /// And this boot of it.
    pub(super) boot: Id,
    /// The time of day when it starts, seconds since 1970.
    pub(super) wall: u64,
    pub(super) volumes: BTreeMap<String, Volume>,
    pub(super) records: BTreeMap<String, Vec<u8>>,
    /// The records of the other machines.
    pub(super) elsewhere: BTreeMap<Id, BTreeMap<String, Vec<u8>>>,
    pub(super) owners: u8,
    /// What has every write: what was in sync when the array was served last. Nothing is ever copied here.
    pub(super) newest: Option<BTreeSet<String>>,
    pub(super) running: BTreeMap<String, Epoch>,
    /// Its data path was told that all replicas in sync are the same.
    pub(super) clean: bool,
    /// Nodes that its data path was launched without, and has not been given.
    pub(super) late: BTreeSet<usize>,
    /// What volumes have to which nodes move, by the node: below this sector they lack what the region logs have marked, and nothing else.
    pub(super) kept: RefCell<BTreeMap<Id, (usize, u64)>>,
    /// And where.
    pub(super) runs_on: BTreeMap<String, Id>,
    /// Of each array, the nodes whose requests its data path held from the first one on.
    pub(super) frozen: BTreeMap<String, Vec<bool>>,
    /// Epochs under which a data path was ever launched, by array.
    pub(super) epochs: Vec<(Id, Epoch)>,
    pub(super) busy: bool,
    /// Arrays whose device a dead daemon has left.
    pub(super) left: BTreeSet<Id>,
    /// Servers come and go while something is under way: who is there now need not have been asked.
    pub(super) unsteady: bool,
    /// Servers that make no volumes.
    pub(super) down: BTreeSet<String>,
    /// Its kernel gives devices in use another size.
    pub(super) resizable: bool,
    /// The size of the device that was told one, sectors.
    pub(super) device: Option<u64>,
    /// Work of these kinds fails.
    pub(super) broken: BTreeSet<&'static str>,
}

/// An id that no other call returns.
pub(super) fn fresh() -> Id {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut id = [1; 16];
    id[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    Id(id)
}

pub(super) fn refused(text: &str) -> Refusal {
    Refusal::new(Errno::ECONNREFUSED, text)
}

impl World {
    pub(super) fn new(volumes: &[&str]) -> World {
        let volume = |at: u8| Volume {
            sectors: 2048,
            id: Id([at; 16]),
            member: None,
            claim: None,
            label: None,
            reachable: true,
            blank: true,
            losses: 0,
        };
        let volumes = volumes.iter().zip(1u8..).map(|(name, at)| ((*name).to_owned(), volume(at))).collect();
        World { host: HOST, volumes, ..World::default() }
    }

    /// The next daemon lives on this machine, with the records of this one.
    pub(super) fn go_to(&mut self, host: Id) {
        let records = self.elsewhere.remove(&host).unwrap_or_default();
        let former = std::mem::replace(&mut self.records, records);
        self.elsewhere.insert(std::mem::replace(&mut self.host, host), former);
    }

    pub(super) fn spec(&self) -> ArraySpec {
        ArraySpec::decode("a", &self.records["a"]).unwrap()
    }

    pub(super) fn reach(&mut self, target: &str, reachable: bool) {
        self.volumes.get_mut(target).unwrap().reachable = reachable;
    }

    /// What a volume's label says.
    pub(super) fn label(&self, target: &str) -> MemberLabel {
        MemberLabel::decode(self.volumes[target].label.as_ref().unwrap()).unwrap()
    }

    /// As servers do.
    pub(super) fn claim(&mut self, target: &Target, array: Id, claim: Claim) -> Result<(), Refusal> {
        let volume = self.volume(target)?;
        assert!(volume.member.as_ref().is_some_and(|member| member.id == array));
        let taken = volume
            .claim
            .is_none_or(|held| claim.epoch > held.epoch || (claim.epoch, claim.owner) == (held.epoch, held.owner));
        if !taken {
            return Err(Refusal::new(Errno::EBADE, "fenced"));
        }
        volume.claim = Some(claim);
        // Who has it may write to it.
        volume.blank = false;
        Ok(())
    }

    /// What must be durable before anything is served: the claim and the newest label on each replica that is in sync, and in the
    /// record that the others are not.
    pub(super) fn check_launch(&mut self, spec: &ArraySpec, claim: Claim) {
        let stored = ArraySpec::decode(&spec.name, &self.records[&spec.name]).unwrap();
        assert_eq!(stored, ArraySpec { clean: false, ..spec.clone() }, "what is served is durable");
        assert_eq!((spec.phase, spec.epoch, claim.host), (Phase::Started, claim.epoch, self.host));
        assert!(self.epochs.iter().all(|(id, epoch)| *id != spec.id || *epoch < spec.epoch), "epochs grow");
        let in_sync = spec.replicas().filter(|(_, replica)| replica.state.is_in_sync());
        let in_sync: BTreeSet<String> = in_sync.map(|(_, replica)| replica.target.to_string()).collect();
        if let Some(stale) = self.newest.as_ref().and_then(|newest| in_sync.difference(newest).next()) {
            panic!("{stale} has missed writes and would be read");
        }
        self.newest = Some(self.written_to(spec, in_sync));
        for (node, replica) in spec.replicas().filter(|(node, _)| !self.is_late(spec, node)) {
            let volume = &self.volumes[&replica.target.to_string()];
            if replica.state.is_in_sync() || volume.reachable && !self.unsteady {
                assert_eq!(volume.claim, Some(claim), "{} is claimed", replica.target);
                let label = self.label(&replica.target.to_string());
                assert_eq!(label.generation, node.generation);
                assert_eq!(label.node().unwrap().replicas, node.replicas);
                assert_eq!(label.node().unwrap().replicas[label.replica], *replica);
            }
        }
    }

    fn is_taken(&self, spec: &ArraySpec, claim: Claim) -> bool {
        let held = |target: &Target| self.volumes.get(&target.to_string()).and_then(|volume| volume.claim);
        let in_sync = spec.replicas().filter(|(_, replica)| replica.state.is_in_sync());
        in_sync.filter_map(|(_, replica)| held(&replica.target)).any(|held| held.host != claim.host)
    }

    fn is_late(&self, spec: &ArraySpec, node: &NodeSpec) -> bool {
        self.late.iter().any(|late| spec.nodes[*late].start == node.start)
    }

    pub(super) fn volume(&mut self, target: &Target) -> Result<&mut Volume, Refusal> {
        let missing = || Refusal::new(Errno::ENOENT, "no such volume");
        let volume = self.volumes.get_mut(&target.to_string()).ok_or_else(missing)?;
        if volume.reachable { Ok(volume) } else { Err(refused("connection refused")) }
    }

    /// The record is durable before any label says more.
    pub(super) fn regroup(&mut self, spec: &ArraySpec, claim: Claim, labels: Vec<(Target, String)>) -> Outcome {
        if self.broken.contains("save") {
            return Outcome::Regrouped(Err(refused("it broke")), Vec::new());
        }
        self.records.insert(spec.name.clone(), spec.encode().unwrap());
        let broken = self.broken.contains("label");
        let put = |(target, text): (Target, String)| {
            let volume = self.volume(&target)?;
            if volume.claim.is_some_and(|held| held.host != claim.host) {
                return Err(Refusal::new(Errno::EBADE, "fenced"));
            }
            assert_eq!(volume.claim, Some(claim));
            if broken {
                return Err(refused("it broke"));
            }
            volume.label = Some(text);
            Ok(())
        };
        let written: Vec<Result<(), Refusal>> = labels.into_iter().map(put).collect();
        // What another host has taken over has other writes by now than those of this one.
        if written.iter().all(Result::is_ok) && self.runs_on.get(&spec.name) == Some(&self.host) {
            self.check_labels(spec);
        }
        Outcome::Regrouped(Ok(()), written)
    }

    /// What must be durable before anything can be written beyond the former end: the sizes, in the record and on every replica.
    fn resize(&mut self, name: &str, sectors: Option<u64>) -> Result<(), Refusal> {
        if !self.resizable {
            return Err(Refusal::new(Errno::EOPNOTSUPP, "this kernel cannot"));
        }
        let Some(sectors) = sectors else { return Ok(()) };
        let spec = ArraySpec::decode(name, &self.records[name]).unwrap();
        assert_eq!(plan::geometry(&spec).unwrap().sectors(), sectors);
        for (node, replica) in spec.replicas() {
            let label = self.label(&replica.target.to_string());
            assert_eq!(label.node().unwrap().sectors, node.sectors, "{}", replica.target);
        }
        self.device = Some(sectors);
        Ok(())
    }

    /// What must be durable before a data path copies anything: the transfer in the record, then on the target, then on the source.
    pub(super) fn check_handed_over(&self, order: &Move) {
        let spec = self.spec();
        let node = &spec.nodes[order.node];
        let transfer = node.transfer.as_ref().unwrap();
        assert_eq!((transfer.from, transfer.to, transfer.stage), (order.from, order.to, Stage::Open));
        let source = node.replicas.iter().find(|replica| replica.volume == order.from).unwrap();
        let (target, source) = (order.target.to_string(), source.target.to_string());
        assert_eq!(self.volumes[&target].claim, self.volumes[&source].claim);
        assert_eq!(transfer.goes_on_from().map_or(0, |kept| kept.below.0), order.copied.0, "it is durable");
        let mut kept = self.kept.borrow_mut();
        let has = kept.get(&order.to).map_or(0, |(_, below)| *below);
        assert!(order.copied.0 <= has, "{} is believed, and it has {has}", order.copied.0);
        // From there on it is copied anew.
        kept.insert(order.to, (order.node, order.copied.0));
        for (volume, role) in [(target, TransferRole::Candidate), (source, TransferRole::Open)] {
            let told = self.label(&volume).transfer.unwrap();
            assert_eq!((told.role, told.id, told.volume), (role, transfer.status.id, order.to), "{volume}");
        }
    }

    /// A data path begins: of nodes that await nobody it marks nothing, or cleans the logs.
    fn forget_unlogged(&self, spec: &ArraySpec) {
        self.kept.borrow_mut().retain(|_, (node, _)| spec.nodes[*node].awaits());
    }

    /// Volumes are no destinations any more: the logs need not know what they lack.
    pub(super) fn no_more(&self, standings: &[(Id, Standing)]) {
        let is_one = |volume: &Id| standings.iter().any(|(of, standing)| of == volume && !standing.is_candidate());
        self.kept.borrow_mut().retain(|volume, _| !is_one(volume));
    }

    /// The logs of a node need keep nothing for a move: then no daemon may go on with it.
    pub(super) fn stays(&self, node: usize) {
        assert!(!self.spec().nodes[node].awaits(), "a daemon that dies now would go on with it");
        self.kept.borrow_mut().retain(|_, (of, _)| *of != node);
    }

    /// Those in sync know who is, before the data path goes on.
    fn check_labels(&mut self, spec: &ArraySpec) {
        let in_sync: Vec<_> = spec.replicas().filter(|(_, replica)| replica.state.is_in_sync()).collect();
        for (node, replica) in in_sync.iter().filter(|(node, _)| !self.is_late(spec, node)) {
            let target = replica.target.to_string();
            let label = self.label(&target);
            let known: Vec<&ReplicaSpec> =
                label.node().unwrap().replicas.iter().filter(|of| of.state.is_in_sync()).collect();
            let now: Vec<&ReplicaSpec> = node.replicas.iter().filter(|of| of.state.is_in_sync()).collect();
            assert_eq!((known, &label.generation), (now, &node.generation), "{target}");
        }
        let in_sync = in_sync.iter().map(|(_, replica)| replica.target.to_string()).collect();
        self.newest = Some(self.written_to(spec, in_sync));
    }

    /// Who has every write when these get the next one: nothing is written to a late node before it has come.
    fn written_to(&mut self, spec: &ArraySpec, in_sync: BTreeSet<String>) -> BTreeSet<String> {
        let former = self.newest.take().unwrap_or_else(|| in_sync.clone());
        let late = |(node, _): &(&NodeSpec, &ReplicaSpec)| self.is_late(spec, node);
        let (late, others): (Vec<_>, Vec<_>) = spec.replicas().partition(late);
        let named = |(_, replica): (&NodeSpec, &ReplicaSpec)| replica.target.to_string();
        let late = late.into_iter().map(named).filter(|target| former.contains(target));
        late.chain(others.into_iter().map(named).filter(|target| in_sync.contains(target))).collect()
    }

    fn make(&mut self, target: &Target, bytes: u64) -> Result<(), Refusal> {
        let name = target.to_string();
        let server = name.split('/').next().unwrap().to_owned();
        if self.down.contains(&server) {
            return Err(refused("connection refused"));
        }
        if self.volumes.contains_key(&name) {
            return Err(Refusal::new(Errno::EEXIST, "the volume exists"));
        }
        let (id, sectors) = (fresh(), bytes / 512);
        self.volumes.insert(
            name,
            Volume { sectors, id, member: None, claim: None, label: None, reachable: true, blank: true, losses: 0 },
        );
        Ok(())
    }

    /// As servers do: what a volume knew stays with it until someone claims it.
    fn free(&mut self, target: &Target, array: Id) -> Result<(), Refusal> {
        let host = self.host;
        match self.volume(target) {
            Ok(volume) if volume.member.as_ref().is_none_or(|member| member.id != array) => Ok(()),
            Ok(volume) if volume.claim.is_some_and(|claim| claim.host != host) => {
                Err(Refusal::new(Errno::EBUSY, "another host has claimed it"))
            }
            Ok(volume) => {
                (volume.member, volume.claim) = (None, None);
                Ok(())
            }
            Err(why) if why.errno == Errno::ENOENT => Ok(()),
            Err(why) => Err(why),
        }
    }

    pub(super) fn perform(&mut self, work: Work) -> Outcome {
        let fails = |kind| if self.broken.contains(kind) { Err(refused("it broke")) } else { Ok(()) };
        match work {
            Work::Survey(targets) => {
                let mut look = |target| {
                    let volume = self.volume(target)?;
                    let identity = volume.id.to_string();
                    let Volume { sectors, id, member, claim, label, losses, .. } = volume.clone();
                    Ok(Found { sectors, identity, volume: id, member, claim, label, losses })
                };
                Outcome::Surveyed(targets.iter().map(&mut look).collect())
            }
            Work::Save(spec) => Outcome::Saved(fails("save").map(|()| {
                self.records.insert(spec.name.clone(), spec.encode().unwrap());
            })),
            Work::Forget(name) => Outcome::Saved(fails("forget").map(|()| drop(self.records.remove(&name)))),
            Work::Assign(members) => {
                let broken = fails("assign");
                let mut assign = |(at, (target, member)): (usize, (Target, Member))| {
                    if at > 0 {
                        broken.clone()?;
                    }
                    let volume = self.volume(&target)?;
                    assert!(volume.member.as_ref().is_none_or(|old| old.id == member.id));
                    if volume.member.is_none() {
                        volume.label = None;
                    }
                    volume.member = Some(member);
                    Ok(Enlisted { volume: volume.id, blank: volume.blank })
                };
                Outcome::Assigned(members.into_iter().enumerate().map(&mut assign).collect())
            }
            Work::Free(array, targets) => {
                Outcome::Each(targets.iter().map(|target| self.free(target, array)).collect())
            }
            Work::Claim(array, epoch, targets) => {
                let broken = fails("claim");
                self.owners += 1;
                let claim = Claim { epoch, owner: Id([self.owners; 16]), host: self.host };
                let stored = self.records.values().any(|bytes| {
                    ArraySpec::decode("a", bytes).is_ok_and(|spec| spec.id == array && spec.epoch == epoch)
                });
                assert!(stored, "the epoch is durable first");
                let mut take = |(at, (target, _)): (usize, &(Target, u64))| {
                    // It breaks halfway.
                    if at > 0 {
                        broken.clone()?;
                    }
                    self.claim(target, array, claim)
                };
                Outcome::Claimed(claim, targets.iter().enumerate().map(&mut take).collect())
            }
            Work::Label(array, claim, labels) => {
                let broken = fails("label");
                let mut put = |(at, (target, text)): (usize, &(Target, String))| {
                    if at > 0 {
                        broken.clone()?;
                    }
                    let volume = self.volume(target)?;
                    if volume.claim != Some(claim) || volume.member.as_ref().is_none_or(|member| member.id != array) {
                        return Err(Refusal::new(Errno::EBADE, "fenced"));
                    }
                    volume.label = Some(text.clone());
                    Ok(())
                };
                Outcome::Each(labels.iter().enumerate().map(&mut put).collect())
            }
            Work::Regroup(spec, claim, labels) => self.regroup(&spec, claim, labels),
            Work::Make(target, bytes) => Outcome::Each(vec![fails("make").and_then(|()| self.make(&target, bytes))]),
            Work::Join(array, claim, targets) => {
                let broken = fails("join");
                let mut take =
                    |(target, _): &(Target, u64)| broken.clone().and_then(|()| self.claim(target, array, claim));
                Outcome::Each(targets.iter().map(&mut take).collect())
            }
            Work::Discard(array, targets) => {
                let broken = fails("discard");
                let mut discard = |(target, remove): &(Target, bool)| {
                    broken.clone()?;
                    self.free(target, array)?;
                    if *remove {
                        self.volumes.remove(&target.to_string());
                    }
                    Ok(())
                };
                Outcome::Each(targets.iter().map(&mut discard).collect())
            }
            // Its first words to a server are refused.
            Work::Launch(spec, claim, _) if self.is_taken(&spec, claim) => {
                Outcome::Launched(Err(Refusal::new(Errno::EBADE, "fenced")))
            }
            Work::Launch(spec, claim, late) => Outcome::Launched(fails("launch").map(|()| {
                self.late = late.into_iter().collect();
                self.clean = spec.clean;
                self.check_launch(&spec, claim);
                self.forget_unlogged(&spec);
                self.epochs.push((spec.id, spec.epoch));
                self.running.insert(spec.name.clone(), spec.epoch);
                self.runs_on.insert(spec.name.clone(), self.host);
                let frozen = spec.nodes.iter().map(|node| node.suspend.is_some()).collect();
                self.frozen.insert(spec.name.clone(), frozen);
                "/dev/ublkb0".to_owned()
            })),
            Work::Resize(name, sectors) => {
                Outcome::Each(vec![fails("resize").and_then(|()| self.resize(&name, sectors))])
            }
            Work::Halt { name, array, how } => {
                let here = self.running.contains_key(&name) && self.runs_on.get(&name) == Some(&self.host);
                let there = here || self.left.contains(&array);
                if there && self.busy && how == Halt::Polite {
                    return Outcome::Halted(Err(Refusal::new(Errno::EBUSY, "mounted on /mnt")));
                }
                if here {
                    self.running.remove(&name);
                    self.runs_on.remove(&name);
                }
                self.left.remove(&array);
                Outcome::Halted(Ok(there && how == Halt::Polite))
            }
        }
    }
}
