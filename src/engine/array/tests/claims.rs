//! Who may start an array, out of which replicas: claims, labels, generations.

use super::*;

#[test]
fn the_epoch_is_greater_than_any_that_was_seen() {
    let (mut world, mut daemon) = pairs();
    let held = Claim { epoch: Epoch(41), owner: Id([90; 16]), host: HOST };
    world.volumes.get_mut("s4:1/v").unwrap().claim = Some(held);
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(world.running["a"], Epoch(42));
    assert!(FOUR.iter().all(|target| world.volumes[*target].claim.unwrap().epoch == Epoch(42)));
    daemon.run(&mut world, stop(false)).unwrap();
    // A label can know of a greater one than the claim: a volume that was freed and assigned again has none.
    world.volumes.get_mut("s1:1/v").unwrap().claim = None;
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(world.running["a"], Epoch(43));
}

#[test]
fn another_host_starts_it_only_by_take_over() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    let mut other = copied(&mut world);
    other.settle(&mut world);
    let why = other.why("a");
    for word in
        ["node n-0 (s1:1/v): it is claimed by another host", &HOST.to_string(), "epoch 1", "dst start a --take-over"]
    {
        assert!(why.contains(word), "{word}: {why}");
    }
    other.run(&mut world, stop(false)).unwrap();
    assert!(other.error(&mut world, start()).contains("--take-over"));
    assert_eq!(world.running["a"], Epoch(1));
    other.run(&mut world, start_on(TAKE)).unwrap();
    assert_eq!(world.running["a"], Epoch(2));
    // The first host's next life is refused in turn, and by name.
    world.go_to(HOST);
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert!(daemon.why("a").contains(&OTHER.to_string()), "{}", daemon.why("a"));
    daemon.run(&mut world, stop(false)).unwrap();
    let error = daemon.error(&mut world, remove(false));
    assert!(error.contains("another host has claimed the volume") && error.contains(&OTHER.to_string()), "{error}");
    let Ok(Answer::Removed(removed)) = daemon.run(&mut world, remove(true)) else { panic!() };
    assert_eq!(removed.warnings.len(), 4);
    assert!(world.volumes.values().all(|volume| volume.member.is_some()), "the array is the other host's");
}

#[test]
fn a_take_over_serves_nothing_before_every_replica_has_accepted() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    let mut other = copied(&mut world);
    world.reach("s2:1/v", false);
    let error = other.error(&mut world, start_on(TAKE));
    for word in ["node n-0 (s2:1/v)", "every replica has accepted", "dst start a --take-over --force"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert_eq!(world.epochs.len(), 1);
    // It is there when it is asked, and fails when it is claimed.
    world.reach("s2:1/v", true);
    world.broken.insert("claim");
    assert!(other.error(&mut world, start_on(TAKE)).contains("it broke"));
    assert_eq!(world.epochs.len(), 1);
    world.broken.clear();
    world.reach("s2:1/v", false);
    other.run(&mut world, start_on(FORCE)).unwrap();
    assert_eq!(states(&world), [IN, OUT, IN, IN]);
    // Even a stale one has to accept: the former host may have called it in sync again.
    other.run(&mut world, stop(false)).unwrap();
    let mut third = {
        let records = world.records.clone();
        world.go_to(Id([202; 16]));
        world.records = records;
        Daemon::boot(&world)
    };
    assert!(third.error(&mut world, start_on(TAKE)).contains("node n-0 (s2:1/v)"));
}

#[test]
fn a_node_goes_on_without_a_replica_once_that_is_durable() {
    let (mut world, mut daemon) = pairs();
    world.reach("s3:1/v", false);
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(states(&world), [IN, IN, OUT, IN]);
    let spec = world.spec();
    assert_eq!(spec.nodes[0].generation.id, spec.id, "a node whose set has not changed keeps its generation");
    assert!(spec.nodes[1].generation.descends(spec.id));
    assert_eq!(world.label("s4:1/v").generation, spec.nodes[1].generation);
    daemon.run(&mut world, stop(false)).unwrap();
    // It comes back: stale it stays, and it learns so.
    world.reach("s3:1/v", true);
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(states(&world), [IN, IN, OUT, IN]);
    assert_eq!(world.spec().nodes, spec.nodes);
    assert_eq!(world.label("s3:1/v").node().unwrap().replicas[0].state, OUT);
    daemon.run(&mut world, stop(false)).unwrap();
    // The stale one alone is not enough.
    world.reach("s4:1/v", false);
    let error = daemon.error(&mut world, start());
    assert!(
        error.contains("(s4:1/v): connection refused; no other replica of this node that is in sync is there"),
        "{error}"
    );
    assert_eq!(states(&world), [IN, IN, OUT, IN]);
}

