//! Arrays that take up what their volumes have come to have.

use super::*;
use crate::control::spec::Frontend;
use crate::units::Lba;

fn grow() -> Command {
    Command::Grow { name: "a".to_owned() }
}

/// Volumes become as large as that.
fn enlarge(world: &mut World, targets: &[&str], sectors: u64) {
    for target in targets {
        world.volumes.get_mut(*target).unwrap().sectors = sectors;
    }
}

fn sizes(world: &World) -> Vec<u64> {
    world.spec().nodes.iter().map(|node| node.sectors).collect()
}

fn states(world: &World, node: usize) -> Vec<ReplicaState> {
    world.spec().nodes[node].replicas.iter().map(|replica| replica.state).collect()
}

fn warning(answer: &Answer) -> &str {
    answer.warnings().first().map_or("", String::as_str)
}

#[test]
fn a_striped_array_grows_with_all_of_its_nodes_when_it_is_started() {
    let (mut world, mut daemon) = made();
    let error = daemon.error(&mut world, grow());
    assert!(error.contains("those of n-0, n-128, n-256 have no room"), "{error}");
    enlarge(&mut world, &["s1:1/v", "s3:1/v"], 5000);
    enlarge(&mut world, &["s2:1/v"], 2048 + 127);
    let error = daemon.error(&mut world, grow());
    assert!(error.contains("those of n-128 have no room"), "{error}");
    enlarge(&mut world, &["s2:1/v"], 4096 + 127);
    let answer = daemon.run(&mut world, grow()).unwrap();
    assert_eq!(warning(&answer), "array 'a' grows with 'dst start a': it is stopped now");
    assert_eq!((sizes(&world), world.spec().grow), (vec![2048; 3], true));
    daemon.run(&mut world, start()).unwrap();
    assert_eq!((sizes(&world), world.spec().grow), (vec![4096; 3], false), "whole chunks of the smallest");
    assert_eq!(daemon.owner.view()[0].spec.as_ref().unwrap().size, 3 * 4096 * 512);
}

#[test]
fn what_several_replicas_hold_behind_the_former_end_is_made_the_same() {
    let (mut world, mut daemon) = pairs();
    enlarge(&mut world, &["s1:1/v", "s2:1/v"], 4096);
    let error = daemon.error(&mut world, grow());
    assert!(
        error.contains("only the last node can become larger, which is n-2048: what lies behind n-0 would move"),
        "{error}"
    );
    enlarge(&mut world, &["s3:1/v"], 4096);
    assert!(daemon.error(&mut world, grow()).contains("only the last node"), "both replicas must have the room");
    enlarge(&mut world, &["s4:1/v"], 3072);
    daemon.run(&mut world, grow()).unwrap();
    let former = world.spec().nodes[1].generation.clone();
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(sizes(&world), [2048, 3072]);
    assert_eq!(states(&world, 0), [ReplicaState::InSync; 2]);
    assert_eq!(states(&world, 1), [ReplicaState::InSync, ReplicaState::Syncing { from: Lba(2048) }]);
    assert_ne!(world.spec().nodes[1].generation, former, "an older label cannot pass for the present one");
}

#[test]
fn who_lacks_something_lacks_the_rest_too() {
    for lost in [false, true] {
        let (mut world, mut daemon) = pairs();
        daemon.run(&mut world, start()).unwrap();
        daemon.run(&mut world, stop(false)).unwrap();
        enlarge(&mut world, &["s3:1/v", "s4:1/v"], 4096);
        daemon.run(&mut world, grow()).unwrap();
        // Either the first replica is behind, as its server tells, or it is away.
        world.volumes.get_mut("s3:1/v").unwrap().losses += u64::from(lost);
        world.reach("s3:1/v", lost);
        daemon.run(&mut world, start()).unwrap();
        if !lost {
            assert_eq!(
                (sizes(&world), world.spec().grow),
                (vec![2048; 2], true),
                "nobody knows what the one that is away has"
            );
            assert_eq!(states(&world, 1), [ReplicaState::Stale, ReplicaState::InSync]);
            daemon.run(&mut world, stop(false)).unwrap();
            world.reach("s3:1/v", true);
            daemon.run(&mut world, start()).unwrap();
            assert_eq!(states(&world, 1), [ReplicaState::Syncing { from: Lba(2048) }, ReplicaState::InSync]);
        }
        assert_eq!(sizes(&world), [2048, 4096]);
        assert!(states(&world, 1).contains(&ReplicaState::InSync));
    }
}

#[test]
fn a_start_in_the_background_leaves_the_size_alone() {
    let (mut world, mut daemon) = started();
    enlarge(&mut world, &THREE, 4096);
    let answer = daemon.run(&mut world, grow()).unwrap();
    assert_eq!(warning(&answer), "array 'a' grows with 'dst stop a' and 'dst start a': this kernel cannot");
    // The daemon dies, and the next one serves on the device that is as large as it was.
    world.running.clear();
    world.left.insert(world.spec().id);
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Started));
    assert_eq!((sizes(&world), world.spec().grow), (vec![2048; 3], true));
    daemon.run(&mut world, stop(false)).unwrap();
    daemon.run(&mut world, start()).unwrap();
    assert_eq!((sizes(&world), world.spec().grow), (vec![4096; 3], false));
}

