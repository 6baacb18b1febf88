//! Properties that chance seldom puts to the test: `it` runs them, and so does `make bugs` under each planted mistake. None of them may
//! go on for ever, whatever the mistake.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use dst::control::replica::{Generation, Standing};

use dst::control::target::Target;
use dst::control::transfer::Kept;
use dst::engine::copy::{Content, Copy, CopyConfig, CopyError, Task};
use dst::engine::link::{LinkEvent, Terms as LinkTerms};
use dst::engine::region::SyncMap;
use dst::engine::replicas::{Effect, Event, Replicas, Standing as ReplicaStanding};
use dst::engine::request::{Request, RequestOp, ShardConfig, Tag};
use dst::engine::scrub::{Repair, Scrub};
use dst::engine::shard::{Body, Report, Shard};
use dst::engine::shared::Shared;
use dst::engine::steer::{Arrival, Move, News, Steer};
use dst::engine::view::{Gate, Role, View, is_logged};
use dst::errno::Errno;
use dst::geometry::map::Geometry;
use dst::store::session::Conn;
use dst::store::state::{Book, Part, State};
use dst::store::volume::{self, Slot, Volume};
use dst::units::{Epoch, Extent, Id, Lba};
use dst::wire::frame::{Header, Op};
use dst::wire::session::{Hello, features};
use dst::wire::volume::{Claim, Member};

use crate::bench::{Bench, SECTORS, VOLUME, ms};

// The simulator has this file, too, from another folder.
#[path = "cases/hosts.rs"]
mod hosts;
use hosts::{
    a_change_that_only_the_record_knows_is_not_taken_over_with,
    a_claim_waits_for_what_the_former_host_has_on_the_disk_and_ends_its_connections,
    a_take_over_serves_nothing_before_every_replica_has_accepted_it,
    an_array_was_not_stopped_in_order_if_another_host_has_had_it_since,
    what_the_former_host_leaves_before_it_is_claimed_is_noticed,
};

macro_rules! cases {
    ($($name:ident)*) => {
        /// All of them, by their names.
        #[cfg(feature = "bugs")]
        pub(crate) const ALL: &[(&str, fn())] = &[$((stringify!($name), $name)),*];

        #[cfg(not(feature = "bugs"))]
        mod tests {
            $(#[test] fn $name() { super::$name(); })*
        }
    };
}

cases! {
    a_node_that_does_not_answer_starves_no_request_of_another
    that_a_node_has_diverged_is_told_although_one_of_its_targets_was_reported_before
    who_is_fenced_by_one_replica_acknowledges_nothing_more
    sets_of_replicas_that_went_on_alone_are_split
    what_waits_at_a_gate_keeps_nobody_from_leaving
    a_replica_that_is_syncing_is_flushed_too
    a_slow_source_of_a_move_is_spared_between_two_tries
    of_a_node_that_comes_late_one_replica_is_gone_by
    an_array_is_not_clean_while_a_node_is_late
    a_failed_flush_is_remembered_though_nobody_was_told
    a_scrub_that_is_to_end_waits_for_no_flush
    an_array_has_grown_when_every_shard_knows
    nodes_of_several_replicas_do_not_grow_at_once
    what_is_noted_as_copied_can_be_lost_on_neither_side
    no_log_is_cleaned_before_the_destination_of_a_move_is_back
    what_happens_before_the_destination_of_a_move_is_back_is_logged
    what_was_copied_is_believed_only_if_nobody_else_was_there
    a_claim_waits_for_what_the_former_host_has_on_the_disk_and_ends_its_connections
    a_take_over_serves_nothing_before_every_replica_has_accepted_it
    what_the_former_host_leaves_before_it_is_claimed_is_noticed
    a_change_that_only_the_record_knows_is_not_taken_over_with
    an_array_was_not_stopped_in_order_if_another_host_has_had_it_since
}

/// A shard of an array with one node, of two replicas.
fn pair() -> (Shard, impl Fn(&mut Shard, usize, u64)) {
    let volumes = [VOLUME, Id([8; 16])];
    let view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[volumes.to_vec()], Epoch(3));
    let config = ShardConfig { index: 0, depth: 8, io_timeout: Duration::from_secs(1) };
    let mut shard = Shard::new(config, Arc::new(view), Arc::new(Shared::new(2, 1)));
    let up = move |shard: &mut Shard, target: usize, losses: u64| {
        let terms =
            LinkTerms { sectors: SECTORS, volume: volumes[target], losses, requests_max: 64, bytes_max: 1 << 20 };
        shard.handle_link(ms(1), target, LinkEvent::Up(terms));
    };
    shard.handle_timeout(ms(0));
    (0..2).for_each(|target| up(&mut shard, target, 0));
    (shard, up)
}

