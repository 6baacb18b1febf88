//! Replicas that come, go and are replaced while the array is in use.

use super::path::{Fate, Path, reboot, tidy};
use super::replicas::{NEW, add, spare, take};
use super::suspend::node;
use super::*;
use crate::control::node::{NodeAsk, Replace, Suspend};

/// Two nodes of two replicas in use, and a volume to spare.
fn served() -> (World, Daemon, Path) {
    let (mut world, mut daemon) = spare();
    daemon.run(&mut world, start()).unwrap();
    let path = Path::new(&daemon, &world);
    (world, daemon, path)
}

fn replace(node_name: &str, to: &str, replica: Option<usize>, force: bool) -> Command {
    node(node_name, NodeAsk::Replace(Replace { to: to.to_owned(), replica, force }))
}

fn hold(node_name: &str) -> Command {
    node(node_name, NodeAsk::Suspend(Suspend::default()))
}

fn targets(world: &World, at: usize) -> Vec<String> {
    world.spec().nodes[at].replicas.iter().map(|replica| replica.target.to_string()).collect()
}

#[test]
fn one_is_added_and_taken_while_the_array_is_in_use() {
    let (mut world, mut daemon, mut path) = served();
    let array = path.run(&mut daemon, &mut world, add("n-0", "s5:1/v")).unwrap();
    assert_eq!((states(&world), array.nodes[0].replicas.len()), (vec![IN, IN, NEW, IN, IN], 3));
    assert_eq!(world.volumes["s5:1/v"].claim, world.volumes["s1:1/v"].claim, "the claim of the array");
    assert_eq!(world.label("s1:1/v").node().unwrap().replicas.len(), 3, "its siblings know of it");
    let volume = Id([50; 16]);
    assert!(matches!(&daemon.steered[..], [Steer::Attach { node: 0, volume: id, .. }] if *id == volume));
    // It is full: that is a change like any other.
    daemon.event(regrouped(vec![(volume, Standing::InSync)]));
    path.settle(&mut daemon, &mut world);
    assert_eq!(states(&world), [IN; 5]);
    let before = world.spec().nodes[0].generation.clone();
    let mut path = Path::new(&daemon, &world);
    path.skip(&daemon);
    let array = path.run(&mut daemon, &mut world, take("n-0", 0)).unwrap();
    assert!(array.warnings.is_empty());
    assert_eq!(targets(&world, 0), ["s2:1/v", "s5:1/v"]);
    assert!(world.volumes["s1:1/v"].member.is_none() && world.spec().nodes[0].generation.descends(before.id));
    tidy(&mut daemon, &mut path, &mut world);
    // It can come back at once.
    path.run(&mut daemon, &mut world, add("n-0", "s1:1/v")).unwrap();
    tidy(&mut daemon, &mut path, &mut world);
}

#[test]
fn what_cannot_be_is_refused() {
    let (mut world, mut daemon, mut path) = served();
    for (command, errno, why) in [
        (add("n-7", "s5:1/v"), Errno::ENOENT, "has no node n-7"),
        (add("n-0", "s3:1/v"), Errno::EINVAL, "s3:1/v is a replica of node n-2048 already"),
        (add("n-0", "s9:1/v"), Errno::ENOENT, "s9:1/v: no such volume"),
        (take("n-0", 2), Errno::ENOENT, "node n-0 has no replica 2"),
        (replace("n-0", "s5:1/v", None, false), Errno::EBUSY, "node n-0 is not suspended"),
    ] {
        let refusal = path.run(&mut daemon, &mut world, command).unwrap_err();
        assert!(refusal.errno == errno && refusal.text.contains(why), "{refusal:?}, not {why}");
    }
    let first = daemon.ask(add("n-0", "s5:1/v"));
    let refusal = path.run(&mut daemon, &mut world, take("n-0", 0)).unwrap_err();
    assert!(refusal.errno == Errno::EBUSY && refusal.text.contains("is getting a replica"), "{refusal}");
    assert!(daemon.replies[&first].is_ok());
    daemon.event(regrouped(vec![(world.volumes["s2:1/v"].id, Standing::Stale)]));
    path.settle(&mut daemon, &mut world);
    let refusal = path.run(&mut daemon, &mut world, take("n-0", 0)).unwrap_err();
    assert!(refusal.text.contains("is the last one that is in sync"), "{refusal}");
}