#[test]
fn after_a_power_cut_of_the_site_replicas_are_waited_for() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    world.running.clear();
    world.reach("s2:1/v", false);
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Starting));
    assert!(daemon.why("a").contains("(s2:1/v): connection refused; it is waited for"), "{}", daemon.why("a"));
    let mut patient = daemon;
    world.reach("s2:1/v", true);
    patient.pass(&mut world);
    assert_eq!((patient.state("a"), states(&world)), (Some(State::Started), vec![IN, IN, IN, IN]));
    // Not for ever.
    world.running.clear();
    world.reach("s2:1/v", false);
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    for _ in 0..limits::PATIENT_TRIES {
        assert_eq!(daemon.state("a"), Some(State::Starting));
        daemon.pass(&mut world);
    }
    assert_eq!((daemon.state("a"), states(&world)), (Some(State::Started), vec![IN, OUT, IN, IN]));
}

#[test]
fn a_record_that_is_older_than_a_label_is_not_used() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    let old = world.records.clone();
    world.reach("s1:1/v", false);
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    world.reach("s1:1/v", true);
    let new = std::mem::replace(&mut world.records, old);
    let mut daemon = Daemon::boot(&world);
    let error = daemon.error(&mut world, start());
    for word in ["node n-0 (s2:1/v)", "newer than this machine's record", "dst import s2:1/v"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    // The other way round nothing is wrong: the label was not written yet.
    world.records = new;
    let mut daemon = Daemon::boot(&world);
    daemon.run(&mut world, start()).unwrap();
}

#[test]
fn two_hosts_with_half_of_the_replicas_each_are_a_split_brain() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    let mut other = copied(&mut world);
    world.reach("s1:1/v", false);
    other.run(&mut world, start_on(FORCE)).unwrap();
    world.reach("s1:1/v", true);
    world.reach("s2:1/v", false);
    world.go_to(HOST);
    // Both have said that the other one was dead.
    world.newest = None;
    daemon.run(&mut world, start_on(FORCE)).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    world.reach("s2:1/v", true);
    for terms in [Terms::default(), TAKE, FORCE] {
        let error = daemon.error(&mut world, start_on(terms));
        for word in ["node n-0 (s2:1/v): split brain", &OTHER.to_string(), "dst replica remove a n-0 1"] {
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}

#[test]
fn a_volume_that_is_not_what_the_record_says_is_refused_by_name() {
    type Change = fn(&mut World);
    let cases: [(Change, &str); 6] = [
        (
            |world| world.volumes.get_mut("s2:1/v").unwrap().id = Id([99; 16]),
            "the volume is another one than when it was added",
        ),
        (|world| world.volumes.get_mut("s2:1/v").unwrap().sectors = 8, "the volume is too small: it has 4K"),
        (|world| world.volumes.get_mut("s2:1/v").unwrap().member = None, "is not assigned to this array any more"),
        (
            |world| {
                let node = world.volumes["s3:1/v"].member.clone();
                world.volumes.get_mut("s2:1/v").unwrap().member = node;
            },
            "the volume is that of node n-2048",
        ),
        (|world| world.volumes.get_mut("s2:1/v").unwrap().label = Some("rubbish".to_owned()), "its label is damaged"),
        (
            |world| {
                let label = world.volumes["s3:1/v"].label.clone();
                world.volumes.get_mut("s2:1/v").unwrap().label = label;
            },
            "its label is that of node n-2048 of array 'a'",
        ),
    ];
    for (change, why) in cases {
        let (mut world, mut daemon) = pairs();
        daemon.run(&mut world, start()).unwrap();
        daemon.run(&mut world, stop(false)).unwrap();
        change(&mut world);
        let error = daemon.error(&mut world, start_on(FORCE));
        assert!(error.contains("node n-0 (s2:1/v)") && error.contains(why), "{error}");
        assert_eq!(world.epochs.len(), 1, "{why}");
    }
}

#[test]
fn the_stale_one_that_returns_first_is_not_served_whatever_step_the_daemon_died_at() {
    for steps in 0..6 {
        let (mut world, mut daemon) = pairs();
        world.reach("s3:1/v", false);
        daemon.ask(start());
        for _ in 0..steps {
            daemon.step(&mut world);
        }
        let (served, recorded) = (world.newest.is_some(), steps > 1);
        assert_eq!(served, steps == 5, "after {steps} steps");
        world.running.clear();
        // The one that has the newest data is away now, and the other is back.
        world.reach("s3:1/v", true);
        world.reach("s4:1/v", false);
        // Nobody has outlived it, so the start waits: else the node would be late.
        world.boot = Id([9; 16]);
        let mut daemon = Daemon::boot(&world);
        daemon.settle(&mut world);
        if recorded {
            for _ in 0..10 {
                daemon.pass(&mut world);
                assert_eq!(daemon.state("a"), Some(State::Starting), "after {steps} steps");
            }
            assert!(daemon.why("a").contains("(s4:1/v)"), "{}", daemon.why("a"));
        } else {
            daemon.run(&mut world, start()).unwrap();
            assert_eq!(states(&world), [IN, IN, IN, OUT]);
        }
    }
}