fn a_node_that_does_not_answer_starves_no_request_of_another() {
    // Chunks of 8 sectors: a write of 256 has 32 parts, and a shard of depth 8 has 64.
    let mut bench = Bench::laid_out(Geometry::striped(8, &[SECTORS; 2]).unwrap(), 1);
    for tag in 0..7 {
        bench.ask(0, 0, tag, RequestOp::Write { fua: false }, u64::from(tag) * 256, 256);
    }
    let mut silent = Vec::new();
    loop {
        silent.extend(std::iter::from_fn(|| bench.sent(0, 0)));
        let Some(frame) = bench.sent(0, 1) else { break };
        bench.answer(0, 1, 0, &frame.header, Ok(()));
    }
    assert!(silent.len() < 7 * 16, "the parts have run out");
    bench.ask(0, 0, 7, RequestOp::Read, 8, 4);
    let frame = bench.sent(0, 1).unwrap();
    bench.answer(0, 1, 0, &frame.header, Ok(()));
    assert_eq!(bench.done(0), Some((7, Ok(()))));
    // Once the silent node answers, everything ends.
    let mut done = 0;
    for _ in 0..7 * 32 {
        silent.extend(std::iter::from_fn(|| bench.sent(0, 0)));
        for frame in std::mem::take(&mut silent) {
            bench.answer(0, 0, 0, &frame.header, Ok(()));
        }
        while let Some(frame) = bench.sent(0, 1) {
            bench.answer(0, 1, 0, &frame.header, Ok(()));
        }
        while let Some((_, result)) = bench.done(0) {
            assert_eq!(result, Ok(()));
            done += 1;
        }
    }
    assert_eq!(done, 7, "something was forgotten");
}

fn that_a_node_has_diverged_is_told_although_one_of_its_targets_was_reported_before() {
    let (mut shard, up) = pair();
    let write = Request::new(RequestOp::Write { fua: false }, Extent::new(0, 8));
    shard.handle_request(ms(2), Tag(0), write);
    for target in 0..2 {
        let reply = shard.poll_send(target).unwrap().header.reply(Ok(()));
        shard.handle_reply(ms(3), target, &reply, Body::Good).unwrap();
    }
    assert_eq!(shard.poll_complete(), Some((Tag(0), Ok(()))));
    // The first one's machine comes back without it; then the other one cannot write.
    shard.handle_link(ms(4), 0, LinkEvent::Down(Errno::ECONNRESET));
    shard.handle_timeout(ms(200));
    up(&mut shard, 0, 1);
    assert_eq!(shard.poll_report(), Some(Report::Lost { target: 0 }));
    shard.handle_request(ms(202), Tag(1), write);
    assert!(shard.poll_send(0).is_none(), "what has lost something is not written");
    let reply = shard.poll_send(1).unwrap().header.reply(Err(Errno::EIO));
    shard.handle_reply(ms(203), 1, &reply, Body::Good).unwrap();
    assert_eq!(shard.poll_complete(), Some((Tag(1), Err(Errno::EIO))));
    // Else its range stays taken for ever.
    assert_eq!(shard.poll_report(), Some(Report::Diverged { node: 0 }));
}

