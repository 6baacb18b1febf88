//! The rules of replicas, suspends and moves, one by one, where the simulator would need luck to see one broken.

use super::*;
use crate::engine::scrub::Repair;
use crate::engine::steer::{Move, MoveError, Moved, ScrubError, ScrubOrder, ScrubWait, Scrubbed};
use crate::engine::view::Gate;
use crate::geometry::map::Geometry;
use crate::units::Epoch;

mod late;
mod resume;

const SECTORS: u64 = 8192;
const NEW: Id = Id([9; 16]);

fn volume(number: usize) -> Id {
    Id([u8::try_from(number + 1).unwrap(); 16])
}

/// One node, and whoever performs what its rules decide; all its targets can be asked.
struct Bench {
    rules: Replicas,
    now: Time,
}

impl Bench {
    fn new(standings: &[Standing]) -> Bench {
        let volumes = (0..standings.len()).map(volume).collect::<Vec<_>>();
        let view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[volumes], Epoch(1));
        let view = view.with_spares(limits::TARGETS_PER_NODE_MAX);
        Bench { rules: Replicas::new(view, standings, true), now: Time(1_000_000_000) }
    }

    fn tell(&mut self, event: Event) -> Vec<Effect> {
        self.rules.handle(event, self.now);
        std::iter::from_fn(|| self.rules.poll()).collect()
    }

    /// All targets but these can be asked.
    fn tick(&mut self, silent: &[usize]) -> Vec<Effect> {
        let targets = self.rules.view().targets.len();
        self.tell(Event::Tick((0..targets).map(|target| !silent.contains(&target)).collect()))
    }

    /// Every shard works from the view that was published last.
    fn adopt(&mut self) -> Vec<Effect> {
        let version = self.rules.view().version;
        self.tell(Event::Adopted { node: 0, version })
    }

    fn gate(&self) -> Gate {
        self.rules.view().nodes[0].gate
    }
}

fn a_move(verify: bool) -> Move {
    let max_freeze = Duration::from_millis(50);
    let (target, target_timeout) = (Target::Local("/new".into()), Duration::from_millis(700));
    let (node, from, to) = (0, volume(0), NEW);
    let (keep, fresh, copied) = (false, true, Lba(0));
    Move { node, from, to, target, rate: 0, verify, max_freeze, target_timeout, keep, fresh, copied }
}

fn saved(effects: &[Effect]) -> Option<Vec<(Id, Standing)>> {
    effects.iter().find_map(|effect| if let Effect::Save(standings) = effect { Some(standings.clone()) } else { None })
}

fn ticket(effects: &[Effect]) -> u64 {
    let flush = |effect: &Effect| if let Effect::Flush { ticket, .. } = effect { Some(*ticket) } else { None };
    effects.iter().find_map(flush).expect("a flush")
}

fn moved(effects: &[Effect]) -> Option<Result<Moved, MoveError>> {
    effects.iter().find_map(|effect| match effect {
        Effect::Tell(News::Moved { result, .. }) => Some(result.clone()),
        _ => None,
    })
}

/// A node with one replica in sync and a stale one that cannot be asked, moving, everything copied.
fn copied() -> (Bench, Vec<Effect>) {
    copied_beside(Standing::Stale)
}

fn copied_beside(other: Standing) -> (Bench, Vec<Effect>) {
    let mut bench = Bench::new(&[Standing::InSync, other]);
    bench.tick(&[1]);
    let effects = bench.tell(Event::Steer(Steer::Move(a_move(false))));
    assert!(matches!(effects[0], Effect::Attach { volume: NEW, .. }), "{effects:?}");
    bench.adopt();
    bench.tick(&[1]);
    let effects = bench.adopt();
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Sync { source: 0, .. })), "{effects:?}");
    let effects = bench.tell(Event::Synced { node: 0, result: Ok(Copied { regions: 4, root: None }) });
    (bench, effects)
}

