//! The NBD frontend alone, over a disk in memory: real clients, and clients that do all they can to break it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dst::engine::request::{Request, RequestOp, Tag};
use dst::errno::Errno;
use dst::io::nbd::frontend::NbdFrontend;
use dst::io::nbd::listener::{Bound, Door, Listener, seat};
use dst::io::ring::{Frontend, Owner, Ring};
use dst::limits;
use dst::wire::nbd::export::Export;

const DISK_BYTES: usize = 64 << 20;
const NAME: &str = "arr";

/// What the threads of one served disk share.
struct Disk {
    bytes: Mutex<Vec<u8>>,
    /// While set, nothing is completed.
    held: AtomicBool,
    /// Requests that the threads have taken and not completed.
    in_flight: AtomicUsize,
    /// Threads that end when the listener has.
    stop: AtomicBool,
    flushes: AtomicUsize,
}

/// A disk in memory behind a frontend, for as long as this lives.
struct Served {
    disk: Arc<Disk>,
    listener: Option<Listener>,
    threads: Vec<JoinHandle<()>>,
    path: PathBuf,
}

impl Served {
    fn new(test: &str, threads: usize, depth: usize) -> Served {
        let path = std::env::temp_dir().join(format!("dst-it-{}-{test}.sock", std::process::id()));
        let disk = Arc::new(Disk {
            bytes: Mutex::new(vec![0; DISK_BYTES]),
            held: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            flushes: AtomicUsize::new(0),
        });
        let bound = Bound::new(&path.to_str().unwrap().parse().unwrap()).unwrap();
        let (seats, doors): (Vec<_>, Vec<_>) = (0..threads).map(|_| seat().unwrap()).unzip();
        let threads = doors
            .into_iter()
            .map(|door| {
                let disk = Arc::clone(&disk);
                std::thread::spawn(move || serve(door, depth, &disk))
            })
            .collect();
        Served { disk, listener: Some(bound.start(seats).unwrap()), threads, path }
    }

    fn uri(&self) -> String {
        self.listener.as_ref().unwrap().address().uri(NAME)
    }

    fn client(&self) -> Raw {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Raw(stream)
    }

    /// A client that is ready to send requests.
    fn open(&self) -> Raw {
        let mut client = self.client();
        client.take(18);
        client.give(&3u32.to_be_bytes());
        client.option(7, &[0, 0, 0, 0, 0, 0]);
        while client.option_reply().0 != 1 {}
        client
    }

    /// Whether an honest client is served: every tag must come back for this to pass.
    fn check_alive(&self, depth: usize) {
        let mut client = self.open();
        for cookie in 0..depth as u64 * 2 {
            client.request(0, 0, cookie, 0, 4096);
        }
        let mut seen = vec![false; depth * 2];
        for _ in 0..depth * 2 {
            let (error, cookie) = client.simple_reply();
            assert_eq!(error, 0);
            client.take(4096);
            assert!(!std::mem::replace(&mut seen[usize::try_from(cookie).unwrap()], true), "answered twice");
        }
        client.request(2, 0, 0, 0, 0);
        assert!(client.is_closed());
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.disk.held.store(false, Ordering::SeqCst);
        self.disk.stop.store(true, Ordering::SeqCst);
        drop(self.listener.take());
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking());
        }
        assert!(!self.path.exists() || std::thread::panicking());
    }
}

/// The worker's loop. Completes in another order than it was asked.
fn serve(door: Door, depth: usize, disk: &Disk) {
    let export = Export {
        name: NAME.to_owned(),
        description: "a disk in memory".to_owned(),
        sectors: DISK_BYTES as u64 / 512,
        block_bytes: 512,
        preferred_bytes: 4096,
    };
    let mut frontend = NbdFrontend::new(export, depth, door).unwrap();
    let mut pending: Vec<(Tag, Request)> = Vec::new();
    let mut completions = Vec::new();
    let mut random: usize = 88_172_645;
    while frontend.is_up() || !pending.is_empty() {
        while let Some(request) = frontend.next_request() {
            disk.in_flight.fetch_add(1, Ordering::SeqCst);
            pending.push(request);
            assert!(pending.len() <= depth);
        }
        if !disk.held.load(Ordering::SeqCst) {
            for _ in 0..pending.len().div_ceil(2) {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let (tag, request) = pending.swap_remove((random >> 33) % pending.len());
                let result = execute(disk, &mut frontend, tag, request);
                disk.in_flight.fetch_sub(1, Ordering::SeqCst);
                frontend.complete(tag, result);
            }
        }
        if disk.stop.load(Ordering::SeqCst) {
            frontend.shut_down();
        }
        completions.clear();
        frontend.turn(false, &mut completions).unwrap();
        if completions.is_empty() && (pending.is_empty() || disk.held.load(Ordering::SeqCst)) {
            std::thread::sleep(Duration::from_micros(50));
        }
        for completion in &completions {
            let (owner, value) = Owner::of(completion.user_data).unwrap();
            assert_eq!(owner, Owner::Frontend);
            frontend.handle(value, completion.result);
        }
    }
}

