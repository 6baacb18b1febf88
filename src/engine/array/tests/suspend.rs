//! Requests of a node that are held: what is durable before what is said, and that it outlives the daemon.

use super::*;
use crate::control::node::{NodeAsk, OnExpire, Suspend, Ttl};
use crate::control::status::Gate;
use std::time::Duration;

pub(super) fn node(node: &str, ask: NodeAsk) -> Command {
    Command::Node { name: "a".to_owned(), node: node.parse().unwrap(), ask }
}

pub(super) fn suspend(ttl: Option<u64>, on_expire: OnExpire) -> Command {
    let ttl = Ttl(ttl.map(Duration::from_secs));
    node("n-128", NodeAsk::Suspend(Suspend { ttl, on_expire, by: Some("me".to_owned()) }))
}

fn forever() -> Command {
    suspend(None, OnExpire::Resume)
}

fn resume() -> Command {
    node("n-128", NodeAsk::Resume)
}

fn fail() -> Command {
    node("n-128", NodeAsk::Fail)
}

pub(super) fn news(daemon: &mut Daemon, world: &World, news: News) {
    let epoch = world.spec().epoch;
    daemon.event(Event::News { name: "a".to_owned(), epoch, news });
}

fn frozen(daemon: &mut Daemon, world: &World) {
    news(daemon, world, News::Frozen { node: 1, flushed: true });
}

fn gate(daemon: &Daemon) -> Gate {
    daemon.owner.view()[0].nodes[1].gate
}

/// A node is suspended, and that was said.
fn suspended(command: Command) -> (World, Daemon) {
    let (mut world, mut daemon) = started();
    let ticket = daemon.ask(command);
    daemon.settle(&mut world);
    assert_eq!((daemon.replies.contains_key(&ticket), gate(&daemon)), (false, Gate::Draining));
    frozen(&mut daemon, &world);
    assert!(daemon.replies.remove(&ticket).unwrap().is_ok());
    assert_eq!(gate(&daemon), Gate::Frozen);
    (world, daemon)
}

#[test]
fn it_is_durable_before_it_begins_and_frozen_before_it_is_said() {
    let (mut world, mut daemon) = started();
    let ticket = daemon.ask(suspend(Some(60), OnExpire::Fail));
    assert!(daemon.steered.is_empty() && world.spec().nodes[1].suspend.is_none());
    daemon.settle(&mut world);
    assert_eq!(daemon.steered, [Steer::Freeze { node: 1 }]);
    let suspend = world.spec().nodes[1].suspend.clone().unwrap();
    assert_eq!((suspend.by.as_str(), suspend.until, suspend.on_expire), ("me", Some(60), OnExpire::Fail));
    assert!(!daemon.replies.contains_key(&ticket));
    frozen(&mut daemon, &world);
    assert!(daemon.replies[&ticket].is_ok());
    daemon.run(&mut world, resume()).unwrap();
    assert_eq!(daemon.steered[1..], [Steer::Thaw { node: 1 }]);
    assert_eq!((world.spec().nodes[1].suspend.clone(), gate(&daemon)), (None, Gate::Open));
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let (mut world, mut daemon) = made();
    let error = |daemon: &mut Daemon, world: &mut World, command, errno, why: &str| {
        let refusal = daemon.run(world, command).unwrap_err();
        assert!(refusal.errno == errno && refusal.text.contains(why), "{refusal:?}, not {why}");
    };
    error(&mut daemon, &mut world, forever(), Errno::EINVAL, "array 'a' is not started");
    daemon.run(&mut world, start()).unwrap();
    error(&mut daemon, &mut world, node("n-7", NodeAsk::Resume), Errno::ENOENT, "has no node n-7");
    error(&mut daemon, &mut world, resume(), Errno::EINVAL, "node n-128 is not suspended, so it is not resumed");
    error(&mut daemon, &mut world, fail(), Errno::EINVAL, "node n-128 is not suspended, so it is not failed");
    world.broken.insert("save");
    error(&mut daemon, &mut world, forever(), Errno::ECONNREFUSED, "node n-128 is not suspended: it broke");
    assert!(daemon.steered.is_empty() && gate(&daemon) == Gate::Open);
    world.broken.clear();
    // A resume that came first.
    let ticket = daemon.ask(forever());
    daemon.settle(&mut world);
    daemon.run(&mut world, resume()).unwrap();
    assert!(daemon.replies.remove(&ticket).unwrap().unwrap_err().text.contains("resumed before it was frozen"));
    frozen(&mut daemon, &world);
    assert_eq!(gate(&daemon), Gate::Open, "news of what is over");
}

#[test]
fn what_is_suspended_already_gets_another_end() {
    let (mut world, mut daemon) = suspended(suspend(Some(60), OnExpire::Fail));
    daemon.now = daemon.now.after(Duration::from_secs(50));
    let Ok(Answer::Array(array)) = daemon.run(&mut world, suspend(Some(60), OnExpire::Resume)) else { panic!() };
    assert_eq!(array.warnings, ["node n-128 was suspended already (by me): its time has begun anew"]);
    assert_eq!(daemon.steered.len(), 1, "it is frozen already");
    let suspend = world.spec().nodes[1].suspend.clone().unwrap();
    assert_eq!((suspend.since, suspend.until, suspend.on_expire), (0, Some(110), OnExpire::Resume));
    // A record that cannot be written leaves the former end.
    world.broken.insert("save");
    assert!(daemon.run(&mut world, forever()).is_err());
    assert_eq!(daemon.owner.view()[0].nodes[1].suspend.as_ref().unwrap().until, Some(110));
}

