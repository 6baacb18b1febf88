//! The control tree against real daemons: over the socket, and as files.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::farm::{Farm, free_address};

/// The array of the 2007 diary: two nodes of 800 sectors, end to end.
fn storage(farm: &Farm) {
    let (a, b) = (farm.volume(0, "a", "400K"), farm.volume(1, "b", "400K"));
    farm.dst(&format!("create storage --alg linear {a} {b}"));
}

#[test]
fn the_tree_of_2007_over_the_socket() {
    let farm = Farm::new(2);
    assert_eq!(farm.dst("tree"), "");
    storage(&farm);
    farm.start_nbd("storage", "--queues 2 --depth 64");
    for (path, value) in [
        ("alg", "alg_linear".to_owned()),
        ("name", "storage".to_owned()),
        ("nodes", "sectors (start [size]): 0 [800] | 800 [800]".to_owned()),
        ("n-0/type", format!("R: {}", farm.servers[0].address)),
        ("n-800/type", format!("R: {}", farm.servers[1].address)),
        ("n-800/size", "800".to_owned()),
        ("n-800/start", "800".to_owned()),
        ("state", "started".to_owned()),
        ("size", "1600".to_owned()),
        ("tags_free", "128".to_owned()),
    ] {
        assert_eq!(farm.dst(&format!("get devices/storage/{path}")), value, "{path}");
        assert!(farm.dst("tree").contains(&format!("devices/storage/{path} : {value}\n")), "{path}");
    }
    assert!(farm.dst("tree").contains("\ndevices/storage/remove_all_nodes\n"));
    assert!(farm.dst("tree devices/storage/n-800").starts_with("devices/storage/n-800/type : R: "));
    for (words, says) in [
        ("get devices/storage/remove_all_nodes", "cannot be read"),
        ("get devices/storage", "is a directory"),
        ("get devices/storage/n-8/type", "there is no 'n-8'"),
        ("get devices/none/alg", "there is no 'none'"),
        ("tree devices/none", "there is no 'none'"),
        ("set devices/storage/alg alg_mirror", "only shows what is"),
        ("set devices/storage/remove_all_nodes 1", "is started"),
        ("set devices/storage/remove_all_nodes 2", "is started"),
    ] {
        let error = farm.dst_fails(words);
        assert!(error.contains(says), "{words}: {error}");
    }
    farm.dst("stop storage");
    assert!(farm.dst_fails("set devices/storage/remove_all_nodes 2").contains("write 1"));
    assert_eq!(farm.dst("get devices/storage/device"), "");
    assert_eq!(farm.dst("set devices/storage/remove_all_nodes 1"), "");
    assert!(farm.dst("list").contains("no arrays"));
}

/// One request, and its answer to the end.
fn ask(mut stream: impl Read + Write, path: &str) -> String {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn figures_for_prometheus() {
    let mut farm = Farm::new(2);
    storage(&farm);
    farm.kill_array();
    let address = free_address();
    farm.start_array_with(&["--metrics", &address]);
    farm.start_nbd("storage", "--queues 2 --depth 64");
    let socket = UnixStream::connect(farm.dir.join("dstd.sock")).unwrap();
    for answer in [ask(socket, "/metrics"), ask(TcpStream::connect(&address).unwrap(), "/metrics")] {
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.contains("content-type: text/plain; version=0.0.4"),
            "{answer}"
        );
        for line in [
            "dst_array_started{array=\"storage\"} 1",
            "dst_array_tags_free{array=\"storage\"} 128",
            "dst_node_size_bytes{array=\"storage\",node=\"n-800\"} 409600",
        ] {
            assert!(answer.lines().any(|other| other == line), "{line} is not in {answer}");
        }
    }
    // Arrays cannot be asked for anything there.
    for path in ["/v1/arrays", "/", "/v1/tree"] {
        assert!(ask(TcpStream::connect(&address).unwrap(), path).starts_with("HTTP/1.1 404"), "{path}");
    }
    let output = std::process::Command::new(crate::farm::binary("dstd"))
        .args(["array", "--metrics", "0.0.0.0:1", "--state-dir"])
        .arg(farm.dir.join("other"))
        .arg("--socket")
        .arg(farm.dir.join("other.sock"))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("--danger-cleartext"), "{error}");
}

/// The directory of a control tree, which is not left mounted.
struct Tree(PathBuf);

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

impl Tree {
    /// Restarts the farm's array daemon with a tree.
    fn of(farm: &mut Farm) -> Tree {
        let device = Path::new("/dev/fuse");
        assert!(device.exists() && nix::unistd::geteuid().is_root(), "this test mounts through /dev/fuse, as root");
        let tree = Tree(farm.dir.join("tree"));
        tree.restart(farm);
        tree
    }

