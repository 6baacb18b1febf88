//! A node that moves: the order of durable things, every way in which it may end, and a daemon that dies after every step.

use super::path::{Fate, Path, reboot, tidy};
use super::suspend::node;
use super::*;
use crate::control::command::Import;
use crate::control::member::TransferRole;
use crate::control::migration::{MigrationState, MigrationStatus};
use crate::control::node::{Act, Keep, Migrate, NodeAsk, Suspend, Which};
use std::time::Duration;

pub(super) const TO: &str = "s4:1/v";

pub(super) fn migrate(to: &str) -> Command {
    node("n-128", NodeAsk::Migrate(Migrate::to(to)))
}

fn keeping(to: &str) -> Command {
    node("n-128", NodeAsk::Migrate(Migrate { keep_source: Some(Keep(Duration::from_secs(60))), ..Migrate::to(to) }))
}

pub(super) fn act(act: Act) -> Command {
    node("n-128", NodeAsk::Migration(act, Which::default()))
}

/// A started array of three nodes, and a volume to go to.
pub(super) fn ready(fate: Fate) -> (World, Daemon, Path) {
    let (mut world, mut daemon) = started();
    let volume = Volume { id: Id([50; 16]), member: None, claim: None, label: None, ..world.volumes[THREE[0]].clone() };
    world.volumes.insert(TO.to_owned(), volume);
    daemon.settle(&mut world);
    let mut path = Path::new(&daemon, &world);
    path.fate = fate;
    (world, daemon, path)
}

pub(super) fn lives_on(world: &World) -> String {
    world.spec().nodes[1].replicas.iter().map(|replica| replica.target.to_string()).collect::<Vec<_>>().join(",")
}

fn last(daemon: &Daemon) -> MigrationStatus {
    daemon.owner.view()[0].migrations.last().cloned().expect("one that is over")
}

pub(super) fn under_way(daemon: &Daemon) -> Option<MigrationStatus> {
    daemon.owner.view()[0].nodes[1].migration.clone()
}

#[test]
fn a_node_moves_and_its_certificate_is_kept() {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    let before = world.spec().nodes[1].generation.clone();
    let array = path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    let migration = array.nodes[1].migration.clone().unwrap();
    assert_eq!((migration.number, migration.state), (1, MigrationState::Preparing));
    // What a dead machine's volumes say.
    let (source, target) = (world.label(THREE[1]).transfer.unwrap(), world.label(TO).transfer.unwrap());
    assert_eq!((source.role, target.role), (TransferRole::Open, TransferRole::Candidate));
    assert_eq!((source.id, source.volume), (migration.id, Id([50; 16])));
    assert_eq!(world.spec().nodes[1].generation, before, "nothing has changed yet");
    path.commit(1);
    path.settle(&mut daemon, &mut world);
    assert_eq!(lives_on(&world), TO);
    assert!(world.spec().nodes[1].generation.descends(before.id));
    let certificate = last(&daemon);
    assert_eq!((certificate.state, certificate.regions, certificate.rolled_back), (MigrationState::Done, 1, 2));
    assert_eq!((certificate.freeze_nanos, certificate.root), (Some(1500), Some("07".repeat(32))));
    assert_eq!(world.spec().migrations, daemon.owner.view()[0].migrations, "it is durable");
    assert_eq!(world.label(THREE[1]).forward().map(|forward| forward.to.to_string()).as_deref(), Some(TO));
    tidy(&mut daemon, &mut path, &mut world);
    // And back: what is let go can be used again at once.
    path.fate = Fate::Done;
    path.run(&mut daemon, &mut world, migrate(THREE[1])).unwrap();
    assert_eq!((lives_on(&world).as_str(), last(&daemon).number), (THREE[1], 2));
    tidy(&mut daemon, &mut path, &mut world);
}

