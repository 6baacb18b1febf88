//! What is left after a server has died: everything that was acknowledged.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dst::errno::Errno;
use dst::wire::frame::Op;

use super::client::{Dir, assign, attach, config, create, named, pattern, start, stat};

/// A server in a process of its own: this test program again, as [`a_server_process`].
pub(super) struct Process {
    child: Child,
    pub(super) address: SocketAddr,
}

const POOL: &str = "DST_TEST_SERVER_POOL";

#[test]
fn a_server_process() {
    if let Some(pool) = std::env::var_os(POOL) {
        dst::roles::server::run(config(Path::new(&pool))).unwrap();
    }
}

impl Process {
    pub(super) fn start(pool: &Path) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["server::survival::a_server_process", "--exact", "--nocapture", "--test-threads=1"])
            .env(POOL, pool)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = lines
            .map(Result::unwrap)
            .find_map(|line| line.split_once("listening on ").map(|(_, address)| address.to_owned()))
            .expect("the server says where it listens");
        Process { child, address: address.parse().unwrap() }
    }
}

impl Process {
    /// A number of each thread, or of the process, from /proc.
    fn status(&self, file: &str, word: &str) -> Vec<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.strip_prefix(word));
        lines.map(|rest| rest.split_whitespace().next().unwrap().parse().unwrap()).collect()
    }

    /// How often its threads have slept.
    fn switches(&self) -> u64 {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let of = |thread: std::fs::DirEntry| format!("task/{}/status", thread.file_name().to_str().unwrap());
        threads.flat_map(|thread| self.status(&of(thread.unwrap()), "voluntary_ctxt_switches:")).sum()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_killed_server_keeps_what_it_acknowledged() {
    let dir = Dir::new();
    let process = Process::start(dir.path());
    for (name, sparse) in [("full", false), ("sparse", true)] {
        create(process.address, name, 8 << 20, sparse);
        assign(process.address, name);
    }
    let mut expected = vec![vec![0; 8 << 20]; 2];
    let mut first = None;
    for (data, name) in expected.iter_mut().zip(["full", "sparse"]) {
        let mut client = attach(process.address, name, (1, 1, 0));
        for round in 0..40u64 {
            let (lba, bytes) = (round * 397 % 16000, 512 * (1 + usize::try_from(round).unwrap() % 16));
            let part = pattern(u8::try_from(round).unwrap(), bytes);
            client.write(lba, &part).unwrap();
            let at = usize::try_from(lba * 512).unwrap();
            data[at..at + bytes].copy_from_slice(&part);
        }
        // In flight when it dies.
        for lba in 0..50 {
            client.send_write(16200 + lba, &pattern(77, 512), false);
        }
        first = Some(client.welcome.instance);
    }
    drop(process);
    let process = Process::start(dir.path());
    for (data, name) in expected.iter().zip(["full", "sparse"]) {
        assert_eq!(stat(process.address, name).array, Some(super::client::array()));
        let mut client = attach(process.address, name, (1, 1, 0));
        assert_ne!(Some(client.welcome.instance), first, "a new life has a new name");
        for lba in (0..16200).step_by(8) {
            let at = usize::try_from(lba * 512).unwrap();
            assert_eq!(client.read(lba, 8).unwrap(), data[at..at + 4096], "{name} at {lba}");
        }
        client.flush().unwrap();
    }
}

/// Small numbers that look random, the same in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn killed_in_the_middle_of_writes_again_and_again() {
    const BLOCKS: usize = 1024;
    let dir = Dir::new();
    let mut dice = Dice(1);
    let mut process = Process::start(dir.path());
    create(process.address, "v", BLOCKS as u64 * 4096, false);
    assign(process.address, "v");
    // What each block was last written with, and with what it was being written when the server died.
    let mut blocks = vec![(0u8, None); BLOCKS];
    for round in 0..6u8 {
        let mut client = attach(process.address, "v", (1, 1, 0));
        let mut open = HashMap::new();
        let mut left = 200 + dice.below(2000);
        while left > 0 {
            if open.len() < 64 {
                let at = usize::try_from(dice.below(BLOCKS as u64)).unwrap();
                if blocks[at].1.is_none() {
                    let value = 1 + u8::try_from(dice.below(255)).unwrap();
                    let asked = client.send_write(at as u64 * 8, &[value; 4096], dice.below(16) == 0);
                    blocks[at].1 = Some(value);
                    open.insert(asked.tag, at);
                }
            } else {
                let (reply, _) = client.receive();
                reply.result().unwrap();
                let at = open.remove(&reply.tag).unwrap();
                blocks[at] = (blocks[at].1.unwrap(), None);
                left -= 1;
            }
        }
        drop(process);
        process = Process::start(dir.path());
        let mut client = attach(process.address, "v", (1, 1, 0));
        let mut seen = Vec::new();
        for (at, (old, new)) in blocks.iter_mut().enumerate() {
            let data = client.read(at as u64 * 8, 8).unwrap();
            for sector in data.chunks(512) {
                let whole = sector.iter().all(|byte| *byte == sector[0]);
                assert!(whole && (sector[0] == *old || Some(sector[0]) == *new), "round {round}, block {at}");
            }
            seen.push(data);
        }
        // What was in flight has landed or never will: nothing of the dead server changes the data any more.
        std::thread::sleep(Duration::from_millis(50));
        for (at, data) in seen.iter().enumerate() {
            assert_eq!(&client.read(at as u64 * 8, 8).unwrap(), data, "round {round}, block {at}");
            if blocks[at].1.is_some() {
                blocks[at] = (7, None);
                client.write(at as u64 * 8, &[7; 4096]).unwrap();
            }
        }
    }
}

