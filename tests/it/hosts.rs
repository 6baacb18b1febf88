//! Two machines and one array: who may serve it, what becomes of the writes of the one that lost it, what is imported and what is
//! refused by name. A machine is a state directory: each has its own daemon here.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::farm::{Farm, Host};

pub(crate) fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

const ESHUTDOWN: u32 = 108;

/// What a host says of its array when another one has taken it: it has ended by itself.
fn has_ended(host: &Host) -> bool {
    let status = host.dst("status one");
    status.contains("one: failed") && status.contains("another host (")
}

/// An NBD client that says what it wants and what came of it.
pub(crate) struct Client(UnixStream);

impl Client {
    pub(crate) fn new(path: &Path) -> Client {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        // Fixed newstyle without zeroes; EXPORT_NAME "one".
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x03one").unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        Client(stream)
    }

    /// Sends a write of one block at the start.
    fn send_write(&mut self, byte: u8) {
        self.send(1);
        let _ = self.0.write_all(&[byte; 4096]);
    }

    fn send(&mut self, command: u16) {
        self.ask(command, 4096);
    }

    fn ask(&mut self, command: u16, bytes: u32) {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0, 0]);
        request.extend(command.to_be_bytes());
        request.extend(7u64.to_be_bytes());
        request.extend(0u64.to_be_bytes());
        request.extend(bytes.to_be_bytes());
        // An array that was fenced has ended: the answer says so.
        let _ = self.0.write_all(&request);
    }

    /// The error number of the answer; that of a connection which has ended, if there is none.
    fn answer(&mut self) -> u32 {
        let mut reply = [0; 16];
        if let Err(error) = self.0.read_exact(&mut reply) {
            assert!(!matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "no answer");
            return ESHUTDOWN;
        }
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes());
        u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]])
    }

    pub(crate) fn write(&mut self, byte: u8) -> u32 {
        self.send_write(byte);
        self.answer()
    }

    /// The error number of a flush.
    pub(crate) fn flush(&mut self) -> u32 {
        self.ask(3, 0);
        self.answer()
    }

    /// The error number of a read that must fail.
    pub(crate) fn read_fails(&mut self) -> u32 {
        self.send(0);
        let errno = self.answer();
        assert_ne!(errno, 0, "it is served");
        errno
    }

    /// The byte that fills the block at the start.
    pub(crate) fn read(&mut self) -> u8 {
        self.send(0);
        assert_eq!(self.answer(), 0);
        let mut block = vec![0; 4096];
        self.0.read_exact(&mut block).unwrap();
        assert!(block.iter().all(|byte| *byte == block[0]), "half a block is one write, half another");
        block[0]
    }
}

fn nbd(farm: &Farm, host: &str) -> PathBuf {
    farm.dir.join(format!("{host}.nbd"))
}

fn start(farm: &Farm, host: &Host, name: &str, options: &str) -> Client {
    host.dst(&format!("start one --frontend nbd:{} {options}", nbd(farm, name).display()));
    Client::new(&nbd(farm, name))
}

