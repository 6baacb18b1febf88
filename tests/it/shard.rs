//! The rules of a shard, one by one: what is sent when, what is held, what an error means. Time is a number here.

use std::sync::Arc;
use std::time::Duration;

use dst::engine::link::{LinkCommand, LinkEvent, Terms};
use dst::engine::request::{Request, RequestOp, ShardConfig, Tag};
use dst::engine::shard::{Body, Shard};
use dst::engine::shared::Shared;
use dst::engine::view::View;
use dst::errno::Errno;
use dst::geometry::map::Geometry;
use dst::units::{Epoch, Extent, Id};
use dst::wire::frame::{Header, Op};

use crate::bench::{Bench, SECTORS, VOLUME, ms};

#[test]
fn a_request_on_the_border_of_two_nodes_becomes_two_frames() {
    let mut bench = Bench::new(2, 1);
    bench.ask(0, 0, 1, RequestOp::Read, SECTORS - 3, 8);
    let (first, second) = (bench.sent(0, 0).unwrap(), bench.sent(0, 1).unwrap());
    assert_eq!((first.header.extent(), second.header.extent()), (Extent::new(SECTORS - 3, 3), Extent::new(0, 5)));
    let place = |reply: &Header| reply.reply(Ok(())).with_body(reply.length, 0);
    let data = bench.shards[0].expect(1, &place(&second.header)).unwrap().unwrap();
    assert_eq!((data.tag, data.offset, data.bytes), (Tag(1), 3 * 512, 5 * 512));
    bench.answer(0, 1, 0, &second.header, Ok(()));
    assert_eq!(bench.done(0), None);
    bench.answer(0, 0, 0, &first.header, Ok(()));
    assert_eq!(bench.done(0), Some((1, Ok(()))));
    assert_eq!(bench.shards[0].active(), 0);
}

#[test]
fn requests_out_of_range_are_refused_at_once() {
    let mut bench = Bench::new(1, 1);
    for (start, sectors) in [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 2), (0, 0)] {
        bench.ask(0, 0, 0, RequestOp::Read, start, sectors);
        assert_eq!(bench.done(0), Some((0, Err(Errno::EINVAL))));
    }
    assert!(bench.sent(0, 0).is_none());
}

#[test]
fn an_answer_must_match_in_everything() {
    let mut bench = Bench::new(2, 1);
    bench.write(0, 0, 0, 16);
    let request = bench.sent(0, 0).unwrap().header;
    let reply = request.reply(Ok(()));
    let wrong = [
        (1, reply),
        (0, Header { sequence: reply.sequence + 1, ..reply }),
        (0, Header { tag: reply.tag + 1, ..reply }),
        (0, Header { tag: u32::MAX, ..reply }),
        (0, Header { op: Op::Read, ..reply }),
        (0, Header { length: reply.length + 512, ..reply }),
        (0, Header { lba: dst::units::Lba(24), ..reply }),
        (0, Header { flags: 0, ..reply }),
    ];
    for (target, wrong) in wrong {
        assert!(bench.shards[0].expect(target, &wrong).is_err(), "{wrong:?}");
        assert!(bench.shards[0].handle_reply(ms(0), target, &wrong, Body::Good).is_err(), "{wrong:?}");
    }
    bench.answer(0, 0, 0, &request, Ok(()));
    assert!(bench.shards[0].handle_reply(ms(0), 0, &reply, Body::Good).is_err(), "a tag completes once");
}

#[test]
fn what_was_not_answered_is_sent_again_after_hello() {
    let mut bench = Bench::new(1, 1);
    bench.write(0, 0, 0, 0);
    let first = bench.sent(0, 0).unwrap().header;
    bench.shards[0].handle_link(ms(10), 0, LinkEvent::Down(Errno::ECONNRESET));
    assert!(bench.sent(0, 0).is_none());
    bench.shards[0].handle_timeout(ms(200));
    assert_eq!(bench.shards[0].poll_link(), Some(LinkCommand::Connect(0)));
    assert!(bench.sent(0, 0).is_none(), "nothing before HELLO is answered");
    bench.up(0, 0, 300);
    let again = bench.sent(0, 0).unwrap().header;
    assert_eq!((again.op, again.extent()), (first.op, first.extent()));
    bench.answer(0, 0, 300, &again, Ok(()));
    assert_eq!(bench.done(0), Some((0, Ok(()))));
}

