//! Nodes that come and go at the end of a linear array that is stopped.

use super::*;

fn add(target: &str, size: Option<u64>) -> Command {
    Command::AddNode { name: "a".to_owned(), target: target.to_owned(), size }
}

fn take(node: &str) -> Command {
    Command::RemoveNode { name: "a".to_owned(), node: node.parse().unwrap() }
}

/// Two nodes of 2048 sectors, of two replicas each, and a volume to spare.
fn spare() -> (World, Daemon) {
    let (mut world, daemon) = pairs();
    let volume = Volume { id: Id([50; 16]), member: None, sectors: 1023, ..world.volumes["s1:1/v"].clone() };
    world.volumes.insert("s5:1/v".to_owned(), volume);
    (world, daemon)
}

fn starts(world: &World) -> Vec<(u64, u64)> {
    world.spec().nodes.iter().map(|node| (node.start.0.0, node.sectors)).collect()
}

#[test]
fn a_linear_array_grows_and_shrinks_at_its_end() {
    let (mut world, mut daemon) = spare();
    let Ok(Answer::Array(array)) = daemon.run(&mut world, add("s5:1/v", None)) else { panic!() };
    assert_eq!((array.nodes.len(), array.spec.as_ref().unwrap().size), (3, (4096 + 1016) * 512));
    assert_eq!(starts(&world), [(0, 2048), (2048, 2048), (4096, 1016)], "whole pages");
    assert_eq!(world.volumes["s5:1/v"].member.as_ref().unwrap().node, "n-4096");
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(world.label("s5:1/v").node().unwrap().start.to_string(), "n-4096");
    for command in [add("s6:1/v", None), take("n-4096")] {
        assert!(daemon.error(&mut world, command).contains("'dst stop a' first"));
    }
    daemon.run(&mut world, stop(false)).unwrap();
    let error = daemon.error(&mut world, take("n-2048"));
    assert!(error.contains("Only n-4096 can be removed"), "{error}");
    assert!(daemon.error(&mut world, take("n-8")).contains("has no node n-8"));
    daemon.run(&mut world, take("n-4096")).unwrap();
    daemon.run(&mut world, take("n-2048")).unwrap();
    assert!(["s3:1/v", "s4:1/v", "s5:1/v"].iter().all(|volume| world.volumes[*volume].member.is_none()));
    assert!(daemon.error(&mut world, take("n-0")).contains("'dst remove a' removes the array"));
    daemon.run(&mut world, start()).unwrap();
}

#[test]
fn a_node_is_as_large_as_was_said() {
    let (mut world, mut daemon) = spare();
    for (size, why) in [(0, "a multiple of 4K"), (4097, "a multiple of 4K"), (1 << 20, "too small with 511.5K: 1M")] {
        let error = daemon.error(&mut world, add("s5:1/v", Some(size)));
        assert!(error.contains(why), "{size}: {error}");
    }
    daemon.run(&mut world, add("s5:1/v", Some(800 * 512))).unwrap();
    assert_eq!(starts(&world)[2], (4096, 800));
    daemon.run(&mut world, remove(false)).unwrap();
    let sized = |size| match create(&["s1:1/v", "s2:1/v"]) {
        Command::Create(create) => Command::Create(Create { alg: Alg::Linear, size, ..create }),
        other => panic!("{other:?}"),
    };
    assert!(daemon.error(&mut world, sized(Some(2 << 20))).contains("target 1 (s1:1/v): too small with 1M: 2M"));
    daemon.run(&mut world, sized(Some(800 * 512))).unwrap();
    assert_eq!(starts(&world), [(0, 800), (800, 800)], "as in 2007");
}