fn who_is_fenced_by_one_replica_acknowledges_nothing_more() {
    let (mut shard, _) = pair();
    let write = Request::new(RequestOp::Write { fua: false }, Extent::new(0, 8));
    shard.handle_request(ms(2), Tag(0), write);
    let reply = shard.poll_send(1).unwrap().header.reply(Ok(()));
    assert!(shard.poll_send(0).is_some());
    shard.handle_reply(ms(3), 1, &reply, Body::Good).unwrap();
    // The other one has a new owner. What both have is its business now.
    shard.handle_link(ms(4), 0, LinkEvent::Down(Errno::EBADE));
    assert_eq!(shard.poll_complete(), Some((Tag(0), Err(Errno::EBADE))));
    assert_eq!(shard.poll_report(), Some(Report::Fenced { target: 0 }));
    shard.handle_request(ms(5), Tag(1), write);
    assert_eq!(shard.poll_complete(), Some((Tag(1), Err(Errno::EBADE))));
    assert!(shard.poll_send(1).is_none());
    assert_eq!(shard.poll_report(), None, "nobody is left");
}

fn sets_of_replicas_that_went_on_alone_are_split() {
    let first = Generation::first(VOLUME);
    let (one, other) = (first.next(Id([1; 16])), first.next(Id([2; 16])));
    assert_eq!((one.standing(&one), one.standing(&first)), (Standing::Same, Standing::Newer));
    assert_eq!((first.standing(&one), one.standing(&other)), (Standing::Older, Standing::Split));
    assert_eq!(one.next(Id([3; 16])).standing(&other.next(Id([4; 16]))), Standing::Split);
}

fn what_waits_at_a_gate_keeps_nobody_from_leaving() {
    let view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[vec![VOLUME]], Epoch(3)).with_spares(2);
    let config = ShardConfig { index: 0, depth: 8, io_timeout: Duration::from_secs(1) };
    let mut shard = Shard::new(config, Arc::new(view.clone()), Arc::new(Shared::new(2, 1)));
    let terms = LinkTerms { sectors: SECTORS, volume: VOLUME, losses: 0, requests_max: 64, bytes_max: 1 << 20 };
    shard.handle_timeout(ms(0));
    shard.handle_link(ms(1), 0, LinkEvent::Up(terms));
    shard.handle_request(ms(2), Tag(0), Request::new(RequestOp::Discard, Extent::new(0, 8)));
    assert!(shard.poll_send(0).is_some());
    // Its connection is lost, and before there is another one the node is suspended.
    shard.handle_link(ms(3), 0, LinkEvent::Down(Errno::ECONNRESET));
    let next = |mut view: View, change: &dyn Fn(&mut View)| {
        view.version += 1;
        view.nodes[0].changed = view.version;
        change(&mut view);
        view.see_singles();
        view
    };
    let frozen = next(view, &|view| view.nodes[0].gate = Gate::Frozen);
    shard.adopt(ms(4), Arc::new(frozen.clone()));
    // A destination comes, and goes again before anything was copied to it.
    let came = next(frozen, &|view| (view.targets[1].volume, view.targets[1].role) = (Id([8; 16]), Role::Stale));
    shard.adopt(ms(5), Arc::new(came.clone()));
    let going = next(came.clone(), &|view| view.targets[1].role = Role::Leaving);
    shard.adopt(ms(6), Arc::new(going));
    assert_eq!(shard.poll_ack(), Some((0, 4)));
    // But nobody begins to be written while it may still be sent to the other one alone.
    let opened = next(came, &|view| {
        view.targets[1].role = Role::Syncing;
        (view.version, view.nodes[0].changed, view.nodes[0].opened) = (5, 5, 5);
    });
    shard.adopt(ms(7), Arc::new(opened));
    assert_eq!(shard.poll_ack(), None);
}

