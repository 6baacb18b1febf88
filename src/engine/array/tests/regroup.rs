//! Changes of the replicas of a started array: durable in the record first, then on the labels, each exactly as it was asked for.

use super::*;
use crate::engine::replicas::Standing;
use crate::units::Lba;

const FRESH: Id = Id([77; 16]);

fn regroup(world: &World, epoch: u64, in_sync: [bool; 4]) -> Event {
    let standing = |in_sync| if in_sync { Standing::InSync } else { Standing::Stale };
    let spec = world.spec();
    let volumes = spec.replicas().map(|(_, replica)| replica.volume);
    let (name, standings) = ("a".to_owned(), volumes.zip(in_sync.map(standing)).collect());
    Event::Regroup { name, epoch: Epoch(epoch), standings, losses: Vec::new(), fresh: FRESH }
}

fn served() -> (World, Daemon) {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    (world, daemon)
}

#[test]
fn a_replica_that_is_left_is_stale_in_the_record_and_on_the_labels_of_the_others() {
    let (mut world, mut daemon) = served();
    let before = world.spec();
    daemon.event(regroup(&world, 1, [true, false, true, true]));
    daemon.settle(&mut world);
    assert_eq!((daemon.regrouped.as_slice(), states(&world)), (&[Saved::All][..], vec![IN, OUT, IN, IN]));
    let (first, second) = (world.label("s1:1/v"), world.label("s3:1/v"));
    assert_eq!(first.generation.id, FRESH);
    assert!(first.generation.descends(before.nodes[0].generation.id));
    assert_eq!(second.generation, before.nodes[1].generation, "that node has not changed");
    assert_eq!(world.label("s2:1/v").generation, before.nodes[0].generation, "it is not told");
    assert_eq!(daemon.state("a"), Some(State::Started));
    daemon.event(regroup(&world, 1, [true; 4]));
    daemon.settle(&mut world);
    assert_eq!(states(&world), [IN, IN, IN, IN]);
    assert_eq!(world.label("s2:1/v").generation, world.spec().nodes[0].generation);
}

#[test]
fn what_cannot_be_made_durable_is_told_and_asked_again() {
    for broken in ["save", "label"] {
        let (mut world, mut daemon) = served();
        let survivor = world.spec().nodes[0].replicas[1].volume;
        let saved = if broken == "save" { Saved::Nothing } else { Saved::AllBut(vec![survivor]) };
        world.broken.insert(broken);
        daemon.event(regroup(&world, 1, [false, true, true, true]));
        daemon.settle(&mut world);
        assert_eq!(daemon.regrouped, std::slice::from_ref(&saved));
        assert!(daemon.why("a").contains("not durable yet"), "{}", daemon.why("a"));
        world.broken.clear();
        daemon.event(regroup(&world, 1, [false, true, true, true]));
        daemon.settle(&mut world);
        assert_eq!((daemon.regrouped.as_slice(), daemon.why("a").as_str()), (&[saved, Saved::All][..], ""));
        assert_eq!(states(&world), [OUT, IN, IN, IN]);
    }
}

#[test]
fn a_stop_waits_for_it_and_a_crash_leaves_the_old_or_the_new() {
    let (mut world, mut daemon) = served();
    daemon.event(regroup(&world, 1, [true, false, true, true]));
    let ticket = daemon.ask(stop(false));
    daemon.settle(&mut world);
    assert!(daemon.replies.remove(&ticket).unwrap().is_ok());
    assert_eq!((daemon.state("a"), states(&world)), (Some(State::Stopped), vec![IN, OUT, IN, IN]));
    // Between the record and the labels: the record is the newer, and the start goes on from it.
    let (mut world, mut daemon) = served();
    world.broken.insert("label");
    daemon.event(regroup(&world, 1, [true, false, true, true]));
    daemon.settle(&mut world);
    world.broken.clear();
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert_eq!((daemon.state("a"), states(&world)), (Some(State::Started), vec![IN, OUT, IN, IN]));
    // Of a former life nothing is taken.
    daemon.event(regroup(&world, 1, [true; 4]));
    daemon.settle(&mut world);
    assert_eq!(states(&world), [IN, OUT, IN, IN]);
}

#[test]
fn only_an_orderly_stop_leaves_replicas_that_are_known_to_be_the_same() {
    let (mut world, mut daemon) = served();
    assert!(!world.spec().clean);
    daemon.run(&mut world, stop(false)).unwrap();
    assert!(world.spec().clean);
    daemon.run(&mut world, start()).unwrap();
    assert!(!world.spec().clean);
    daemon.run(&mut world, stop(true)).unwrap();
    assert!(!world.spec().clean, "what was in flight has ended in any way");
    daemon.run(&mut world, start()).unwrap();
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert!(!world.spec().clean, "its daemon died");
}

#[test]
fn how_far_a_replica_is_filled_is_in_the_record() {
    let (mut world, mut daemon) = served();
    let spec = world.spec();
    let generation = spec.nodes[0].generation.clone();
    let filled = |from: u64| Standing::Filling { from: Lba(from) };
    for (from, state) in [(0, Standing::Stale), (0, filled(0)), (64, filled(64))] {
        let told = spec.replicas().map(|(_, replica)| (replica.volume, Standing::InSync));
        let mut standings: Vec<(Id, Standing)> = told.collect();
        standings[1].1 = state;
        daemon.event(Event::Regroup {
            name: "a".to_owned(),
            epoch: Epoch(1),
            standings,
            losses: Vec::new(),
            fresh: FRESH,
        });
        daemon.settle(&mut world);
        if state != Standing::Stale {
            assert_eq!(states(&world)[1], ReplicaState::Syncing { from: Lba(from) });
        }
        assert_eq!(world.spec().nodes[0].generation.ancestors, [generation.id], "only its set makes a generation");
    }
}
