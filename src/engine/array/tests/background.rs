//! What goes on without anybody asking: arrays that come back, and arrays that have died.

use super::*;

#[test]
fn a_started_array_comes_back_in_the_background() {
    let (mut world, _) = started();
    world.running.clear();
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