#[test]
fn a_server_without_work_does_nothing_and_takes_little() {
    let dir = Dir::new();
    let process = Process::start(dir.path());
    create(process.address, "v", 8 << 20, false);
    assign(process.address, "v");
    // Peers that ask for more than they were promised, and take no answer.
    let greedy: Vec<_> = (0..8u16)
        .map(|channel| {
            let mut client = attach(process.address, "v", (1, 1, channel));
            client.stream.set_nonblocking(true).unwrap();
            for _ in 0..300 {
                let header = client.header(Op::Read, 0, 2048);
                let _ = client.stream.write(&header.encode());
            }
            client
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    let kib: u64 = process.status("status", "VmRSS:").iter().sum();
    let promised = greedy.len() as u64 * u64::from(greedy[0].welcome.bytes_max) / 1024;
    assert!(kib < 2 * promised + (48 << 10), "{kib} KiB");
    let before: u64 = process.switches();
    std::thread::sleep(Duration::from_secs(1));
    let switches = process.switches() - before;
    assert!(switches <= 5, "an idle server woke {switches} times in a second");
}

#[test]
fn a_stopped_server_leaves_a_pool_that_starts_again() {
    let dir = Dir::new();
    for round in 0..5u8 {
        let (server, address) = start(dir.path());
        if round == 0 {
            create(address, "v", 1 << 20, false);
            assign(address, "v");
        }
        let mut client = attach(address, "v", (1, 1, 0));
        if round > 0 {
            assert_eq!(client.read(0, 8).unwrap(), pattern(round - 1, 4096));
        }
        client.write(0, &pattern(round, 4096)).unwrap();
        server.stop();
        assert!(client.is_closed());
    }
}

#[test]
fn a_volume_is_not_served_while_a_former_server_has_it_locked() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    create(address, "v", 1 << 20, false);
    create(address, "free", 1 << 20, false);
    assign(address, "v");
    assign(address, "free");
    // What a killed server's operation in flight looks like: a shared lock on the data.
    let held = std::fs::File::open(dir.path().join("v")).unwrap();
    let lock = nix::fcntl::Flock::lock(held, nix::fcntl::FlockArg::LockSharedNonblock).unwrap();
    let waiting = std::thread::spawn(move || attach(address, "v", (1, 1, 0)).flush());
    attach(address, "free", (1, 1, 0)).flush().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(!waiting.is_finished(), "HELLO waits for the former server");
    assert_eq!(stat(address, "v").connections, 0);
    drop(lock);
    assert_eq!(waiting.join().unwrap(), Ok(()));
    // Now it is ours, for as long as the server lives.
    let other = std::fs::File::open(dir.path().join("v")).unwrap();
    let (_, error) = nix::fcntl::Flock::lock(other, nix::fcntl::FlockArg::LockExclusiveNonblock).unwrap_err();
    assert_eq!(error, nix::errno::Errno::EWOULDBLOCK);
    drop(server);
}

#[test]
fn names_survive_a_remove_and_create() {
    let dir = Dir::new();
    let (_server, address) = start(dir.path());
    let first = create(address, "v", 1 << 20, false);
    assign(address, "v");
    attach(address, "v", (1, 9, 0)).write(0, &pattern(1, 4096)).unwrap();
    while stat(address, "v").connections > 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    super::client::ask::<_, dst::wire::volume::Volume>(address, Op::VolumeRemove, &named("v", true)).unwrap();
    let second = create(address, "v", 1 << 20, false);
    assert_ne!(first.id, second.id);
    assign(address, "v");
    let mut client = attach(address, "v", (1, 1, 0));
    assert_eq!(client.read(0, 8).unwrap(), vec![0; 4096], "a new volume of the same name is new");
    assert_eq!(client.read(1 << 30, 8), Err(Errno::EINVAL));
}
