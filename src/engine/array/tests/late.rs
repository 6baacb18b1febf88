//! Nodes that a start went on without: who is one, what is proven before it is served, and a daemon that dies after every step of that.

use super::suspend::{news, node};
use super::*;
use crate::control::command::Import;
use crate::control::member::TransferRole;
use crate::control::node::{Migrate, NodeAsk, Suspend};
use crate::control::scrub::Scrub;
use crate::engine::replicas::Standing;
use crate::engine::steer::Arrival;

/// The daemon dies, and its users live on; these servers are away when the next one starts.
fn killed(make: fn() -> (World, Daemon), away: &[&str]) -> (World, Daemon) {
    let (mut world, mut daemon) = make();
    if daemon.state("a") == Some(State::Stopped) {
        daemon.run(&mut world, start()).unwrap();
    }
    away.iter().for_each(|target| world.reach(target, false));
    let daemon = next_life(&mut world);
    (world, daemon)
}

fn next_life(world: &mut World) -> Daemon {
    world.running.clear();
    let mut daemon = Daemon::boot(world);
    daemon.settle(world);
    daemon
}

/// The third of three nodes is late.
fn one_of_three() -> (World, Daemon) {
    killed(made, &THREE[2..])
}

/// The second of two nodes is, with both of its replicas.
fn one_of_pairs() -> (World, Daemon) {
    killed(pairs, &["s3:1/v", "s4:1/v"])
}

fn late(daemon: &Daemon, node: usize) -> Option<String> {
    daemon.owner.view()[0].nodes[node].late.clone()
}

/// What the data path is given, with what must be durable by then; it serves the node from now on.
fn opened(daemon: &mut Daemon, world: &mut World) -> Option<(usize, Vec<Arrival>)> {
    let steered = std::mem::take(&mut daemon.steered);
    let (node, replicas) = steered.into_iter().find_map(|steer| match steer {
        Steer::Arrive { node, replicas } => Some((node, replicas)),
        _ => None,
    })?;
    let spec = world.spec();
    let own = &spec.nodes[node];
    assert_eq!(replicas.len(), own.replicas.len());
    for (arrival, replica) in replicas.iter().zip(&own.replicas) {
        assert_eq!((&arrival.target, arrival.volume), (&replica.target, replica.volume));
        assert_eq!(arrival.standing == Standing::InSync, replica.state.is_in_sync(), "as the record says");
        assert_eq!(arrival.losses, spec.memory.volumes.get(&replica.volume).copied());
        let volume = &world.volumes[&replica.target.to_string()];
        if replica.state.is_in_sync() || volume.reachable {
            let claim = volume.claim.unwrap();
            assert_eq!((claim.epoch, claim.host), (spec.epoch, world.host), "{} is claimed", replica.target);
            let label = world.label(&replica.target.to_string());
            assert_eq!((label.generation, label.epoch), (own.generation.clone(), spec.epoch));
        }
    }
    let in_sync = own.replicas.iter().filter(|replica| replica.state.is_in_sync());
    let in_sync: BTreeSet<String> = in_sync.map(|replica| replica.target.to_string()).collect();
    let newest = world.newest.as_mut().unwrap();
    assert!(in_sync.is_subset(newest), "{in_sync:?} have missed writes and would be read");
    newest.retain(|target| in_sync.contains(target) || !own.replicas.iter().any(|of| of.target.to_string() == *target));
    assert!(world.late.remove(&node));
    news(daemon, world, News::Arrived { node, result: Ok(()) });
    Some((node, replicas))
}

/// Looks until it has come.
fn comes(daemon: &mut Daemon, world: &mut World) -> Vec<Arrival> {
    for _ in 0..=limits::PATIENT_TRIES + 1 {
        daemon.pass(world);
        if let Some((_, replicas)) = opened(daemon, world) {
            return replicas;
        }
    }
    panic!("{:?}", daemon.why("a"));
}

/// Looks often; it does not come.
fn stays(daemon: &mut Daemon, world: &mut World) -> String {
    for _ in 0..2 * limits::PATIENT_TRIES {
        daemon.pass(world);
        assert_eq!(opened(daemon, world), None);
    }
    assert_eq!(daemon.state("a"), Some(State::Started));
    daemon.why("a")
}

