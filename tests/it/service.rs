//! dstd as a service: what it tells the service manager, and that a hang is noticed.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::farm::{Farm, Process, binary, free_address};

/// How long something may take that has to happen. Machines are slow at times.
const PATIENCE: Duration = Duration::from_secs(30);
/// The watchdog's time: short, so that several pass in a test.
const WATCHDOG: Duration = Duration::from_millis(200);

/// A service manager's end.
struct Manager {
    name: String,
    socket: UnixDatagram,
}

impl Manager {
    fn new(name: &str) -> Manager {
        let name = format!("dst-manager-{name}-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Manager { name: format!("@{name}"), socket }
    }

    fn environment(&self) -> [(&str, String); 2] {
        [("NOTIFY_SOCKET", self.name.clone()), ("WATCHDOG_USEC", WATCHDOG.as_micros().to_string())]
    }

    /// What is told within `patience`.
    fn hears(&self, patience: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(patience)).unwrap();
        let mut message = [0; 1000];
        let bytes = self.socket.recv(&mut message).ok()?;
        Some(String::from_utf8(message[..bytes].to_vec()).unwrap())
    }

    /// Hears until a message has this line.
    fn waits_for(&self, line: &str) {
        let until = Instant::now() + PATIENCE;
        loop {
            let message = self.hears(PATIENCE).unwrap_or_else(|| panic!("{line} was not told"));
            if message.lines().any(|told| told == line) {
                return;
            }
            assert!(Instant::now() < until, "{line} was not told, but {message}");
        }
    }

    /// Forgets what has been told.
    fn forgets(&self) {
        while self.hears(Duration::from_millis(1)).is_some() {}
    }
}

/// An array daemon under a manager, with one array started.
fn managed(name: &str) -> (Farm, Manager) {
    let mut farm = Farm::new(1);
    farm.kill_array();
    let manager = Manager::new(name);
    let environment = manager.environment();
    let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    farm.start_array_in(&[], &environment);
    manager.waits_for("READY=1");
    let volume = farm.volume(0, "a", "1M");
    farm.dst(&format!("create a --alg linear {volume}"));
    farm.start_nbd("a", "--queues 2");
    (farm, manager)
}

#[test]
fn an_array_daemon_tells_that_it_serves_lives_and_ends() {
    let (mut farm, manager) = managed("array");
    manager.forgets();
    for _ in 0..3 {
        manager.waits_for("WATCHDOG=1");
    }
    farm.array_process().unwrap().signal(Signal::SIGTERM);
    manager.waits_for("STOPPING=1");
    assert!(!farm.array_process().unwrap().outlives(PATIENCE));
}

/// A server that is away is no hang; an I/O thread that does not go round is one, whatever the daemon's other threads do.
#[test]
fn the_watchdog_is_fed_by_what_makes_progress() {
    let (mut farm, manager) = managed("hang");
    farm.servers[0].kill();
    manager.forgets();
    for _ in 0..5 {
        manager.waits_for("WATCHDOG=1");
    }
    let thread = thread_of(farm.array_id(), "io-1-a");
    ptrace::seize(thread, Options::empty()).unwrap();
    ptrace::interrupt(thread).unwrap();
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
    // It may have answered just before it was held, twice: for what was on its way, and for the next time.
    let mut beats = 0;
    let until = Instant::now() + 5 * WATCHDOG;
    while Instant::now() < until {
        beats += usize::from(manager.hears(WATCHDOG).is_some_and(|told| told == "WATCHDOG=1"));
        assert!(beats <= 3, "the watchdog is fed although an I/O thread is held");
        // The owner and the socket go on.
        farm.dst("list");
    }
    ptrace::detach(thread, None).unwrap();
    manager.forgets();
    manager.waits_for("WATCHDOG=1");
}

fn thread_of(process: u32, name: &str) -> Pid {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    let named = |task: &std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap().trim() == name;
    let task = tasks.into_iter().find(named).unwrap_or_else(|| panic!("there is no thread {name}"));
    Pid::from_raw(task.file_name().to_str().unwrap().parse().unwrap())
}

#[test]
fn a_server_tells_that_it_serves_lives_and_ends() {
    let farm = Farm::new(0);
    let manager = Manager::new("server");
    let mut command = Command::new(binary("dstd"));
    command.args(["server", "--listen", &free_address(), "--threads", "2", "--pool"]).arg(farm.dir.join("pool"));
    let mut server = Process::start(command.envs(manager.environment()), &farm.dir.join("server.log"));
    manager.waits_for("READY=1");
    manager.forgets();
    for _ in 0..3 {
        manager.waits_for("WATCHDOG=1");
    }
    server.signal(Signal::SIGTERM);
    manager.waits_for("STOPPING=1");
    assert!(!server.outlives(PATIENCE));
}

#[test]
fn both_in_one_tell_it_too() {
    let farm = Farm::new(0);
    let manager = Manager::new("up");
    let mut command = Command::new(binary("dstd"));
    command.args(["up", "--listen", &free_address(), "--dir"]).arg(farm.dir.join("up"));
    let mut both = Process::start(command.envs(manager.environment()), &farm.dir.join("up.log"));
    manager.waits_for("READY=1");
    manager.waits_for("WATCHDOG=1");
    both.signal(Signal::SIGTERM);
    manager.waits_for("STOPPING=1");
    assert!(!both.outlives(PATIENCE));
}

/// A field of `/proc/PID/status`.
fn status(process: u32, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("there is no {field}")).trim().to_owned()
}

