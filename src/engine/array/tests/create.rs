//! Creating arrays: what is refused, what is left behind.

use super::*;
use crate::control::replica::Generation;
use crate::units::Lba;

#[test]
fn a_create_that_cannot_be_is_refused_with_words() {
    let mut world = World::new(&THREE);
    world.volumes.get_mut(THREE[1]).unwrap().reachable = false;
    world.volumes.insert("alias:1/v".to_owned(), world.volumes[THREE[0]].clone());
    let small = Volume { sectors: 8, id: Id([9; 16]), ..world.volumes[THREE[0]].clone() };
    world.volumes.insert("small:1/v".to_owned(), small);
    let other = Member { id: Id([77; 16]), name: "other".to_owned(), node: "n-0".to_owned() };
    let used = Volume { member: Some(other), id: Id([10; 16]), ..world.volumes[THREE[0]].clone() };
    world.volumes.insert("used:1/v".to_owned(), used);
    for (targets, why) in [
        (vec![], "1 to 1024 nodes"),
        (vec!["nowhere"], "HOST:PORT/VOLUME"),
        (vec!["s1:1/v", "s1:1/v"], "given twice"),
        (vec!["s1:1/v", "s2:1/v"], "target 2 (s2:1/v): connection refused"),
        (vec!["s1:1/v", "s9:1/v"], "target 2 (s9:1/v): no such volume"),
        (vec!["s1:1/v", "alias:1/v"], "same volume as target 1 (s1:1/v)"),
        (vec!["s1:1/v", "small:1/v"], "too small with 4K: at least 64K"),
        (vec!["used:1/v"], "in use by array 'other' (node n-0)"),
        (vec!["used:1/v"], "dst volume free used:1/v --force"),
    ] {
        let mut daemon = Daemon::boot(&world);
        let error = daemon.error(&mut world, create(&targets));
        assert!(error.contains(why), "{targets:?}: {error}");
        assert!(world.records.is_empty() && daemon.state("a").is_none());
    }
    let mut daemon = Daemon::boot(&world);
    let with = |alg, chunk, block, name: &str| {
        let targets = vec!["s1:1/v".to_owned()];
        Command::Create(Create { name: name.to_owned(), alg, chunk, block, replicas: 1, targets, size: None })
    };
    for (command, why) in [
        (with(Alg::Linear, Some(65536), 512, "a"), "linear array has no chunk"),
        (with(Alg::Striped, Some(65535), 512, "a"), "no power of two"),
        (with(Alg::Striped, Some(2048), 512, "a"), "4 to 1024 KiB"),
        (with(Alg::Striped, Some(2 << 20), 512, "a"), "4 to 1024 KiB"),
        (with(Alg::Linear, None, 1024, "a"), "512 or 4096"),
        (with(Alg::Linear, None, 512, "a/b"), "not a name"),
    ] {
        let error = daemon.error(&mut world, command);
        assert!(error.contains(why), "{error}");
    }
    daemon.run(&mut world, with(Alg::Linear, None, 512, "a")).unwrap();
    assert!(daemon.error(&mut world, with(Alg::Linear, None, 512, "a")).contains("'dst remove a' first"));
}

fn mirrored(replicas: usize, targets: &[&str]) -> Command {
    let targets = targets.iter().map(|target| (*target).to_owned()).collect();
    Command::Create(Create {
        name: "a".to_owned(),
        alg: Alg::Striped,
        chunk: None,
        block: 512,
        replicas,
        targets,
        size: None,
    })
}

#[test]
fn a_node_is_as_large_as_its_smallest_replica() {
    let mut world = World::new(&["s1:1/v", "s2:1/v", "s3:1/v", "s4:1/v"]);
    world.volumes.get_mut("s2:1/v").unwrap().sectors = 1500;
    world.volumes.get_mut("s3:1/v").unwrap().sectors = 1700;
    let mut daemon = Daemon::boot(&world);
    let command = mirrored(2, &["s1:1/v,s2:1/v", "s4:1/v,s3:1/v"]);
    let Ok(Answer::Array(array)) = daemon.run(&mut world, command) else { panic!() };
    assert_eq!(array.spec.as_ref().unwrap().size, 2 * (1500 / 128) * 128 * 512);
    assert!(array.warnings.is_empty());
    let shown: Vec<String> = array.nodes[1].replicas.iter().map(|replica| replica.target.to_string()).collect();
    assert_eq!(shown, ["s4:1/v", "s3:1/v"]);
    let spec = ArraySpec::decode("a", &world.records["a"]).unwrap();
    assert_eq!(spec.nodes[0].generation, Generation::first(spec.id));
    for ((node, replica), at) in spec.replicas().zip([1u8, 2, 4, 3]) {
        assert_eq!((replica.volume, replica.state), (Id([at; 16]), ReplicaState::InSync));
        let member = world.volumes[&replica.target.to_string()].member.as_ref().unwrap();
        assert_eq!(member.node, node.start.to_string());
    }
    daemon.run(&mut world, remove(false)).unwrap();
    assert!(world.volumes.values().all(|volume| volume.member.is_none()));
}