#[test]
fn the_host_that_lost_an_array_writes_nothing_more() {
    let farm = Farm::new(2);
    let (a, b) = (farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M"));
    let (first, second) = (farm.host("first"), farm.host("second"));
    first.dst(&format!("create one --alg linear {a} {b}"));
    says(&second.dst_fails(&format!("import {a}")), &["has no label", "never was"]);
    let mut old = start(&farm, &first, "first", "");
    assert_eq!(old.write(b'A'), 0);

    says(&second.dst(&format!("import {a}")), &["imported one: 16M, linear, 2 nodes", "dst start one"]);
    let error = second.dst_fails(&format!("start one --frontend nbd:{}", nbd(&farm, "second").display()));
    says(&error, &["cannot start: node n-0", &a, "claimed by another host", "epoch 1", "dst start one --take-over"]);
    assert_eq!(old.write(b'A'), 0, "who asks has taken nothing");
    let mut new = start(&farm, &second, "second", "--take-over");
    assert_eq!(new.read(), b'A');
    assert_eq!(new.write(b'B'), 0);
    assert_ne!(old.write(b'C'), 0);
    assert_eq!(new.read(), b'B');
    wait_for("the first host has stopped by itself", || has_ended(&first));
    says(&first.dst("status one"), &["fenced", "epoch 2) has taken the array", "dst start one --take-over"]);
    drop(old);
    first.dst("stop one");
    let error = first.dst_fails(&format!("start one --frontend nbd:{}", nbd(&farm, "first").display()));
    says(&error, &["claimed by another host", "epoch 2"]);
    says(&first.dst_fails("remove one"), &["another host has claimed", "remove it there"]);
    first.dst("remove one --force");
    assert_eq!(new.write(b'D'), 0);
    assert_eq!(new.read(), b'D', "what another host forgets is no loss");
}

#[test]
fn a_daemon_that_stood_still_through_a_take_over_overwrites_nothing() {
    let mut farm = Farm::new(1);
    let a = farm.volume(0, "a", "8M");
    let (first, second) = (farm.host("first"), farm.host("second"));
    first.dst(&format!("create one --alg linear {a}"));
    let mut old = start(&farm, &first, "first", "--io-timeout 5s");
    assert_eq!(old.write(b'A'), 0);
    first.process.freeze();
    old.send_write(b'C');
    second.dst(&format!("import {a}"));
    let mut new = start(&farm, &second, "second", "--take-over");
    assert_eq!(new.write(b'B'), 0);
    // Even a server that was started again knows who has the volume.
    farm.servers[0].kill();
    farm.servers[0].start();
    first.process.signal(Signal::SIGCONT);
    assert_ne!(old.answer(), 0, "it is too late for this write");
    assert_eq!(new.read(), b'B');
}

#[test]
fn a_host_that_is_fenced_while_a_replica_is_away_calls_nothing_done() {
    let mut farm = Farm::new(2);
    let (a, b) = (farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M"));
    let (first, second) = (farm.host("first"), farm.host("second"));
    first.dst(&format!("create one --alg linear --replicas 2 {a},{b}"));
    let mut old = start(&farm, &first, "first", "--io-timeout 30s");
    assert_eq!(old.write(b'A'), 0);
    second.dst(&format!("import {a}"));
    first.process.freeze();
    old.send_write(b'C');
    farm.servers[1].kill();
    let mut new = start(&farm, &second, "second", "--take-over --force");
    assert_eq!((new.read(), new.write(b'B')), (b'A', 0));
    // That one replica does not answer, and the other one is another host's, makes no write that could be acknowledged.
    first.process.signal(Signal::SIGCONT);
    assert_ne!(old.answer(), 0, "it is nowhere");
    wait_for("the first host has stopped by itself", || has_ended(&first));
    assert_eq!(new.read(), b'B');
    farm.servers[1].start();
    wait_for("in sync", || second.dst("status one --json").matches("\"in_sync\"").count() == 2);
    assert_eq!(new.read(), b'B');
    drop(new);
    second.dst("stop one --force");
    let [one, other] =
        [(0, "a"), (1, "b")].map(|(at, name)| std::fs::read(farm.servers[at].pool().join(name)).unwrap());
    assert!(one[..4096].iter().all(|byte| *byte == b'B') && one == other);
}

#[test]
fn what_cannot_be_imported_is_named() {
    let mut farm = Farm::new(2);
    let (a, b) = (farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M"));
    farm.dst(&format!("create one --alg linear {a} {b}"));
    farm.start_nbd("one", "");
    farm.dst("stop one");
    let other = farm.host("other");
    says(&other.dst_fails("import 127.0.0.1:1/v"), &["127.0.0.1:1", "connection refused"]);
    farm.servers[1].kill();
    says(
        &other.dst_fails(&format!("import {a}")),
        &["node n-16384 has no volume that is there", &b, "connection refused"],
    );
    farm.servers[1].start();
    // Another volume under the old name, then one of another array.
    farm.dst(&format!("volume remove {b} --force"));
    farm.volume(1, "b", "8M");
    says(&other.dst_fails(&format!("import {a}")), &["node n-16384", &b, "another volume is there"]);
    says(&other.dst_fails(&format!("import {b}")), &[&b, "belongs to no array"]);
    says(&farm.dst_fails("start one"), &["node n-16384", &b, "not assigned to this array any more"]);
    farm.dst(&format!("create two --alg linear {b}"));
    says(&farm.dst_fails("start one"), &["node n-16384", &b, "belongs to array 'two' now"]);
    says(&other.dst("list"), &["no arrays"]);
    says(&farm.dst_fails(&format!("import {a}")), &["node n-16384"]);
}

#[test]
fn local_targets_are_claimed_too() {
    let farm = Farm::new(0);
    let (first, second) = (farm.host("first"), farm.host("second"));
    let path = farm.dir.join("disk");
    std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let path = path.to_str().unwrap();
    first.dst(&format!("create one --alg linear {path}"));
    drop(start(&farm, &first, "first", ""));
    first.dst("stop one --force");
    second.dst(&format!("import {path} --name one"));
    let uri = nbd(&farm, "second");
    says(
        &second.dst_fails(&format!("start one --frontend nbd:{}", uri.display())),
        &["claimed by another host", "epoch 1"],
    );
    let mut new = start(&farm, &second, "second", "--take-over");
    assert_eq!(new.write(b'B'), 0);
    let error = first.dst_fails(&format!("start one --frontend nbd:{}", nbd(&farm, "first").display()));
    says(&error, &[path, "claimed by another host", "epoch 2"]);
}

#[test]
fn replicas_are_recorded_listed_and_changed() {
    let farm = Farm::new(3);
    let volumes: Vec<String> = (0..3).map(|at| farm.volume(at, "v", "8M")).collect();
    let small = farm.volume(0, "small", "4M");
    says(
        &farm.dst_fails(&format!("create one --alg linear --replicas 2 {}", volumes[0])),
        &["names 1 target", "commas"],
    );
    says(
        &farm.dst_fails(&format!("create one --alg linear --replicas 2 {0},{0}", volumes[0])),
        &[&volumes[0], "is given twice"],
    );
    let words = format!("create one --alg linear --replicas 2 {},{}", volumes[0], volumes[1]);
    let output = farm.try_dst(&words);
    assert!(output.status.success());
    says(&String::from_utf8_lossy(&output.stdout), &["created one: 8M, linear, 1 node of up to 2 replicas"]);
    let (host, _) = farm.servers[0].address.rsplit_once(':').unwrap();
    says(&String::from_utf8_lossy(&output.stderr), &[&format!("node n-0 has two replicas on {host}")]);
    says(&farm.dst("replica list one"), &["NODE", "n-0", "0", &volumes[0], "1", &volumes[1], "in sync", "detached"]);
    says(&farm.dst_fails(&format!("replica add one n-0 {small}")), &[&small, "too small with 4M: the node has 8M"]);
    says(&farm.dst_fails(&format!("replica add one n-8 {}", volumes[2])), &["no node n-8"]);
    says(&farm.dst(&format!("replica add one n-0 {}", volumes[2])), &["added", &volumes[2], "it is filled while"]);
    says(&farm.dst("replica list one"), &[&volumes[2], "syncing, 0 of 8M"]);
    let listed: serde_json::Value = serde_json::from_str(&farm.dst("replica list one --json")).unwrap();
    assert_eq!(
        (listed[0]["replicas"][2]["state"].as_str(), listed[0]["replicas"][2]["synced"].as_u64()),
        (Some("syncing"), Some(0))
    );
    farm.dst("replica remove one n-0 0");
    says(&farm.dst_fails("replica remove one n-0 0"), &["last one that is in sync"]);
    assert!(!farm.dst("status one").contains(&volumes[0]));
    farm.dst(&format!("volume remove {}", volumes[0]));
    farm.dst("remove one");
}