#[test]
fn the_one_that_has_everything_is_kept() {
    for lost in 0..2 {
        let mut bench = Bench::new(&[Standing::InSync, Standing::InSync]);
        let shared = Shared::new(limits::TARGETS_PER_NODE_MAX, 1);
        for target in 0..2 {
            shared.target(target).begin(Losses { told: 3, lost: target == lost });
        }
        bench.rules.look_at_losses(&shared);
        // The other one does not answer.
        bench.tick(&[1 - lost]);
        bench.tell(Event::Report(Report::Failed { target: 1 - lost, errno: Errno::ETIMEDOUT }));
        let expected = if lost == 0 { [Role::Leaving, Role::InSync] } else { [Role::InSync, Role::Leaving] };
        assert_eq!([bench.rules.role(0), bench.rules.role(1)], expected);
        assert!(bench.rules.losses(&shared).iter().all(|(_, losses)| !losses.lost), "it is no loss");
    }
    // Both have lost something: one of them stays, and says so.
    let mut bench = Bench::new(&[Standing::InSync, Standing::InSync]);
    let shared = Shared::new(limits::TARGETS_PER_NODE_MAX, 1);
    (0..2).for_each(|target| shared.target(target).begin(Losses { told: 3, lost: true }));
    bench.rules.look_at_losses(&shared);
    bench.tick(&[]);
    assert_eq!([bench.rules.role(0), bench.rules.role(1)], [Role::InSync, Role::Leaving]);
    let kept: Vec<bool> = bench.rules.losses(&shared).iter().map(|(_, losses)| losses.lost).collect();
    assert_eq!(kept, [true, false]);
    assert!(!bench.rules.is_clean(&shared));
    let effects = bench.tell(Event::Steer(Steer::AcceptLoss { node: 0 }));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Forgive { target: 0 })), "{effects:?}");
}

#[test]
fn what_was_lost_before_everything_was_copied_is_not_held_against_a_replica() {
    let mut bench = Bench::new(&[Standing::InSync, Standing::Stale]);
    let shared = Shared::new(limits::TARGETS_PER_NODE_MAX, 1);
    shared.target(1).begin(Losses { told: 3, lost: true });
    bench.rules.look_at_losses(&shared);
    shared.target(1).forget_loss();
    bench.tick(&[]);
    bench.tell(Event::Saved(Saved::All));
    bench.adopt();
    bench.tell(Event::Synced { node: 0, result: Ok(Copied { regions: 4, root: None }) });
    bench.tell(Event::Saved(Saved::All));
    bench.adopt();
    assert_eq!([bench.rules.role(0), bench.rules.role(1)], [Role::InSync; 2]);
    // Before the owner has looked again.
    bench.tell(Event::Report(Report::Failed { target: 0, errno: Errno::EIO }));
    assert_eq!([bench.rules.role(0), bench.rules.role(1)], [Role::Leaving, Role::InSync]);
}

#[test]
fn what_is_left_is_not_recorded_while_a_copy_still_reads_from_it() {
    let mut bench = Bench::new(&[Standing::InSync, Standing::InSync, Standing::Stale]);
    bench.tick(&[]);
    let effects = bench.adopt();
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Sync { source: 0, target: 2, .. })), "{effects:?}");
    let effects = bench.tell(Event::Report(Report::Failed { target: 0, errno: Errno::EIO }));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::StopSync { .. })), "{effects:?}");
    // Else the write that it missed would be over, its region free, and copied from the one that lacks it.
    assert_eq!(saved(&bench.adopt()), None);
    let standings = saved(&bench.tell(Event::Synced { node: 0, result: Err(CopyError::Stopped) }));
    assert_eq!(standings.unwrap()[0], (volume(0), Standing::Stale));
    assert_eq!(bench.rules.role(2), Role::Syncing, "it goes on from the other one");
}

