//! Properties of a shard that chance seldom puts to the test: `it` runs them, and so does `make bugs` under each planted mistake.

use std::sync::Arc;
use std::time::Duration;

use dst::engine::link::{LinkEvent, Terms};
use dst::engine::request::{Request, RequestOp, ShardConfig, Tag};
use dst::engine::shard::{Body, Report, Shard};
use dst::engine::shared::Shared;
use dst::engine::view::View;
use dst::errno::Errno;
use dst::geometry::map::Geometry;
use dst::units::{Epoch, Extent, Id};

use crate::bench::{Bench, SECTORS, VOLUME, ms};

/// All of them.
#[cfg(feature = "bugs")]
pub(crate) const ALL: [(&str, fn()); 2] = [
    (
        "a_node_that_does_not_answer_starves_no_request_of_another",
        a_node_that_does_not_answer_starves_no_request_of_another,
    ),
    (
        "that_a_node_has_diverged_is_told_although_one_of_its_targets_was_reported_before",
        that_a_node_has_diverged_is_told_although_one_of_its_targets_was_reported_before,
    ),
];

pub(crate) fn a_node_that_does_not_answer_starves_no_request_of_another() {
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
    while done < 7 {
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
}

pub(crate) fn that_a_node_has_diverged_is_told_although_one_of_its_targets_was_reported_before() {
    let volumes = [VOLUME, Id([8; 16])];
    let view = View::new(Geometry::linear(&[SECTORS]).unwrap(), &[volumes.to_vec()], Epoch(3));
    let config = ShardConfig { index: 0, depth: 8, io_timeout: Duration::from_secs(1) };
    let mut shard = Shard::new(config, Arc::new(view), Arc::new(Shared::new(2, 1)));
    let up = |shard: &mut Shard, target: usize, losses: u64| {
        let terms = Terms { sectors: SECTORS, volume: volumes[target], losses, requests_max: 64, bytes_max: 1 << 20 };
        shard.handle_link(ms(1), target, LinkEvent::Up(terms));
    };
    shard.handle_timeout(ms(0));
    (0..2).for_each(|target| up(&mut shard, target, 0));
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