#[test]
fn a_target_that_is_still_being_let_go_is_waited_for() {
    let (mut world, mut daemon, mut path) = ready(Fate::Done);
    let first = daemon.ask(migrate(TO));
    while under_way(&daemon).is_some() || daemon.owner.view()[0].migrations.is_empty() {
        assert!(path.step(&mut daemon, &world) || daemon.step(&mut world));
    }
    let back = daemon.ask(migrate(THREE[1]));
    path.settle(&mut daemon, &mut world);
    assert!(daemon.replies[&first].is_ok() && daemon.replies[&back].is_ok(), "{:?}", daemon.replies);
    assert_eq!(lives_on(&world), THREE[1]);
    tidy(&mut daemon, &mut path, &mut world);
}

#[test]
fn a_volume_is_made_and_removed_when_nothing_comes_of_it() {
    let (mut world, mut daemon, mut path) = ready(Fate::Fails(MoveError::Target(Errno::EIO)));
    path.run(&mut daemon, &mut world, migrate("s4:1/")).unwrap();
    let failed = last(&daemon);
    assert!(failed.to.to_string().starts_with("s4:1/a-n-128-"), "{}", failed.to);
    assert_eq!((failed.state, lives_on(&world).as_str()), (MigrationState::Failed, THREE[1]));
    assert!(failed.why.unwrap().contains("failed, or was too slow: input/output error"));
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!(world.volumes.len(), 4, "what was made is gone");
    assert!(world.label(THREE[1]).transfer.is_none(), "the source no longer sends anybody there");
    path.fate = Fate::Done;
    path.run(&mut daemon, &mut world, migrate("s4:1/new")).unwrap();
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!(lives_on(&world), "s4:1/new");
    // One that was there before stays, and may hold anything.
    path.fate = Fate::Fails(MoveError::Different(crate::units::Lba(8)));
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    let fresh = |steer: &Steer| matches!(steer, Steer::Move(order) if order.fresh);
    assert_eq!(daemon.steered.iter().map(fresh).collect::<Vec<_>>(), [true, true, false]);
    assert!(last(&daemon).why.unwrap().contains("differ in the region at sector 8"));
    tidy(&mut daemon, &mut path, &mut world);
    assert!(world.volumes.contains_key(TO));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    let volume = world.volumes[TO].clone();
    let member = Some(Member { id: Id([77; 16]), name: "other".to_owned(), node: "n-0".to_owned() });
    world.volumes.insert("used:1/v".to_owned(), Volume { member, id: Id([51; 16]), ..volume.clone() });
    world.volumes.insert("small:1/v".to_owned(), Volume { sectors: 8, id: Id([52; 16]), ..volume });
    world.volumes.insert("alias:1/v".to_owned(), world.volumes[THREE[1]].clone());
    world.down.insert("down:1".to_owned());
    for (to, errno, why) in [
        (THREE[1], Errno::EINVAL, "node n-128 lives on s2:1/v already: nothing to move"),
        (THREE[0], Errno::EINVAL, "s1:1/v is in use already, for node n-0"),
        ("alias:1/v", Errno::EINVAL, "it is the volume of node n-128 (s2:1/v)"),
        ("used:1/v", Errno::EBUSY, "in use by array 'other'"),
        ("small:1/v", Errno::EINVAL, "too small with 4K: the node has 1M"),
        ("nowhere", Errno::EINVAL, "HOST:PORT/VOLUME"),
        ("/no/such/file", Errno::ENOENT, "no such volume"),
        ("down:1/v", Errno::ECONNREFUSED, "connection refused"),
    ] {
        let refusal = path.run(&mut daemon, &mut world, migrate(to)).unwrap_err();
        assert!(refusal.errno == errno && refusal.text.contains(why), "{to}: {refusal:?}");
        assert!(under_way(&daemon).is_none() && daemon.steered.is_empty(), "{to}");
    }
    let typed = Migrate { rate: 1, ..Migrate::to(TO) };
    let command = node("n-128", NodeAsk::Migrate(typed));
    assert_eq!(path.run(&mut daemon, &mut world, command).unwrap_err().errno, Errno::EINVAL);
    for command in [act(Act::Abort), act(Act::Undo), act(Act::Pause)] {
        let refusal = path.run(&mut daemon, &mut world, command).unwrap_err();
        assert!(refusal.errno == Errno::ENOENT && refusal.text.contains("is not moving"), "{refusal:?}");
    }
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    let other = node("n-0", NodeAsk::Migrate(Migrate::to(TO)));
    for (command, errno, why) in [
        (migrate("s4:1/"), Errno::EBUSY, "node n-128 is moving to s4:1/v already (migration 2)"),
        (other, Errno::EINVAL, "s4:1/v is in use already, for migration 2 of node n-128"),
        (act(Act::Undo), Errno::EBUSY, "is not committed: 'dst migration abort' ends it"),
        (act(Act::Resume), Errno::EBUSY, "is not paused"),
        (
            node("n-128", NodeAsk::Migration(Act::Abort, Which { number: Some(9) })),
            Errno::ENOENT,
            "has no migration 9 under way",
        ),
    ] {
        let refusal = path.run(&mut daemon, &mut world, command).unwrap_err();
        assert!(refusal.errno == errno && refusal.text.contains(why), "{refusal:?}, not {why}");
    }
    // Another node moves meanwhile.
    path.run(&mut daemon, &mut world, node("n-0", NodeAsk::Migrate(Migrate::to("s4:1/")))).unwrap();
}

