//! The region log, over sockets and across the deaths of its server.

use std::net::SocketAddr;
use std::os::unix::fs::FileExt;

use dst::errno::Errno;
use dst::limits;
use dst::store::state::SLOTS_BYTES;
use dst::units::{Epoch, Id};
use dst::wire::frame::Op;
use dst::wire::session::features;
use dst::wire::volume::{RegionPage, Regions, Resize, Volume};

use super::client::{
    Client, Dir, array, ask, assign, attach, create, hello, pattern, read_welcome, refusal, send_hello,
};
use super::client::{connect, start, stat};
use super::kept::Mount;
use super::survival::Process;

const REGION_SECTORS: u64 = limits::REGION_BYTES / 512;

/// A client whose session has a log.
fn logged(address: SocketAddr, session: u8, epoch: u64) -> Client {
    let mut stream = connect(address);
    let mut hello = hello("v", (session, epoch, 0));
    hello.features |= features::REGION_LOG;
    send_hello(&mut stream, &hello, epoch);
    let client = read_welcome(stream, epoch).unwrap();
    assert_eq!(client.welcome.features, features::OURS);
    client
}

fn question(session: u8, epoch: u64) -> Regions {
    let owner = Id([session; 16]);
    Regions { name: "v".to_owned(), array: array().id, epoch: Epoch(epoch), owner, after: None }
}

fn marked(address: SocketAddr, session: u8, epoch: u64) -> Vec<(u64, u64)> {
    let page: RegionPage = ask(address, Op::Regions, &question(session, epoch)).unwrap();
    assert!(!page.more && page.region_bytes == limits::REGION_BYTES);
    page.marked
}

fn volume(address: SocketAddr, bytes: u64) {
    create(address, "v", bytes, true);
    assign(address, "v");
}

#[test]
fn what_was_changed_is_marked_after_any_death() {
    let dir = Dir::new();
    let mut process = Process::start(dir.path());
    volume(process.address, 6 << 30);
    let mut client = logged(process.address, 1, 1);
    assert_eq!(marked(process.address, 1, 1), []);
    client.write(REGION_SECTORS - 1, &pattern(1, 1024)).unwrap();
    client.call(Op::Discard, 5 * REGION_SECTORS, 1).unwrap();
    client.call(Op::WriteZeroes, 4998 * REGION_SECTORS + 8, 2 * REGION_SECTORS).unwrap();
    client.read(77 * REGION_SECTORS, 8).unwrap();
    let expected = [(0, 2), (5, 1), (4998, 3)];
    assert_eq!(marked(process.address, 1, 1), expected);
    drop((client, process));
    process = Process::start(dir.path());
    let (errno, text) = refusal(ask::<_, RegionPage>(process.address, Op::Regions, &question(2, 1)));
    assert!(errno == Errno::EBADE && text.contains("claimed"), "{text}");
    assert_eq!(marked(process.address, 1, 1), expected);
    let after = Regions { after: Some(0), ..question(1, 1) };
    assert_eq!(ask::<_, RegionPage>(process.address, Op::Regions, &after).unwrap().marked, [(1, 1), (5, 1), (4998, 3)]);
    // In the middle of many writes.
    let mut client = logged(process.address, 2, 2);
    for region in 100..150 {
        client.send_write(region * REGION_SECTORS, &pattern(2, 4096), false);
    }
    let answered = (0..20).map(|_| client.receive().0.lba.0 / REGION_SECTORS).collect::<Vec<_>>();
    drop((client, process));
    process = Process::start(dir.path());
    let found = marked(process.address, 2, 2);
    for region in answered {
        assert!(found.iter().any(|(first, count)| (*first..first + count).contains(&region)), "{region}: {found:?}");
    }
    // What is on the disk and not marked was never written.
    let mut client = attach(process.address, "v", (2, 2, 0));
    for region in 100..150 {
        let is_marked = found.iter().any(|(first, count)| (*first..first + count).contains(&region));
        let data = client.read(region * REGION_SECTORS, 8).unwrap();
        assert!(is_marked || data == vec![0; 4096], "{region} was written and is not marked");
    }
}

#[test]
fn a_session_without_a_log_marks_nothing() {
    let dir = Dir::new();
    let (_server, address) = start(dir.path());
    volume(address, 8 << 20);
    let mut client = attach(address, "v", (1, 1, 0));
    assert_eq!(client.welcome.features, features::DATA_CRC);
    client.write(0, &pattern(1, 512)).unwrap();
    assert_eq!(marked(address, 1, 1), []);
}