#[test]
fn a_move_is_recorded_when_nothing_is_in_flight_and_all_is_flushed() {
    let (mut bench, effects) = copied();
    let patience = |bench: &Bench| bench.rules.view().target_timeout(0);
    assert_eq!((bench.gate(), patience(&bench)), (Gate::Open, a_move(false).target_timeout));
    bench.tell(Event::Flushed { ticket: ticket(&effects), durable: true });
    assert_eq!(bench.gate(), Gate::Closing);
    let effects = bench.adopt();
    assert_eq!(saved(&effects), None);
    let effects = bench.tell(Event::Flushed { ticket: ticket(&effects), durable: true });
    let filled = Standing::Filling { from: Lba(0) };
    // What the stale one lacks, the log of the one that goes knew.
    let expected = vec![(volume(0), Standing::Absent), (volume(1), filled), (NEW, Standing::InSync)];
    assert_eq!((saved(&effects), moved(&effects), bench.gate()), (Some(expected), None, Gate::Closing));
    let effects = bench.tell(Event::Saved(Saved::All));
    assert!(matches!(moved(&effects), Some(Ok(Moved { copied: 4, .. }))), "{effects:?}");
    assert_eq!((bench.rules.role(0), bench.rules.role(2), bench.gate()), (Role::Absent, Role::InSync, Gate::Open));
    assert_eq!(patience(&bench), limits::TARGET_TIMEOUT, "for whatever is filled next");
}

#[test]
fn a_cut_over_that_takes_too_long_is_rolled_back_and_a_late_flush_commits_nothing() {
    let (mut bench, effects) = copied();
    bench.tell(Event::Flushed { ticket: ticket(&effects), durable: true });
    let late = ticket(&bench.adopt());
    bench.now = bench.now.after(Duration::from_millis(50));
    bench.tick(&[1]);
    assert_eq!((bench.gate(), bench.rules.role(2)), (Gate::Open, Role::Syncing));
    let effects = bench.tell(Event::Flushed { ticket: late, durable: true });
    assert_eq!((saved(&effects), bench.gate()), (None, Gate::Open));
    bench.now = bench.now.after(limits::CUT_OVER_RETRY_MIN);
    ticket(&bench.tick(&[1]));
    assert_eq!(bench.rules.move_shown(0).unwrap().rolled_back, 1);
}

#[test]
fn one_move_at_a_time_and_a_refused_one_attaches_nothing() {
    let (mut bench, _) = copied();
    let other = Move { to: Id([8; 16]), ..a_move(true) };
    let effects = bench.tell(Event::Steer(Steer::Move(other)));
    assert_eq!(moved(&effects), Some(Err(MoveError::Refused)));
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Attach { .. })), "{effects:?}");
}

#[test]
fn a_volume_that_cannot_be_attached_ends_its_move() {
    let mut bench = Bench::new(&[Standing::InSync]);
    bench.tick(&[]);
    let effects = bench.tell(Event::Steer(Steer::Move(a_move(true))));
    let Effect::Attach { target, .. } = effects[0] else { panic!("{effects:?}") };
    bench.tell(Event::NotAttached { target, errno: Errno::ENOENT });
    let effects = bench.adopt();
    assert_eq!(saved(&effects).unwrap()[1], (NEW, Standing::Absent));
    bench.tell(Event::Saved(Saved::All));
    let effects = bench.adopt();
    assert_eq!(moved(&effects), Some(Err(MoveError::Target(Errno::ENOENT))));
    assert!(bench.rules.view().is_single(0));
}

#[test]
fn a_suspended_node_is_flushed_when_nothing_can_be_sent_any_more() {
    let mut bench = Bench::new(&[Standing::InSync]);
    bench.tick(&[]);
    let effects = bench.tell(Event::Steer(Steer::Freeze { node: 0 }));
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Flush { .. })), "{effects:?}");
    bench.adopt();
    assert_eq!(bench.gate(), Gate::Frozen);
    let ticket = ticket(&bench.adopt());
    let effects = bench.tell(Event::Flushed { ticket, durable: true });
    let frozen = |effect: &Effect| matches!(effect, Effect::Tell(News::Frozen { node: 0, flushed: true }));
    assert!(effects.iter().any(frozen), "{effects:?}");
}

#[test]
fn what_is_left_is_recorded_when_a_copy_reads_no_more_although_it_still_writes() {
    let mut bench = Bench::new(&[Standing::InSync, Standing::InSync, Standing::Stale]);
    bench.tick(&[]);
    bench.adopt();
    bench.tell(Event::Report(Report::Failed { target: 0, errno: Errno::EIO }));
    bench.adopt();
    // Its target may be one that does not answer, either: then the end of the copy is far.
    let standings = saved(&bench.tell(Event::SourceLeft { node: 0 }));
    assert_eq!(standings.unwrap()[0], (volume(0), Standing::Stale));
}

