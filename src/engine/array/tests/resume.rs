//! A transfer that a daemon finds open goes on from what was copied, or, in doubt, from zero. The world knows what the destination really has.

use super::path::{Fate, Path, reboot, tidy};
use super::suspend::node;
use super::transfer::{TO, act, lives_on, migrate, ready, under_way};
use super::*;
use crate::control::migration::MigrationState;
use crate::control::node::{Act, NodeAsk, Suspend};

const BELOW: u64 = 512;

/// A node that moves, of which so much is copied and flushed.
fn half() -> (World, Daemon, Path) {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    path.keep(&world, 1, BELOW);
    path.settle(&mut daemon, &mut world);
    (world, daemon, path)
}

/// From where the moves went on that data paths were given.
fn handed(daemon: &Daemon) -> Vec<u64> {
    let copied = |steer: &Steer| if let Steer::Move(order) = steer { Some(order.copied.0) } else { None };
    daemon.steered.iter().filter_map(copied).collect()
}

fn kept(world: &World) -> Option<u64> {
    world.spec().nodes[1].transfer.as_ref().and_then(|transfer| transfer.kept).map(|kept| kept.below.0)
}

fn is_told(daemon: &Daemon) -> bool {
    daemon.steered.contains(&Steer::Stay { node: 1 })
}

#[test]
fn it_goes_on_from_what_was_copied() {
    let (mut world, daemon, _) = half();
    assert_eq!((kept(&world), under_way(&daemon).unwrap().copied), (Some(BELOW), BELOW * 512));
    let (mut daemon, mut path) = reboot(&mut world, Fate::Slow);
    assert_eq!(handed(&daemon), [BELOW]);
    let shown = under_way(&daemon).unwrap();
    assert_eq!((shown.copied, shown.resumed), (BELOW * 512, Some(BELOW * 512)));
    path.keep(&world, 1, 2 * BELOW);
    path.settle(&mut daemon, &mut world);
    // Stopped in order, it is the same.
    daemon.run(&mut world, stop(false)).unwrap();
    daemon.steered.clear();
    daemon.run(&mut world, start()).unwrap();
    let mut path = Path::new(&daemon, &world);
    path.fate = Fate::Done;
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!((handed(&daemon), lives_on(&world).as_str()), (vec![2 * BELOW], TO));
    let certificate = daemon.owner.view()[0].migrations.last().cloned().unwrap();
    assert_eq!((certificate.state, certificate.resumed), (MigrationState::Done, Some(2 * BELOW * 512)));
    assert!(is_told(&daemon), "it is over");
}

#[test]
fn a_crash_after_every_step_believes_no_more_than_there_is() {
    let mut from = Vec::new();
    for steps in 0..40 {
        for (fate, second) in [(Fate::Slow, 0), (Fate::Slow, 3), (Fate::Fails(MoveError::Target(Errno::EIO)), 0)] {
            let (mut world, daemon, _) = half();
            drop(daemon);
            // The next one dies on the way, and so, perhaps, does the one after it.
            for steps in [steps, second] {
                world.running.clear();
                let mut daemon = Daemon::boot(&world);
                let mut path = Path::new(&daemon, &world);
                path.fate = fate;
                for _ in 0..steps {
                    let served = daemon.state("a") == Some(State::Started);
                    let _ = served && path.step(&mut daemon, &world) || daemon.step(&mut world);
                }
            }
            let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
            tidy(&mut daemon, &mut path, &mut world);
            from.extend(handed(&daemon));
        }
    }
    assert!(from.iter().filter(|from| **from == BELOW).count() > 60, "{from:?}");
}

