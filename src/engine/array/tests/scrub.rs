//! The comparison of a node's replicas: what is refused, what is recorded before it begins, and what is kept of it.

use super::path::{Fate, Path, reboot};
use super::suspend::{news, node};
use super::*;
use crate::control::node::NodeAsk;
use crate::control::replica::ReplicaState;
use crate::control::scrub::{Scrub, ScrubState, ScrubStatus};
use crate::engine::scrub::{Finding, Findings, Repair, Wrong};
use crate::engine::steer::{ScrubError, ScrubOrder, Scrubbed};
use crate::units::Extent;

fn scrub(of: &str, repair: bool, from: Option<usize>) -> Command {
    node(of, NodeAsk::Scrub(Scrub { repair, from, rate: 0 }))
}

fn abort() -> Command {
    node("n-0", NodeAsk::EndScrub)
}

fn served() -> (World, Daemon) {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    (world, daemon)
}

fn shown(daemon: &Daemon) -> ScrubStatus {
    daemon.owner.view()[0].nodes[0].scrub.clone().expect("a scrub")
}

fn over(error: Option<ScrubError>) -> News {
    let finding =
        Finding { extent: Extent::new(0, 8), wrong: Wrong::Different, at_fault: vec![Id([2; 16])], repaired: false };
    let findings = Findings { different: 3, list: vec![finding], more: true, ..Findings::default() };
    News::Scrubbed { node: 0, scrubbed: Scrubbed { regions: 1, compared: 1, findings, error } }
}

#[test]
fn it_is_recorded_before_it_begins_and_its_result_is_kept() {
    let (mut world, mut daemon) = served();
    let ticket = daemon.ask(scrub("n-0", true, Some(1)));
    assert!(daemon.steered.is_empty());
    daemon.settle(&mut world);
    assert!(daemon.replies[&ticket].is_ok());
    let repair = Repair::From(world.volumes["s2:1/v"].id);
    assert_eq!(daemon.steered, [Steer::Scrub(ScrubOrder { node: 0, repair, rate: 0 })]);
    assert_eq!(world.spec().nodes[0].scrub.as_ref().unwrap().state, ScrubState::Running);
    let refusal = daemon.run(&mut world, scrub("n-0", false, None)).unwrap_err();
    assert!(refusal.errno == Errno::EBUSY && refusal.text.contains("is being scrubbed already"), "{refusal}");
    news(&mut daemon, &world, over(None));
    daemon.settle(&mut world);
    let kept = world.spec().nodes[0].scrub.clone().unwrap();
    assert_eq!((kept.state, kept.different, kept.wrong(), kept.more), (ScrubState::Done, 3, 3, true));
    assert_eq!((kept.found[0].sectors, kept.found[0].at_fault.clone()), (8, vec![Id([2; 16])]));
    assert_eq!(kept, shown(&daemon));
    // Until the next one.
    daemon.run(&mut world, scrub("n-0", false, None)).unwrap();
    assert_eq!((shown(&daemon).different, shown(&daemon).found.len()), (0, 0));
    // A replica that could not be put right is named.
    news(&mut daemon, &world, over(Some(ScrubError::Repair(world.volumes["s1:1/v"].id, Errno::EIO))));
    let failed = shown(&daemon);
    assert!(failed.state == ScrubState::Failed && failed.why.unwrap().starts_with("s1:1/v could not be put right"));
}

#[test]
fn what_cannot_be_compared_or_judged_is_refused_by_name() {
    let (mut world, mut daemon) = served();
    let error = |daemon: &mut Daemon, world: &mut World, command, errno, why: &str| {
        let refusal = daemon.run(world, command).unwrap_err();
        assert!(refusal.errno == errno && refusal.text.contains(why), "{refusal:?}, not {why}");
    };
    let two = "nobody can say which of them is right. Say whom to go by with --from K";
    error(&mut daemon, &mut world, scrub("n-0", true, None), Errno::EINVAL, two);
    error(&mut daemon, &mut world, scrub("n-0", true, Some(2)), Errno::ENOENT, "has no replica 2");
    error(&mut daemon, &mut world, scrub("n-0", false, Some(0)), Errno::EINVAL, "without it nothing is written");
    error(&mut daemon, &mut world, abort(), Errno::ENOENT, "is not being scrubbed");
    world.broken.insert("save");
    error(&mut daemon, &mut world, scrub("n-0", false, None), Errno::ECONNREFUSED, "it broke");
    assert!(daemon.steered.is_empty() && daemon.owner.view()[0].nodes[0].scrub.is_none());
    world.broken.clear();
    daemon.event(regrouped(vec![(world.volumes["s2:1/v"].id, Standing::Stale)]));
    daemon.settle(&mut world);
    assert_eq!(states(&world)[1], ReplicaState::Stale);
    error(&mut daemon, &mut world, scrub("n-0", true, Some(1)), Errno::EBUSY, "(s2:1/v) is stale");
    let (mut world, mut daemon) = started();
    error(&mut daemon, &mut world, scrub("n-0", false, None), Errno::EINVAL, "node n-0 has one replica");
}

#[test]
fn it_ends_when_it_is_asked_to_and_with_its_data_path() {
    let (mut world, mut daemon) = served();
    let mut path = Path::new(&daemon, &world);
    path.run(&mut daemon, &mut world, scrub("n-0", false, None)).unwrap();
    path.run(&mut daemon, &mut world, abort()).unwrap();
    assert_eq!(shown(&daemon).state, ScrubState::Aborted);
    path.run(&mut daemon, &mut world, scrub("n-0", false, None)).unwrap();
    let (mut daemon, _) = reboot(&mut world, Fate::Slow);
    assert_eq!(shown(&daemon).state, ScrubState::Interrupted);
    daemon.run(&mut world, scrub("n-0", false, None)).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    assert_eq!(world.spec().nodes[0].scrub.as_ref().unwrap().state, ScrubState::Interrupted);
}