#[test]
fn a_node_that_cannot_be_is_refused() {
    let (mut world, mut daemon) = spare();
    world.volumes.insert("alias:1/v".to_owned(), world.volumes["s3:1/v"].clone());
    let volume = world.volumes["s5:1/v"].clone();
    world.volumes.insert("small:1/v".to_owned(), Volume { sectors: 7, id: Id([51; 16]), ..volume.clone() });
    let member = Some(Member { id: Id([77; 16]), name: "other".to_owned(), node: "n-0".to_owned() });
    world.volumes.insert("used:1/v".to_owned(), Volume { member, id: Id([52; 16]), ..volume });
    let before = world.spec();
    for (target, why) in [
        ("nowhere", "HOST:PORT/VOLUME"),
        ("s3:1/v", "s3:1/v is a replica of node n-2048 already"),
        ("alias:1/v", "it is the volume of node n-2048 (s3:1/v)"),
        ("small:1/v", "too small"),
        ("used:1/v", "in use by array 'other'"),
        ("s9:1/v", "s9:1/v: no such volume"),
    ] {
        let error = daemon.error(&mut world, add(target, None));
        assert!(error.contains(why), "{target}: {error}");
        assert_eq!((daemon.state("a"), world.spec()), (Some(State::Stopped), before.clone()));
    }
    let (mut world, mut daemon) = made();
    assert!(daemon.error(&mut world, add("s5:1/v", None)).contains("is striped"));
    assert!(daemon.error(&mut world, take("n-256")).contains("is striped"));
}

#[test]
fn a_change_that_was_cut_off_is_whole_or_undone() {
    for (command, volume) in [(add("s5:1/v", None), "s5:1/v"), (take("n-2048"), "s3:1/v")] {
        for steps in 0..5 {
            let (mut world, mut daemon) = spare();
            let ticket = daemon.ask(command.clone());
            for _ in 0..steps {
                daemon.step(&mut world);
            }
            let answered = daemon.replies.contains_key(&ticket);
            let half = world.spec().replicas().any(|(_, replica)| replica.volume.is_nil());
            world.reach(volume, false);
            let mut daemon = Daemon::boot(&world);
            daemon.settle(&mut world);
            if half {
                let error = daemon.error(&mut world, start());
                assert!(error.contains(&format!("({volume}): the node was being added or removed")), "{error}");
            }
            world.reach(volume, true);
            let mut daemon = Daemon::boot(&world);
            daemon.settle(&mut world);
            let spec = world.spec();
            let has = spec.replicas().any(|(_, replica)| replica.target.to_string() == volume);
            assert_eq!(has, world.volumes[volume].member.is_some(), "after {steps} steps of {command:?}");
            assert!(spec.replicas().all(|(_, replica)| !replica.volume.is_nil()));
            if answered {
                assert_eq!(has, volume == "s5:1/v", "what was answered is done");
            }
            daemon.run(&mut world, start()).unwrap();
        }
    }
}

#[test]
fn what_fails_on_the_way_is_as_if_it_had_not_been() {
    for steps in 1..4 {
        let (mut world, mut daemon) = spare();
        let before = world.spec();
        let ticket = daemon.ask(add("s5:1/v", None));
        for _ in 0..steps {
            daemon.step(&mut world);
        }
        match steps {
            2 => world.reach("s5:1/v", false),
            _ => drop(world.broken.insert("save")),
        }
        daemon.settle(&mut world);
        assert!(daemon.replies[&ticket].is_err());
        world.broken.clear();
        world.reach("s5:1/v", true);
        let mut daemon = Daemon::boot(&world);
        daemon.settle(&mut world);
        assert_eq!((world.spec(), world.volumes["s5:1/v"].member.is_none()), (before, true), "{steps}");
        daemon.run(&mut world, start()).unwrap();
    }
    let (mut world, mut daemon) = spare();
    let before = world.spec();
    world.broken.insert("save");
    assert!(daemon.error(&mut world, take("n-2048")).contains("it broke"));
    world.broken.clear();
    assert_eq!((world.spec(), world.volumes["s3:1/v"].member.is_some()), (before, true));
    world.reach("s3:1/v", false);
    let Ok(Answer::Array(array)) = daemon.run(&mut world, take("n-2048")) else { panic!() };
    assert!(array.warnings[0].contains("s3:1/v stays assigned to 'a'"), "{:?}", array.warnings);
    daemon.run(&mut world, start()).unwrap();
}