fn a_replica_that_is_syncing_is_flushed_too() {
    let volumes = [VOLUME, Id([8; 16])];
    let mut view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[volumes.to_vec()], Epoch(3));
    view.targets[1].role = Role::Syncing;
    view.nodes[0].sync = Some(Arc::new(SyncMap::complete(SECTORS, view.region_sectors)));
    view.see_singles();
    let config = ShardConfig { index: 0, depth: 8, io_timeout: Duration::from_secs(1) };
    let mut shard = Shard::new(config, Arc::new(view), Arc::new(Shared::new(2, 1)));
    shard.handle_timeout(ms(0));
    for (target, volume) in volumes.into_iter().enumerate() {
        let terms = LinkTerms { sectors: SECTORS, volume, losses: 0, requests_max: 64, bytes_max: 1 << 20 };
        shard.handle_link(ms(1), target, LinkEvent::Up(terms));
    }
    let write = Request::new(RequestOp::Write { fua: false }, Extent::new(0, 8));
    for (tag, request) in [(0, write), (1, Request::new(RequestOp::Flush, Extent::default()))] {
        shard.handle_request(ms(2), Tag(tag), request);
        for target in 0..2 {
            let sent = shard.poll_send(target).map(|sent| sent.header.reply(Ok(())));
            let reply = sent.unwrap_or_else(|| panic!("{:?} does not go to target {target}", request.op));
            shard.handle_reply(ms(3), target, &reply, Body::Good).unwrap();
        }
        assert_eq!(shard.poll_complete(), Some((Tag(tag), Ok(()))));
    }
}

fn a_slow_source_of_a_move_is_spared_between_two_tries() {
    let view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[vec![VOLUME]], Epoch(3));
    let mut rules = Replicas::new(view.with_spares(2), &[ReplicaStanding::InSync], true);
    let tell = |rules: &mut Replicas, event, now| {
        rules.handle(event, now);
        let effects: Vec<Effect> = std::iter::from_fn(|| rules.poll()).collect();
        effects.iter().any(|effect| matches!(effect, Effect::Sync { .. }))
    };
    let adopted = |rules: &Replicas| Event::Adopted { node: 0, version: rules.view().version };
    let (max_freeze, target_timeout) = (Duration::from_millis(50), Duration::from_millis(700));
    let (target, to) = (Target::Local("/new".into()), Id([9; 16]));
    let (rate, verify, keep, fresh, copied) = (0, false, false, true, Lba(0));
    let spec =
        Move { node: 0, from: VOLUME, to, target, rate, verify, max_freeze, target_timeout, keep, fresh, copied };
    tell(&mut rules, Event::Tick(vec![true; 2]), ms(1));
    tell(&mut rules, Event::Steer(Steer::Move(spec)), ms(1));
    let next = adopted(&rules);
    tell(&mut rules, next, ms(1));
    tell(&mut rules, Event::Tick(vec![true; 2]), ms(1));
    let next = adopted(&rules);
    assert!(tell(&mut rules, next, ms(1)), "it copies");
    let slow = Event::Synced { node: 0, result: Err(CopyError::Source(Lba(0), Errno::ETIMEDOUT)) };
    assert!(!tell(&mut rules, slow, ms(2)), "who waits for its region goes first");
    let next = rules.next_timeout();
    assert!(tell(&mut rules, Event::Tick(vec![true; 2]), next), "then it goes on");
}

/// Two nodes, of which nobody has come to the second one.
fn half_late() -> Replicas {
    let view = View::new(Geometry::linear(&[SECTORS; 2]).unwrap(), &[vec![VOLUME], vec![]], Epoch(3));
    Replicas::new(view.with_spares(2), &[ReplicaStanding::InSync], false)
}

fn of_a_node_that_comes_late_one_replica_is_gone_by() {
    let mut rules = half_late();
    let arrival = |number: u8| Arrival {
        target: Target::Local("/late".into()),
        volume: Id([number; 16]),
        standing: ReplicaStanding::InSync,
        losses: None,
    };
    rules.handle(Event::Steer(Steer::Arrive { node: 1, replicas: vec![arrival(20), arrival(21)] }), ms(1));
    let [first, second] = [20, 21].map(|number| {
        let targets = &rules.view().targets;
        rules.role(targets.iter().position(|target| target.volume == Id([number; 16])).unwrap())
    });
    assert_eq!((first, second), (Role::InSync, Role::Leaving), "what was in flight may be on one alone");
    assert_eq!(rules.view().nodes[1].gate, Gate::Undecided, "nothing is read before that is durable");
}

fn an_array_is_not_clean_while_a_node_is_late() {
    let rules = half_late();
    assert!(rules.is_settled() && !rules.is_clean(&Shared::new(rules.view().targets.len(), 1)));
}