    fn restart(&self, farm: &mut Farm) {
        farm.kill_array();
        farm.start_array_with(&["--tree", self.0.to_str().unwrap()]);
        // Its socket is there first.
        let until = Instant::now() + Duration::from_secs(30);
        while std::fs::metadata(self.path("devices")).is_err() {
            assert!(Instant::now() < until, "the tree is not there:\n{}", farm.logs());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    fn get(&self, path: &str) -> Result<String, Errno> {
        std::fs::read_to_string(self.path(path)).map_err(|error| errno(&error))
    }

    /// As a shell does it.
    fn set(&self, path: &str, value: &str) -> Result<(), Errno> {
        let file = File::options().write(true).truncate(true).open(self.path(path));
        file.and_then(|mut file| file.write_all(value.as_bytes())).map_err(|error| errno(&error))
    }

    fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.lines().any(|line| line.split(' ').nth(4) == self.0.to_str())
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap())
}

#[test]
fn the_tree_of_2007_as_files() {
    let mut farm = Farm::new(2);
    storage(&farm);
    let tree = Tree::of(&mut farm);
    let all: dst::control::tree::Entries = serde_json::from_str(&farm.dst("tree --json")).unwrap();
    assert!(all.tree.len() > 30);
    for entry in all.tree {
        let expected = entry.value.map(|value| value + "\n").ok_or(Errno::EPERM);
        assert_eq!(tree.get(&entry.path), expected, "{}", entry.path);
    }
    assert_eq!(tree.get("devices/storage/nodes").unwrap(), "sectors (start [size]): 0 [800] | 800 [800]\n");
    let names = |path: &str| -> Vec<String> {
        let names =
            std::fs::read_dir(tree.path(path)).unwrap().map(|name| name.unwrap().file_name().into_string().unwrap());
        names.collect()
    };
    assert_eq!((names(""), names("devices")), (vec!["devices".to_owned()], vec!["storage".to_owned()]));
    assert!(names("devices/storage").contains(&"n-800".to_owned()));
    let mut part = [0; 4];
    let mut alg = File::open(tree.path("devices/storage/alg")).unwrap();
    alg.read_exact(&mut part).unwrap();
    let mut rest = String::new();
    alg.read_to_string(&mut rest).unwrap();
    assert_eq!((&part, rest.as_str()), (b"alg_", "linear\n"));

    let remove = "devices/storage/remove_all_nodes";
    for (path, value, expected) in [
        ("devices/storage/alg", "alg_mirror\n", Errno::EPERM),
        ("devices/storage/n-8/suspend", "1\n", Errno::ENOENT),
        ("devices/storage/n-800/suspend", "1\n", Errno::EBUSY),
        (remove, "yes\n", Errno::EINVAL),
        (remove, "\u{1f4be}", Errno::EINVAL),
    ] {
        assert_eq!(tree.set(path, value), Err(expected), "{path}");
    }
    assert_eq!(std::fs::write(tree.path("devices/storage/new"), "").map_err(|error| errno(&error)), Err(Errno::ENOSYS));
    farm.start_nbd("storage", "");
    assert_eq!(tree.set(remove, "1\n"), Err(Errno::EBUSY));
    farm.dst("stop storage");
    let mut state = File::open(tree.path("devices/storage/state")).unwrap();
    tree.set(remove, "1\n").unwrap();
    assert!(farm.dst("list").contains("no arrays"));
    assert!(names("devices").is_empty());
    assert_eq!(state.read(&mut part).map_err(|error| errno(&error)), Err(Errno::ENOENT), "it was open");
}

#[test]
fn a_slow_write_stalls_no_reader() {
    let mut farm = Farm::new(2);
    storage(&farm);
    let tree = Tree::of(&mut farm);
    farm.servers[1].process().unwrap().freeze();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| tree.set("devices/storage/remove_all_nodes", "1"));
        let until = Instant::now() + Duration::from_millis(500);
        let mut reads = 0;
        while Instant::now() < until || reads < 100 {
            assert!(!writer.is_finished(), "its server does not answer");
            let begun = Instant::now();
            assert_eq!(tree.get("devices/storage/name").unwrap(), "storage\n");
            assert!(begun.elapsed() < Duration::from_secs(5));
            reads += 1;
        }
        farm.servers[1].process().unwrap().signal(Signal::SIGCONT);
        assert_eq!(writer.join().unwrap(), Ok(()));
    });
    assert!(farm.dst("list").contains("no arrays"));
}

/// What `poll` says of a file within this time.
fn waits(file: &File, milliseconds: u16) -> PollFlags {
    let mut files = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
    poll(&mut files, PollTimeout::from(milliseconds)).unwrap();
    files[0].revents().unwrap()
}