/// In use on a kernel that can, with larger volumes.
fn able() -> (World, Daemon) {
    let (mut world, daemon) = started();
    world.resizable = true;
    enlarge(&mut world, &THREE, 4096);
    (world, daemon)
}

#[test]
fn a_device_in_use_grows_last_of_all() {
    let (mut world, mut daemon) = able();
    let ticket = daemon.ask(grow());
    assert!(daemon.error(&mut world, grow()).contains("is growing already"));
    let [Steer::Grow(geometry)] = daemon.steered.as_slice() else { panic!("{:?}", daemon.steered) };
    assert_eq!(geometry.sectors(), 3 * 4096);
    assert_eq!((sizes(&world), world.device), (vec![4096; 3], None), "not before every shard knows");
    assert!(!daemon.replies.contains_key(&ticket));
    suspend::news(&mut daemon, &world, News::Grown { done: true });
    daemon.settle(&mut world);
    assert_eq!(world.device, Some(3 * 4096));
    let Ok(Answer::Array(array)) = daemon.replies.remove(&ticket).unwrap() else { panic!() };
    assert_eq!((array.spec.unwrap().size, array.warnings.len()), (3 * 4096 * 512, 0));
}

#[test]
fn what_cannot_grow_at_once_says_why() {
    let nbd = RunOptions { frontend: "nbd:/run/a.sock".parse::<Frontend>().unwrap(), ..RunOptions::default() };
    let start_nbd = Command::Start { name: "a".to_owned(), run: nbd, terms: Terms::default() };
    let (mut world, mut daemon) = able();
    daemon.run(&mut world, stop(false)).unwrap();
    daemon.run(&mut world, start_nbd).unwrap();
    let answer = daemon.run(&mut world, grow()).unwrap();
    assert!(warning(&answer).contains("a client of NBD learns the size when it connects"), "{answer:?}");
    let (mut world, mut daemon) = pairs();
    (world.resizable, _) = (true, daemon.run(&mut world, start()).unwrap());
    enlarge(&mut world, &["s3:1/v", "s4:1/v"], 4096);
    let answer = daemon.run(&mut world, grow()).unwrap();
    assert!(warning(&answer).contains("node n-2048 has 2 replicas"), "{answer:?}");
    assert!(daemon.steered.is_empty());
}

#[test]
fn what_is_not_written_everywhere_is_taken_back() {
    for broken in ["save", "label"] {
        let (mut world, mut daemon) = able();
        world.broken.insert(broken);
        let ticket = daemon.ask(grow());
        daemon.step(&mut world);
        daemon.step(&mut world);
        // The record and the labels; and then, all is well again.
        daemon.step(&mut world);
        world.broken.clear();
        daemon.settle(&mut world);
        let refusal = daemon.replies.remove(&ticket).unwrap().unwrap_err();
        assert!(refusal.text.contains("array 'a' has not grown"), "{refusal}");
        assert_eq!((sizes(&world), daemon.steered.len()), (vec![2048; 3], 0), "{broken}");
        let told = |target: &str| world.label(target).node().unwrap().sectors;
        assert_eq!(THREE.map(told), [2048; 3], "{broken}");
    }
}

#[test]
fn a_data_path_that_cannot_take_it_stays_as_it_is() {
    let (mut world, mut daemon) = able();
    let ticket = daemon.ask(grow());
    daemon.settle(&mut world);
    suspend::news(&mut daemon, &world, News::Grown { done: false });
    daemon.settle(&mut world);
    let answer = daemon.replies.remove(&ticket).unwrap().unwrap();
    assert!(warning(&answer).contains("a node has changed meanwhile"));
    assert_eq!((sizes(&world), world.spec().grow, world.device), (vec![2048; 3], true, None));
    // And who asks for it when it ends is told.
    let (mut world, mut daemon) = able();
    let ticket = daemon.ask(grow());
    daemon.settle(&mut world);
    daemon.run(&mut world, stop(false)).unwrap();
    assert_eq!(daemon.replies.remove(&ticket).unwrap().unwrap_err().errno, Errno::ECANCELED);
}

#[test]
fn a_daemon_may_die_at_any_step_of_it() {
    for live in [false, true] {
        for steps in 0.. {
            let (mut world, mut daemon) = if live { able() } else { made() };
            enlarge(&mut world, &THREE, 4096);
            let ticket = daemon.ask(grow());
            let mut left = steps;
            while left > 0 && daemon.step(&mut world) {
                left -= 1;
            }
            if live && daemon.steered.len() == 1 && left > 0 {
                suspend::news(&mut daemon, &world, News::Grown { done: true });
                daemon.settle(&mut world);
            }
            let done = daemon.replies.contains_key(&ticket);
            world.running.clear();
            let mut daemon = Daemon::boot(&world);
            daemon.settle(&mut world);
            let device = world.device.unwrap_or(3 * 2048);
            assert!(sizes(&world).iter().sum::<u64>() >= device, "the device is never larger than the array");
            assert_eq!(daemon.state("a"), Some(if live { State::Started } else { State::Stopped }));
            if live {
                daemon.run(&mut world, stop(false)).unwrap();
            }
            daemon.run(&mut world, start()).unwrap();
            assert!(sizes(&world) == [4096; 3] || !done, "what was promised is kept");
            if done {
                break;
            }
        }
    }
}
