//! The owner's part that moves a node of an array in use to another target: what is asked, what is recorded, how it ends.
//!
//! The order of durable things: the record with the transfer; the target made, assigned, claimed; its label; the labels of the node's
//! replicas; then the data path has it ([`Steer::Move`]). Its commit is a change of the replicas ([`super::regroup`]): record first, then
//! the target's label. What is left over, the former volume or a target that nothing came of, is a debt in the record. A transfer
//! that a daemon finds open goes on from what the record says was copied, if the claims and labels of all volumes prove that nobody else has used
//! them since ([`Kept`]); in doubt from zero, and that is durable before anything of it is touched.

use super::errand::{Errand, Next, Purpose, Step};
use super::live::After;
use super::{Array, Effect, Found, Owner, Ticket, Work, plan, replicas};
use crate::control::command::Refusal;
use crate::control::member::{MemberLabel, TransferRole};
use crate::control::migration::{MigrationState, MigrationStatus};
use crate::control::node::{Act, Migrate, Which};
use crate::control::target::{ServerAddress, Target};
use crate::control::transfer::{Debt, Kept, Moved, Stage, Transfer};
use crate::engine::steer;
use crate::engine::steer::{MoveError, Steer};
use crate::errno::Errno;
use crate::limits;
use crate::units::{Id, SECTOR_BYTES, Time, format_size};

