//! A move that a former daemon had begun goes on where that was.

use super::*;
use crate::engine::points::Points;
use crate::engine::region::RegionState;
use crate::engine::survey::Marked;

const HALF: Lba = Lba(4096);

fn goes_on(verify: bool) -> Event {
    Event::Steer(Steer::Move(Move { copied: HALF, ..a_move(verify) }))
}

/// Whether servers would be told now that they may clean their logs.
fn cleans(bench: &Bench) -> bool {
    let shared = Shared::new(limits::TARGETS_PER_NODE_MAX, 1);
    let points: &Points = &bench.rules.view().nodes[0].overlap.as_ref().expect("several targets").points;
    for target in 0..2 {
        let mark = shared.target(target).flush_mark().expect("a new daemon has flushed nothing");
        shared.target(target).flushed(&mark);
        points.told(target, 7);
    }
    points.look(&shared, [(0, 0), (1, 1)].into_iter());
    points.to_tell(0) > 0
}

fn synced(effects: &[Effect]) -> Option<Arc<SyncMap>> {
    effects.iter().find_map(|effect| match effect {
        Effect::Sync { source: 0, map, task, .. } => {
            let fresh = matches!(task, Task::Copy { fresh: true });
            assert_eq!(fresh, !map.needs_survey(), "what is copied again may have been written");
            Some(Arc::clone(map))
        }
        _ => None,
    })
}

/// The map of the sync engine that begins for it.
fn begun(bench: &mut Bench) -> Arc<SyncMap> {
    bench.adopt();
    bench.tick(&[]);
    synced(&bench.adopt()).expect("it copies")
}

#[test]
fn it_goes_on_with_what_was_not_copied_and_what_is_marked() {
    let mut bench = Bench::new(&[Standing::InSync]);
    bench.rules.await_move(0);
    bench.tick(&[]);
    let effects = bench.tell(goes_on(true));
    assert!(matches!(effects[0], Effect::Attach { volume: NEW, logged: true, .. }), "{effects:?}");
    let map = begun(&mut bench);
    // Regions of a MiB: four of 2048 sectors.
    assert_eq!((map.needs_survey(), map.left(), map.state(1)), (true, 2, RegionState::Done));
    bench.tick(&[]);
    let mut marked = Marked::default();
    marked.add(&[(0, 1)]);
    map.mark(&marked);
    assert_eq!((map.left(), map.state(0)), (3, RegionState::Todo));
    // What is copied again is not news; what lies behind it is.
    map.keep(2);
    assert_eq!(saved(&bench.tick(&[])), None);
    map.keep(3);
    assert_eq!(saved(&bench.tick(&[])).unwrap()[1], (NEW, Standing::Candidate { from: Lba(6144) }));
    bench.tell(Event::Saved(Saved::All));
    assert_eq!(bench.rules.role(1), Role::Syncing);
    let effects = bench.tell(Event::Synced { node: 0, result: Ok(Copied { regions: 2, root: None }) });
    // All of it is compared, also what was compared before.
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Sync { task: Task::Verify, .. })), "{effects:?}");
}

#[test]
fn no_log_is_cleaned_before_its_destination_is_back_or_it_is_over() {
    let mut bench = Bench::new(&[Standing::InSync; 2]);
    assert!(cleans(&bench));
    bench.rules.await_move(0);
    assert!(!cleans(&bench), "from the first flush on");
    assert!(bench.rules.view().logs_copies(1), "what one is copied, the third one would not know");
    bench.tick(&[]);
    bench.adopt();
    assert!(!cleans(&bench));
    // It comes back: it is one of them.
    bench.tell(goes_on(false));
    assert!(!bench.rules.view().nodes[0].awaits && !cleans(&bench));
    // It is left, and until that is durable nothing has changed.
    bench.tell(Event::Steer(Steer::Abort { node: 0 }));
    let effects = bench.adopt();
    assert_eq!(saved(&effects).unwrap()[2], (NEW, Standing::Absent));
    assert!(!cleans(&bench));
    bench.tell(Event::Saved(Saved::All));
    assert!(moved(&bench.adopt()).is_some() && cleans(&bench));
    // Or it never comes.
    let mut bench = Bench::new(&[Standing::InSync; 2]);
    bench.rules.await_move(0);
    bench.tick(&[]);
    // An order that cannot be begun does not end it: the record still has it.
    let strange = Move { from: Id([77; 16]), ..a_move(true) };
    assert_eq!(moved(&bench.tell(Event::Steer(Steer::Move(strange)))), Some(Err(MoveError::Refused)));
    assert!(!cleans(&bench));
    bench.tell(Event::Steer(Steer::Stay { node: 0 }));
    assert!(cleans(&bench) && !bench.rules.view().nodes[0].awaits);
    bench.tell(Event::Steer(Steer::Stay { node: 7 }));
}

#[test]
fn it_waits_for_a_source_that_is_behind_after_a_death() {
    let volumes = vec![volume(0), volume(1)];
    let view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[volumes], Epoch(1));
    let view = view.with_spares(limits::TARGETS_PER_NODE_MAX);
    let rules = Replicas::new(view, &[Standing::InSync; 2], false);
    let mut bench = Bench { rules, now: Time(1_000_000_000) };
    bench.rules.await_move(0);
    bench.tick(&[]);
    // The first one is gone by, and the second one moves.
    let order = Move { from: volume(1), copied: HALF, ..a_move(false) };
    assert_eq!(moved(&bench.tell(Event::Steer(Steer::Move(order)))), None);
    bench.tell(Event::Saved(Saved::All));
    bench.adopt();
    bench.tick(&[]);
    bench.adopt();
    assert_eq!([0, 1, 2].map(|of| bench.rules.role(of)), [Role::InSync, Role::Syncing, Role::Stale]);
    assert!(bench.rules.view().logs_copies(1));
    bench.tell(Event::Synced { node: 0, result: Ok(Copied { regions: 1, root: None }) });
    bench.tell(Event::Saved(Saved::All));
    bench.adopt();
    bench.tick(&[]);
    let effects = bench.adopt();
    let begins = |effect: &Effect| matches!(effect, Effect::Sync { source: 1, target: 2, .. });
    assert!(effects.iter().any(begins), "{effects:?}");
    assert_eq!([0, 1, 2].map(|of| bench.rules.role(of)), [Role::InSync, Role::InSync, Role::Syncing]);
}

#[test]
fn what_was_mirrored_is_known_to_have_everything() {
    // Moving back is the same: the one that was kept has everything once it is flushed.
    let mut bench = Bench::new(&[Standing::InSync]);
    bench.tick(&[]);
    bench.tell(Event::Steer(Steer::Move(a_move(false))));
    let map = begun(&mut bench);
    (0..map.regions()).for_each(|region| map.set(region, RegionState::Done));
    map.keep(map.regions());
    let effects = bench.tell(Event::Synced { node: 0, result: Ok(Copied { regions: 4, root: None }) });
    assert_eq!(saved(&effects).unwrap()[1], (NEW, Standing::Candidate { from: Lba(SECTORS) }));
    let mut bench = Bench::new(&[Standing::InSync]);
    bench.tick(&[]);
    bench.tell(Event::Steer(Steer::Move(Move { copied: Lba(SECTORS), ..a_move(false) })));
    let map = begun(&mut bench);
    assert_eq!((map.left(), map.needs_survey()), (0, true));
}