/// Whether this machine, maybe a container, lets root do this; the daemon says so if it does not.
fn is_capable(capability: u32) -> bool {
    u64::from_str_radix(&status(std::process::id(), "CapEff"), 16).unwrap() >> capability & 1 == 1
}

/// Each thread of the daemon may be waited for by a write, and none may wait for writeback.
#[test]
fn every_thread_is_an_io_flusher() {
    const CAP_SYS_RESOURCE: u32 = 24;
    const MEMALLOC_NOIO: u64 = 0x0008_0000;
    const LOCAL_THROTTLE: u64 = 0x0010_0000;
    let farm = Farm::new(2);
    let (a, b) = (farm.volume(0, "a", "4M"), farm.volume(1, "b", "4M"));
    farm.dst(&format!("create a --alg linear --replicas 2 {a},{b}"));
    farm.start_nbd("a", "--queues 2");
    if !is_capable(CAP_SYS_RESOURCE) {
        assert!(farm.logs().contains("PR_SET_IO_FLUSHER is refused"));
        return;
    }
    let mut names = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", farm.array_id())).unwrap().flatten() {
        // It may have ended meanwhile.
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        let (name, rest) = stat.rsplit_once(") ").unwrap();
        let flags: u64 = rest.split(' ').nth(6).unwrap().parse().unwrap();
        assert_eq!(flags & (MEMALLOC_NOIO | LOCAL_THROTTLE), MEMALLOC_NOIO | LOCAL_THROTTLE, "{name} has {flags:#x}");
        names.push(name.split_once('(').unwrap().1.to_owned());
    }
    for name in ["io-0-a", "io-1-a", "keeper-a", "dst-owner", "dst-http"] {
        assert!(names.iter().any(|named| named == name), "no {name} among {names:?}");
    }
}

/// The trap is what is mapped and never used: stacks of 2 MiB and arenas of 64 MiB for each thread.
#[test]
fn a_small_array_locks_little_memory() {
    const CAP_IPC_LOCK: u32 = 14;
    let farm = Farm::new(2);
    let targets: Vec<String> = (0..4).map(|node| farm.volume(node % 2, &format!("v{node}"), "4M")).collect();
    farm.dst(&format!("create a --alg striped {}", targets.join(" ")));
    // An NBD thread has a buffer of 1 MiB for each request.
    farm.start_nbd("a", "--queues 2 --depth 8");
    let locked = status(farm.array_id(), "VmLck");
    let locked: u64 = locked.strip_suffix(" kB").unwrap().trim().parse().unwrap();
    if is_capable(CAP_IPC_LOCK) {
        assert!(locked > 16 << 10, "only {locked} KiB are locked: not even the buffers");
        assert!(locked < 64 << 10, "{locked} KiB are locked");
    } else {
        assert!(locked == 0 && farm.logs().contains("memory is not locked"), "{locked} KiB\n{}", farm.logs());
    }
}

/// A mount that is made later, and taken away at the end.
struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    fn new(path: std::path::PathBuf) -> Tmpfs {
        std::fs::create_dir_all(&path).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("dst-test"), &path, Some("tmpfs"), flags, None::<&str>).unwrap();
        Tmpfs(path)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// It keeps nothing of the host's mounted, and sees what is mounted later all the same.
#[test]
fn the_daemon_has_mounts_of_its_own() {
    let mut farm = Farm::new(0);
    let tree = farm.dir.join("tree");
    farm.kill_array();
    farm.start_array_with(&["--tree", tree.to_str().unwrap()]);
    let process = farm.array_id();
    let namespace = |process: u32| std::fs::read_link(format!("/proc/{process}/ns/mnt")).unwrap();
    // Its socket is there before.
    let until = Instant::now() + PATIENCE;
    let mounts = || std::fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap();
    while namespace(process) == namespace(std::process::id()) || !mounts().is_empty() {
        assert!(Instant::now() < until, "it has mounts:\n{}\n{}", mounts(), farm.logs());
        std::thread::sleep(Duration::from_millis(5));
    }
    for task in std::fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten() {
        let own = std::fs::read_link(task.path().join("ns/mnt")).unwrap();
        assert_eq!(own, namespace(process), "a thread is elsewhere: {:?}", task.path());
    }
    let later = Tmpfs::new(farm.dir.join("later"));
    assert_eq!(mounts(), "", "nothing is mounted there");
    // Both sides of the mount are seen: the tree from here, the file from there.
    let target = later.0.join("file");
    std::fs::File::create(&target).unwrap().set_len(4 << 20).unwrap();
    farm.dst(&format!("create a --alg linear {}", target.display()));
    assert_eq!(std::fs::read_to_string(tree.join("devices/a/name")).unwrap(), "a\n");
    farm.start_nbd("a", "--queues 1");
    farm.dst("stop a");
    // A second daemon at the same place finds a dead tree, and the end of it leaves none.
    farm.kill_array();
    farm.start_array_with(&["--tree", tree.to_str().unwrap()]);
    let until = Instant::now() + PATIENCE;
    while std::fs::read_to_string(tree.join("devices/a/name")).ok().as_deref() != Some("a\n") {
        assert!(Instant::now() < until, "there is no tree:\n{}", farm.logs());
        std::thread::sleep(Duration::from_millis(5));
    }
    farm.array_process().unwrap().signal(Signal::SIGTERM);
    assert!(!farm.array_process().unwrap().outlives(PATIENCE));
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(tree.to_str().unwrap()), "the tree is still mounted");
}