/// What makes it doubtful, and whether nothing may be believed.
type Doubt = (&'static str, fn(&mut World, &mut Daemon), bool);

fn of_target(world: &mut World, change: impl Fn(&mut Volume)) {
    change(world.volumes.get_mut(TO).unwrap());
}

fn of_source(world: &mut World, change: impl Fn(&mut Volume)) {
    change(world.volumes.get_mut(THREE[1]).unwrap());
}

/// Another host takes the array over, serves it for a while, and it is taken back.
fn away_and_back(world: &mut World, daemon: &mut Daemon) {
    world.running.clear();
    world.go_to(OTHER);
    let mut other = Daemon::boot(world);
    other.run(world, super::transfer::import(THREE[0], false)).unwrap();
    other.run(world, start_on(TAKE)).unwrap();
    assert_eq!(handed(&other), [0], "its record knows of nothing that was copied");
    other.run(world, stop(false)).unwrap();
    world.go_to(HOST);
    *daemon = Daemon::boot(world);
    daemon.settle(world);
    daemon.run(world, stop(false)).unwrap();
    daemon.run(world, start_on(TAKE)).unwrap();
}

#[test]
fn what_is_doubtful_begins_anew() {
    let doubts: &[Doubt] = &[
        ("nothing", |_, _| {}, false),
        ("another host has served it", away_and_back, true),
        (
            "a later claim of this host, of which this record knows nothing",
            |world, _| of_source(world, |volume| volume.claim.as_mut().unwrap().epoch = Epoch(7)),
            true,
        ),
        ("nobody has claimed the source", |world, _| of_source(world, |volume| volume.claim = None), true),
        ("nor the target", |world, _| of_target(world, |volume| volume.claim = None), true),
        (
            "another host has claimed the target",
            |world, _| {
                of_target(world, |volume| volume.claim.as_mut().unwrap().host = OTHER);
            },
            true,
        ),
        ("the target is that of another transfer", |world, _| of_target(world, |volume| volume.label = None), true),
        ("the source knows of none", |world, _| of_source(world, |volume| volume.label = None), true),
    ];
    for (what, doubt, anew) in doubts {
        for steps in 0..30 {
            let (mut world, mut daemon, _) = half();
            if *anew {
                world.kept.borrow_mut().clear();
            }
            doubt(&mut world, &mut daemon);
            if *what == "another host has served it" {
                let mut path = Path::new(&daemon, &world);
                path.fate = Fate::Done;
                tidy(&mut daemon, &mut path, &mut world);
                assert_eq!((handed(&daemon).last(), lives_on(&world).as_str()), (Some(&0), TO), "{what}");
                break;
            }
            // That it is not believed is durable before anybody touches what it is about.
            world.running.clear();
            let mut daemon = Daemon::boot(&world);
            let mut path = Path::new(&daemon, &world);
            path.fate = Fate::Slow;
            for _ in 0..steps {
                let served = daemon.state("a") == Some(State::Started);
                let _ = served && path.step(&mut daemon, &world) || daemon.step(&mut world);
            }
            let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
            tidy(&mut daemon, &mut path, &mut world);
            assert_eq!(handed(&daemon), [if *anew { 0 } else { BELOW }], "{what}, {steps}");
            assert_eq!(lives_on(&world), TO, "{what}, {steps}");
        }
    }
}

#[test]
fn a_doubt_that_cannot_be_written_down_stays_one() {
    let (mut world, _, _) = half();
    world.kept.borrow_mut().clear();
    of_target(&mut world, |volume| volume.claim = None);
    world.running.clear();
    let mut daemon = Daemon::boot(&world);
    while daemon.state("a") == Some(State::Starting) && daemon.step(&mut world) {}
    world.broken.insert("save");
    let mut path = Path::new(&daemon, &world);
    path.settle(&mut daemon, &mut world);
    assert_eq!((handed(&daemon), kept(&world)), (Vec::new(), Some(BELOW)));
    assert_eq!(world.volumes[TO].claim, None, "nobody has touched it");
    world.broken.clear();
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!((handed(&daemon), lives_on(&world).as_str()), (vec![0], TO));
}

#[test]
fn the_logs_are_kept_until_its_end_is_durable() {
    // Paused, so that the data path never hears of it.
    let paused = || {
        let (mut world, mut daemon, mut path) = half();
        path.run(&mut daemon, &mut world, act(Act::Pause)).unwrap();
        let (daemon, path) = reboot(&mut world, Fate::Slow);
        assert!(handed(&daemon).is_empty() && world.spec().nodes[1].awaits());
        (world, daemon, path)
    };
    let (mut world, mut daemon, mut path) = paused();
    world.broken.insert("save");
    path.run(&mut daemon, &mut world, act(Act::Abort)).unwrap_err();
    assert!(!is_told(&daemon) && kept(&world) == Some(BELOW));
    world.broken.clear();
    path.run(&mut daemon, &mut world, node("n-0", NodeAsk::Suspend(Suspend::default()))).unwrap();
    assert!(is_told(&daemon) && kept(&world).is_none());
    tidy(&mut daemon, &mut path, &mut world);
    // Or it goes on after all.
    let (mut world, mut daemon, mut path) = paused();
    path.fate = Fate::Done;
    path.run(&mut daemon, &mut world, act(Act::Resume)).unwrap();
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!((handed(&daemon), lives_on(&world).as_str()), (vec![BELOW], TO));
    // A daemon may die at any step of its end.
    for steps in 0..20 {
        let (mut world, mut daemon, mut path) = half();
        daemon.ask(act(Act::Abort));
        path.steps(&mut daemon, &mut world, steps);
        let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
        tidy(&mut daemon, &mut path, &mut world);
    }
}
