//! Who is compared: our processes and those of others, each with a copy of the same data.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::farm::{Farm, Process, free_address, run};
use crate::load::Dialect;

/// Bytes of each export.
pub(crate) const EXPORT_BYTES: u64 = 256 << 20;

/// How a server is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By a unix socket: fio, nbdcopy.
    Unix,
    /// By TCP on loopback: the load generator.
    Tcp,
}

/// A server that is ready.
pub(crate) struct Contestant {
    pub(crate) name: &'static str,
    /// Of NBD servers.
    pub(crate) uri: String,
    /// With [`Way::Tcp`].
    pub(crate) address: String,
    pub(crate) dialect: Dialect,
    pub(crate) volume: String,
    /// Whose CPU time is the server's.
    pub(crate) processes: Vec<u32>,
    /// Held for as long as it is compared.
    _process: Option<Process>,
}

impl Contestant {
    /// The same under another name.
    pub(crate) fn named(self, name: &'static str) -> Contestant {
        Contestant { name, ..self }
    }
}

/// A directory for data, gone with the value.
pub(crate) struct Ground {
    pub(crate) dir: PathBuf,
}

impl Ground {
    pub(crate) fn new(below: &Path) -> Ground {
        let dir = below.join(format!("dst-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Ground { dir }
    }

    /// A file full of data, the same each time.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        let mut block = vec![0u8; 1 << 20];
        let mut file = std::fs::File::create(&path).unwrap();
        for number in 0..EXPORT_BYTES >> 20 {
            let mut state = number + 1;
            for word in block.chunks_exact_mut(8) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                word.copy_from_slice(&(state >> 8).to_be_bytes());
            }
            std::io::Write::write_all(&mut file, &block).unwrap();
        }
        file.sync_all().unwrap();
        path
    }

    fn start(&self, name: &'static str, mut command: Command, way: Way, at: &str) -> Contestant {
        let log = self.dir.join(format!("{name}-{way:?}.log"));
        let process = Process::start(&mut command, &log);
        let until = Instant::now() + Duration::from_secs(10);
        let ready = || match way {
            Way::Unix => UnixStream::connect(at).is_ok(),
            Way::Tcp => TcpStream::connect(at).is_ok(),
        };
        while !ready() {
            let log = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(Instant::now() < until, "{name} is not ready: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
        let uri = if way == Way::Unix { format!("nbd+unix:///?socket={at}") } else { format!("nbd://{at}") };
        Contestant {
            name,
            uri,
            address: at.to_owned(),
            dialect: Dialect::Nbd,
            volume: String::new(),
            processes: vec![process.id()],
            _process: Some(process),
        }
    }

    /// Where the next server listens.
    fn place(&self, name: &str, way: Way) -> String {
        match way {
            Way::Unix => self.dir.join(format!("{name}.sock")).to_str().unwrap().to_owned(),
            Way::Tcp => free_address(),
        }
    }

    pub(crate) fn nbdkit(&self, name: &'static str, way: Way, plugin: &[&str]) -> Contestant {
        let at = self.place(&name.replace(' ', "-"), way);
        let mut command = Command::new("nbdkit");
        command.args(["-f", "--exit-with-parent"]);
        match at.rsplit_once(':').filter(|_| way == Way::Tcp) {
            Some((host, port)) => command.args(["-i", host, "-p", port]),
            None => command.args(["-U", &at]),
        };
        command.args(plugin);
        self.start(name, command, way, &at)
    }

    pub(crate) fn qemu(&self, name: &'static str, way: Way, file: &Path, cache: &str) -> Contestant {
        let at = self.place(&name.replace(' ', "-"), way);
        let mut command = Command::new("qemu-nbd");
        command.args(["-f", "raw", "--aio=io_uring", "-t", "-e", "8", &format!("--cache={cache}")]);
        match at.rsplit_once(':').filter(|_| way == Way::Tcp) {
            Some((host, port)) => command.args(["-b", host, "-p", port]),
            None => command.args(["-k", &at]),
        };
        command.arg(file);
        self.start(name, command, way, &at)
    }

    /// The server that does nothing: this program again.
    pub(crate) fn null(&self, way: Way) -> Contestant {
        let (tcp, unix) = (free_address(), self.place(&format!("null-{way:?}"), Way::Unix));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["null", &tcp, &unix]);
        let at = if way == Way::Tcp { tcp } else { unix };
        self.start("nothing", command, way, &at)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// An array of ours, started over NBD.
pub(crate) fn array(
    farm: &Farm,
    name: &'static str,
    way: Way,
    alg: &str,
    targets: &[String],
    servers: bool,
) -> Contestant {
    // A name of people's may have blanks in it.
    let label: String = name.chars().filter(char::is_ascii_alphanumeric).collect::<String>() + &format!("{way:?}");
    farm.dst(&format!("create {label} --alg {alg} {}", targets.join(" ")));
    let at = match way {
        Way::Unix => farm.dir.join(format!("{label}.nbd")).to_str().unwrap().to_owned(),
        Way::Tcp => free_address(),
    };
    let uri = farm.dst(&format!("start {label} --frontend nbd:{at}"));
    let mut processes = vec![farm.array_id()];
    if servers {
        processes.extend(farm.servers.iter().map(|server| server.process_id()));
    }
    Contestant { name, uri, address: at, dialect: Dialect::Nbd, volume: String::new(), processes, _process: None }
}

/// One of our servers, to be spoken to in our protocol.
pub(crate) fn server(farm: &Farm, name: &'static str, volume: &str) -> Contestant {
    let address = farm.servers[0].address.clone();
    crate::load::make_volume(&address, volume, EXPORT_BYTES);
    let processes = vec![farm.servers[0].process_id()];
    let volume = volume.to_owned();
    Contestant { name, uri: String::new(), address, dialect: Dialect::Dst, volume, processes, _process: None }
}

/// Copies the data of a file to an export.
pub(crate) fn fill(from: &Path, to: &Contestant) {
    run("nbdcopy", &["--no-extents", "--destination-is-zero", from.to_str().unwrap(), &to.uri]);
}