#[test]
fn what_joins_waits_for_what_leaves() {
    let mut bench = Bench::new(&[Standing::InSync, Standing::InSync, Standing::Stale]);
    bench.tick(&[]);
    bench.adopt();
    bench.tell(Event::Report(Report::Failed { target: 1, errno: Errno::EIO }));
    let effects = bench.tell(Event::Synced { node: 0, result: Ok(Copied { regions: 4, root: None }) });
    assert_eq!(saved(&effects), None, "a shard may still read what is left");
    let left = vec![(volume(0), Standing::InSync), (volume(1), Standing::Stale), (volume(2), Standing::Stale)];
    assert_eq!(saved(&bench.adopt()), Some(left));
    bench.tell(Event::Saved(Saved::All));
    let joined = vec![(volume(0), Standing::InSync), (volume(1), Standing::Stale), (volume(2), Standing::InSync)];
    assert_eq!(saved(&bench.adopt()), Some(joined));
}

fn order(repair: Repair) -> Event {
    Event::Steer(Steer::Scrub(ScrubOrder { node: 0, repair, rate: 0 }))
}

fn begins(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Sync { task: Task::Scrub(_), .. }))
}

fn stops(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::StopSync { .. }))
}

fn scrubbed(effects: &[Effect]) -> Option<Scrubbed> {
    effects.iter().find_map(|effect| match effect {
        Effect::Tell(News::Scrubbed { scrubbed, .. }) => Some(scrubbed.clone()),
        _ => None,
    })
}

/// A node with so many replicas in sync, that is being scrubbed.
fn scrubbing(replicas: usize, repair: Repair) -> Bench {
    let mut bench = Bench::new(&vec![Standing::InSync; replicas]);
    bench.tick(&[]);
    assert!(!begins(&bench.tell(order(repair))), "not before every shard knows its windows");
    assert!(begins(&bench.adopt()));
    bench
}

const STOPPED: Event = Event::Synced { node: 0, result: Err(CopyError::Stopped) };

fn waits(bench: &Bench) -> Option<ScrubWait> {
    bench.rules.scrub_shown(0).expect("a scrub").waits
}

#[test]
fn a_scrub_makes_way_for_a_suspend_and_goes_on_where_it_was() {
    let mut bench = scrubbing(2, Repair::No);
    let map = bench.rules.scrub_shown(0).unwrap().map;
    assert!(stops(&bench.tell(Event::Steer(Steer::Freeze { node: 0 }))));
    bench.tell(STOPPED);
    assert_eq!((bench.gate(), waits(&bench)), (Gate::Draining, Some(ScrubWait::Suspended)));
    bench.adopt();
    let tickets: Vec<u64> = bench
        .adopt()
        .iter()
        .filter_map(|effect| match effect {
            Effect::Flush { ticket, .. } => Some(*ticket),
            _ => None,
        })
        .collect();
    for ticket in tickets {
        bench.tell(Event::Flushed { ticket, durable: true });
    }
    assert_eq!(bench.rules.freeze_state(0), FreezeState::Frozen);
    let effects = bench.tell(Event::Steer(Steer::Thaw { node: 0 }));
    assert!(begins(&effects) || begins(&bench.adopt()));
    assert!(Arc::ptr_eq(&map, &bench.rules.scrub_shown(0).unwrap().map), "what was compared was");
    let effects = bench.tell(Event::Synced { node: 0, result: Ok(Copied { regions: 4, root: None }) });
    assert_eq!(scrubbed(&effects).unwrap().error, None);
    bench.adopt();
    assert!(bench.rules.view().nodes[0].sync.is_none() && bench.rules.is_idle());
}