fn execute(disk: &Disk, frontend: &mut NbdFrontend, tag: Tag, request: Request) -> Result<(), Errno> {
    let mut bytes = disk.bytes.lock().unwrap();
    let start = usize::try_from(request.extent.start.bytes()).unwrap();
    let length = usize::try_from(request.extent.bytes()).unwrap();
    let part = &mut bytes[start..start + length];
    // The tag's buffer is the worker's between `next_request` and `complete`.
    #[allow(unsafe_code)]
    let buffer = || {
        assert!(length <= frontend.buffer_bytes());
        // SAFETY: as said above; the length was just checked.
        unsafe { std::slice::from_raw_parts_mut(frontend.buffer(tag), length) }
    };
    match request.op {
        RequestOp::Read => buffer().copy_from_slice(part),
        RequestOp::Write { .. } => part.copy_from_slice(buffer()),
        RequestOp::Discard | RequestOp::WriteZeroes { .. } => part.fill(0),
        RequestOp::Digest => return Err(Errno::EOPNOTSUPP),
        RequestOp::Flush => drop(disk.flushes.fetch_add(1, Ordering::SeqCst)),
    }
    Ok(())
}

/// A client that sends what it likes.
struct Raw(UnixStream);

impl Raw {
    fn give(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn option(&mut self, code: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        self.give(&[b"IHAVEOPT", &code.to_be_bytes()[..], &length.to_be_bytes(), data].concat());
    }

    fn option_reply(&mut self) -> (u32, Vec<u8>) {
        self.take(12);
        let kind = self.u32();
        let length = self.u32() as usize;
        (kind, self.take(length))
    }

    fn request(&mut self, code: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        self.give(&request(code, flags, cookie, offset, length));
    }

    fn simple_reply(&mut self) -> (u32, u64) {
        assert_eq!(self.u32(), 0x6744_6698);
        (self.u32(), u64::from_be_bytes(self.take(8).try_into().unwrap()))
    }

    /// Whether the server has closed the connection, whatever it still had to say.
    fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

fn request(code: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let magic = 0x2560_9513u32.to_be_bytes();
    [
        &magic[..],
        &flags.to_be_bytes(),
        &code.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// Runs a program of the machine, which must succeed; what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error} (`make setup` installs it)"));
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{program} {arguments:?}: {status}\n{out}\n{err}");
    out.into_owned()
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < until, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that repeat only after a long while.
fn pattern(count: usize) -> Vec<u8> {
    (0..count as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

#[test]
fn libnbd_sees_what_the_export_can() {
    let served = Served::new("info", 1, 16);
    for ability in ["connect", "flush", "fua", "multi-conn", "trim", "zero", "cache", "df", "structured-reply"] {
        run("nbdinfo", &["--can", ability, &served.uri()]);
    }
    assert_eq!(run("nbdinfo", &["--size", &served.uri()]).trim(), DISK_BYTES.to_string());
    let listed = run("nbdinfo", &["--list", "--json", &served.uri()]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let export = &listed["exports"][0];
    assert_eq!(export["export-name"], NAME);
    assert_eq!(export["description"], "a disk in memory");
    assert_eq!(export["contexts"][0], "base:allocation");
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["block_size_maximum"], limits::PAYLOAD_BYTES_MAX);
    let map = run("nbdinfo", &["--map", "--json", &served.uri()]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    assert!(map.as_array().unwrap().iter().all(|extent| extent["type"] == 0), "{map}");
    let other = served.uri().replace(NAME, "other");
    assert!(!Command::new("nbdinfo").arg(other).output().unwrap().status.success());
}

#[test]
fn copies_come_back_as_they_went() {
    let served = Served::new("copy", 2, 16);
    let folder = std::env::temp_dir().join(format!("dst-it-{}-copy", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (there, back) = (folder.join("there"), folder.join("back"));
    std::fs::write(&there, pattern(DISK_BYTES)).unwrap();
    let (there, back) = (there.to_str().unwrap(), back.to_str().unwrap());
    run("nbdcopy", &["--flush", there, &served.uri()]);
    assert!(served.disk.flushes.load(Ordering::SeqCst) > 0);
    run("nbdcopy", &[&served.uri(), back]);
    assert!(std::fs::read(there).unwrap() == std::fs::read(back).unwrap());
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", there, &served.uri()]);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", there, &served.uri()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", there, &served.uri()]);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn fio_verifies_every_block() {
    let served = Served::new("fio", 2, 32);
    let uri = format!("--uri={}", served.uri());
    run(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--bsrange=512-1M",
            "--bs_unaligned=0",
            "--blockalign=512",
            "--iodepth=64",
            "--numjobs=4",
            "--size=16M",
            "--offset_increment=16M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--group_reporting",
        ],
    );
}

#[test]
fn each_field_at_its_bounds_leaves_the_server_alive() {
    let served = Served::new("fields", 1, 8);
    // Client flags, then the head of an option.
    for flags in [4u32, 0x8000_0000, u32::MAX] {
        let mut client = served.client();
        client.give(&flags.to_be_bytes());
        assert!(client.is_closed(), "{flags}");
    }
    for length in [limits::NBD_OPTION_BYTES_MAX + 1, u32::MAX] {
        let mut client = served.client();
        client.give(&3u32.to_be_bytes());
        client.give(&[b"IHAVEOPT", &7u32.to_be_bytes()[..], &length.to_be_bytes()].concat());
        assert!(client.is_closed(), "{length}");
    }
    let mut client = served.client();
    client.take(18);
    client.give(&3u32.to_be_bytes());
    // STARTTLS, and a number that no one knows, with as much data as there may be.
    client.option(5, &[]);
    assert_eq!(client.option_reply().0, 0x8000_0001);
    client.option(u32::MAX, &vec![0; limits::NBD_OPTION_BYTES_MAX as usize]);
    assert_eq!(client.option_reply().0, 0x8000_0001);
    // Requests in place of an option.
    client.request(0, 0, 0, 0, 512);
    assert!(client.is_closed());

    let mut client = served.open();
    let end = DISK_BYTES as u64;
    let max = limits::PAYLOAD_BYTES_MAX;
    for (code, flags, offset, length, error) in [
        (0, 0, 0, 0, 22),
        (0, 0, 0, max, 0),
        (0, 0, 0, max + 512, 22),
        (0, 0, 0, u32::MAX, 22),
        (0, 0, end - 512, 512, 0),
        (0, 0, end - 512, 1024, 22),
        (0, 0, u64::MAX, u32::MAX, 22),
        (0, 0, u64::MAX - 511, 512, 22),
        (0, 0, 1, 512, 22),
        (0, 0xffff, 0, 512, 22),
        (3, 0, 0, 0, 0),
        (3, 0, 512, 0, 22),
        (4, 0, 0, 64 << 20, 0),
        (4, 0, 0, (64 << 20) + 512, 22),
        (4, 1, 0, 512, 0),
        (5, 0, 0, 512, 0),
        (5, 0, end, 512, 22),
        (6, 3, 0, 64 << 20, 0),
        (6, 0, 0, u32::MAX - 511, 28),
        // Without the context there is no answer to BLOCK_STATUS.
        (7, 0, 0, 512, 22),
        (8, 0, 0, 512, 22),
        (u16::MAX, 0, 0, 512, 22),
    ] {
        client.request(code, flags, 77, offset, length);
        assert_eq!(client.simple_reply(), (error, 77), "{code} {flags} {offset} {length}");
        if code == 0 && error == 0 {
            client.take(length as usize);
        }
    }
    // What is refused of a write is skipped, and the stream goes on.
    for (offset, length, error) in [
        (end, 512, 28),
        (1, 512, 22),
        (0, 513, 22),
        (0, max, 0),
        (0, max + 512, 22),
        (0, 9 << 20, 22),
        (0, 0, 22),
        (512, 1024, 0),
    ] {
        client.request(1, 1, 5, offset, length);
        client.give(&vec![7; length as usize]);
        assert_eq!(client.simple_reply(), (error, 5), "{offset} {length}");
    }
    assert!(served.disk.bytes.lock().unwrap()[..max as usize].iter().all(|byte| *byte == 7));
    client.request(1, 0, 0, 0, limits::NBD_SKIP_BYTES_MAX + 1);
    assert!(client.is_closed());
    let mut client = served.open();
    client.give(&[0; 28]);
    assert!(client.is_closed());
    served.check_alive(8);
}

#[test]
fn a_stream_cut_anywhere_leaves_the_server_alive() {
    let served = Served::new("cut", 1, 4);
    let mut whole = 3u32.to_be_bytes().to_vec();
    whole.extend_from_slice(&[b"IHAVEOPT", &[0, 0, 0, 7, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0][..]].concat());
    whole.extend_from_slice(&request(0, 0, 1, 0, 4096));
    whole.extend_from_slice(&request(1, 0, 2, 0, 1024));
    whole.extend_from_slice(&[9; 1024]);
    for at in (0..whole.len()).step_by(3) {
        let mut client = served.client();
        client.give(&whole[..at]);
        drop(client);
        // The same cut, but the pieces arrive one by one.
        let mut client = served.client();
        client.give(&whole[..at]);
        if at % 9 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        client.give(&whole[at..]);
        client.request(2, 0, 0, 0, 0);
        assert!(client.is_closed());
    }
    served.check_alive(4);
}

#[test]
fn requests_of_a_dead_client_end_and_their_tags_come_back() {
    const DEPTH: usize = 8;
    let served = Served::new("dead", 1, DEPTH);
    for round in 0..4 {
        served.disk.held.store(true, Ordering::SeqCst);
        let mut client = served.open();
        for cookie in 0..DEPTH as u64 {
            client.request(0, 0, cookie, 0, limits::PAYLOAD_BYTES_MAX);
        }
        wait_until("all tags in use", || served.disk.in_flight.load(Ordering::SeqCst) == DEPTH);
        // More than there are tags, and half a write: not read.
        client.request(0, 0, 99, 0, 4096);
        client.request(1, 0, 99, 0, 4096);
        if round % 2 == 0 {
            drop(client);
            served.disk.held.store(false, Ordering::SeqCst);
        } else {
            // Dies while its answers are being sent.
            served.disk.held.store(false, Ordering::SeqCst);
            client.take(100);
            drop(client);
        }
        wait_until("everything done", || served.disk.in_flight.load(Ordering::SeqCst) == 0);
        served.check_alive(DEPTH);
    }
}

#[test]
fn a_stop_answers_what_is_in_flight() {
    let served = Served::new("stop", 2, 8);
    served.disk.held.store(true, Ordering::SeqCst);
    let (mut busy, mut idle, mut shaking) = (served.open(), served.open(), served.client());
    busy.request(1, 0, 1, 0, 4096);
    busy.give(&[5; 4096]);
    busy.request(0, 0, 2, 8192, 4096);
    wait_until("both taken", || served.disk.in_flight.load(Ordering::SeqCst) == 2);
    served.disk.stop.store(true, Ordering::SeqCst);
    assert!(idle.is_closed());
    assert!(shaking.is_closed());
    served.disk.held.store(false, Ordering::SeqCst);
    let mut cookies = Vec::new();
    for _ in 0..2 {
        let (error, cookie) = busy.simple_reply();
        assert_eq!(error, 0);
        if cookie == 2 {
            busy.take(4096);
        }
        cookies.push(cookie);
    }
    cookies.sort_unstable();
    assert_eq!(cookies, [1, 2]);
    assert!(busy.is_closed());
}

#[test]
fn there_is_a_limit_to_connections() {
    let served = Served::new("many", 1, 4);
    let mut clients: Vec<Raw> = (0..limits::NBD_CONNECTIONS_MAX).map(|_| served.open()).collect();
    assert!(served.client().is_closed(), "one too many");
    // Each of them holds one tag with half a write; the last ones wait.
    clients[0].request(0, 0, 1, 0, 512);
    assert_eq!(clients[0].simple_reply(), (0, 1));
    drop(clients);
    served.check_alive(4);
}

#[test]
fn a_client_that_does_not_finish_its_handshake_is_closed() {
    let served = Served::new("late", 1, 4);
    let mut client = served.client();
    client.take(18);
    client.give(&3u32.to_be_bytes());
    let from = Instant::now();
    assert!(client.is_closed());
    let took = from.elapsed();
    assert!((Duration::from_secs(8)..Duration::from_secs(14)).contains(&took), "{took:?}");
}

#[test]
fn a_client_that_keeps_all_tags_gives_way_to_others() {
    if std::env::var_os("SLOW_TESTS").is_none() {
        return;
    }
    let served = Served::new("greedy", 1, 4);
    let mut greedy = served.open();
    for cookie in 0..16 {
        greedy.request(0, 0, cookie, 0, limits::PAYLOAD_BYTES_MAX);
    }
    let mut other = served.open();
    other.0.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    other.request(0, 0, 1, 0, 512);
    assert_eq!(other.simple_reply(), (0, 1));
}
