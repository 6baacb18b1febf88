//! HELLO: channels, draining, superseding, refusals.

use std::time::{Duration, Instant};

use dst::errno::Errno;
use dst::units::Id;
use dst::wire::frame::Op;
use dst::wire::session::Hello;

use super::client::{Dir, assign, attach, attached, connect, create, hello, pattern, read_welcome, send_hello, start};
use super::client::{stat, try_attach};

#[test]
fn channels_of_a_session_live_side_by_side() {
    let (_dir, server, address, mut first) = attached(false);
    let mut second = attach(address, "v", (1, 1, 1));
    assert_eq!(first.welcome.instance, server.instance());
    assert_eq!(first.welcome, second.welcome);
    first.write(0, &pattern(1, 4096)).unwrap();
    assert_eq!(second.read(0, 8).unwrap(), pattern(1, 4096));
    assert_eq!(stat(address, "v").connections, 2);
}

#[test]
fn a_channel_opened_again_closes_its_former_connection() {
    let (_dir, _server, address, mut old) = attached(false);
    old.write(0, &pattern(1, 4096)).unwrap();
    let mut new = attach(address, "v", (1, 1, 0));
    assert!(old.is_closed());
    assert_eq!(new.read(0, 8).unwrap(), pattern(1, 4096));
}

/// A request that takes a while: zeros are written where the filesystem cannot make them.
const SLOW_SECTORS: u64 = (512 << 20) / 512;

/// A volume in memory, on which a large WRITE_ZEROES is slow; `None` where there is no such place.
fn slow_volume() -> Option<(Dir, dst::roles::server::Server, std::net::SocketAddr)> {
    let memory = std::path::Path::new("/dev/shm");
    if !memory.is_dir() {
        eprintln!("skipped: no /dev/shm");
        return None;
    }
    let dir = Dir::below(memory);
    let (server, address) = start(dir.path());
    create(address, "v", SLOW_SECTORS * 512, true);
    assign(address, "v");
    Some((dir, server, address))
}

#[test]
fn a_new_connection_waits_for_what_the_old_one_has_on_the_disk() {
    let Some((_dir, _server, address)) = slow_volume() else { return };
    for who in [(1, 1, 0), (2, 2, 5)] {
        let mut old = attach(address, "v", (1, 1, 0));
        let slow = old.header(Op::WriteZeroes, 0, SLOW_SECTORS);
        old.send(&slow, &[]);
        // Until the server has it.
        std::thread::sleep(Duration::from_millis(20));
        let mut new = attach(address, "v", who);
        // Were the old request still at work, it would run over these.
        let places = [0, SLOW_SECTORS / 2, SLOW_SECTORS - 8];
        places.iter().for_each(|lba| new.write(*lba, &pattern(5, 4096)).unwrap());
        assert!(old.is_closed(), "no answer comes on the old connection");
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            places.iter().for_each(|lba| assert_eq!(new.read(*lba, 8).unwrap(), pattern(5, 4096)));
        }
    }
}

#[test]
fn a_greater_epoch_takes_the_volume_and_the_old_session_is_fenced() {
    let (_dir, _server, address, mut old) = attached(false);
    let mut other = attach(address, "v", (1, 1, 3));
    let mut new = attach(address, "v", (2, 2, 0));
    assert!(old.is_closed() && other.is_closed());
    for fenced in [(1, 1, 0), (1, 1, 9), (3, 2, 0), (2, 1, 0)] {
        let (errno, text) = try_attach(address, "v", fenced).err().unwrap();
        assert_eq!(errno, Errno::EBADE);
        assert!(text.contains("epoch 2"), "{text}");
    }
    new.write(0, &pattern(2, 512)).unwrap();
    drop(new);
    // The claim outlives its connections.
    assert_eq!(try_attach(address, "v", (1, 1, 0)).err().unwrap().0, Errno::EBADE);
    assert_eq!(attach(address, "v", (2, 2, 0)).read(0, 1).unwrap(), pattern(2, 512));
    assert_eq!(attach(address, "v", (2, 7, 0)).epoch.0, 7, "an epoch may grow within a life");
}

#[test]
fn hellos_that_cannot_be_taken_say_why() {
    let (_dir, _server, address, _client) = attached(false);
    let refused = |hello: Hello, epoch| {
        let mut stream = connect(address);
        send_hello(&mut stream, &hello, epoch);
        read_welcome(stream, epoch).err().unwrap()
    };
    let good = hello("v", (1, 1, 0));
    let (errno, text) = refused(Hello { volume: "nothere".to_owned(), ..good.clone() }, 1);
    assert_eq!(errno, Errno::ENOENT);
    assert!(text.contains("nothere"), "{text}");
    assert_eq!(refused(Hello { array: Id([0xc; 16]), ..good.clone() }, 1).0, Errno::EBUSY);
    assert_eq!(refused(Hello { versions: (2, 9), ..good }, 1).0, Errno::EPROTONOSUPPORT);
}

#[test]
fn many_sessions_come_and_go() {
    let (_dir, _server, address, _client) = attached(false);
    for round in 0..50u64 {
        let mut client = attach(address, "v", (1, 1, u16::try_from(round % 16).unwrap()));
        client.send_write(round * 8, &pattern(u8::try_from(round).unwrap(), 4096), false);
    }
    let until = Instant::now() + Duration::from_secs(10);
    while stat(address, "v").connections > 1 {
        assert!(Instant::now() < until, "connections are forgotten when they end");
        std::thread::sleep(Duration::from_millis(5));
    }
}