fn a_failed_flush_is_remembered_though_nobody_was_told() {
    let (name, instance, boot) = ("v".to_owned(), Id([2; 16]), Id([6; 16]));
    let config = volume::Config { name, id: VOLUME, instance, boot, sparse: true, write_through: false };
    let mut volume = Volume::new(config, SECTORS, Book::new(VOLUME, (0, State::default())), None);
    let array = Id([10; 16]);
    let (session, host) = (Id([1; 16]), Id([3; 16]));
    let (versions, features, name) = ((1, 1), features::OURS, "v".to_owned());
    let hello = Hello { versions, features, array, session, host, channel: 0, volume: name };
    let member = Member { id: array, name: "storage".to_owned(), node: "n-0".to_owned() };
    // What is saved is; what goes to the disk is returned.
    let tell = |volume: &mut Volume, event: volume::Event<'_>| {
        volume.handle(event);
        let mut works = Vec::new();
        while let Some(effect) = volume.poll_effect() {
            match effect {
                volume::Effect::Save(_) => volume.handle(volume::Event::Saved { part: Part::State, result: Ok(()) }),
                volume::Effect::Disk(work) => works.push(work),
                _ => {}
            }
        }
        works
    };
    let conn = Conn(0);
    tell(&mut volume, volume::Event::Attach { conn, hello: &hello, epoch: Epoch(1), assigned: Some(&member) });
    let ask = |volume: &mut Volume, op, sequence| {
        let extent = if op == Op::Flush { Extent::default() } else { Extent::new(8, 8) };
        let header = Header::request(op, 1, sequence, Epoch(1), extent);
        let works = tell(volume, volume::Event::Request { conn, slot: Slot(0), header: &header, intact: true });
        assert_eq!(works.len(), 1, "{op:?}");
        works[0].job
    };
    let job = ask(&mut volume, Op::Discard, 0);
    tell(&mut volume, volume::Event::DiskDone { job, result: Ok(()) });
    let job = ask(&mut volume, Op::Flush, 1);
    tell(&mut volume, volume::Event::Gone { conn });
    tell(&mut volume, volume::Event::DiskDone { job, result: Err(Errno::EIO) });
    assert!(volume.state().flush_failed);
}

fn a_scrub_that_is_to_end_waits_for_no_flush() {
    let members = vec![(0, VOLUME), (1, Id([8; 16]))];
    let task = Task::Scrub(Scrub { members, repair: Repair::From(VOLUME), tally: Arc::default() });
    let config = CopyConfig { task, source: 0, target: 1, shard: 0, windows: 1, rate: 0, checkpoint: Duration::ZERO };
    let mut copy = Copy::new(config, Arc::new(SyncMap::new(8, 8)), Arc::default());
    let mut put_right = false;
    for _ in 0..16 {
        let (tag, request) = copy.next_request(ms(1)).expect("it goes on");
        match request.op {
            RequestOp::Flush => {
                assert_eq!(request.target, Some(1), "what was put right is made durable");
                copy.stop();
                assert_eq!(copy.poll_abandoned(), Some(tag), "its server may have died");
                copy.complete(tag, Err(Errno::ECANCELED), Content::Unknown);
                assert_eq!(copy.outcome(), Some(Err(CopyError::Stopped)));
                return;
            }
            RequestOp::Digest => {
                let differs = request.target == Some(1) && !put_right;
                copy.complete(tag, Ok(()), Content::Digest([u8::from(differs); 32]));
            }
            op => {
                put_right |= op != RequestOp::Read;
                copy.complete(tag, Ok(()), Content::Unknown);
            }
        }
    }
    panic!("nothing was put right");
}

/// What is told after a steer, and the view that is published.
fn steered(rules: &mut Replicas, event: Event) -> (Vec<News>, Option<Arc<View>>) {
    rules.handle(event, ms(1));
    let (mut told, mut view) = (Vec::new(), None);
    while let Some(effect) = rules.poll() {
        match effect {
            Effect::Tell(news) => told.push(news),
            Effect::Publish(published) => view = Some(published),
            _ => {}
        }
    }
    (told, view)
}