#[test]
fn replicas_that_make_no_sense_are_refused() {
    let mut world = World::new(&["s1:1/v", "s1:2/v", "s3:1/v", "/srv/a,b", "/srv/c"]);
    world.volumes.insert("alias:1/v".to_owned(), world.volumes["s1:1/v"].clone());
    let tiny = Volume { sectors: 8, id: Id([9; 16]), ..world.volumes["s1:1/v"].clone() };
    world.volumes.insert("tiny:1/v".to_owned(), tiny);
    for (replicas, targets, why) in [
        (0, ["s1:1/v"], "0 replicas: a node has 1 to 3"),
        (4, ["s1:1/v"], "4 replicas: a node has 1 to 3"),
        (2, ["s1:1/v"], "names 1 target(s), and each node has 2 replicas"),
        (2, ["s1:1/v,s3:1/v,s1:2/v"], "names 3 target(s), and each node has 2 replicas"),
        (2, ["s1:1/v,"], "HOST:PORT/VOLUME"),
        (2, ["s1:1/v,s1:1/v"], "s1:1/v is given twice"),
        (2, ["s1:1/v,alias:1/v"], "target 2 (alias:1/v): it is the same volume as target 1 (s1:1/v)"),
        (2, ["s1:1/v,tiny:1/v"], "target 2 (tiny:1/v): too small with 4K"),
    ] {
        let mut daemon = Daemon::boot(&world);
        let error = daemon.error(&mut world, mirrored(replicas, &targets));
        assert!(error.contains(why), "{targets:?}: {error}");
        assert!(world.records.is_empty());
    }
    let mut daemon = Daemon::boot(&world);
    let Ok(Answer::Array(array)) = daemon.run(&mut world, mirrored(2, &["s1:1/v,s1:2/v"])) else { panic!() };
    assert_eq!(array.warnings, ["node n-0 has two replicas on s1: when that machine is away, so are both"]);
    daemon.run(&mut world, remove(false)).unwrap();
    let Ok(Answer::Array(array)) = daemon.run(&mut world, mirrored(2, &["s1:1/v,/srv/c"])) else { panic!() };
    assert!(array.warnings.is_empty());
    daemon.run(&mut world, remove(false)).unwrap();
    daemon.run(&mut world, mirrored(1, &["/srv/a,b"])).unwrap();
}

#[test]
fn a_create_that_fails_leaves_nothing() {
    for broken in ["save", "assign"] {
        let mut world = World::new(&THREE);
        world.broken.insert(broken);
        let mut daemon = Daemon::boot(&world);
        assert!(daemon.error(&mut world, create(&THREE)).contains("it broke"));
        assert!(daemon.state("a").is_none() && world.records.is_empty(), "{broken}");
        assert!(world.volumes.values().all(|volume| volume.member.is_none()), "{broken}");
    }
}

#[test]
fn a_create_that_cannot_be_undone_at_once_is_undone_later() {
    for force in [false, true] {
        let mut world = World::new(&THREE);
        let mut daemon = Daemon::boot(&world);
        let ticket = daemon.ask(create(&THREE));
        while !matches!(daemon.todo.front(), Some((_, Work::Free(..)))) {
            if matches!(daemon.todo.front(), Some((_, Work::Assign(_)))) {
                world.broken.insert("assign");
            }
            assert!(daemon.step(&mut world));
        }
        world.volumes.get_mut(THREE[0]).unwrap().reachable = false;
        daemon.settle(&mut world);
        let error = daemon.replies[&ticket].as_ref().unwrap_err().text.clone();
        assert!(error.contains("was not created: node n-128 (s2:1/v): it broke"), "{error}");
        assert!(error.contains("dst remove a --force"), "{error}");
        world.broken.clear();
        assert!(daemon.error(&mut world, remove(false)).contains("in the background"));
        if force {
            let Ok(Answer::Removed(removed)) = daemon.run(&mut world, remove(true)) else { panic!() };
            assert!(removed.warnings[0].contains("dst volume free s1:1/v --force"));
        } else {
            daemon.pass(&mut world);
            assert_eq!(daemon.state("a"), Some(State::Removing));
            world.volumes.get_mut(THREE[0]).unwrap().reachable = true;
            daemon.pass(&mut world);
            assert!(world.volumes[THREE[0]].member.is_none());
        }
        assert!(daemon.state("a").is_none() && world.records.is_empty());
    }
}

#[test]
fn replicas_that_may_differ_are_filled_from_the_first() {
    const FOUR: [&str; 4] = ["s1:1/v", "s2:1/v", "s3:1/v", "s4:1/v"];
    const FILL: ReplicaState = ReplicaState::Syncing { from: Lba(0) };
    for (used, name) in FOUR.iter().enumerate() {
        let mut world = World::new(&FOUR);
        world.volumes.get_mut(*name).unwrap().blank = false;
        let mut daemon = Daemon::boot(&world);
        daemon.run(&mut world, mirrored(2, &["s1:1/v,s2:1/v", "s3:1/v,s4:1/v"])).unwrap();
        let filled = if used < 2 { [IN, FILL, IN, IN] } else { [IN, IN, IN, FILL] };
        assert_eq!(states(&world), filled, "{name} was used before");
        assert!(world.spec().clean, "those in sync are the same");
    }
}
