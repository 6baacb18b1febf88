//! What is durable before who is answered, and what the server's next life makes of it.

use super::*;
use crate::wire::volume::LabelPut;

/// A flush whose failure cannot be saved is answered all the same, and never with success.
#[test]
fn a_failure_that_cannot_be_saved_is_told() {
    let mut volume = attached(false);
    let sync = work(&ask(&mut volume, 0, &header(Op::Flush, 1, false)));
    for round in 0..3 {
        let save = match round {
            0 => done(&mut volume, sync, Err(Errno::EIO)),
            _ => ask(&mut volume, 0, &header(Op::Flush, 1, false)),
        };
        assert!(matches!(save[..], [Effect::Save(_)]), "it is tried again with the next flush");
        volume.handle(Event::Saved { part: Part::State, result: Err(Errno::EIO) });
        assert_eq!(answer(&effects(&mut volume)), Err(Errno::EIO));
    }
}

/// A sync that failed after its client had gone: the kernel would answer the next one with success.
#[test]
fn a_failure_that_nobody_was_told_is_remembered() {
    let mut volume = attached(false);
    let write = work(&ask(&mut volume, 0, &header(Op::Write, 1, false)));
    assert_eq!(answer(&done(&mut volume, write, Ok(()))), Ok(()));
    let sync = work(&ask(&mut volume, 0, &header(Op::Flush, 1, false)));
    volume.handle(Event::Gone { conn: Conn(0) });
    let all = done(&mut volume, sync, Err(Errno::EIO));
    assert!(matches!(all[..], [Effect::Save(_)]), "{all:?}");
    // It could not be saved: a stop tries once more before it ends.
    volume.handle(Event::Saved { part: Part::State, result: Err(Errno::EIO) });
    assert_eq!(effects(&mut volume), []);
    volume.handle(Event::Stop);
    let all = effects(&mut volume);
    assert!(matches!(all[..], [Effect::Save(_)]), "{all:?}");
    volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
    assert_eq!(effects(&mut volume), [Effect::Stopped]);
    let state = volume.state();
    assert!(state.flush_failed && state.dirty);
}

#[test]
fn a_claim_is_durable_before_its_welcome() {
    let mut volume = attached(false);
    let (hello, member) = (hello(2, 0), member());
    let knock = |volume: &mut Volume, conn, epoch| {
        let (hello, assigned) = (&hello, Some(&member));
        volume.handle(Event::Attach { conn: Conn(conn), hello, epoch: Epoch(epoch), assigned });
        effects(volume)
    };
    assert!(matches!(knock(&mut volume, 1, 5)[..], [Effect::Save(_)]));
    assert_eq!(knock(&mut volume, 2, 4), [], "who comes later waits");
    assert_eq!(work(&ask(&mut volume, 0, &header(Op::Read, 1, false))).op, DiskOp::Read, "the owner is still served");
    volume.handle(Event::Saved { part: Part::State, result: Err(Errno::EIO) });
    let all = effects(&mut volume);
    assert!(
        matches!(&all[..], [Effect::Refuse { conn: Conn(1), errno: Errno::EIO, text }, Effect::Save(_)] if text.contains("cannot be written")),
        "{all:?}"
    );
    volume.handle(Event::Gone { conn: Conn(2) });
    volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
    let all = effects(&mut volume);
    assert!(
        matches!(all[..], [Effect::Close { conn: Conn(0), .. }]),
        "a claim holds though its HELLO has gone: {all:?}"
    );
    assert_eq!(volume.state().claim.map(|claim| claim.epoch), Some(Epoch(4)));
    let all = knock(&mut volume, 3, 3);
    assert!(matches!(all[..], [Effect::Refuse { errno: Errno::EBADE, .. }]), "{all:?}");
}

#[test]
fn a_label_is_its_owners() {
    let mut volume = attached(false);
    let label = |epoch, owner, text: &str| {
        let (name, label) = ("v".to_owned(), text.to_owned());
        LabelPut { name, array: ARRAY, epoch: Epoch(epoch), owner: Id([owner; 16]), label }
    };
    let put = |volume: &mut Volume, put: &LabelPut| {
        volume.handle(Event::Ask { number: 7, ask: Ask::Label(put) });
        effects(volume)
    };
    let refused = |all: &[Effect]| match all {
        [Effect::Answer { number: 7, result: Err((errno, _)) }] => *errno,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&put(&mut volume, &label(2, 1, "x"))), Errno::EBADE);
    assert_eq!(refused(&put(&mut volume, &label(1, 2, "x"))), Errno::EBADE);
    assert_eq!(refused(&put(&mut volume, &label(1, 1, "\u{7}"))), Errno::EINVAL);
    assert_eq!(refused(&put(&mut volume, &label(1, 1, &"x".repeat(limits::LABEL_BYTES_MAX + 1)))), Errno::EINVAL);
    assert!(matches!(put(&mut volume, &label(1, 1, "first"))[..], [Effect::Save(_)]));
    volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
    assert_eq!(effects(&mut volume), [Effect::Answer { number: 7, result: Ok(Told::Done) }]);
    assert!(matches!(put(&mut volume, &label(1, 1, "second"))[..], [Effect::Save(_)]));
    volume.handle(Event::Saved { part: Part::State, result: Err(Errno::EIO) });
    assert_eq!(refused(&effects(&mut volume)), Errno::EIO);
    attach(&mut volume, 1, 2, 2, 0);
    assert_eq!(volume.state().label.as_deref(), Some("first"), "what was not saved does not come back later");
    volume.handle(Event::Ask { number: 8, ask: Ask::Free });
    assert_eq!(settled(&mut volume)[1..], [Effect::Answer { number: 8, result: Ok(Told::Done) }]);
    assert_eq!((volume.state().claim, volume.state().label.as_deref()), (None, Some("first")));
    let welcome = attach(&mut volume, 2, 1, 1, 0);
    assert!(matches!(welcome[..], [Effect::Welcome { .. }]), "a freed volume begins anew: {welcome:?}");
    assert_eq!(volume.state().label, None);
}