#[test]
fn the_others_are_served_and_it_comes_when_its_server_does() {
    let (mut world, mut daemon) = one_of_three();
    assert_eq!(daemon.state("a"), Some(State::Started));
    let why = stays(&mut daemon, &mut world);
    assert_eq!(why, "served without a node that is late: node n-256 (s3:1/v): connection refused");
    assert_eq!(
        (late(&daemon, 1), late(&daemon, 2).as_deref()),
        (None, Some("node n-256 (s3:1/v): connection refused"))
    );
    assert!(daemon.now.after(limits::RECONNECT_MAX) >= daemon.owner.next_wake(), "it is looked at now and then");
    let epochs = THREE.map(|target| world.volumes[target].claim.unwrap().epoch.0);
    assert_eq!(epochs, [2, 2, 1], "of it nothing was asked");
    world.reach(THREE[2], true);
    let arrival = comes(&mut daemon, &mut world);
    assert_eq!((arrival.len(), arrival[0].standing), (1, Standing::InSync));
    assert_eq!((late(&daemon, 2), daemon.why("a").as_str()), (None, ""));
    assert_eq!(daemon.owner.next_wake(), Time::NEVER);
    assert_eq!((states(&world), world.spec().clean), (vec![IN; 3], false));
    daemon.run(&mut world, stop(false)).unwrap();
    daemon.run(&mut world, start()).unwrap();
}

#[test]
fn who_is_never_late() {
    type Change = fn(&mut World);
    let cases: [(&str, Change); 4] = [
        ("its users died with its machine", |world| world.boot = Id([9; 16])),
        ("nobody else is there", |world| THREE.iter().for_each(|target| world.reach(target, false))),
        ("another host has one of the others", |world| {
            let claim = Claim { epoch: Epoch(5), owner: Id([9; 16]), host: OTHER };
            world.volumes.get_mut(THREE[0]).unwrap().claim = Some(claim);
        }),
        ("one of the others is not what it was", |world| world.volumes.get_mut(THREE[0]).unwrap().id = Id([99; 16])),
    ];
    for (why, change) in cases {
        let (mut world, _) = started();
        world.reach(THREE[2], false);
        change(&mut world);
        let mut daemon = next_life(&mut world);
        for _ in 0..10 {
            daemon.pass(&mut world);
        }
        assert_eq!((daemon.state("a"), world.epochs.len()), (Some(State::Starting), 1), "{why}");
    }
    // Who asks for a start is told at once.
    let (mut world, mut daemon) = one_of_three();
    daemon.run(&mut world, stop(true)).unwrap();
    for terms in [Terms::default(), TAKE, FORCE] {
        assert!(daemon.error(&mut world, start_on(terms)).contains("cannot start: node n-256 (s3:1/v)"));
    }
    let import = Command::Import(Import { target: THREE[0].to_owned(), name: Some("b".to_owned()), force: false });
    assert!(daemon.run(&mut world, import).is_err());
    // A node of this machine.
    let mut world = World::new(&[THREE[0], "/disk"]);
    let mut daemon = Daemon::boot(&world);
    daemon.run(&mut world, create(&[THREE[0], "/disk"])).unwrap();
    daemon.run(&mut world, start()).unwrap();
    world.reach("/disk", false);
    assert_eq!(next_life(&mut world).state("a"), Some(State::Starting));
    // A node that moves.
    let (mut world, mut daemon) = started();
    let volume = Volume { id: Id([50; 16]), member: None, claim: None, label: None, ..world.volumes[THREE[0]].clone() };
    world.volumes.insert(FOUR[3].to_owned(), volume);
    let ticket = daemon.ask(node("n-256", NodeAsk::Migrate(Migrate::to(FOUR[3]))));
    daemon.settle(&mut world);
    assert!(daemon.replies.remove(&ticket).unwrap().is_ok());
    world.reach(THREE[2], false);
    assert_eq!(next_life(&mut world).state("a"), Some(State::Starting));
}

#[test]
fn all_that_come_are_claimed_and_the_others_stale_before_it_is_served() {
    // Both: the one that comes first is not gone on with at once.
    let (mut world, mut daemon) = one_of_pairs();
    assert_eq!((daemon.state("a"), states(&world)), (Some(State::Started), vec![IN; 4]));
    world.reach("s4:1/v", true);
    daemon.pass(&mut world);
    assert!(late(&daemon, 1).unwrap().contains("(s3:1/v): connection refused; it is waited for"));
    world.reach("s3:1/v", true);
    let arrivals = comes(&mut daemon, &mut world);
    assert!(arrivals.iter().all(|arrival| arrival.standing == Standing::InSync));
    assert_eq!(states(&world), [IN; 4]);
    // One alone, for so long that the other may be dead; then that one is stale, whatever happens.
    let (mut world, mut daemon) = one_of_pairs();
    let before = world.spec().nodes[1].generation.clone();
    world.reach("s4:1/v", true);
    let arrivals = comes(&mut daemon, &mut world);
    assert_eq!(arrivals.iter().map(|of| of.standing).collect::<Vec<_>>(), [Standing::Stale, Standing::InSync]);
    assert_eq!(states(&world), [IN, IN, OUT, IN]);
    assert!(world.spec().nodes[1].generation.descends(before.id));
    assert_eq!(world.spec().nodes[0].generation, world.label("s1:1/v").generation);
    world.reach("s3:1/v", true);
    world.reach("s4:1/v", false);
    let mut daemon = next_life(&mut world);
    assert!(stays(&mut daemon, &mut world).contains("s4:1/v"), "the stale one has come, which is nobody");
    world.reach("s4:1/v", true);
    comes(&mut daemon, &mut world);
    assert_eq!(states(&world), [IN, IN, OUT, IN]);
}

