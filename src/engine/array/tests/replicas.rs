//! Replicas that come and go while the array is stopped.

use super::*;

pub(super) fn add(node: &str, target: &str) -> Command {
    Command::AddReplica { name: "a".to_owned(), node: node.parse().unwrap(), target: target.to_owned() }
}

pub(super) fn take(node: &str, replica: usize) -> Command {
    Command::RemoveReplica { name: "a".to_owned(), node: node.parse().unwrap(), replica }
}

/// Two nodes of two replicas, and a volume to spare.
pub(super) fn spare() -> (World, Daemon) {
    let (mut world, daemon) = pairs();
    let volume = Volume { id: Id([50; 16]), member: None, ..world.volumes["s1:1/v"].clone() };
    world.volumes.insert("s5:1/v".to_owned(), volume);
    (world, daemon)
}

pub(super) const NEW: ReplicaState = ReplicaState::Syncing { from: crate::units::Lba(0) };

#[test]
fn a_new_replica_has_nothing_yet() {
    let (mut world, mut daemon) = spare();
    let Ok(Answer::Array(array)) = daemon.run(&mut world, add("n-0", "s5:1/v")) else { panic!() };
    assert_eq!(array.nodes[0].replicas[2].synced, Some(0));
    assert_eq!(states(&world), [IN, IN, NEW, IN, IN]);
    let spec = world.spec();
    assert_eq!(spec.nodes[0].generation.id, spec.id, "the set that is in sync is the same");
    assert_eq!(spec.nodes[0].replicas[2].volume, Id([50; 16]));
    assert_eq!(world.volumes["s5:1/v"].member.as_ref().unwrap().node, "n-0");
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(world.label("s5:1/v").node().unwrap().replicas[2].state, NEW);
    daemon.run(&mut world, stop(false)).unwrap();
    // It is claimed like the others, and never served from.
    world.reach("s1:1/v", false);
    world.reach("s2:1/v", false);
    assert!(daemon.error(&mut world, start()).contains("no other replica of this node that is in sync is there"));
}

#[test]
fn a_replica_that_cannot_be_is_refused() {
    let (mut world, mut daemon) = spare();
    world.volumes.insert("alias:1/v".to_owned(), world.volumes["s3:1/v"].clone());
    let volume = world.volumes["s5:1/v"].clone();
    world.volumes.insert("small:1/v".to_owned(), Volume { sectors: 8, id: Id([51; 16]), ..volume.clone() });
    let member = Some(Member { id: Id([77; 16]), name: "other".to_owned(), node: "n-0".to_owned() });
    world.volumes.insert("used:1/v".to_owned(), Volume { member, id: Id([52; 16]), ..volume });
    for (node, target, why) in [
        ("n-8", "s5:1/v", "array 'a' has no node n-8"),
        ("n-0", "nowhere", "HOST:PORT/VOLUME"),
        ("n-0", "s3:1/v", "s3:1/v is a replica of node n-2048 already"),
        ("n-0", "alias:1/v", "it is the volume of node n-2048 (s3:1/v)"),
        ("n-0", "small:1/v", "too small with 4K: the node has 1M"),
        ("n-0", "used:1/v", "in use by array 'other'"),
        ("n-0", "s9:1/v", "s9:1/v: no such volume"),
    ] {
        let error = daemon.error(&mut world, add(node, target));
        assert!(error.contains(why), "{target}: {error}");
        assert_eq!((daemon.state("a"), states(&world)), (Some(State::Stopped), vec![IN, IN, IN, IN]));
    }
    daemon.run(&mut world, add("n-0", "s5:1/v")).unwrap();
    assert!(daemon.error(&mut world, add("n-0", "s6:1/v")).contains("3 replicas already"));
}

#[test]
fn an_add_that_fails_is_as_if_it_had_not_been() {
    for broken in ["save", "assign"] {
        let (mut world, mut daemon) = spare();
        let ticket = daemon.ask(add("n-0", "s5:1/v"));
        daemon.step(&mut world);
        if broken == "assign" {
            daemon.step(&mut world);
            world.reach("s5:1/v", false);
        } else {
            world.broken.insert(broken);
        }
        daemon.settle(&mut world);
        assert!(daemon.replies[&ticket].is_err(), "{broken}");
        world.broken.clear();
        world.reach("s5:1/v", true);
        assert_eq!(states(&world), [IN, IN, IN, IN], "{broken}");
        assert!(world.volumes["s5:1/v"].member.is_none());
        daemon.run(&mut world, start()).unwrap();
    }
}