#[test]
fn what_was_left_is_compared_from_the_beginning_and_not_recorded_before_the_comparison_has_ended() {
    let mut bench = scrubbing(2, Repair::No);
    let map = bench.rules.scrub_shown(0).unwrap().map;
    assert!(stops(&bench.tell(Event::Report(Report::Failed { target: 1, errno: Errno::EIO }))));
    // Else a write that it missed would be over, and its region look different.
    assert_eq!(saved(&bench.adopt()), None);
    assert_eq!(saved(&bench.tell(STOPPED)).unwrap()[1], (volume(1), Standing::Stale));
    bench.tell(Event::Saved(Saved::All));
    bench.adopt();
    bench.tick(&[]);
    let effects = bench.adopt();
    assert_eq!((bench.rules.role(1), waits(&bench)), (Role::Syncing, Some(ScrubWait::Syncing)));
    assert!(!begins(&effects) && effects.iter().any(|effect| matches!(effect, Effect::Sync { .. })), "{effects:?}");
    bench.tell(Event::Synced { node: 0, result: Ok(Copied { regions: 4, root: None }) });
    bench.tell(Event::Saved(Saved::All));
    bench.adopt();
    bench.tick(&[]);
    assert!(begins(&bench.adopt()));
    assert!(!Arc::ptr_eq(&map, &bench.rules.scrub_shown(0).unwrap().map));
}

#[test]
fn a_scrub_waits_for_two_and_for_the_one_to_go_by() {
    let mut bench = Bench::new(&[Standing::InSync, Standing::Stale, Standing::InSync]);
    bench.tick(&[1, 2]);
    bench.tell(order(Repair::No));
    assert_eq!(waits(&bench), Some(ScrubWait::Unreachable));
    bench.tell(Event::Steer(Steer::EndScrub { node: 0 }));
    bench.tell(order(Repair::From(volume(1))));
    assert_eq!(waits(&bench), Some(ScrubWait::NotInSync));
    assert_eq!(
        scrubbed(&bench.tell(Event::Steer(Steer::EndScrub { node: 0 }))).unwrap().error,
        Some(ScrubError::Aborted)
    );
    bench.tell(order(Repair::Majority));
    assert_eq!(waits(&bench), Some(ScrubWait::NotInSync));
    bench.tell(Event::Steer(Steer::EndScrub { node: 0 }));
    let effects = bench.tell(order(Repair::From(NEW)));
    assert_eq!(scrubbed(&effects).unwrap().error, Some(ScrubError::SourceGone));
    let mut bench = Bench::new(&[Standing::InSync]);
    bench.tick(&[]);
    assert_eq!(scrubbed(&bench.tell(order(Repair::No))).unwrap().error, Some(ScrubError::Alone));
}

#[test]
fn a_replica_that_cannot_be_put_right_is_left_and_filled_from_the_beginning() {
    let mut bench = scrubbing(2, Repair::From(volume(0)));
    let result = Err(CopyError::Repair(1, Errno::EIO));
    let effects = bench.tell(Event::Synced { node: 0, result });
    assert_eq!(scrubbed(&effects).unwrap().error, Some(ScrubError::Repair(volume(1), Errno::EIO)));
    assert_eq!(bench.rules.role(1), Role::Leaving);
    assert_eq!(saved(&bench.adopt()).unwrap()[1], (volume(1), Standing::Filling { from: Lba(0) }));
}

#[test]
fn who_is_to_know_of_a_death_may_die_before() {
    let mut bench = Bench::new(&[Standing::InSync; 3]);
    bench.tick(&[]);
    bench.tell(Event::Report(Report::Failed { target: 2, errno: Errno::EIO }));
    assert!(saved(&bench.adopt()).is_some());
    // It is in the record, and the second one cannot be told.
    let effects = bench.tell(Event::Saved(Saved::AllBut(vec![volume(1)])));
    assert_eq!(bench.rules.role(2), Role::Leaving, "a write that it missed is not over");
    assert!(effects.is_empty(), "not before it is tried again: {effects:?}");
    bench.tell(Event::Saved(Saved::Nothing));
    bench.tell(Event::Saved(Saved::All));
    assert_eq!([1, 2].map(|target| bench.rules.role(target)), [Role::Leaving; 2], "shards may still read it");
    let standings = saved(&bench.adopt()).unwrap();
    assert_eq!(
        standings[..3].iter().map(|(_, standing)| *standing).collect::<Vec<_>>(),
        [Standing::InSync, Standing::Stale, Standing::Stale]
    );
    bench.tell(Event::Saved(Saved::All));
    assert_eq!([0, 1, 2].map(|target| bench.rules.role(target)), [Role::InSync, Role::Stale, Role::Stale]);
    // The last one is never left: it is waited for.
    let mut bench = Bench::new(&[Standing::InSync; 2]);
    bench.tick(&[]);
    bench.tell(Event::Report(Report::Failed { target: 1, errno: Errno::EIO }));
    bench.adopt();
    bench.tell(Event::Saved(Saved::AllBut(vec![volume(0)])));
    assert!(saved(&bench.tell(Event::Saved(Saved::Nothing))).is_some());
    assert_eq!([bench.rules.role(0), bench.rules.role(1)], [Role::InSync, Role::Leaving]);
}