/// Looks often, until it is served.
fn settle_late(daemon: &mut Daemon, world: &mut World) {
    for _ in 0..2 * limits::PATIENT_TRIES {
        if daemon.state("a") == Some(State::Started) && late(daemon, 1).is_none() {
            break;
        }
        daemon.pass(world);
        opened(daemon, world);
    }
}

#[test]
fn a_crash_after_every_step_serves_nothing_that_has_missed_writes() {
    let mut reached = 0;
    for steps in 0..12 {
        for back in [["s3:1/v"].as_slice(), &["s4:1/v"], &["s3:1/v", "s4:1/v"]] {
            for then in [["s3:1/v"].as_slice(), &["s4:1/v"], &["s3:1/v", "s4:1/v"]] {
                let (mut world, mut daemon) = one_of_pairs();
                back.iter().for_each(|target| world.reach(target, true));
                let mut left = steps;
                while left > 0 && late(&daemon, 1).is_some() {
                    daemon.now = daemon.owner.next_wake().min(daemon.now.after(limits::RECONNECT_MAX));
                    daemon.event(Event::Tick);
                    // Only the steps of its arrival count.
                    for _ in 0..3 {
                        left -= usize::from(left > 0 && daemon.step(&mut world));
                    }
                    reached += usize::from(opened(&mut daemon, &mut world).is_some());
                }
                FOUR[2..].iter().for_each(|target| world.reach(target, then.contains(target)));
                let mut daemon = next_life(&mut world);
                settle_late(&mut daemon, &mut world);
                FOUR[2..].iter().for_each(|target| world.reach(target, true));
                settle_late(&mut daemon, &mut world);
                assert_eq!(daemon.state("a"), Some(State::Started), "{steps} {back:?} {then:?}");
                assert_eq!(late(&daemon, 1), None, "{steps} {back:?} {then:?}");
            }
        }
    }
    assert!(reached > 0);
}

#[test]
fn what_cannot_be_served_stays_late_and_says_why() {
    type Change = fn(&mut World);
    let cases: [(Change, &str); 5] = [
        (|world| world.volumes.get_mut(THREE[2]).unwrap().id = Id([99; 16]), "the volume is another one"),
        (|world| world.volumes.get_mut(THREE[2]).unwrap().member = None, "is not assigned to this array any more"),
        (
            |world| {
                let claim = Claim { epoch: Epoch(1), owner: Id([9; 16]), host: OTHER };
                world.volumes.get_mut(THREE[2]).unwrap().claim = Some(claim);
            },
            "claimed by another host",
        ),
        (
            |world| {
                let claim = Claim { epoch: Epoch(8), owner: Id([9; 16]), host: HOST };
                world.volumes.get_mut(THREE[2]).unwrap().claim = Some(claim);
            },
            "epoch 8 has been used there, and this machine's record of the array has got to 2 only",
        ),
        (
            |world| {
                let mut spec = world.spec();
                spec.nodes[2].generation = spec.nodes[2].generation.next(Id([77; 16]));
                let label = MemberLabel::of(&spec, HOST, 2, 0).unwrap();
                world.volumes.get_mut(THREE[2]).unwrap().label = Some(label);
            },
            "its label is newer than this machine's record",
        ),
    ];
    for (change, why) in cases {
        let (mut world, mut daemon) = one_of_three();
        let before = world.volumes[THREE[2]].clone();
        world.reach(THREE[2], true);
        change(&mut world);
        let changed = world.volumes[THREE[2]].clone();
        let said = stays(&mut daemon, &mut world);
        assert!(said.contains("node n-256") && said.contains(why), "{said}");
        let after = &world.volumes[THREE[2]];
        assert_eq!((after.claim, &after.label), (changed.claim, &changed.label), "it is not touched");
        // When it is as it was, it is served.
        world.volumes.insert(THREE[2].to_owned(), Volume { reachable: true, ..before });
        comes(&mut daemon, &mut world);
    }
}