#[test]
fn a_write_past_its_deadline_holds_its_target_for_every_shard() {
    let mut bench = Bench::new(2, 2);
    bench.write(0, 0, 0, 0);
    assert!(bench.sent(0, 0).is_some());
    bench.shards[0].handle_timeout(ms(1000));
    assert_eq!(bench.shards[0].poll_link(), Some(LinkCommand::Close(0)));
    assert_eq!(bench.done(0), None, "the connection may still touch the buffer");
    bench.shards[0].handle_link(ms(1001), 0, LinkEvent::Down(Errno::ECANCELED));
    assert_eq!(bench.done(0), Some((0, Err(Errno::ETIMEDOUT))));

    bench.write(1, 1002, 0, 0);
    assert!(bench.sent(1, 0).is_none(), "another shard sends nothing either");
    bench.write(1, 1002, 1, SECTORS);
    assert!(bench.sent(1, 1).is_some(), "other targets go on");

    bench.shards[0].handle_timeout(ms(1200));
    bench.up(0, 0, 1300);
    assert!(bench.sent(1, 0).is_some(), "HELLO has confirmed the fate of the old write");
}

#[test]
fn a_deadline_while_disconnected_holds_too_if_the_write_was_ever_sent() {
    let mut bench = Bench::new(1, 2);
    bench.write(0, 0, 0, 0);
    assert!(bench.sent(0, 0).is_some());
    bench.shards[0].handle_link(ms(10), 0, LinkEvent::Down(Errno::ECONNRESET));
    bench.write(0, 10, 1, 64);
    bench.shards[0].handle_timeout(ms(1005));
    assert_eq!(bench.done(0), Some((0, Err(Errno::ETIMEDOUT))));
    assert!(bench.shared.target(0).is_held());
    bench.shards[0].handle_timeout(ms(1100));
    assert_eq!(bench.done(0), Some((1, Err(Errno::ETIMEDOUT))));
    bench.up(0, 0, 1200);
    assert!(!bench.shared.target(0).is_held());
    assert!(bench.sent(0, 0).is_none(), "nothing that has failed is ever sent");
}

#[test]
fn what_was_never_sent_needs_no_hold() {
    let mut bench = Bench::new(1, 1);
    bench.shards[0].handle_link(ms(0), 0, LinkEvent::Down(Errno::ECONNRESET));
    bench.write(0, 0, 0, 0);
    bench.shards[0].handle_timeout(ms(1000));
    assert_eq!(bench.done(0), Some((0, Err(Errno::ETIMEDOUT))));
    assert!(!bench.shared.target(0).is_held());
}

#[test]
fn a_flush_goes_where_writes_were_acknowledged_by_any_shard() {
    let mut bench = Bench::new(3, 2);
    assert_eq!(bench.flush(0, 0), [0, 1, 2], "a new daemon counts every target as written");
    assert!(bench.flush(1, 0).is_empty());
    bench.written(1, 2, 0);
    assert_eq!(bench.flush(0, 0), [2]);
    assert!(bench.flush(1, 0).is_empty());
}

#[test]
fn a_write_acknowledged_during_a_flush_is_not_covered_by_it() {
    let mut bench = Bench::new(1, 2);
    bench.flush(0, 0);
    bench.written(0, 0, 0);
    bench.ask(0, 0, 7, RequestOp::Flush, 0, 0);
    let flush = bench.sent(0, 0).unwrap().header;
    bench.written(1, 0, 0);
    bench.answer(0, 0, 0, &flush, Ok(()));
    assert_eq!(bench.done(0), Some((7, Ok(()))));
    assert_eq!(bench.flush(0, 0), [0]);
}

#[test]
fn a_durable_write_needs_no_flush() {
    let mut bench = Bench::new(1, 1);
    bench.flush(0, 0);
    bench.ask(0, 0, 0, RequestOp::Write { fua: true }, 0, 8);
    let frame = bench.sent(0, 0).unwrap().header;
    assert!(frame.is_fua());
    bench.answer(0, 0, 0, &frame, Ok(()));
    assert_eq!(bench.done(0), Some((0, Ok(()))));
    assert!(bench.flush(0, 0).is_empty());
}