#[test]
fn a_step_that_fails_leaves_nothing_behind() {
    for (kind, to) in [("save", TO), ("assign", TO), ("join", TO), ("label", TO), ("make", "s4:1/new")] {
        let mut done = false;
        for nth in 0..8 {
            let (mut world, mut daemon, mut path) = ready(Fate::Slow);
            let ticket = daemon.ask(migrate(to));
            path.steps(&mut daemon, &mut world, nth);
            world.broken.insert(kind);
            path.settle(&mut daemon, &mut world);
            world.broken.clear();
            let answer = daemon.replies.remove(&ticket).expect("an answer");
            if answer.is_ok() {
                done = true;
                break;
            }
            assert!(!daemon.steered.iter().any(|steer| matches!(steer, Steer::Move(_))), "{kind} {nth}");
            assert!(under_way(&daemon).is_none(), "{kind} {nth}");
            // Whatever could not be written is, with the next change.
            path.run(&mut daemon, &mut world, node("n-0", NodeAsk::Suspend(Suspend::default()))).unwrap();
            path.run(&mut daemon, &mut world, node("n-0", NodeAsk::Resume)).unwrap();
            tidy(&mut daemon, &mut path, &mut world);
            assert_eq!(lives_on(&world), THREE[1]);
            assert!(kind != "make" || world.volumes.len() == 4);
        }
        assert!(done || kind == "assign", "{kind}");
    }
}

#[test]
fn it_can_be_aborted_at_every_step() {
    let mut late = false;
    for steps in 0..40 {
        let (mut world, mut daemon, mut path) = ready(Fate::Done);
        let begun = daemon.ask(migrate("s4:1/new"));
        path.steps(&mut daemon, &mut world, steps);
        let ticket = daemon.ask(act(Act::Abort));
        path.settle(&mut daemon, &mut world);
        let aborted = daemon.replies.remove(&ticket).expect("an answer");
        assert!(daemon.replies.contains_key(&begun), "{steps}");
        match (aborted, lives_on(&world).as_str()) {
            (Ok(_), "s2:1/v") => assert_eq!(last(&daemon).state, MigrationState::Aborted),
            (Err(refusal), "s4:1/new") => {
                late = true;
                assert!(matches!(refusal.errno, Errno::EBUSY | Errno::ENOENT), "{refusal:?}");
            }
            // Nothing was recorded yet.
            (Err(refusal), "s2:1/v") => assert_eq!(refusal.errno, Errno::ENOENT, "{refusal:?}"),
            other => panic!("{steps}: {other:?}"),
        }
        tidy(&mut daemon, &mut path, &mut world);
    }
    assert!(late);
}