#[test]
fn its_time_passes() {
    let (mut world, mut daemon) = suspended(suspend(Some(60), OnExpire::Resume));
    assert_eq!(daemon.owner.next_wake(), Time(0).after(Duration::from_secs(60)));
    daemon.pass(&mut world);
    assert_eq!(daemon.steered[1..], [Steer::Thaw { node: 1 }]);
    assert!(world.spec().nodes[1].suspend.is_none() && gate(&daemon) == Gate::Open);
    let (mut world, mut daemon) = suspended(suspend(Some(60), OnExpire::Fail));
    daemon.pass(&mut world);
    assert_eq!(daemon.steered[1..], [Steer::Fail { node: 1 }]);
    assert_eq!((gate(&daemon), daemon.owner.next_wake()), (Gate::Failing, Time::NEVER));
    assert!(daemon.error(&mut world, forever()).contains("its requests fail: 'dst resume a n-128' first"));
    daemon.run(&mut world, resume()).unwrap();
    assert_eq!(daemon.steered[2..], [Steer::Thaw { node: 1 }]);
}

#[test]
fn waiting_requests_fail_only_when_that_is_durable() {
    let (mut world, mut daemon) = suspended(suspend(Some(60), OnExpire::Resume));
    world.broken.insert("save");
    assert!(daemon.error(&mut world, fail()).contains("it broke"));
    assert_eq!((daemon.steered.len(), gate(&daemon)), (1, Gate::Frozen));
    world.broken.clear();
    daemon.run(&mut world, fail()).unwrap();
    assert_eq!((daemon.steered[1..].to_vec(), gate(&daemon)), (vec![Steer::Fail { node: 1 }], Gate::Failing));
    assert!(world.spec().nodes[1].suspend.as_ref().unwrap().failing);
}

#[test]
fn it_outlives_the_daemon_with_what_is_left_of_its_time() {
    let (mut world, daemon) = suspended(suspend(Some(60), OnExpire::Resume));
    drop(daemon);
    world.wall = 20;
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert_eq!((daemon.state("a"), gate(&daemon)), (Some(State::Started), Gate::Frozen));
    assert!(world.frozen["a"][1] && daemon.steered.is_empty(), "the first view has it");
    assert_eq!(daemon.owner.next_wake(), Time(0).after(Duration::from_secs(40)));
    // Its time has passed while nothing ran.
    world.wall = 60;
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert_eq!((gate(&daemon), world.frozen["a"][1], daemon.steered.len()), (Gate::Open, false, 0));
    // The same, when requests are to fail then.
    let (mut world, daemon) = suspended(suspend(Some(60), OnExpire::Fail));
    drop(daemon);
    world.wall = 61;
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert_eq!((gate(&daemon), daemon.steered.as_slice()), (Gate::Failing, &[Steer::Fail { node: 1 }][..]));
}

#[test]
fn a_crash_after_every_step_leaves_it_open_or_held() {
    for steps in 0..3 {
        let (mut world, mut daemon) = started();
        let ticket = daemon.ask(forever());
        for _ in 0..steps {
            daemon.step(&mut world);
        }
        if steps == 2 {
            frozen(&mut daemon, &world);
        }
        let said = daemon.replies.contains_key(&ticket);
        let mut daemon = Daemon::boot(&world);
        daemon.settle(&mut world);
        assert_eq!(gate(&daemon), if steps == 0 { Gate::Open } else { Gate::Frozen }, "{steps}");
        assert!(!said || world.frozen["a"][1], "what was said holds");
    }
}

#[test]
fn a_node_that_cannot_be_reached_is_frozen_with_a_warning() {
    let (mut world, mut daemon) = started();
    let ticket = daemon.ask(forever());
    daemon.settle(&mut world);
    news(&mut daemon, &world, News::Frozen { node: 1, flushed: false });
    let Ok(Answer::Array(array)) = daemon.replies.remove(&ticket).unwrap() else { panic!() };
    assert!(array.warnings[0].contains("node n-128 cannot be reached"), "{:?}", array.warnings);
}

#[test]
fn an_end_of_the_array_answers_who_waits_and_a_stop_ends_the_suspend() {
    let (mut world, mut daemon) = started();
    let ticket = daemon.ask(forever());
    daemon.settle(&mut world);
    let died = Event::Died { name: "a".to_owned(), epoch: Epoch(1), why: "broken".to_owned() };
    daemon.event(died);
    assert!(daemon.replies.remove(&ticket).unwrap().unwrap_err().text.contains("in use no more"));
    daemon.settle(&mut world);
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(gate(&daemon), Gate::Frozen, "its data path died: it is held as before");
    daemon.run(&mut world, stop(false)).unwrap();
    daemon.run(&mut world, start()).unwrap();
    assert_eq!((gate(&daemon), world.frozen["a"][1]), (Gate::Open, false));
}

#[test]
fn a_change_of_the_replicas_is_not_held_up() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    let ticket = daemon.ask(node("n-2048", NodeAsk::Suspend(Suspend::default())));
    let volumes: Vec<Id> = world.spec().replicas().map(|(_, replica)| replica.volume).collect();
    let standings = vec![(volumes[0], Standing::InSync), (volumes[1], Standing::Stale)];
    daemon.event(Event::Regroup {
        name: "a".to_owned(),
        epoch: Epoch(1),
        standings,
        losses: Vec::new(),
        fresh: fresh(),
    });
    world.reach("s1:1/v", false);
    daemon.settle(&mut world);
    // The label of a node that has nothing to do with it cannot be written.
    assert_eq!(daemon.regrouped, [Saved::AllBut(vec![volumes[0]])]);
    assert_eq!(daemon.steered, [Steer::Freeze { node: 1 }]);
    news(&mut daemon, &world, News::Frozen { node: 1, flushed: true });
    assert!(daemon.replies.remove(&ticket).unwrap().is_ok());
}