#[test]
fn a_failed_flush_is_for_ever() {
    let mut bench = Bench::new(2, 2);
    bench.ask(0, 0, 7, RequestOp::Flush, 0, 0);
    let (bad, good) = (bench.sent(0, 0).unwrap().header, bench.sent(0, 1).unwrap().header);
    bench.answer(0, 0, 0, &bad, Err(Errno::EIO));
    bench.answer(0, 1, 0, &good, Ok(()));
    assert_eq!(bench.done(0), Some((7, Err(Errno::EIO))));
    for shard in 0..2 {
        bench.ask(shard, 0, 7, RequestOp::Flush, 0, 0);
        assert!(bench.sent(shard, 0).is_none(), "never tried again");
        if let Some(good) = bench.sent(shard, 1) {
            bench.answer(shard, 1, 0, &good.header, Ok(()));
        }
        assert_eq!(bench.done(shard), Some((7, Err(Errno::EIO))));
        bench.write(shard, 0, 1, 0);
        assert_eq!(bench.done(shard), Some((1, Err(Errno::EIO))), "it could never be made durable truthfully");
        bench.written(shard, 1, 0);
    }
    bench.ask(0, 0, 2, RequestOp::Read, 0, 8);
    assert!(bench.sent(0, 0).is_some(), "what is there can still be read");
}

#[test]
fn a_flush_that_timed_out_covers_nothing() {
    let mut bench = Bench::new(1, 1);
    bench.ask(0, 0, 7, RequestOp::Flush, 0, 0);
    assert!(bench.sent(0, 0).is_some());
    bench.shards[0].handle_timeout(ms(1000));
    bench.shards[0].handle_link(ms(1000), 0, LinkEvent::Down(Errno::ECANCELED));
    assert_eq!(bench.done(0), Some((7, Err(Errno::ETIMEDOUT))));
    bench.shards[0].handle_timeout(ms(1200));
    bench.up(0, 0, 1200);
    assert_eq!(bench.flush(0, 1200), [0]);
}

#[test]
fn damaged_data_is_asked_again_and_then_an_error() {
    let mut bench = Bench::new(1, 1);
    bench.ask(0, 0, 0, RequestOp::Read, 0, 8);
    for _ in 0..4 {
        let request = bench.sent(0, 0).unwrap().header;
        let reply = request.reply(Ok(())).with_body(request.length, 1);
        bench.shards[0].handle_reply(ms(0), 0, &reply, Body::Damaged).unwrap();
    }
    assert_eq!(bench.done(0), Some((0, Err(Errno::EILSEQ))));

    bench.write(0, 0, 1, 0);
    let request = bench.sent(0, 0).unwrap().header;
    bench.answer(0, 0, 0, &request, Err(Errno::EILSEQ));
    let again = bench.sent(0, 0).unwrap().header;
    bench.answer(0, 0, 0, &again, Ok(()));
    assert_eq!(bench.done(0), Some((1, Ok(()))));
}

#[test]
fn errors_of_the_disk_arrive_as_they_are() {
    let mut bench = Bench::new(1, 1);
    for error in [Errno::ENOSPC, Errno::EIO, Errno::EROFS] {
        bench.write(0, 0, 0, 0);
        let request = bench.sent(0, 0).unwrap().header;
        bench.answer(0, 0, 0, &request, Err(error));
        assert_eq!(bench.done(0), Some((0, Err(error))));
    }
}

#[test]
fn a_server_that_shuts_down_is_asked_again_later() {
    let mut bench = Bench::new(1, 1);
    bench.write(0, 0, 0, 0);
    let request = bench.sent(0, 0).unwrap().header;
    bench.answer(0, 0, 0, &request, Err(Errno::ESHUTDOWN));
    assert_eq!((bench.done(0), bench.shards[0].poll_link()), (None, Some(LinkCommand::Close(0))));
    bench.shards[0].handle_link(ms(1), 0, LinkEvent::Down(Errno::ECANCELED));
    bench.shards[0].handle_timeout(ms(200));
    bench.up(0, 0, 200);
    let again = bench.sent(0, 0).unwrap().header;
    bench.answer(0, 0, 200, &again, Ok(()));
    assert_eq!(bench.done(0), Some((0, Ok(()))));
}