#[test]
fn a_crash_after_every_step_leaves_the_old_or_the_new() {
    let (mut old, mut new) = (0, 0);
    for steps in 0..60 {
        for fate in [Fate::Done, Fate::Fails(MoveError::Target(Errno::EIO))] {
            let (mut world, mut daemon, mut path) = ready(Fate::Done);
            daemon.ask(migrate("s4:1/new"));
            path.steps(&mut daemon, &mut world, steps);
            drop(daemon);
            // What was open begins anew, and ends like this.
            let (mut daemon, mut path) = reboot(&mut world, fate);
            tidy(&mut daemon, &mut path, &mut world);
            match lives_on(&world).as_str() {
                "s2:1/v" => {
                    old += 1;
                    // Of one that is not assigned yet nobody knows who has made it.
                    assert!(!world.volumes.contains_key("s4:1/new") || steps == 3, "{steps}");
                }
                "s4:1/new" => {
                    new += 1;
                    assert_eq!(last(&daemon).state, MigrationState::Done);
                    let forward = world.label(THREE[1]).forward().map(|forward| forward.to.to_string());
                    assert_eq!(forward.as_deref(), Some("s4:1/new"), "{steps}");
                }
                other => panic!("{other} after {steps}"),
            }
            daemon.run(&mut world, stop(false)).unwrap();
            daemon.run(&mut world, start()).unwrap();
        }
    }
    assert!(old > 5 && new > 50, "{old} {new}");
}

#[test]
fn a_paused_one_stays_paused_over_a_restart() {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    path.run(&mut daemon, &mut world, act(Act::Pause)).unwrap();
    assert!(daemon.steered.contains(&Steer::Pause { node: 1, paused: true }));
    assert!(path.run(&mut daemon, &mut world, act(Act::Pause)).unwrap_err().text.contains("is paused already"));
    let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
    assert!(daemon.steered.is_empty() && under_way(&daemon).unwrap().paused);
    path.run(&mut daemon, &mut world, act(Act::Resume)).unwrap();
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!(lives_on(&world), TO);
    // Or it is given up.
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    path.run(&mut daemon, &mut world, act(Act::Pause)).unwrap();
    let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
    path.run(&mut daemon, &mut world, act(Act::Abort)).unwrap();
    assert_eq!(last(&daemon).state, MigrationState::Aborted);
    tidy(&mut daemon, &mut path, &mut world);
}

#[test]
fn a_target_that_is_away_after_a_restart_is_waited_for() {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    world.reach(TO, false);
    let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
    assert!(under_way(&daemon).unwrap().why.unwrap().contains("connection refused; tried again"));
    assert_eq!(lives_on(&world), THREE[1], "it is served meanwhile");
    world.reach(TO, true);
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!(lives_on(&world), TO);
    // Another volume in its place is none that was copied to.
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    *world.volumes.get_mut(TO).unwrap() = Volume { id: Id([90; 16]), member: None, ..world.volumes[TO].clone() };
    let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
    tidy(&mut daemon, &mut path, &mut world);
    assert!(last(&daemon).why.unwrap().contains("another volume is there"), "{:?}", last(&daemon));
}

#[test]
fn a_source_that_is_kept_can_be_gone_back_to() {
    let (mut world, mut daemon, mut path) = ready(Fate::Done);
    path.run(&mut daemon, &mut world, keeping(TO)).unwrap();
    assert_eq!(under_way(&daemon).unwrap().state, MigrationState::Committed);
    assert_eq!((lives_on(&world).as_str(), world.volumes[THREE[1]].member.is_some()), (TO, true));
    let refusal = path.run(&mut daemon, &mut world, migrate("s4:1/")).unwrap_err();
    assert!(refusal.text.contains("its former target is kept (migration 1)"), "{refusal}");
    assert!(path.run(&mut daemon, &mut world, act(Act::Abort)).unwrap_err().text.contains("is committed"));
    path.run(&mut daemon, &mut world, act(Act::Undo)).unwrap();
    assert_eq!((lives_on(&world).as_str(), last(&daemon).number), (THREE[1], 2));
    tidy(&mut daemon, &mut path, &mut world);
    assert!(world.volumes[TO].member.is_none());
}