#[test]
fn a_change_that_was_cut_off_is_whole_or_undone() {
    for (command, kept) in [(add("n-0", "s5:1/v"), "s1:1/v"), (take("n-0", 1), "s1:1/v")] {
        for steps in 0..5 {
            let (mut world, mut daemon) = spare();
            daemon.ask(command.clone());
            for _ in 0..steps {
                daemon.step(&mut world);
            }
            let answered = !daemon.replies.is_empty();
            // The volume is away at first: what is half done is refused by name.
            let half = world.spec().replicas().any(|(_, replica)| replica.volume.is_nil());
            let target = if matches!(command, Command::AddReplica { .. }) { "s5:1/v" } else { "s2:1/v" };
            world.reach(target, false);
            let mut daemon = Daemon::boot(&world);
            daemon.settle(&mut world);
            if half {
                for reachable in [false, true] {
                    world.reach(target, reachable);
                    let error = daemon.error(&mut world, start());
                    assert!(error.contains(&format!("node n-0 ({target}): it was being added or removed")), "{error}");
                }
            }
            world.reach(target, true);
            let mut daemon = Daemon::boot(&world);
            daemon.settle(&mut world);
            let spec = world.spec();
            let has = spec.replicas().any(|(_, replica)| replica.target.to_string() == target);
            let assigned = world.volumes[target].member.is_some();
            assert_eq!(has, assigned, "after {steps} steps of {command:?}");
            assert!(
                spec.replicas().all(|(_, replica)| !replica.volume.is_nil()) && world.volumes[kept].member.is_some()
            );
            if answered {
                assert_eq!(has, target == "s5:1/v", "what was answered is done");
            }
            daemon.run(&mut world, start()).unwrap();
        }
    }
}

#[test]
fn a_record_that_cannot_be_written_at_the_end_is_told() {
    for (command, why) in [
        (add("n-0", "s5:1/v"), "half added: 'dst replica remove a n-0 2'"),
        (take("n-0", 0), "It is gone, and the record here still has it"),
    ] {
        let (mut world, mut daemon) = spare();
        let ticket = daemon.ask(command.clone());
        let steps = if matches!(command, Command::AddReplica { .. }) { 3 } else { 2 };
        for _ in 0..steps {
            daemon.step(&mut world);
        }
        world.broken.insert("save");
        daemon.settle(&mut world);
        let error = daemon.replies[&ticket].as_ref().unwrap_err().text.clone();
        assert!(error.contains(why), "{error}");
        world.broken.clear();
        let mut daemon = Daemon::boot(&world);
        daemon.settle(&mut world);
        assert!(world.volumes["s5:1/v"].member.is_none());
        daemon.run(&mut world, start()).unwrap();
    }
    // Or it is taken back at once.
    let (mut world, mut daemon) = spare();
    daemon.ask(add("n-0", "s5:1/v"));
    for _ in 0..3 {
        daemon.step(&mut world);
    }
    world.broken.insert("save");
    daemon.settle(&mut world);
    world.broken.clear();
    daemon.run(&mut world, take("n-0", 2)).unwrap();
    assert!(world.volumes["s5:1/v"].member.is_none());
    daemon.run(&mut world, start()).unwrap();
}

#[test]
fn a_replica_is_taken_away_but_never_the_last_good_one() {
    let (mut world, mut daemon) = spare();
    let first = world.spec();
    assert!(daemon.error(&mut world, take("n-0", 2)).contains("node n-0 has no replica 2"));
    daemon.run(&mut world, take("n-0", 0)).unwrap();
    let spec = world.spec();
    assert!(spec.nodes[0].generation.descends(first.nodes[0].generation.id) && spec.nodes[1] == first.nodes[1]);
    assert_eq!(spec.nodes[0].replicas, first.nodes[0].replicas[1..]);
    assert!(world.volumes["s1:1/v"].member.is_none());
    daemon.run(&mut world, add("n-0", "s5:1/v")).unwrap();
    let error = daemon.error(&mut world, take("n-0", 0));
    assert!(error.contains("replica 0 of node n-0 (s2:1/v) is the last one that is in sync"), "{error}");
    // One that is not in sync changes no set, and one that is away stays assigned.
    let before = world.spec().nodes[0].generation.clone();
    world.reach("s5:1/v", false);
    let Ok(Answer::Array(array)) = daemon.run(&mut world, take("n-0", 1)) else { panic!() };
    assert!(array.warnings[0].contains("s5:1/v stays assigned to 'a'"), "{:?}", array.warnings);
    assert_eq!(world.spec().nodes[0].generation, before);
    daemon.run(&mut world, start()).unwrap();
}

#[test]
fn a_removal_that_cannot_be_written_is_none() {
    let (mut world, mut daemon) = spare();
    let before = world.spec();
    world.broken.insert("save");
    assert!(daemon.error(&mut world, take("n-0", 0)).contains("it broke"));
    world.broken.clear();
    assert_eq!((world.spec(), world.volumes["s1:1/v"].member.is_some()), (before, true));
    daemon.run(&mut world, start()).unwrap();
}