/// A volume whose server was started again in this boot, with the former one's state.
fn restarted(former: &Volume, boot: u8) -> Volume {
    let config = Config { boot: Id([boot; 16]), ..former.config.clone() };
    Volume::new(config, SECTORS, Book::new(VOLUME, (0, former.state().clone())), None)
}

fn losses(volume: &mut Volume) -> u64 {
    match attach(volume, 0, 1, 1, 0)[..] {
        [Effect::Welcome { welcome, .. }] => welcome.losses,
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn a_loss_is_counted_once_and_only_when_the_memory_was_lost() {
    let volume = attached(true);
    let mut same = restarted(&volume, 6);
    assert_eq!(losses(&mut same), 0, "a process died, not the machine");
    assert_eq!(work(&ask(&mut same, 0, &header(Op::Write, 1, false))).op, DiskOp::Write { durable: false });
    let mut other = restarted(&same, 7);
    assert_eq!(losses(&mut other), 1);
    assert_eq!(losses(&mut restarted(&other, 8)), 1, "nothing was written in between");
    // An orderly stop leaves nothing to lose.
    let mut volume = attached(true);
    volume.handle(Event::Stop);
    let sync = work(&effects(&mut volume));
    assert_eq!(sync.op, DiskOp::Sync);
    assert!(matches!(done(&mut volume, sync, Ok(()))[..], [Effect::Save(_)]));
    assert!(volume.state().dirty);
    volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
    assert_eq!(effects(&mut volume), [Effect::Stopped]);
    assert_eq!(losses(&mut restarted(&volume, 7)), 0);
    // One whose sync fails does not.
    let mut volume = attached(true);
    volume.handle(Event::Stop);
    let sync = work(&effects(&mut volume));
    done(&mut volume, sync, Err(Errno::EIO));
    volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
    assert_eq!(effects(&mut volume), [Effect::Stopped]);
    assert!(volume.state().flush_failed);
    assert_eq!(losses(&mut restarted(&volume, 7)), 1);
}

#[test]
fn a_loss_that_cannot_be_counted_refuses() {
    let mut volume = restarted(&attached(true), 7);
    let (hello, member) = (hello(1, 0), member());
    for conn in 0..3 {
        volume.handle(Event::Attach { conn: Conn(conn), hello: &hello, epoch: Epoch(1), assigned: Some(&member) });
        assert!(matches!(effects(&mut volume)[..], [Effect::Save(_)]));
        volume.handle(Event::Saved { part: Part::State, result: Err(Errno::EIO) });
        assert!(matches!(effects(&mut volume)[..], [Effect::Refuse { errno: Errno::EIO, .. }]));
    }
    assert_eq!(losses(&mut volume), 1);
}

#[test]
fn changes_wait_for_what_must_be_written_down() {
    let mut volume = restarted(&attached(true), 6);
    let mut volume = {
        volume.handle(Event::Stop);
        let sync = work(&effects(&mut volume));
        done(&mut volume, sync, Ok(()));
        volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
        restarted(&volume, 6)
    };
    assert_eq!(losses(&mut volume), 0);
    assert_eq!(work(&ask(&mut volume, 9, &header(Op::Read, 1, false))).op, DiskOp::Read, "a read changes nothing");
    assert!(matches!(ask(&mut volume, 0, &header(Op::Write, 1, false))[..], [Effect::Save(_)]));
    assert_eq!(ask(&mut volume, 1, &header(Op::Discard, 1, false)), []);
    volume.handle(Event::Saved { part: Part::State, result: Err(Errno::ENOSPC) });
    let all = effects(&mut volume);
    assert_eq!(all.len(), 2);
    all.iter().for_each(|one| assert_eq!(answer(std::slice::from_ref(one)), Err(Errno::EIO)));
    assert!(matches!(ask(&mut volume, 0, &header(Op::Write, 1, false))[..], [Effect::Save(_)]));
    // Its connection is replaced before it begins: it never reaches the disk.
    assert_eq!(losses(&mut volume_with_gone(&mut volume)), 0);
}

/// The volume, after its only connection has gone while changes of it were parked.
fn volume_with_gone(volume: &mut Volume) -> Volume {
    volume.handle(Event::Gone { conn: Conn(0) });
    volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
    assert_eq!(effects(volume), []);
    restarted(volume, 6)
}