impl Owner {
    /// A node is to move.
    pub(super) fn migrate(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        at: usize,
        migrate: &Migrate,
        (fresh, now): (Id, Time),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let invalid = |text: String| Refusal::new(Errno::EINVAL, text);
        migrate.check().map_err(invalid)?;
        array.free_of_errands(at)?;
        array.still(at)?;
        let replica = array.which_replica(at, migrate.replica)?;
        let (start, from) = (array.spec.nodes[at].start, &array.spec.nodes[at].replicas[replica]);
        if !from.state.is_in_sync() {
            let (name, word) = (&array.spec.name, from.state.word());
            let text = format!(
                "replica {replica} of node {start} ({}) is {word}: it has nothing to move. Wait until it is in sync, or 'dst replica remove {name} \
                 {start} {replica}' and add another",
                from.target
            );
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        let to = destination(array, at, &migrate.to, fresh).map_err(invalid)?;
        if from.target == to {
            return Err(invalid(format!("node {start} lives on {to} already: nothing to move")));
        }
        array.unused(&to)?;
        let (from, from_target) = (from.volume, from.target.clone());
        let number = array.spec.migrated + 1;
        let status = MigrationStatus {
            rate: migrate.rate,
            max_freeze: migrate.max_freeze,
            target_timeout: migrate.target_timeout,
            verify: migrate.verify,
            epoch: array.spec.epoch,
            begun: self.wall(now),
            size: array.spec.nodes[at].sectors * SECTOR_BYTES,
            ..MigrationStatus::new(number, fresh, start, from_target, to.clone())
        };
        let keep = migrate.keep_source.map(|keep| keep.0);
        let transfer = Transfer { status, from, to: Id::NIL, made: false, keep, stage: Stage::Open, kept: None };
        self.begin(array, at, Purpose::Move, to, Some(ticket), effects)?;
        array.live.drafts.insert(at, transfer);
        Ok(())
    }

    /// The target of a move was looked at: of a new one, or of one that is gone on with.
    pub(super) fn probed_move(
        &mut self,
        array: &mut Array,
        node: usize,
        errand: &mut Errand,
        found: Option<Result<Found, Refusal>>,
    ) -> Result<Next, Refusal> {
        let remote = matches!(errand.target, Target::Remote { .. });
        let missing = remote && matches!(&found, Some(Err(why)) if why.errno == Errno::ENOENT);
        if let Some(mut transfer) = array.live.drafts.remove(&node) {
            transfer.made = missing;
            if !missing {
                replicas::fit(array, node, &errand.target, found)?;
            }
            array.spec.migrated = transfer.status.number;
            array.spec.nodes[node].transfer = Some(transfer);
            return Ok(Next::Save(Step::Intending));
        }
        let id = array.spec.id;
        let sectors = array.spec.nodes[node].sectors;
        let Some(transfer) = &mut array.spec.nodes[node].transfer else {
            return Err(Refusal::new(Errno::ECANCELED, "it has ended"));
        };
        if missing && transfer.made && transfer.to.is_nil() {
            let bytes = transfer.status.size.next_multiple_of(limits::VOLUME_BYTES_MULTIPLE);
            return Ok(Next::Work(Step::Making, Work::Make(errand.target.clone(), bytes)));
        }
        let found = found.unwrap_or_else(|| Err(Refusal::new(Errno::EIO, "it was not asked")))?;
        // Nobody knows who has made a volume that was not there at first and is not assigned.
        transfer.made &= !transfer.to.is_nil() || found.member.as_ref().is_some_and(|member| member.id == id);
        let lost = |text: String| Err(Refusal::new(Errno::ECANCELED, text));
        if !transfer.to.is_nil() && found.volume != transfer.to {
            return lost(format!("{}: another volume is there than the one that was copied to", errand.target));
        }
        if let Some(member) = found.member.as_ref().filter(|member| member.id != id) {
            return lost(format!("{}: {}", errand.target, plan::in_use(member, &errand.target)));
        }
        if found.sectors < sectors {
            let has = format_size(found.sectors * SECTOR_BYTES);
            return lost(format!("{}: it has become too small, {has}", errand.target));
        }
        let (host, greatest, transfer_id) = (self.host, array.spec.epoch, transfer.status.id);
        let vouched = |kept: &Kept| {
            let told = is_told(id, found.label.as_deref(), transfer_id, TransferRole::Candidate);
            told && kept.is_vouched_by(found.claim.as_ref(), host, greatest)
        };
        if let Some(doubted) = transfer.kept.take_if(|kept| !vouched(kept)) {
            transfer.keep(None);
            return Ok(Next::Save(Step::Doubted(doubted)));
        }
        self.intended_again(array, node, errand)
    }

    /// The target is the array's: it is told what it is.
    pub(super) fn label_candidate(&self, array: &Array, node: usize) -> Result<Next, Refusal> {
        let bad = |bad| Refusal::new(Errno::EINVAL, format!("its label cannot be made: it is {bad}"));
        let label = MemberLabel::candidate(&array.spec, self.host, node).map_err(bad)?;
        let to = array.spec.nodes[node].transfer.as_ref().map(|transfer| transfer.status.to.clone());
        let (Some(claim), Some(to)) = (array.claim, to) else {
            return Err(Refusal::new(Errno::ECANCELED, "it has ended"));
        };
        Ok(Next::Work(Step::Labelling, Work::Label(array.spec.id, claim, vec![(to, label)])))
    }

    /// The replicas of the node are told where to look for the truth.
    pub(super) fn tell_siblings(&self, array: &Array, node: usize) -> Result<Next, Refusal> {
        let places =
            array.spec.nodes.iter().enumerate().flat_map(|(at, spec)| spec.replicas.iter().map(move |of| (at, of)));
        let told: Vec<bool> = places.map(|(at, replica)| at == node && replica.state.is_in_sync()).collect();
        let labels = array.labels(&told, self.host)?;
        let claim = array.claim.ok_or_else(|| Refusal::new(Errno::EIO, "the array has no claim"))?;
        Ok(Next::Work(Step::Telling, Work::Label(array.spec.id, claim, labels)))
    }

    /// Everything is durable: the data path moves the node.
    pub(super) fn hand_over(&mut self, array: &mut Array, node: usize) -> Result<Next, Refusal> {
        let spec = &mut array.spec.nodes[node];
        let Some(transfer) = &mut spec.transfer else { return Err(Refusal::new(Errno::ECANCELED, "it has ended")) };
        transfer.status.why = None;
        let from = transfer.goes_on_from().map(|kept| kept.below);
        transfer.status.resumed = from.map(|from| from.0 * SECTOR_BYTES).or(transfer.status.resumed.map(|_| 0));
        let status = &transfer.status;
        let order = steer::Move {
            node,
            from: transfer.from,
            to: transfer.to,
            target: status.to.clone(),
            rate: status.rate,
            verify: status.verify,
            max_freeze: status.max_freeze,
            target_timeout: status.target_timeout,
            keep: transfer.keep.is_some(),
            fresh: array.live.blank.remove(&node),
            copied: from.unwrap_or_default(),
        };
        let held = spec.suspend.is_some();
        let text = format!("node {} is suspended: nothing is copied until it is resumed", spec.start);
        array.live.moving.insert(node, None);
        array.live.retries.remove(&node);
        Ok(Next::End(Some(Steer::Move(order)), held.then_some(text).into_iter().collect()))
    }

    /// A target could not be made ready. What the record has not is forgotten; what a daemon has found there is tried again,
    /// unless it can never be.
    pub(super) fn not_ready(
        &mut self,
        array: &mut Array,
        node: usize,
        mut errand: Errand,
        why: Refusal,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        array.live.drafts.remove(&node);
        let Some(transfer) = &mut array.spec.nodes[node].transfer else {
            effects.extend(errand.ticket.map(|ticket| Effect::Reply(ticket, Err(why))));
            return effects.extend(errand.abort.map(|ticket| Effect::Reply(ticket, Ok(array.answer()))));
        };
        // A volume whose making has failed may be somebody else's.
        transfer.made &= !transfer.to.is_nil();
        let started = errand.ticket.is_some();
        if !started && errand.abort.is_none() && why.errno != Errno::ECANCELED {
            transfer.status.why = Some(format!("{}; tried again", why.text));
            let tries = array.live.retries.get(&node).map_or(0, |(_, tries)| *tries);
            let wait = limits::RECONNECT_MIN * (1 << tries.min(10));
            array.live.retries.insert(node, (now.after(wait.min(limits::RECONNECT_MAX)), tries + 1));
            return;
        }
        let state = if errand.abort.is_some() { MigrationState::Aborted } else { MigrationState::Failed };
        self.conclude(array, node, state, Some(why.text.clone()), now);
        errand.step = Step::Failing(why);
        array.live.errands.insert(node, errand);
        array.live.wanted.push(After::Errand(node));
    }

    /// A move has ended.
    pub(super) fn moved(
        &mut self,
        array: &mut Array,
        node: usize,
        result: Result<steer::Moved, MoveError>,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        let Some(abort) = array.live.moving.remove(&node) else { return };
        let wall = self.wall(now);
        let Some(transfer) = &mut array.spec.nodes[node].transfer else { return };
        let start = transfer.status.node;
        match result {
            Ok(moved) => {
                transfer.status.certify(&moved, wall);
                match transfer.keep {
                    Some(keep) => {
                        transfer.status.state = MigrationState::Committed;
                        transfer.status.keep_until = Some(wall.saturating_add(keep.as_secs()));
                        array.live.keeps.insert(node, now.after(keep));
                    }
                    None => self.conclude(array, node, MigrationState::Done, None, now),
                }
                array.live.wanted.push(After::Quiet);
                let text = format!("too late: node {start} has moved already");
                effects.extend(abort.map(|ticket| Effect::Reply(ticket, Err(Refusal::new(Errno::EBUSY, text)))));
            }
            Err(error) => {
                let (state, why) = explain(error, &transfer.status);
                self.conclude(array, node, state, Some(why), now);
                array.live.wanted.push(abort.map_or(After::Quiet, After::Reply));
            }
        }
    }

    /// A transfer is over: its certificate is kept, the volume that it leaves behind is let go.
    fn conclude(&self, array: &mut Array, node: usize, state: MigrationState, why: Option<String>, now: Time) {
        let wall = self.wall(now);
        array.close_transfer(node, state, why, wall);
    }

    /// Something about a node's migration.
    pub(super) fn act(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        node: usize,
        (act, which): (Act, Which),
        (fresh, now): (Id, Time),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let (name, start) = (array.spec.name.clone(), array.spec.nodes[node].start);
        let found = array.spec.nodes[node].transfer.as_ref();
        let transfer = found.filter(|transfer| which.number.is_none_or(|number| number == transfer.status.number));
        let Some(transfer) = transfer else {
            let what = which
                .number
                .map_or_else(|| "is not moving".to_owned(), |number| format!("has no migration {number} under way"));
            let text = format!("node {start} {what}: 'dst migration list {name}' shows what there is");
            return Err(Refusal::new(Errno::ENOENT, text));
        };
        let kept = transfer.stage == Stage::Committed;
        let (number, paused) = (transfer.status.number, transfer.status.paused);
        let refuse =
            |text: String| Err(Refusal::new(Errno::EBUSY, format!("migration {number} of node {start} {text}")));
        match act {
            Act::Pause | Act::Resume | Act::Abort if kept => refuse(format!(
                "is committed: 'dst migration undo {name} {start}' moves the node back, 'release' ends the keeping"
            )),
            Act::Undo | Act::Release if !kept => refuse("is not committed: 'dst migration abort' ends it".to_owned()),
            Act::Pause if paused => refuse("is paused already".to_owned()),
            Act::Resume if !paused => refuse("is not paused".to_owned()),
            Act::Pause | Act::Resume => {
                self.pause(ticket, array, (node, act == Act::Pause), now, effects);
                Ok(())
            }
            Act::Abort => self.abort(ticket, array, node, now, effects),
            Act::Undo => self.move_back(ticket, array, node, (fresh, now)),
            Act::Release => {
                if array.live.moving.contains_key(&node) || array.live.releasing.contains_key(&node) {
                    return refuse("is being ended: try again".to_owned());
                }
                self.release(array, node, Some(ticket), effects);
                Ok(())
            }
        }
    }

    fn pause(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        (node, paused): (usize, bool),
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(transfer) = &mut array.spec.nodes[node].transfer {
            transfer.status.paused = paused;
        }
        if array.live.moving.contains_key(&node) {
            effects.push(Effect::Steer(array.spec.name.clone(), Steer::Pause { node, paused }));
        }
        array.live.wanted.push(After::Reply(ticket));
        self.go_on(array, now, effects);
    }

    fn abort(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        node: usize,
        now: Time,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let twice = || Err(Refusal::new(Errno::EBUSY, "it is being aborted already: wait"));
        match (array.live.errands.get_mut(&node), array.live.moving.get_mut(&node)) {
            (Some(errand), _) if errand.purpose == Purpose::Move => match errand.abort {
                Some(_) => return twice(),
                None => errand.abort = Some(ticket),
            },
            (_, Some(Some(_))) => return twice(),
            (_, Some(asker)) => {
                *asker = Some(ticket);
                effects.push(Effect::Steer(array.spec.name.clone(), Steer::Abort { node }));
            }
            (_, None) => {
                array.live.retries.remove(&node);
                let why = "it was asked to end".to_owned();
                self.conclude(array, node, MigrationState::Aborted, Some(why), now);
                array.live.wanted.push(After::Reply(ticket));
            }
        }
        Ok(())
    }

    /// Back to the source, which has been kept.
    fn move_back(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        node: usize,
        (fresh, now): (Id, Time),
    ) -> Result<(), Refusal> {
        array.free_of_errands(node)?;
        if array.live.moving.contains_key(&node) || array.live.releasing.contains_key(&node) {
            return Err(Refusal::new(Errno::EBUSY, "the migration is being ended: try again"));
        }
        let wall = self.wall(now);
        let number = array.spec.migrated + 1;
        let Some(former) = array.spec.nodes[node].transfer.take() else { return Ok(()) };
        let before = &former.status;
        let status = MigrationStatus {
            rate: before.rate,
            max_freeze: before.max_freeze,
            target_timeout: before.target_timeout,
            verify: before.verify,
            epoch: array.spec.epoch,
            begun: wall,
            size: before.size,
            ..MigrationStatus::new(number, fresh, before.node, before.to.clone(), before.from.clone())
        };
        let target = status.to.clone();
        let (from, to) = (former.to, former.from);
        let back = Transfer { status, from, to, made: false, keep: None, stage: Stage::Open, kept: None };
        array.spec.migrated = number;
        array.remember(MigrationStatus { state: MigrationState::Done, ..former.status });
        array.spec.nodes[node].transfer = Some(back);
        array.live.blank.remove(&node);
        array.live.keeps.remove(&node);
        let (purpose, step, volume) = (Purpose::Move, Step::Intending, former.from);
        let errand = Errand { purpose, step, target, volume, job: None, ticket: Some(ticket), abort: None };
        array.live.errands.insert(node, errand);
        array.live.wanted.push(After::Errand(node));
        Ok(())
    }

    /// The source of a migration is kept no longer.
    fn release(&mut self, array: &mut Array, node: usize, ticket: Option<Ticket>, effects: &mut Vec<Effect>) {
        let Some(transfer) = &array.spec.nodes[node].transfer else { return };
        let volume = transfer.from;
        array.live.keeps.remove(&node);
        array.live.releasing.insert(node, ticket);
        effects.push(Effect::Steer(array.spec.name.clone(), Steer::Detach { node, volume }));
    }

    /// The data path has let a volume go that was no replica: the source of a migration, which was kept.
    pub(super) fn let_go(&mut self, array: &mut Array, node: usize, volume: Id, now: Time) {
        let kept = |transfer: &Transfer| transfer.stage == Stage::Committed && transfer.from == volume;
        let ticket = array.live.releasing.remove(&node).flatten();
        if array.spec.nodes[node].transfer.as_ref().is_some_and(kept) {
            self.conclude(array, node, MigrationState::Done, None, now);
        }
        array.live.wanted.push(ticket.map_or(After::Quiet, After::Reply));
    }

    /// Goes on with transfers that the record has, and ends what has been kept long enough.
    pub(super) fn go_on(&mut self, array: &mut Array, now: Time, effects: &mut Vec<Effect>) {
        let due: Vec<usize> = array.live.keeps.iter().filter(|(_, at)| **at <= now).map(|(node, _)| *node).collect();
        for node in due {
            self.release(array, node, None, effects);
        }
        for node in 0..array.spec.nodes.len() {
            let Some(transfer) = &array.spec.nodes[node].transfer else { continue };
            let early = array.live.retries.get(&node).is_some_and(|(at, _)| *at > now);
            let busy = array.live.moving.contains_key(&node) || array.live.errands.contains_key(&node);
            if transfer.stage == Stage::Open && !transfer.status.paused && !early && !busy {
                let target = transfer.status.to.clone();
                // Nothing is under way with it, so it is not refused.
                let _ = self.begin(array, node, Purpose::Move, target, None, effects);
            }
        }
    }

    /// Ends in the record what did not outlive the data path, before the array is served again: what was committed has moved, and
    /// a source that was kept has missed writes.
    pub(super) fn settle_transfers(&self, array: &mut Array, now: Time) {
        for node in 0..array.spec.nodes.len() {
            let Some(transfer) = &array.spec.nodes[node].transfer else { continue };
            if transfer.stage == Stage::Committed {
                let why = match transfer.status.ended {
                    None => Some("dstd ended before the figures were recorded".to_owned()),
                    Some(_) => None,
                };
                self.conclude(array, node, MigrationState::Done, why, now);
            }
        }
    }
}

impl Array {
    /// A transfer is over.
    pub(super) fn close_transfer(&mut self, node: usize, state: MigrationState, why: Option<String>, wall: u64) {
        let start = self.spec.nodes[node].start;
        let Some(Transfer { mut status, from, to, made, stage, .. }) = self.spec.nodes[node].transfer.take() else {
            return;
        };
        let debt = match stage {
            Stage::Open => Debt { node: start, target: status.to.clone(), volume: to, remove: made, moved: None },
            Stage::Committed => {
                let moved = Some(Moved { id: status.id, volume: to, to: status.to.clone() });
                Debt { node: start, target: status.from.clone(), volume: from, remove: false, moved }
            }
        };
        self.spec.debts.push(debt);
        self.live.payer.hurry();
        self.live.keeps.remove(&node);
        self.live.polite.insert(node);
        if self.live.awaited.remove(&node) {
            self.live.stays.insert(node);
        }
        (status.state, status.paused) = (state, false);
        status.ended = status.ended.or(Some(wall));
        status.why = why;
        self.remember(status);
    }

