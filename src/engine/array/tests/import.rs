//! Importing an array out of what its volumes know of it.

use super::*;
use crate::control::command::Import;

fn import(target: &str, force: bool) -> Command {
    Command::Import(Import { target: target.to_owned(), name: None, force })
}

/// Two nodes of two replicas, which ran on one host; and the daemon of another one, which knows nothing of them.
fn lost() -> (World, Daemon) {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    world.go_to(OTHER);
    let daemon = Daemon::boot(&world);
    (world, daemon)
}

#[test]
fn an_array_moves_to_another_host() {
    for first in FOUR {
        let (mut world, mut daemon) = lost();
        let Ok(Answer::Array(array)) = daemon.run(&mut world, import(first, false)) else { panic!() };
        assert_eq!((array.name.as_str(), array.state), ("a", State::Stopped));
        assert!(
            array.warnings[0].contains("claimed by another host") && array.warnings.len() == 1,
            "{:?}",
            array.warnings
        );
        assert!(daemon.error(&mut world, start()).contains("--take-over"));
        let Ok(Answer::Array(array)) = daemon.run(&mut world, start_on(TAKE)) else { panic!() };
        assert_eq!(array.spec.unwrap().epoch, Epoch(2));
        // It is the very same array.
        let here = world.spec();
        world.go_to(HOST);
        let there = world.spec();
        assert_eq!((here.nodes, here.id, here.alg), (there.nodes, there.id, there.alg));
    }
}

#[test]
fn it_can_have_another_name_and_only_one_record() {
    let (mut world, mut daemon) = lost();
    let named = Import { target: FOUR[0].to_owned(), name: Some("b".to_owned()), force: false };
    daemon.run(&mut world, Command::Import(named)).unwrap();
    assert_eq!(daemon.state("b"), Some(State::Stopped));
    assert!(daemon.error(&mut world, import(FOUR[1], false)).contains("here already, as 'b'"));
    let bad = Import { target: FOUR[0].to_owned(), name: Some("b/c".to_owned()), force: false };
    assert!(daemon.error(&mut world, Command::Import(bad)).contains("not a name"));
    assert!(daemon.error(&mut world, import("nowhere", false)).contains("HOST:PORT/VOLUME"));
}

#[test]
fn what_a_volume_is_not_is_said() {
    let (mut world, mut daemon) = made();
    assert!(daemon.error(&mut world, import(THREE[0], false)).contains("has no label: labels are written when"));
    daemon.run(&mut world, remove(false)).unwrap();
    assert!(daemon.error(&mut world, import(THREE[0], false)).contains("belongs to no array"));
    assert!(daemon.error(&mut world, import("s9:1/v", false)).contains("s9:1/v: no such volume"));
    world.reach(THREE[0], false);
    assert!(daemon.error(&mut world, import(THREE[0], false)).contains("s1:1/v: connection refused"));
}

#[test]
fn a_replica_that_is_called_in_sync_must_be_seen() {
    type Change = fn(&mut World);
    let cases: [(Change, &str); 7] = [
        (|world| world.reach("s2:1/v", false), "connection refused"),
        (|world| drop(world.volumes.remove("s2:1/v")), "no such volume"),
        (|world| world.volumes.get_mut("s2:1/v").unwrap().id = Id([99; 16]), "another volume is there"),
        (|world| world.volumes.get_mut("s2:1/v").unwrap().member = None, "it was freed"),
        (|world| world.volumes.get_mut("s2:1/v").unwrap().sectors = 8, "too small: it has 4K"),
        (|world| world.volumes.get_mut("s2:1/v").unwrap().label = Some("x".to_owned()), "its label is damaged"),
        (
            |world| {
                let member = world.volumes.get_mut("s2:1/v").unwrap().member.as_mut().unwrap();
                (member.id, member.name) = (Id([98; 16]), "other".to_owned());
            },
            "belongs to array 'other' now",
        ),
    ];
    for (change, why) in cases {
        let (mut world, mut daemon) = lost();
        change(&mut world);
        let error = daemon.error(&mut world, import("s1:1/v", false));
        assert!(error.contains("nothing was imported: node n-0 (s2:1/v): ") && error.contains(why), "{error}");
        assert!(error.contains("--force"), "{error}");
        assert!(world.records.is_empty() && daemon.state("a").is_none());
        let Ok(Answer::Array(array)) = daemon.run(&mut world, import("s1:1/v", true)) else { panic!() };
        assert!(
            array.warnings[0].contains("node n-0 (s2:1/v), which is in sync, was not seen"),
            "{:?}",
            array.warnings
        );
    }
    let (mut world, mut daemon) = lost();
    world.reach("s3:1/v", false);
    world.reach("s4:1/v", false);
    for force in [false, true] {
        let error = daemon.error(&mut world, import("s1:1/v", force));
        assert!(
            error.contains("node n-2048 has no volume that is there and known: s3:1/v: connection refused"),
            "{error}"
        );
    }
}