#[test]
fn who_finds_a_greater_claim_of_another_host_there_ends() {
    let (mut world, mut daemon) = one_of_three();
    world.reach(THREE[2], true);
    let held = Claim { epoch: Epoch(7), owner: Id([9; 16]), host: OTHER };
    world.volumes.get_mut(THREE[2]).unwrap().claim = Some(held);
    daemon.pass(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Failed));
    for word in ["fenced", &OTHER.to_string(), "node n-256 (s3:1/v)"] {
        assert!(daemon.why("a").contains(word), "{word}: {}", daemon.why("a"));
    }
    assert!(world.running.is_empty() && daemon.steered.is_empty());
}

#[test]
fn a_server_that_dies_again_meanwhile_is_waited_for() {
    for broken in ["join", "label", "save"] {
        let (mut world, mut daemon) = one_of_pairs();
        FOUR[2..].iter().for_each(|target| world.reach(target, true));
        world.broken.insert(broken);
        daemon.pass(&mut world);
        assert_eq!(opened(&mut daemon, &mut world), None, "{broken}");
        assert!(late(&daemon, 1).unwrap().contains("it broke"), "{broken}: {:?}", late(&daemon, 1));
        world.broken.clear();
        comes(&mut daemon, &mut world);
    }
    // And what the data path cannot attach.
    let (mut world, mut daemon) = one_of_three();
    world.reach(THREE[2], true);
    daemon.pass(&mut world);
    assert!(matches!(daemon.steered.pop(), Some(Steer::Arrive { node: 2, .. })));
    let why = "no such name".to_owned();
    news(&mut daemon, &world, News::Arrived { node: 2, result: Err(why) });
    assert_eq!(late(&daemon, 2).as_deref(), Some("no such name"));
    comes(&mut daemon, &mut world);
}