#[test]
fn fenced_is_for_ever_and_has_its_own_number() {
    let mut bench = Bench::new(2, 1);
    bench.write(0, 0, 0, 0);
    assert!(bench.sent(0, 0).is_some());
    bench.shards[0].handle_link(ms(1), 0, LinkEvent::Down(Errno::EBADE));
    assert_eq!(bench.done(0), Some((0, Err(Errno::EBADE))));
    bench.write(0, 2, 0, 0);
    assert_eq!(bench.done(0), Some((0, Err(Errno::EBADE))));
    bench.shards[0].handle_timeout(ms(100_000));
    assert!(std::iter::from_fn(|| bench.shards[0].poll_link()).all(|command| command != LinkCommand::Connect(0)));
    assert!(!bench.shared.target(0).has_failed_flush());
}

#[test]
fn another_volume_under_the_same_name_is_not_served() {
    let mut bench = Bench::new(1, 1);
    for (volume, sectors) in [(Id([8; 16]), SECTORS), (VOLUME, SECTORS - 1)] {
        bench.shards[0].handle_link(ms(0), 0, LinkEvent::Down(Errno::ECONNRESET));
        bench.shards[0].handle_timeout(ms(100_000));
        while bench.shards[0].poll_link().is_some() {}
        let terms = Terms { sectors, volume, losses: 0, requests_max: 64, bytes_max: 1 << 20 };
        bench.shards[0].handle_link(ms(100_000), 0, LinkEvent::Up(terms));
        assert_eq!(bench.shards[0].poll_link(), Some(LinkCommand::Close(0)));
        bench.write(0, 100_000, 0, 0);
        assert!(bench.sent(0, 0).is_none());
        bench.shards[0].abort(Errno::EIO);
        assert_eq!(bench.done(0), Some((0, Err(Errno::EIO))));
    }
}

#[test]
fn large_zeroings_are_cut_and_each_node_gets_one_run() {
    let sectors = 3 * (1u64 << 21);
    let shared = Arc::new(Shared::new(2, 1));
    let geometry = Geometry::striped(128, &[sectors, sectors]).unwrap();
    let view = Arc::new(View::new(geometry, &[vec![VOLUME], vec![VOLUME]], Epoch(1)));
    let config = ShardConfig { index: 0, depth: 4, io_timeout: Duration::from_secs(1) };
    let mut shard = Shard::new(config, view, shared);
    shard.handle_timeout(ms(0));
    for target in 0..2 {
        let terms = Terms { sectors, volume: VOLUME, losses: 0, requests_max: 64, bytes_max: 1 << 20 };
        shard.handle_link(ms(0), target, LinkEvent::Up(terms));
    }
    let whole = Extent::new(0, 2 * sectors);
    shard.handle_request(ms(0), Tag(0), Request::new(RequestOp::Discard, whole));
    for target in 0..2 {
        let frames: Vec<Header> = std::iter::from_fn(|| shard.poll_send(target)).map(|frame| frame.header).collect();
        let extents: Vec<Extent> = frames.iter().map(Header::extent).collect();
        assert_eq!(extents, [0, 1, 2].map(|part| Extent::new(part << 21, 1 << 21)));
        for frame in frames {
            shard.handle_reply(ms(0), target, &frame.reply(Ok(())), Body::Good).unwrap();
        }
    }
    assert_eq!(shard.poll_complete(), Some((Tag(0), Ok(()))));
}

#[test]
fn what_waits_for_a_machine_that_has_lost_something_is_refused() {
    let mut bench = Bench::new(1, 1);
    bench.written(0, 0, 1);
    bench.shards[0].handle_link(ms(2), 0, LinkEvent::Down(Errno::ECONNRESET));
    bench.ask(0, 3, 1, RequestOp::Read, 0, 8);
    bench.ask(0, 3, 2, RequestOp::Flush, 0, 0);
    bench.shards[0].handle_timeout(ms(200));
    let terms = Terms { sectors: SECTORS, volume: VOLUME, losses: 1, requests_max: 64, bytes_max: 1 << 20 };
    bench.shards[0].handle_link(ms(201), 0, LinkEvent::Up(terms));
    assert!(bench.sent(0, 0).is_none(), "older data would be read");
    assert_eq!((bench.done(0), bench.done(0)), (Some((1, Err(Errno::EIO))), Some((2, Err(Errno::EIO)))));
    bench.ask(0, 202, 1, RequestOp::Read, 0, 8);
    assert_eq!(bench.done(0), Some((1, Err(Errno::EIO))));
    // No flush has failed: when the loss is accepted everything goes on.
    bench.shared.target(0).forget_loss();
    bench.written(0, 0, 203);
    assert_eq!(bench.flush(0, 204), [0]);
}