/// The last of two nodes becomes larger while requests are in flight; a request beyond the former end succeeds in each shard as soon as it is said
/// that the array has grown.
fn an_array_has_grown_when_every_shard_knows() {
    let mut bench = Bench::new(2, 2);
    let view = View::new(Geometry::linear(&[SECTORS; 2]).unwrap(), &[vec![VOLUME], vec![VOLUME]], Epoch(3));
    let mut rules = Replicas::new(view, &[ReplicaStanding::InSync; 2], true);
    let beyond = 2 * SECTORS;
    for shard in 0..2 {
        bench.write(shard, 1, 0, beyond - 8);
        bench.write(shard, 1, 1, beyond);
        assert_eq!(bench.done(shard), Some((1, Err(Errno::EINVAL))), "it is not there yet");
    }
    let larger = Geometry::linear(&[SECTORS, 2 * SECTORS]).unwrap();
    let (mut told, view) = steered(&mut rules, Event::Steer(Steer::Grow(larger)));
    let view = view.expect("a new layout");
    // No gate is shut, so each shard says at once that it works with it, whatever is in flight.
    for shard in 0..2 {
        assert_eq!(told, [], "shard {shard} does not know yet");
        bench.shards[shard].adopt(ms(2), Arc::clone(&view));
        let acked: Vec<(usize, u64)> = std::iter::from_fn(|| bench.shards[shard].poll_ack()).collect();
        assert_eq!(acked, [(1, view.version)]);
        if shard == 1 {
            told = steered(&mut rules, Event::Adopted { node: 1, version: view.version }).0;
        }
    }
    assert_eq!(told, [News::Grown { done: true }]);
    for shard in 0..2 {
        bench.write(shard, 3, 1, beyond);
        let frames: Vec<Header> = std::iter::from_fn(|| bench.sent(shard, 1)).map(|frame| frame.header).collect();
        let starts: Vec<u64> = frames.iter().map(|frame| frame.extent().start.0).collect();
        assert_eq!(starts, [SECTORS - 8, SECTORS], "what was in flight lies where it lay");
        for frame in frames {
            bench.answer(shard, 1, 4, &frame, Ok(()));
        }
        assert_eq!((bench.done(shard), bench.done(shard)), (Some((0, Ok(()))), Some((1, Ok(())))));
    }
}

/// Behind the former end nobody knows what they hold; and a layout with which something would move is none.
fn nodes_of_several_replicas_do_not_grow_at_once() {
    let volumes = [vec![VOLUME], vec![VOLUME, Id([8; 16])]];
    let view = || View::new(Geometry::linear(&[SECTORS; 2]).unwrap(), &volumes, Epoch(3));
    for sizes in [&[SECTORS, 2 * SECTORS][..], &[SECTORS], &[SECTORS / 2, SECTORS], &[SECTORS; 2], &[SECTORS; 3]] {
        let mut rules = Replicas::new(view(), &[ReplicaStanding::InSync; 3], true);
        let (told, view) = steered(&mut rules, Event::Steer(Steer::Grow(Geometry::linear(sizes).unwrap())));
        assert_eq!((told, view.is_none()), (vec![News::Grown { done: false }], true), "{sizes:?}");
    }
}

/// What a copy says that need not be copied again is durable on its target, and what was read for it is on its source: else a machine that
/// loses power makes the two differ, and no region log knows of it.
fn what_is_noted_as_copied_can_be_lost_on_neither_side() {
    let map = Arc::new(SyncMap::new(80, 8));
    let (task, checkpoint) = (Task::Copy { fresh: false }, Duration::ZERO);
    let config = CopyConfig { task, source: 0, target: 1, shard: 0, windows: 3, rate: 0, checkpoint };
    let mut copy = Copy::new(config, Arc::clone(&map), Arc::default());
    let (mut loose, mut durable, mut grounded) = (BTreeSet::new(), BTreeSet::new(), false);
    for _ in 0..200 {
        let Some((tag, request)) = copy.next_request(ms(1)) else { break };
        match (request.op, request.target) {
            (RequestOp::Flush, Some(0)) => grounded = true,
            (RequestOp::Flush, _) => durable.append(&mut loose),
            (RequestOp::Read, _) => {}
            _ => drop(loose.insert(request.extent.start.0)),
        }
        let kept = map.kept();
        assert!((0..kept).step_by(8).all(|start| durable.contains(&start)), "{kept} are noted before the flush");
        copy.complete(tag, Ok(()), Content::Unknown);
        let kept = map.kept();
        assert!(kept == 0 || grounded, "its source may lose what was read there");
        assert!((0..kept).step_by(8).all(|start| durable.contains(&start)), "{kept} are noted");
    }
    assert_eq!((copy.outcome().is_some(), map.kept()), (true, 80));
}

