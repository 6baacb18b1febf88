//! What goes on without anybody asking: arrays that come back, and arrays that have died.

use super::*;

/// After a boot of the machine nobody has outlived the daemon: a start waits for every node.
const REBOOTED: Id = Id([9; 16]);

#[test]
fn a_started_array_comes_back_in_the_background() {
    let (mut world, _) = started();
    world.running.clear();
    world.boot = REBOOTED;
    world.volumes.get_mut(THREE[2]).unwrap().reachable = false;
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Starting));
    assert!(daemon.why("a").contains("node n-256 (s3:1/v): connection refused"), "{}", daemon.why("a"));
    assert!(daemon.error(&mut world, start()).contains("give up with 'dst stop a'"));
    assert!(daemon.error(&mut world, remove(false)).contains("'dst stop a' first"));
    daemon.pass(&mut world);
    daemon.now = daemon.owner.next_wake();
    daemon.event(Event::Tick);
    assert!(daemon.why("a").contains("connection refused"), "it is shown while it is tried again");
    let ticket = daemon.ask(start());
    let error = daemon.replies.remove(&ticket).unwrap().unwrap_err().text;
    assert!(error.contains("connection refused") && error.contains("give up with 'dst stop a'"), "{error}");
    daemon.settle(&mut world);
    world.broken.insert("launch");
    world.volumes.get_mut(THREE[2]).unwrap().reachable = true;
    daemon.pass(&mut world);
    assert_eq!((daemon.state("a"), daemon.why("a").as_str()), (Some(State::Starting), "it broke"));
    world.broken.clear();
    daemon.pass(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Started));
    assert_eq!(daemon.owner.next_wake(), Time::NEVER);
    assert!(world.epochs.last().unwrap().1 > Epoch(1));
    assert_eq!(daemon.owner.view()[0].spec.as_ref().unwrap().run.queues, 3, "options come back");
}

#[test]
fn a_start_can_be_given_up_at_every_step() {
    for steps in 0..6 {
        let (mut world, _) = started();
        world.running.clear();
        world.boot = REBOOTED;
        world.volumes.get_mut(THREE[2]).unwrap().reachable = steps > 0;
        let mut daemon = Daemon::boot(&world);
        for _ in 0..steps.max(1) {
            daemon.step(&mut world);
        }
        daemon.run(&mut world, stop(false)).unwrap();
        assert_eq!(daemon.state("a"), Some(State::Stopped), "after {steps} steps");
        assert!(world.running.is_empty());
        assert_eq!(ArraySpec::decode("a", &world.records["a"]).unwrap().phase, Phase::Stopped);
    }
}

#[test]
fn a_device_that_a_dead_daemon_has_left_in_use_is_not_taken_away_unless_that_is_said() {
    let (mut world, _) = started();
    world.running.clear();
    world.boot = REBOOTED;
    world.volumes.get_mut(THREE[2]).unwrap().reachable = false;
    world.left.insert(world.spec().id);
    world.busy = true;
    let mut daemon = Daemon::boot(&world);
    daemon.settle(&mut world);
    assert!(daemon.error(&mut world, stop(false)).contains("mounted"));
    assert_eq!(daemon.state("a"), Some(State::Starting), "it goes on trying");
    assert_eq!(world.spec().phase, Phase::Started);
    daemon.run(&mut world, stop(true)).unwrap();
    assert_eq!((daemon.state("a"), world.left.len()), (Some(State::Stopped), 0));
    assert_eq!(world.spec().phase, Phase::Stopped);
}

#[test]
fn an_array_that_died_can_be_stopped_and_started() {
    let died = |epoch| Event::Died { name: "a".to_owned(), epoch, why: "fenced".to_owned() };
    let (mut world, mut daemon) = started();
    daemon.event(died(Epoch(9)));
    assert_eq!(daemon.state("a"), Some(State::Started), "that was another life");
    daemon.event(died(Epoch(1)));
    daemon.settle(&mut world);
    assert!(world.running.is_empty());
    assert_eq!((daemon.state("a"), daemon.why("a").as_str()), (Some(State::Failed), "fenced"));
    assert!(daemon.error(&mut world, remove(false)).contains("'dst stop a' first"));
    daemon.run(&mut world, start()).unwrap();
    daemon.event(died(Epoch(2)));
    daemon.settle(&mut world);
    world.volumes.get_mut(THREE[0]).unwrap().reachable = false;
    assert!(daemon.error(&mut world, start()).contains("connection refused"));
    assert_eq!(daemon.state("a"), Some(State::Failed));
    daemon.run(&mut world, stop(false)).unwrap();
    assert_eq!(daemon.state("a"), Some(State::Stopped));
}

#[test]
fn an_array_that_another_host_has_taken_ends_and_says_who() {
    let (mut world, mut daemon) = started();
    let held = Claim { epoch: Epoch(7), owner: Id([9; 16]), host: OTHER };
    world.volumes.get_mut(THREE[1]).unwrap().claim = Some(held);
    let volume = world.volumes[THREE[1]].id;
    let fenced = |epoch| Event::News { name: "a".to_owned(), epoch, news: News::Fenced { volume } };
    daemon.event(fenced(Epoch(9)));
    assert_eq!(daemon.state("a"), Some(State::Started), "that was another life");
    daemon.event(fenced(Epoch(1)));
    // Each of its threads tells it.
    daemon.event(fenced(Epoch(1)));
    assert_eq!(daemon.state("a"), Some(State::Failed));
    assert!(daemon.why("a").starts_with("fenced: another owner"), "{}", daemon.why("a"));
    daemon.settle(&mut world);
    assert!(world.running.is_empty());
    let why = daemon.why("a");
    for word in ["fenced", &OTHER.to_string(), "epoch 7", "node n-128 (s2:1/v)", "dst start a --take-over"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    assert!(daemon.error(&mut world, start()).contains("claimed by another host"));
    daemon.run(&mut world, start_on(TAKE)).unwrap();
    assert_eq!(world.running["a"], Epoch(8));
    // Who has it cannot be told by a volume that is away.
    world.reach(THREE[0], false);
    let volume = world.volumes[THREE[0]].id;
    daemon.event(Event::News { name: "a".to_owned(), epoch: Epoch(8), news: News::Fenced { volume } });
    daemon.settle(&mut world);
    assert!(daemon.why("a").starts_with("fenced: another owner"), "{}", daemon.why("a"));
    daemon.run(&mut world, stop(false)).unwrap();
    assert_eq!(daemon.state("a"), Some(State::Stopped));
}