#[test]
fn a_value_can_be_waited_for() {
    let mut farm = Farm::new(2);
    storage(&farm);
    let tree = Tree::of(&mut farm);
    let changed = PollFlags::POLLPRI | PollFlags::POLLERR;
    let mut file = File::open(tree.path("devices/storage/state")).unwrap();
    let mut read = || {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        (text, file.try_clone().unwrap())
    };
    let unread = File::open(tree.path("devices/storage/name")).unwrap();
    assert_eq!(waits(&unread, 0), changed, "nobody has seen it yet");
    let (text, file) = read();
    assert_eq!((text.as_str(), waits(&file, 300)), ("stopped\n", PollFlags::empty()));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| waits(&file, 20_000));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waiting.is_finished());
        farm.start_nbd("storage", "");
        assert_eq!(waiting.join().unwrap(), changed);
    });
    assert_eq!(waits(&file, 0), changed, "until it is read");
    let until = Instant::now() + Duration::from_secs(20);
    while read().0 != "started\n" {
        assert!(Instant::now() < until);
    }
    assert_eq!(waits(&file, 0), PollFlags::empty());
}

#[test]
fn a_dead_tree_is_replaced_and_an_end_takes_it_away() {
    let mut farm = Farm::new(2);
    storage(&farm);
    let tree = Tree::of(&mut farm);
    farm.kill_array();
    assert_eq!(tree.get("devices/storage/name"), Err(Errno::ENOTCONN));
    tree.restart(&mut farm);
    assert_eq!(tree.get("devices/storage/name").unwrap(), "storage\n");
    // Who is in it keeps nobody from ending.
    let inside = File::open(tree.path("devices/storage/name")).unwrap();
    let array = farm.array_process().unwrap();
    array.signal(Signal::SIGTERM);
    assert!(!array.outlives(Duration::from_secs(20)));
    assert!(!tree.is_mounted());
    drop(inside);
    std::fs::create_dir_all(&tree.0).unwrap();
    nix::mount::mount(Some("other"), &tree.0, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
    let output = std::process::Command::new(crate::farm::binary("dstd"))
        .args(["array", "--tree", tree.0.to_str().unwrap(), "--state-dir"])
        .arg(farm.dir.join("state"))
        .arg("--socket")
        .arg(farm.dir.join("dstd.sock"))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("is a mount of something else already"), "{error}");
}

/// Looks until it is so.
fn wait_until(farm: &Farm, what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < until, "{what}:\n{}\n{}", farm.dst("tree"), farm.dst("why storage"));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client that is killed when it is dropped.
struct Client(std::process::Child);

impl Client {
    fn new(uri: &str, what: &str) -> Client {
        let mut command = std::process::Command::new("qemu-io");
        // Without the flush at its end: a flush has to do with every node.
        Client(
            command
                .args(["-t", "unsafe", "-f", "raw", "-c", what, uri])
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap(),
        )
    }

    fn is_done(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// It ends well, and soon.
    fn succeeds(mut self, farm: &Farm, what: &str) {
        wait_until(farm, what, || self.is_done());
        assert!(self.0.wait().unwrap().success(), "{what}");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_node_is_suspended_and_moved_by_what_is_written() {
    let mut farm = Farm::new(3);
    storage(&farm);
    let new = farm.volume(2, "c", "400K");
    let tree = Tree::of(&mut farm);
    let uri = farm.start_nbd("storage", "--queues 1 --depth 16");
    let node = |name: &str| format!("devices/storage/n-800/{name}");
    let shows = |name: &str, value: &str| tree.get(&node(name)) == Ok(format!("{value}\n"));
    wait_until(&farm, "it is not connected", || shows("state", "connected"));
    assert_eq!(tree.set(&node("suspend"), "2\n"), Err(Errno::EINVAL));
    assert_eq!(tree.set(&node("migrate"), "nowhere\n"), Err(Errno::EINVAL));
    tree.set(&node("suspend"), "1 none\n").unwrap();
    // What is shown may be a moment old.
    wait_until(&farm, "it is not frozen", || shows("suspend", "1") && shows("state", "frozen"));
    assert!(shows("parked", "0"), "{}", farm.dst("tree"));
    let mut parked = Client::new(&uri, "write -P 3 500k 64k");
    wait_until(&farm, "nothing is parked", || !shows("parked", "0"));
    Client::new(&uri, "write -P 4 0 64k").succeeds(&farm, "the other node goes on");
    wait_until(&farm, "nobody says why", || {
        let why = farm.dst("why storage");
        why.contains("n-800") && why.contains("the node, suspended by the control tree") && why.contains("'dst resume'")
    });
    assert!(!parked.is_done());
    tree.set(&node("suspend"), "0\n").unwrap();
    parked.succeeds(&farm, "what has waited goes on");
    assert!(shows("suspend", "0") && shows("state", "connected"));

    tree.set(&node("migrate"), &new).unwrap();
    let address = &farm.servers[2].address;
    wait_until(&farm, "it does not move", || shows("type", &format!("R: {address}")) && shows("progress", "none"));
    assert!(shows("migrate", "") && shows("size", "800") && shows("start", "800"));
    Client::new(&uri, "read -P 3 500k 64k").succeeds(&farm, "it has what was written");
}