#[test]
fn a_node_that_cannot_be_recorded_holds_up_no_other() {
    let volumes = [vec![volume(0), volume(1)], vec![volume(2), volume(3)]];
    let view = View::new(Geometry::linear(&[SECTORS; 2]).unwrap(), &volumes, Epoch(1));
    let mut bench = Bench { rules: Replicas::new(view, &[Standing::InSync; 4], true), now: Time(1_000_000_000) };
    bench.tick(&[]);
    for target in [1, 3] {
        bench.tell(Event::Report(Report::Failed { target, errno: Errno::EIO }));
    }
    let version = bench.rules.view().version;
    bench.tell(Event::Adopted { node: 0, version });
    // What is being saved knows of the first node only.
    bench.tell(Event::Saved(Saved::AllBut(vec![volume(0)])));
    bench.tell(Event::Adopted { node: 1, version });
    assert!(saved(&bench.tell(Event::Saved(Saved::Nothing))).is_some());
    bench.tell(Event::Saved(Saved::AllBut(vec![volume(0)])));
    assert_eq!([1, 3].map(|target| bench.rules.role(target)), [Role::Leaving, Role::Stale]);
    bench.tell(Event::Saved(Saved::Nothing));
    bench.tell(Event::Saved(Saved::All));
    assert_eq!(bench.rules.role(1), Role::Stale);
}

#[test]
fn a_third_one_that_fails_at_the_commit_of_a_move_is_left() {
    let mut bench = Bench::new(&[Standing::InSync; 2]);
    bench.tick(&[]);
    bench.tell(Event::Steer(Steer::Move(a_move(false))));
    bench.adopt();
    bench.tick(&[]);
    bench.adopt();
    let effects = bench.tell(Event::Synced { node: 0, result: Ok(Copied { regions: 4, root: None }) });
    bench.tell(Event::Flushed { ticket: ticket(&effects), durable: true });
    let effects = bench.adopt();
    let effects = bench.tell(Event::Flushed { ticket: ticket(&effects), durable: true });
    assert!(saved(&effects).is_some());
    bench.tell(Event::Saved(Saved::AllBut(vec![volume(1), NEW])));
    bench.tell(Event::Saved(Saved::Nothing));
    bench.tell(Event::Saved(Saved::All));
    assert_eq!((bench.rules.role(1), bench.gate()), (Role::Leaving, Gate::Closing));
    let standings = saved(&bench.adopt()).unwrap();
    let new = bench.rules.slot(0, NEW).unwrap();
    let standing = |of: usize| standings.iter().find(|(id, _)| *id == bench.rules.view().targets[of].volume).unwrap().1;
    // Its marks are with the one that goes.
    assert_eq!([0, 1, new].map(standing), [Standing::Absent, Standing::Filling { from: Lba(0) }, Standing::InSync]);
    assert!(matches!(moved(&bench.tell(Event::Saved(Saved::All))), Some(Ok(_))));
    assert_eq!((bench.rules.role(new), bench.gate()), (Role::InSync, Gate::Open));
}