#[test]
fn what_its_machine_has_lost_is_judged_when_it_comes() {
    let cut = |world: &mut World, target: &str| world.volumes.get_mut(target).unwrap().losses += 1;
    // The only one: it is served as one that has lost something, until that is accepted.
    let (mut world, mut daemon) = one_of_three();
    cut(&mut world, THREE[2]);
    world.reach(THREE[2], true);
    let arrivals = comes(&mut daemon, &mut world);
    assert_eq!(arrivals[0].losses, Some(Losses { told: 1, lost: true }));
    daemon.run(&mut world, node("n-256", NodeAsk::AcceptLoss)).unwrap();
    assert_eq!(daemon.steered, [Steer::AcceptLoss { node: 2 }]);
    // One of two: it is behind the other.
    let (mut world, mut daemon) = one_of_pairs();
    cut(&mut world, "s3:1/v");
    FOUR[2..].iter().for_each(|target| world.reach(target, true));
    let arrivals = comes(&mut daemon, &mut world);
    assert_eq!(arrivals.iter().map(|of| of.standing).collect::<Vec<_>>(), [Standing::Stale, Standing::InSync]);
    // And without the other: that one may have everything, and is waited for, or given up.
    let (mut world, mut daemon) = one_of_pairs();
    cut(&mut world, "s3:1/v");
    world.reach("s3:1/v", true);
    let why = stays(&mut daemon, &mut world);
    for word in ["s4:1/v may have", "dst accept-loss a n-2048"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    let mut other = next_life(&mut world);
    assert!(stays(&mut other, &mut world).contains("s4:1/v may have"), "the next daemon judges alike");
    other.run(&mut world, node("n-2048", NodeAsk::AcceptLoss)).unwrap();
    let arrivals = comes(&mut other, &mut world);
    assert_eq!(arrivals[0].losses, Some(Losses { told: 1, lost: false }));
    assert_eq!(states(&world), [IN, IN, IN, OUT]);
}

/// The record is of before a migration of the node that is late.
fn moving_unknown() -> (World, Daemon) {
    let (mut world, mut daemon) = started();
    let records = world.records.clone();
    let volume = Volume { id: Id([50; 16]), member: None, claim: None, label: None, ..world.volumes[THREE[0]].clone() };
    world.volumes.insert(FOUR[3].to_owned(), volume);
    daemon.run(&mut world, node("n-256", NodeAsk::Migrate(Migrate::to(FOUR[3])))).unwrap();
    daemon.settle(&mut world);
    assert_eq!(world.label(THREE[2]).transfer.unwrap().role, TransferRole::Open);
    world.records = records;
    world.reach(THREE[2], false);
    let daemon = next_life(&mut world);
    world.reach(THREE[2], true);
    (world, daemon)
}

#[test]
fn a_target_that_its_label_names_is_asked_first() {
    let (mut world, mut daemon) = moving_unknown();
    world.reach(FOUR[3], false);
    let why = stays(&mut daemon, &mut world);
    assert!(why.contains("was moving to s4:1/v, which must say whether it has taken over"), "{why}");
    world.reach(FOUR[3], true);
    comes(&mut daemon, &mut world);
    // It has: the record is an older copy.
    let (mut world, mut daemon) = moving_unknown();
    let mut spec = world.spec();
    spec.nodes[2].generation = spec.nodes[2].generation.next(Id([77; 16]));
    let taken = MemberLabel::of(&spec, HOST, 2, 0).unwrap();
    world.volumes.get_mut(FOUR[3]).unwrap().label = Some(taken);
    let why = stays(&mut daemon, &mut world);
    assert!(why.contains("has moved to s4:1/v, and this machine's record does not know of that"), "{why}");
}

#[test]
fn what_is_asked_about_it_is_refused_but_for_a_resume() {
    let suspend = || node("n-256", NodeAsk::Suspend(Suspend::default()));
    let (mut world, mut daemon) = one_of_three();
    let asks = [
        suspend(),
        node("n-256", NodeAsk::Migrate(Migrate::to(FOUR[3]))),
        node("n-256", NodeAsk::Scrub(Scrub::default())),
        Command::AddReplica { name: "a".to_owned(), node: "n-256".parse().unwrap(), target: FOUR[3].to_owned() },
    ];
    for ask in asks {
        let error = daemon.error(&mut world, ask);
        assert!(error.contains("node n-256 is late") && error.contains("(s3:1/v)"), "{error}");
    }
    // One that was suspended is so when it has come, or is resumed before.
    for resumed in [false, true] {
        let (mut world, mut daemon) = started();
        let ticket = daemon.ask(suspend());
        daemon.settle(&mut world);
        news(&mut daemon, &world, News::Frozen { node: 2, flushed: true });
        assert!(daemon.replies.remove(&ticket).unwrap().is_ok());
        world.reach(THREE[2], false);
        let mut daemon = next_life(&mut world);
        assert_eq!((late(&daemon, 2).is_some(), &world.frozen["a"]), (true, &vec![false, false, true]));
        if resumed {
            daemon.run(&mut world, node("n-256", NodeAsk::Resume)).unwrap();
            assert_eq!(daemon.steered, [Steer::Thaw { node: 2 }]);
        }
        world.reach(THREE[2], true);
        comes(&mut daemon, &mut world);
        assert_eq!(world.spec().nodes[2].suspend.is_some(), !resumed);
    }
}

#[test]
fn a_stop_and_the_end_of_the_daemon_wait_for_nobody() {
    for steps in 0..4 {
        let (mut world, mut daemon) = one_of_three();
        world.reach(THREE[2], true);
        daemon.now = daemon.owner.next_wake();
        daemon.event(Event::Tick);
        for _ in 0..steps {
            daemon.step(&mut world);
        }
        daemon.run(&mut world, stop(false)).unwrap();
        assert_eq!((daemon.state("a"), daemon.owner.next_wake()), (Some(State::Stopped), Time::NEVER), "{steps}");
        daemon.run(&mut world, start()).unwrap();
        assert_eq!(late(&daemon, 2), None);
        let (mut world, mut daemon) = one_of_three();
        daemon.event(Event::Shutdown);
        daemon.settle(&mut world);
        assert!(daemon.exited);
    }
}

#[test]
fn a_stop_that_is_refused_meanwhile_leaves_it_on_its_way() {
    for steps in 0..6 {
        let (mut world, mut daemon) = one_of_three();
        world.reach(THREE[2], true);
        world.busy = true;
        daemon.now = daemon.owner.next_wake();
        daemon.event(Event::Tick);
        for _ in 0..steps {
            daemon.step(&mut world);
        }
        let ticket = daemon.ask(stop(false));
        opened(&mut daemon, &mut world);
        daemon.settle(&mut world);
        assert!(daemon.replies.remove(&ticket).unwrap().is_err());
        opened(&mut daemon, &mut world);
        if late(&daemon, 2).is_some() {
            comes(&mut daemon, &mut world);
        }
        assert_eq!((daemon.state("a"), late(&daemon, 2)), (Some(State::Started), None), "after {steps} steps");
    }
}