#[test]
fn the_keeping_of_a_source_ends() {
    type End = fn(&mut World, &mut Daemon, &mut Path);
    let release: End = |world, daemon, path| drop(path.run(daemon, world, act(Act::Release)).unwrap());
    let time: End = |_, daemon, _| {
        daemon.now = daemon.owner.next_wake();
        daemon.event(Event::Tick);
    };
    let failure: End = |world, _, path| path.lose(1, world.volumes[THREE[1]].id);
    let restart: End = |world, daemon, path| (*daemon, *path) = reboot(world, Fate::Done);
    for end in [release, time, failure, restart] {
        let (mut world, mut daemon, mut path) = ready(Fate::Done);
        path.run(&mut daemon, &mut world, keeping(TO)).unwrap();
        end(&mut world, &mut daemon, &mut path);
        tidy(&mut daemon, &mut path, &mut world);
        assert_eq!((last(&daemon).state, under_way(&daemon)), (MigrationState::Done, None));
        assert_eq!(last(&daemon).freeze_nanos, Some(1500), "its certificate is kept");
        assert!(world.volumes[THREE[1]].member.is_none());
        let refusal = path.run(&mut daemon, &mut world, act(Act::Undo)).unwrap_err();
        assert_eq!(refusal.errno, Errno::ENOENT);
    }
}

#[test]
fn a_former_volume_that_is_away_is_let_go_when_it_is_back() {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    world.reach(THREE[1], false);
    path.commit(1);
    path.settle(&mut daemon, &mut world);
    assert_eq!((last(&daemon).state, world.spec().debts.len()), (MigrationState::Done, 1));
    let (mut daemon, mut path) = reboot(&mut world, Fate::Done);
    assert_eq!(world.spec().debts.len(), 1, "it is not forgotten");
    world.reach(THREE[1], true);
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!(world.label(THREE[1]).forward().map(|forward| forward.to.to_string()).as_deref(), Some(TO));
}

#[test]
fn a_stop_ends_no_migration_and_a_removal_frees_all() {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    assert!(daemon.error(&mut world, remove(false)).contains("is started"));
    daemon.run(&mut world, stop(false)).unwrap();
    daemon.steered.clear();
    daemon.run(&mut world, start()).unwrap();
    let mut path = Path::new(&daemon, &world);
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!(lives_on(&world), TO, "it goes on with the next start");
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    daemon.run(&mut world, remove(false)).unwrap();
    assert!(world.volumes.values().all(|volume| volume.member.is_none()));
}

#[test]
fn the_end_of_the_data_path_ends_nothing_but_it() {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    let ticket = daemon.ask(act(Act::Abort));
    daemon.event(Event::Died { name: "a".to_owned(), epoch: Epoch(1), why: "broken".to_owned() });
    daemon.settle(&mut world);
    assert!(daemon.replies.remove(&ticket).unwrap().is_err());
    daemon.steered.clear();
    daemon.run(&mut world, start()).unwrap();
    let mut path = Path::new(&daemon, &world);
    tidy(&mut daemon, &mut path, &mut world);
    assert_eq!(lives_on(&world), TO);
}

pub(super) fn import(target: &str, force: bool) -> Command {
    Command::Import(Import { target: target.to_owned(), name: None, force })
}

fn warned(answer: Result<Answer, Refusal>) -> String {
    match answer {
        Ok(Answer::Array(array)) => array.warnings.join("; "),
        other => panic!("{other:?}"),
    }
}

/// Another host, which finds what the first one has left.
fn elsewhere(world: &mut World) -> Daemon {
    world.running.clear();
    world.go_to(OTHER);
    Daemon::boot(world)
}

#[test]
fn another_host_finds_the_data_where_it_is() {
    // Moved: from the volume that was left, and from one of another node, which names that one.
    for first in [THREE[1], THREE[0], TO] {
        let (mut world, mut daemon, mut path) = ready(Fate::Done);
        path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
        tidy(&mut daemon, &mut path, &mut world);
        let mut other = elsewhere(&mut world);
        other.run(&mut world, import(first, false)).unwrap();
        assert_eq!(lives_on(&world), TO, "{first}");
        other.run(&mut world, start_on(TAKE)).unwrap();
        // The record of the first host is an old one.
        world.go_to(HOST);
        let mut daemon = Daemon::boot(&world);
        daemon.settle(&mut world);
        assert!(daemon.why("a").contains("import") || daemon.why("a").contains("another host"), "{}", daemon.why("a"));
    }
}

