//! Real processes for tests at host speed: storage servers, an array daemon, the command line. Everything lives in a directory of
//! its own and on loopback, and is gone when the farm is dropped.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a process may take to be ready. Machines are slow at times.
const READY: Duration = Duration::from_secs(30);

/// The daemon's binary, and the command line's beside it.
pub(crate) fn binary(name: &str) -> PathBuf {
    let dstd = PathBuf::from(env!("CARGO_BIN_EXE_dstd"));
    let path = dstd.with_file_name(name);
    assert!(path.exists(), "{} is not built: run `cargo build --workspace` in the same profile first", path.display());
    path
}

/// A process that is killed when it is dropped.
pub(crate) struct Process {
    child: Child,
}

impl Process {
    pub(crate) fn start(command: &mut Command, log: &Path) -> Process {
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let errors = log.try_clone().unwrap();
        let child = command.stdin(Stdio::null()).stdout(log).stderr(errors).spawn().unwrap();
        Process { child }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it runs; it is looked at for as long as `patience` lasts, or until it has ended.
    pub(crate) fn outlives(&mut self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while self.child.try_wait().unwrap().is_none() {
            if Instant::now() > until {
                return true;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// SIGSTOP, and waits until no thread of it runs any more.
    pub(crate) fn freeze(&self) {
        self.signal(nix::sys::signal::Signal::SIGSTOP);
        let stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        let tasks = format!("/proc/{}/task", self.child.id());
        let until = Instant::now() + READY;
        while !std::fs::read_dir(&tasks).unwrap().flatten().all(stopped) {
            assert!(Instant::now() < until, "it does not stop");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL, and wait.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One storage server.
pub(crate) struct Server {
    pub(crate) address: String,
    pool: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl Server {
    /// One with the pool `dir/pool{index}`, not started.
    pub(crate) fn new(dir: &Path, index: usize) -> Server {
        Server::with_pool(dir, index, &dir.join(format!("pool{index}")))
    }

    fn with_pool(dir: &Path, index: usize, pool: &Path) -> Server {
        std::fs::create_dir_all(pool).unwrap();
        let log = dir.join(format!("server{index}.log"));
        Server { address: free_address(), pool: pool.to_owned(), log, process: None }
    }

    /// Its process's id.
    pub(crate) fn process_id(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    /// Its process, if it was started.
    pub(crate) fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    pub(crate) fn kill(&mut self) {
        self.process = None;
    }

    pub(crate) fn start(&mut self) {
        let mut command = Command::new(binary("dstd"));
        command.args(["server", "--listen", &self.address, "--pool"]).arg(&self.pool);
        self.process = Some(Process::start(&mut command, &self.log));
        let address = self.address.clone();
        wait(&format!("server {address}"), &self.log, || TcpStream::connect(&address).is_ok());
    }

    /// Where volumes lie as files.
    pub(crate) fn pool(&self) -> &Path {
        &self.pool
    }
}

/// A further array daemon with a state directory of its own: what another machine would be.
pub(crate) struct Host {
    pub(crate) process: Process,
    socket: PathBuf,
}

impl Host {
    /// Runs `dst` with these words there; it must succeed. What it printed, without the last newline.
    pub(crate) fn dst(&self, words: &str) -> String {
        let output = run_dst(&self.socket, words);
        assert!(output.status.success(), "dst {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Runs `dst` with these words there; it must fail. What it said.
    pub(crate) fn dst_fails(&self, words: &str) -> String {
        let output = run_dst(&self.socket, words);
        assert_eq!(output.status.code(), Some(1), "dst {words}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }
}

fn run_dst(socket: &Path, words: &str) -> Output {
    Command::new(binary("dst")).arg("--socket").arg(socket).args(words.split_whitespace()).output().unwrap()
}

fn array_daemon(state: &Path, socket: &Path, log: &Path, options: &[&str], environment: &[(&str, &str)]) -> Process {
    let mut command = Command::new(binary("dstd"));
    command
        .arg("array")
        .arg("--state-dir")
        .arg(state)
        .arg("--socket")
        .arg(socket)
        .args(options)
        .envs(environment.iter().copied());
    let process = Process::start(&mut command, log);
    wait("dstd array", log, || UnixStream::connect(socket).is_ok());
    process
}

/// See the module's description.
pub(crate) struct Farm {
    pub(crate) dir: PathBuf,
    pub(crate) servers: Vec<Server>,
    array: Option<Process>,
}

impl Farm {
    /// An array daemon and `servers` servers with empty pools.
    pub(crate) fn new(servers: usize) -> Farm {
        let dir = Farm::make_dir();
        let pools: Vec<PathBuf> = (0..servers).map(|index| dir.join(format!("pool{index}"))).collect();
        Farm::with(dir, &pools)
    }

    /// An array daemon, and a server for each of these directories.
    pub(crate) fn with_pools(pools: &[PathBuf]) -> Farm {
        Farm::with(Farm::make_dir(), pools)
    }

    /// The same, with the records and logs below `parent`.
    pub(crate) fn below(parent: &Path, pools: &[PathBuf]) -> Farm {
        Farm::with(Farm::make_dir_below(parent), pools)
    }

    fn make_dir() -> PathBuf {
        Farm::make_dir_below(&std::env::temp_dir())
    }

    fn make_dir_below(parent: &Path) -> PathBuf {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!("dst-farm-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn with(dir: PathBuf, pools: &[PathBuf]) -> Farm {
        let mut farm = Farm { dir, servers: Vec::new(), array: None };
        for (index, pool) in pools.iter().enumerate() {
            let mut server = Server::with_pool(&farm.dir, index, pool);
            server.start();
            farm.servers.push(server);
        }
        farm.start_array();
        farm
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("dstd.sock")
    }

    pub(crate) fn start_array(&mut self) {
        self.start_array_with(&[]);
    }

    /// With these options of `dstd array`, too.
    pub(crate) fn start_array_with(&mut self, options: &[&str]) {
        self.start_array_in(options, &[]);
    }

    /// The same, with these variables in its environment.
    pub(crate) fn start_array_in(&mut self, options: &[&str], environment: &[(&str, &str)]) {
        let (state, log) = (self.dir.join("state"), self.dir.join("array.log"));
        self.array = Some(array_daemon(&state, &self.socket(), &log, options, environment));
    }

    /// Another machine.
    pub(crate) fn host(&self, name: &str) -> Host {
        let socket = self.dir.join(format!("{name}.sock"));
        let process = array_daemon(&self.dir.join(name), &socket, &self.dir.join(format!("{name}.log")), &[], &[]);
        Host { process, socket }
    }

    /// The array daemon's process, if it was started.
    pub(crate) fn array_process(&mut self) -> Option<&mut Process> {
        self.array.as_mut()
    }

    /// The array daemon's process id.
    pub(crate) fn array_id(&self) -> u32 {
        self.array.as_ref().unwrap().id()
    }

    pub(crate) fn kill_array(&mut self) {
        self.array = None;
    }

    /// Runs `dst` with these words, whatever comes of it.
    pub(crate) fn try_dst(&self, words: &str) -> Output {
        run_dst(&self.socket(), words)
    }

    /// Runs `dst` with these words; it must succeed. What it printed, without the last newline.
    pub(crate) fn dst(&self, words: &str) -> String {
        let mut output = self.try_dst(words);
        // The daemon may not have noticed yet that an NBD client has gone.
        let until = Instant::now() + READY;
        while words.starts_with("stop ")
            && String::from_utf8_lossy(&output.stderr).contains("NBD client(s) are connected")
            && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(20));
            output = self.try_dst(words);
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "dst {words}\n{errors}\n{}", self.logs());
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Runs `dst` with these words; it must fail. What it said.
    pub(crate) fn dst_fails(&self, words: &str) -> String {
        let output = self.try_dst(words);
        assert_eq!(output.status.code(), Some(1), "dst {words}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }

    /// Makes a volume of `size` on server `index`; its target.
    pub(crate) fn volume(&self, index: usize, name: &str, size: &str) -> String {
        let target = format!("{}/{name}", self.servers[index].address);
        self.dst(&format!("volume create {target} --size {size}"));
        target
    }

    /// Starts an array over NBD on a unix socket; its URI.
    pub(crate) fn start_nbd(&self, array: &str, options: &str) -> String {
        let socket = self.dir.join(format!("{array}.nbd"));
        let uri = self.dst(&format!("start {array} --frontend nbd:{} {options}", socket.display()));
        assert!(uri.starts_with("nbd+unix:"), "{uri}");
        uri
    }

    /// Waits for an array that comes back with its daemon.
    pub(crate) fn wait_until_started(&self, array: &str) {
        let until = Instant::now() + READY;
        while !self.dst(&format!("status {array} --json")).contains("\"started\"") {
            assert!(
                Instant::now() < until,
                "{array} did not come back:\n{}\n{}",
                self.dst(&format!("status {array}")),
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the processes have logged: the end of it.
    pub(crate) fn logs(&self) -> String {
        let mut all = String::new();
        for entry in std::fs::read_dir(&self.dir).unwrap().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                all.push_str(&format!("--- {}\n{}\n", path.display(), tail(&path)));
            }
        }
        all
    }
}

impl Drop for Farm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        self.array = None;
        self.servers.clear();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// An address that nobody else uses: loopback has sixteen million, this process takes one of its own, and each port of it once, so that a
/// server that was killed finds its own again.
///
/// It is not tried out with a listener: a program that another test starts at that moment has the listener too until it is executed,
/// and would answer in the place of the server.
pub(crate) fn free_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(1024);
    let [_, a, b, c] = std::process::id().to_be_bytes();
    format!("127.{}.{b}.{c}:{}", a + 1, NEXT.fetch_add(1, Ordering::Relaxed))
}

fn wait(what: &str, log: &Path, ready: impl Fn() -> bool) {
    let until = Instant::now() + READY;
    while !ready() {
        assert!(Instant::now() < until, "{what} is not ready:\n{}", tail(log));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a tool; it must succeed. What it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| {
        panic!("{program}: {error}; `make setup` installs what the tests need");
    });
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {}\n{text}\n{errors}", arguments.join(" "));
    text.into_owned()
}