#[test]
fn the_newest_label_says_who_is_in_sync() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    world.reach("s1:1/v", false);
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    world.reach("s1:1/v", true);
    world.go_to(OTHER);
    let mut daemon = Daemon::boot(&world);
    // The stale one is asked first; its own label calls both in sync.
    world.reach("s2:1/v", false);
    let error = daemon.error(&mut world, import("s1:1/v", false));
    assert!(error.contains("node n-0 (s2:1/v): connection refused. The others call it in sync"), "{error}");
    world.reach("s2:1/v", true);
    let Ok(Answer::Array(array)) = daemon.run(&mut world, import("s1:1/v", false)) else { panic!() };
    assert!(array.warnings.contains(&"node n-0 (s1:1/v) is stale".to_owned()), "{:?}", array.warnings);
    assert_eq!(states(&world), [OUT, IN, IN, IN]);
    daemon.run(&mut world, start_on(TAKE)).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    // What is stale is not needed.
    let mut other = World { records: BTreeMap::new(), ..world.clone() };
    other.volumes.remove("s1:1/v");
    let mut daemon = Daemon::boot(&other);
    let Ok(Answer::Array(array)) = daemon.run(&mut other, import("s3:1/v", false)) else { panic!() };
    assert!(array.warnings[0].contains("(s1:1/v), which is stale, cannot be used"), "{:?}", array.warnings);
}

#[test]
fn a_split_brain_is_not_imported() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    let mut other = copied(&mut world);
    world.reach("s1:1/v", false);
    other.run(&mut world, start_on(FORCE)).unwrap();
    world.reach("s1:1/v", true);
    world.reach("s2:1/v", false);
    world.go_to(HOST);
    world.newest = None;
    daemon.run(&mut world, start_on(FORCE)).unwrap();
    world.reach("s2:1/v", true);
    world.go_to(Id([202; 16]));
    let mut third = Daemon::boot(&world);
    for force in [false, true] {
        let error = third.error(&mut world, import("s3:1/v", force));
        for word in ["split brain", "s1:1/v", "s2:1/v"] {
            assert!(error.contains(word), "{word}: {error}");
        }
    }
    // The operator has chosen.
    let loser = world.volumes.get_mut("s2:1/v").unwrap();
    (loser.member, loser.label, loser.claim) = (None, None, None);
    third.run(&mut world, import("s3:1/v", false)).unwrap();
    assert_eq!(states(&world)[..2], [IN, OUT]);
}

#[test]
fn a_copy_of_a_volume_is_not_the_volume() {
    let (mut world, mut daemon) = lost();
    let copy = Volume { id: Id([77; 16]), ..world.volumes["s1:1/v"].clone() };
    world.volumes.insert("copy:1/v".to_owned(), copy);
    let error = daemon.error(&mut world, import("copy:1/v", true));
    assert!(error.contains("copy:1/v has the label of another volume"), "{error}");
}

#[test]
fn a_stale_record_is_made_anew_and_a_newer_one_is_kept() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    let old = world.records.clone();
    world.reach("s1:1/v", false);
    daemon.run(&mut world, start()).unwrap();
    assert!(daemon.error(&mut world, import("s2:1/v", false)).contains("'dst stop a' first"));
    daemon.run(&mut world, stop(false)).unwrap();
    world.reach("s1:1/v", true);
    world.records = old;
    let mut daemon = Daemon::boot(&world);
    assert!(daemon.error(&mut world, start()).contains("'dst import s2:1/v'"));
    daemon.run(&mut world, import("s2:1/v", false)).unwrap();
    assert_eq!(states(&world), [OUT, IN, IN, IN]);
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    // The record of a change whose labels were not written.
    let remove = Command::RemoveReplica { name: "a".to_owned(), node: "n-2048".parse().unwrap(), replica: 0 };
    daemon.run(&mut world, remove).unwrap();
    let error = daemon.error(&mut world, import("s2:1/v", true));
    assert!(error.contains("node n-2048: the record here is newer than the labels"), "{error}");
    world.broken.insert("save");
    assert!(daemon.run(&mut world, import("s2:1/v", true)).is_err());
    assert_eq!(daemon.state("a"), Some(State::Stopped), "the former record stays");
}

#[test]
fn an_import_that_cannot_be_written_leaves_nothing() {
    let (mut world, mut daemon) = lost();
    world.broken.insert("save");
    assert!(daemon.error(&mut world, import("s1:1/v", false)).contains("it broke"));
    assert!(daemon.state("a").is_none() && world.records.is_empty());
    world.broken.clear();
    let ticket = daemon.ask(import("s1:1/v", false));
    daemon.event(Event::Shutdown);
    assert!(!daemon.exited);
    daemon.settle(&mut world);
    assert!(daemon.exited && daemon.replies[&ticket].as_ref().unwrap_err().text.contains("dstd is ending"));
}

#[test]
fn an_array_of_many_nodes_is_found_from_one_label_to_the_next() {
    let names: Vec<String> =
        (0..250).map(|at| format!("a-server-with-quite-a-long-name-{at}:20070/a-volume-with-a-name-{at}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut world = World::new(&names);
    let mut daemon = Daemon::boot(&world);
    daemon.run(&mut world, create(&names)).unwrap();
    daemon.run(&mut world, start()).unwrap();
    assert!(world.label(names[7]).nodes.len() < names.len());
    let made = world.spec();
    world.go_to(OTHER);
    let mut daemon = Daemon::boot(&world);
    daemon.run(&mut world, import(names[7], false)).unwrap();
    assert_eq!(world.spec().nodes, made.nodes);
}