    fn remember(&mut self, status: MigrationStatus) {
        self.spec.migrations.push(status);
        let many = self.spec.migrations.len().saturating_sub(limits::MIGRATIONS_KEPT);
        self.spec.migrations.drain(..many);
    }

    /// Refuses a second migration of a node.
    fn still(&self, node: usize) -> Result<(), Refusal> {
        let (name, spec) = (&self.spec.name, &self.spec.nodes[node]);
        let Some(transfer) = &spec.transfer else { return Ok(()) };
        let (start, number, to) = (spec.start, transfer.status.number, &transfer.status.to);
        let text = match transfer.stage {
            Stage::Open => format!(
                "node {start} is moving to {to} already (migration {number}): wait, or 'dst migration abort {name} {start}'"
            ),
            Stage::Committed => format!(
                "node {start} has moved to {to}, and its former target is kept (migration {number}): 'dst migration release {name} {start}' \
                 ends that, 'undo' moves it back"
            ),
        };
        Err(Refusal::new(Errno::EBUSY, text))
    }
}

impl MigrationStatus {
    /// What was measured and proven.
    fn certify(&mut self, moved: &steer::Moved, wall: u64) {
        self.regions = moved.regions;
        let before = self.resumed.unwrap_or(0);
        self.copied = moved.copied.saturating_mul(limits::REGION_BYTES).saturating_add(before).min(self.size);
        self.root = moved.root.map(|root| root.iter().map(|byte| format!("{byte:02x}")).collect());
        self.freeze_nanos = Some(moved.freeze_nanos);
        self.rolled_back = moved.rolled_back;
        self.ended = Some(wall);
        self.why = None;
    }
}

/// Whether a label says that its volume is this in a transfer.
pub(super) fn is_told(array: Id, label: Option<&str>, transfer: Id, role: TransferRole) -> bool {
    let label = label.and_then(|text| MemberLabel::decode(text).ok()).filter(|label| label.array == array);
    label.and_then(|label| label.transfer).is_some_and(|told| told.id == transfer && told.role == role)
}

/// Why a node stays where it is, in words.
fn explain(error: MoveError, status: &MigrationStatus) -> (MigrationState, String) {
    let why = match error {
        MoveError::Aborted => return (MigrationState::Aborted, "it was asked to end".to_owned()),
        MoveError::Source(lba, errno) => {
            format!("{} cannot be read at sector {lba} of the node: {}", status.from, errno.text())
        }
        MoveError::Target(errno) => {
            format!(
                "{} failed, or was too slow: {}. Nothing was lost; migrate again when it is well, or with a longer --target-timeout",
                status.to,
                errno.text()
            )
        }
        MoveError::Different(lba) => format!(
            "the two differ in the region at sector {lba} of the node, although both have had the same writes: nothing was committed. Look at the \
             disks and the memory of both machines"
        ),
        MoveError::Refused => {
            "the data path could not begin it: the node's replicas have changed. Migrate again".to_owned()
        }
    };
    (MigrationState::Failed, why)
}

/// Where a node is to go. `HOST:PORT/` alone is a new volume there.
fn destination(array: &Array, node: usize, text: &str, fresh: Id) -> Result<Target, String> {
    let server = text.strip_suffix('/').filter(|server| !server.is_empty() && !server.contains('/'));
    let Some(server) = server else { return text.parse() };
    let server: ServerAddress = server.parse()?;
    let tail = format!("-{}-{}", array.spec.nodes[node].start, &fresh.to_string()[..8]);
    let name: String = array.spec.name.chars().take(limits::NAME_BYTES_MAX - tail.len()).collect();
    Ok(Target::Remote { server, volume: format!("{name}{tail}") })
}