#[test]
fn a_source_that_is_slow_is_asked_again_and_not_for_ever() {
    let slow = || Event::Synced { node: 0, result: Err(CopyError::Source(Lba(0), Errno::ETIMEDOUT)) };
    let begun = || {
        let mut bench = Bench::new(&[Standing::InSync]);
        bench.tick(&[]);
        bench.tell(Event::Steer(Steer::Move(a_move(false))));
        bench.adopt();
        bench.tick(&[]);
        bench.adopt();
        bench
    };
    let again = |effects: &[Effect]| effects.iter().any(|effect| matches!(effect, Effect::Sync { source: 0, .. }));
    // Those who wait for its region go first.
    let spared = |bench: &mut Bench| {
        assert!(!again(&bench.tell(slow())));
        bench.now = bench.rules.next_timeout();
        again(&bench.tick(&[]))
    };
    let mut bench = begun();
    for _ in 1..limits::SOURCE_TRIES {
        assert!(spared(&mut bench));
    }
    // It gets on a little: all tries are its own again.
    let map = bench.rules.view().nodes[0].sync.clone().unwrap();
    map.set(0, crate::engine::region::RegionState::Done);
    for _ in 1..limits::SOURCE_TRIES {
        assert!(spared(&mut bench));
    }
    bench.tell(slow());
    bench.adopt();
    bench.tell(Event::Saved(Saved::All));
    assert_eq!(moved(&bench.adopt()), Some(Err(MoveError::Source(Lba(0), Errno::ETIMEDOUT))));
    // One that is not there is not waited for.
    let mut bench = begun();
    bench.tick(&[0]);
    assert!(!again(&bench.tell(slow())));
    assert!(
        bench
            .rules
            .move_shown(0)
            .is_some_and(|shown| shown.phase == crate::control::migration::MigrationState::Preparing)
    );
}

#[test]
fn nothing_is_read_before_it_is_durable_which_one_is_gone_by() {
    let volumes = vec![volume(0), volume(1)];
    let view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[volumes], Epoch(1));
    let begun =
        || Bench { rules: Replicas::new(view.clone(), &[Standing::InSync; 2], false), now: Time(1_000_000_000) };
    let mut bench = begun();
    assert_eq!(bench.gate(), Gate::Undecided, "from the first request on");
    assert!(saved(&bench.tick(&[])).is_some());
    bench.tell(Event::Saved(Saved::Nothing));
    assert_eq!(bench.gate(), Gate::Undecided);
    bench.tell(Event::Saved(Saved::All));
    assert_eq!((bench.gate(), bench.rules.role(1)), (Gate::Open, Role::Stale));
}

#[test]
fn a_suspend_that_was_on_is_on_whatever_else_happens_first() {
    let view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[vec![volume(0), volume(1)]], Epoch(1));
    for clean in [false, true] {
        let rules = Replicas::new(view.clone(), &[Standing::InSync; 2], clean);
        let mut bench = Bench { rules, now: Time(1_000_000_000) };
        bench.rules.begin_frozen(0);
        assert_eq!(bench.gate(), Gate::Frozen, "from the first request on");
        // A view that is about something else does not open it.
        bench.tell(Event::Report(Report::Failed { target: 1, errno: Errno::EIO }));
        let mut gates = vec![bench.gate()];
        for _ in 0..20 {
            bench.tick(&[]);
            bench.tell(Event::Saved(Saved::All));
            let effects = bench.adopt();
            gates.push(bench.gate());
            for effect in effects {
                if let Effect::Flush { ticket, .. } = effect {
                    bench.tell(Event::Flushed { ticket, durable: true });
                }
            }
        }
        assert!(gates.iter().all(|gate| matches!(gate, Gate::Frozen | Gate::Draining)), "{gates:?}");
        assert_eq!(bench.rules.freeze_state(0), FreezeState::Frozen);
    }
}

#[test]
fn beside_a_volume_that_comes_what_was_filled_is_filled_anew() {
    for other in [Standing::Stale, Standing::Filling { from: Lba(4096) }] {
        let (mut bench, effects) = copied_beside(other);
        bench.tell(Event::Flushed { ticket: ticket(&effects), durable: true });
        let effects = bench.adopt();
        let effects = bench.tell(Event::Flushed { ticket: ticket(&effects), durable: true });
        let standings = saved(&effects).unwrap();
        assert_eq!(standings[1], (volume(1), Standing::Filling { from: Lba(0) }), "{other:?}");
    }
}