#[test]
fn what_is_flushed_everywhere_is_cleaned_lazily() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    volume(address, 64 << 20);
    let mut client = logged(address, 1, 1);
    for region in [3, 4, 9] {
        client.write(region * REGION_SECTORS, &pattern(1, 4096)).unwrap();
    }
    let point = client.flush_up_to(0).unwrap();
    assert!(point > 0);
    assert!(client.flush_up_to(0).unwrap() > point, "each flush has a point of its own");
    for _ in 0..4 * limits::REGION_CLEAN_FLUSHES {
        client.flush_up_to(0).unwrap();
    }
    assert_eq!(marked(address, 1, 1), [(3, 2), (9, 1)], "the server cleans nothing of its own accord");
    client.write(9 * REGION_SECTORS, &pattern(2, 4096)).unwrap();
    for _ in 0..4 * limits::REGION_CLEAN_FLUSHES {
        client.flush_up_to(point).unwrap();
    }
    assert_eq!(marked(address, 1, 1), [(9, 1)], "nor what was written since");
    drop(client);
    server.stop();
    let (_server, address) = start(dir.path());
    assert_eq!(marked(address, 1, 1), [(9, 1)]);
    let mut client = logged(address, 1, 1);
    for _ in 0..4 * limits::REGION_CLEAN_FLUSHES {
        client.flush_up_to(point + 1000).unwrap();
    }
    assert_eq!(marked(address, 1, 1), [(9, 1)], "a point of another life of the server says nothing");
    let point = client.flush_up_to(0).unwrap();
    for _ in 0..4 * limits::REGION_CLEAN_FLUSHES {
        client.flush_up_to(point).unwrap();
    }
    assert_eq!(marked(address, 1, 1), []);
}

#[test]
fn damage_marks_what_it_covers() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    volume(address, 6 << 30);
    let mut client = logged(address, 1, 1);
    client.write(5000 * REGION_SECTORS, &pattern(1, 512)).unwrap();
    drop(client);
    server.stop();
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join(".v.state")).unwrap();
    file.write_all_at(b"oops", SLOTS_BYTES as u64 + 100).unwrap();
    let (_server, address) = start(dir.path());
    let found = marked(address, 1, 1);
    assert_eq!(found.first().map(|run| run.0), Some(0));
    assert_eq!(found.last(), Some(&(5000, 1)), "the other page is whole");
    assert_eq!(found.len(), 2, "{found:?}");
}

#[test]
fn a_volume_that_grows_has_regions_for_what_is_new() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    volume(address, 8 << 20);
    let mut client = logged(address, 1, 1);
    client.write(7 * REGION_SECTORS, &pattern(1, 512)).unwrap();
    let grown = Resize { name: "v".to_owned(), size: 12 << 30, force: false };
    assert_eq!(ask::<_, Volume>(address, Op::VolumeResize, &grown).unwrap().size, 12 << 30);
    client.write(12_287 * REGION_SECTORS, &pattern(1, 512)).unwrap();
    assert_eq!(marked(address, 1, 1), [(7, 1), (12_287, 1)]);
    drop(client);
    server.stop();
    let (_server, address) = start(dir.path());
    assert_eq!(marked(address, 1, 1), [(7, 1), (12_287, 1)]);
    let immense = Resize { name: "v".to_owned(), size: 1 << 50, force: false };
    assert_eq!(refusal(ask::<_, Volume>(address, Op::VolumeResize, &immense)).0, Errno::ENOSPC, "too many regions");
    assert_eq!(stat(address, "v").size, 12 << 30);
}

#[test]
fn a_full_pool_stops_no_mark() {
    let Some(mount) = Mount::new("8m") else { return };
    let (_server, address) = start(mount.path());
    // More regions than one page has, and not half of its space.
    create(address, "v", 1 << 34, true);
    assign(address, "v");
    let mut client = logged(address, 1, 1);
    for region in [0, 4000, 12_000] {
        client.write(region * REGION_SECTORS, &pattern(1, 4096)).unwrap();
    }
    assert!(std::fs::write(mount.path().join("filler~"), vec![1; 16 << 20]).is_err(), "the pool is full");
    // The data has no space left; the mark has.
    assert_eq!(client.write(8000 * REGION_SECTORS, &pattern(1, 4096)), Err(Errno::ENOSPC));
    client.write(4000 * REGION_SECTORS, &pattern(2, 4096)).unwrap();
    assert_eq!(marked(address, 1, 1), [(0, 1), (4000, 1), (8000, 1), (12_000, 1)]);
}