#[test]
fn a_volume_that_is_away_is_freed_later() {
    let (mut world, mut daemon, mut path) = served();
    world.reach("s2:1/v", false);
    let array = path.run(&mut daemon, &mut world, take("n-0", 1)).unwrap();
    assert!(array.warnings[0].contains("s2:1/v stays assigned to 'a'"), "{:?}", array.warnings);
    let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
    world.reach("s2:1/v", true);
    tidy(&mut daemon, &mut path, &mut world);
    assert!(world.volumes["s2:1/v"].member.is_none());
}

#[test]
fn a_crash_after_every_step_leaves_no_volume_that_nobody_knows() {
    for (command, suspended) in [
        (add("n-0", "s5:1/v"), false),
        (take("n-0", 1), false),
        (replace("n-0", "s5:1/v", Some(1), false), true),
        (replace("n-0", "s5:1/v", Some(0), true), true),
    ] {
        for steps in 0..30 {
            let (mut world, mut daemon, mut path) = served();
            if suspended {
                path.run(&mut daemon, &mut world, hold("n-0")).unwrap();
            }
            let ticket = daemon.ask(command.clone());
            path.steps(&mut daemon, &mut world, steps);
            let said = daemon.replies.contains_key(&ticket);
            let known = targets(&world, 0);
            drop(daemon);
            let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
            tidy(&mut daemon, &mut path, &mut world);
            assert!(!said || targets(&world, 0) == known, "what was said holds");
            daemon.run(&mut world, stop(false)).unwrap();
            daemon.run(&mut world, start()).unwrap();
        }
    }
}

#[test]
fn a_replica_of_a_suspended_node_is_replaced_and_filled_from_its_sibling() {
    let (mut world, mut daemon, mut path) = served();
    path.run(&mut daemon, &mut world, hold("n-0")).unwrap();
    let refusal = path.run(&mut daemon, &mut world, replace("n-0", "s5:1/v", None, false)).unwrap_err();
    assert!(refusal.text.contains("node n-0 has 2 replicas: say which with --replica"), "{refusal}");
    path.run(&mut daemon, &mut world, replace("n-0", "s5:1/v", Some(0), false)).unwrap();
    assert_eq!((targets(&world, 0), states(&world)), (vec!["s5:1/v".into(), "s2:1/v".into()], vec![NEW, IN, IN, IN]));
    assert!(world.spec().nodes[0].suspend.is_some(), "it is suspended still");
    tidy(&mut daemon, &mut path, &mut world);
    assert!(world.volumes["s1:1/v"].member.is_none());
}

#[test]
fn the_only_copy_is_replaced_by_the_operators_word_alone() {
    let (mut world, mut daemon) = started();
    let volume = Volume { id: Id([50; 16]), member: None, claim: None, label: None, ..world.volumes[THREE[0]].clone() };
    world.volumes.insert("s5:1/v".to_owned(), volume.clone());
    world.volumes.insert("small:1/v".to_owned(), Volume { sectors: 8, id: Id([51; 16]), ..volume });
    let mut path = Path::new(&daemon, &world);
    path.run(&mut daemon, &mut world, hold("n-128")).unwrap();
    let refusal = path.run(&mut daemon, &mut world, replace("n-128", "s5:1/v", None, false)).unwrap_err();
    assert!(refusal.errno == Errno::EPERM && refusal.text.contains("it would be lost"), "{refusal:?}");
    let refusal = path.run(&mut daemon, &mut world, replace("n-128", "small:1/v", None, true)).unwrap_err();
    assert!(refusal.text.contains("too small"), "{refusal}");
    let before = world.spec().nodes[1].generation.clone();
    path.run(&mut daemon, &mut world, replace("n-128", "s5:1/v", None, true)).unwrap();
    assert_eq!(targets(&world, 1), ["s5:1/v"]);
    assert!(world.spec().nodes[1].generation.descends(before.id));
    assert_eq!(world.label("s5:1/v").generation, world.spec().nodes[1].generation);
    tidy(&mut daemon, &mut path, &mut world);
    assert!(world.volumes[THREE[1]].member.is_none());
    // A data path that cannot leaves everything as it was.
    path.run(&mut daemon, &mut world, node("n-0", NodeAsk::Suspend(Suspend::default()))).unwrap();
    let ticket = daemon.ask(replace("n-0", THREE[1], None, true));
    while !matches!(daemon.steered.last(), Some(Steer::Replace { .. })) {
        assert!(daemon.step(&mut world) || path.step(&mut daemon, &world));
    }
    path.skip(&daemon);
    news(&mut daemon, &world, News::Moved { node: 0, result: Err(MoveError::Refused) });
    path.settle(&mut daemon, &mut world);
    assert!(daemon.replies.remove(&ticket).unwrap().unwrap_err().text.contains("node n-0 is not replaced"));
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!(targets(&world, 0), [THREE[0]]);
}