#[test]
fn another_host_goes_on_with_the_source_of_what_was_not_committed() {
    for first in [THREE[1], TO] {
        let (mut world, mut daemon, mut path) = ready(Fate::Slow);
        path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
        let mut other = elsewhere(&mut world);
        let said = warned(other.run(&mut world, import(first, false)));
        assert!(said.contains("node n-128 was moving to s4:1/v: that begins anew"), "{said}");
        other.run(&mut world, start_on(TAKE)).unwrap();
        assert_eq!(lives_on(&world), THREE[1]);
        let claims = [THREE[1], TO].map(|target| world.volumes[target].claim.unwrap().host);
        assert_eq!(claims, [OTHER, OTHER], "the first host can commit no more");
        let mut path = Path::new(&other, &world);
        tidy(&mut other, &mut path, &mut world);
        assert_eq!(lives_on(&world), TO, "it is gone on with");
    }
}

#[test]
fn an_import_between_the_commit_record_and_its_label_is_fenced() {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    let claim = world.volumes[TO].claim.unwrap();
    let mut other = elsewhere(&mut world);
    other.run(&mut world, import(THREE[1], false)).unwrap();
    // The first host is alive, and its commit is durable on the target before the other one's claim is.
    let ticket = other.ask(start_on(TAKE));
    while !matches!(other.todo.front(), Some((_, Work::Claim(..)))) {
        assert!(other.step(&mut world));
    }
    world.go_to(HOST);
    path.commit(1);
    path.settle(&mut daemon, &mut world);
    assert_eq!((lives_on(&world).as_str(), world.volumes[TO].claim), (TO, Some(claim)));
    world.go_to(OTHER);
    // What was freed meanwhile is not the array's any more: only the order of claim and look matters here.
    let member = world.volumes[TO].member.clone().map(|member| Member { node: "n-128".to_owned(), ..member });
    world.volumes.get_mut(THREE[1]).unwrap().member = member;
    other.settle(&mut world);
    let refusal = other.replies.remove(&ticket).unwrap().unwrap_err();
    assert!(refusal.text.contains("node n-128 has moved to s4:1/v"), "{refusal}");
    assert!(refusal.text.contains("'dst import s4:1/v'"), "{refusal}");
}

#[test]
fn a_target_that_may_have_taken_over_must_be_seen() {
    let (mut world, mut daemon, mut path) = ready(Fate::Slow);
    path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
    world.reach(TO, false);
    let mut other = elsewhere(&mut world);
    let error = other.error(&mut world, import(THREE[1], false));
    assert!(error.contains("node n-128 was moving to s4:1/v, which was not seen: connection refused"), "{error}");
    other.run(&mut world, import(THREE[1], true)).unwrap();
    let error = other.error(&mut world, start_on(TAKE));
    assert!(error.contains("which must say whether it has taken over"), "{error}");
    other.run(&mut world, start_on(FORCE)).unwrap();
    assert_eq!(lives_on(&world), THREE[1]);
}

#[test]
fn an_older_copy_of_the_record_is_not_started_from() {
    for moment in 0..2 {
        let (mut world, mut daemon, mut path) = ready(Fate::Slow);
        let before = world.records.clone();
        path.run(&mut daemon, &mut world, migrate(TO)).unwrap();
        let copy = if moment == 0 { before } else { world.records.clone() };
        // The source cannot be told any more.
        world.reach(THREE[1], false);
        path.commit(1);
        path.settle(&mut daemon, &mut world);
        world.reach(THREE[1], true);
        world.records = copy;
        world.running.clear();
        let mut daemon = Daemon::boot(&world);
        daemon.settle(&mut world);
        assert!(daemon.why("a").contains("node n-128 has moved to s4:1/v"), "{moment}: {}", daemon.why("a"));
        assert!(world.running.is_empty());
    }
}