/// A node of two replicas, whose move goes on where it was when its destination is back.
fn awaiting() -> Replicas {
    let volumes = vec![VOLUME, Id([8; 16])];
    let view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[volumes], Epoch(3));
    let mut rules = Replicas::new(view, &[ReplicaStanding::InSync; 2], true);
    rules.await_move(0);
    rules
}

fn no_log_is_cleaned_before_the_destination_of_a_move_is_back() {
    let mut rules = awaiting();
    let config = ShardConfig { index: 0, depth: 8, io_timeout: Duration::from_secs(1) };
    let mut shard = Shard::new(config, Arc::clone(rules.view()), Arc::new(Shared::new(2, 1)));
    shard.handle_timeout(ms(0));
    for (target, volume) in [VOLUME, Id([8; 16])].into_iter().enumerate() {
        let terms = LinkTerms { sectors: SECTORS, volume, losses: 0, requests_max: 64, bytes_max: 1 << 20 };
        shard.handle_link(ms(1), target, LinkEvent::Up(terms));
    }
    // Each flush is answered with a point; what the next ones tell of them.
    let mut told = || {
        let mut told = 0;
        for round in 1..8 {
            let write = Request::new(RequestOp::Write { fua: false }, Extent::new(0, 8));
            for (tag, request) in [(0, write), (1, Request::new(RequestOp::Flush, Extent::default()))] {
                shard.handle_request(ms(2), Tag(tag), request);
                for target in 0..2 {
                    let sent = shard.poll_send(target).expect("a frame").header;
                    told = told.max(if sent.op == Op::Flush { sent.point() } else { 0 });
                    let reply = sent.reply(Ok(()));
                    let reply = if sent.op == Op::Flush { reply.with_point(round) } else { reply };
                    shard.handle_reply(ms(3), target, &reply, Body::Good).unwrap();
                }
                assert_eq!(shard.poll_complete(), Some((Tag(tag), Ok(()))));
            }
        }
        told
    };
    assert_eq!(told(), 0, "its destination lacks what would be cleaned");
    rules.handle(Event::Steer(Steer::Stay { node: 0 }), ms(4));
    assert!(told() > 0, "when the move is over");
}

fn what_happens_before_the_destination_of_a_move_is_back_is_logged() {
    assert!(is_logged(1, true), "what is written to the only replica");
    assert!(is_logged(2, false) && !is_logged(1, false));
    let mut rules = awaiting();
    assert!(rules.view().logs_copies(1), "what one replica is copied from the other");
    rules.handle(Event::Steer(Steer::Stay { node: 0 }), ms(1));
    assert!(!rules.view().logs_copies(1));
}

fn what_was_copied_is_believed_only_if_nobody_else_was_there() {
    let (host, owner) = (Id([1; 16]), Id([2; 16]));
    let kept = Kept { below: Lba(8), epoch: Epoch(5) };
    let claim = |epoch, host| Claim { epoch: Epoch(epoch), owner, host };
    let vouched = |claim: Option<Claim>| kept.is_vouched_by(claim.as_ref(), host, Epoch(6));
    assert!(vouched(Some(claim(5, host))) && vouched(Some(claim(6, host))));
    assert!(!vouched(Some(claim(6, Id([3; 16])))), "another host has claimed it");
    assert!(!vouched(Some(claim(7, host))), "the record is an older one");
    assert!(!vouched(Some(claim(4, host))) && !vouched(None), "it was freed, and may have been anybody's");
}
