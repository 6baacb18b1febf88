//! `dst upgrade`: the daemon goes on as what is installed in its place.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::farm::{Farm, Process, binary, run};

/// Copies a program that is to be run. By a process of its own: one that another test starts meanwhile would have a descriptor of this one
/// that still writes, until it becomes its program, and whoever runs the copy would be told that it is busy.
fn copy_program(to: &Path) {
    run("cp", &[binary("dstd").to_str().unwrap(), to.to_str().unwrap()]);
}

/// An array daemon whose program is a file of its own.
struct Installed {
    process: Process,
    dir: PathBuf,
}

impl Installed {
    fn new(farm: &Farm) -> Installed {
        let dir = farm.dir.join("installed");
        std::fs::create_dir(&dir).unwrap();
        copy_program(&dir.join("dstd"));
        let mut command = Command::new(dir.join("dstd"));
        // Relative, as somebody may have typed it.
        command.args(["array", "--state-dir", "state", "--socket", "dstd.sock", "--tree", "tree"]).current_dir(&dir);
        let process = Process::start(&mut command, &farm.dir.join("installed.log"));
        let until = Instant::now() + Duration::from_secs(30);
        while UnixStream::connect(dir.join("dstd.sock")).is_err() || !dir.join("tree/devices").exists() {
            assert!(Instant::now() < until, "it does not start:\n{}", farm.logs());
            std::thread::sleep(Duration::from_millis(5));
        }
        Installed { process, dir }
    }

    fn try_dst(&self, words: &str) -> Output {
        let socket = self.dir.join("dstd.sock");
        Command::new(binary("dst")).arg("--socket").arg(socket).args(words.split_whitespace()).output().unwrap()
    }

    fn dst(&self, words: &str) -> String {
        let output = self.try_dst(words);
        assert!(output.status.success(), "dst {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    fn dst_fails(&self, words: &str) -> String {
        let output = self.try_dst(words);
        assert_eq!(output.status.code(), Some(1), "dst {words}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }

    /// Puts another program in the place of the one that runs.
    fn install(&self, make: impl FnOnce(&Path)) {
        let new = self.dir.join("dstd.new");
        make(&new);
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(new, self.dir.join("dstd")).unwrap();
    }

    fn runs(&self) -> PathBuf {
        std::fs::read_link(format!("/proc/{}/exe", self.process.id())).unwrap()
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        self.process.kill();
        let _ = nix::mount::umount2(&self.dir.join("tree"), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn the_daemon_goes_on_as_what_is_installed() {
    let farm = Farm::new(1);
    let volume = farm.volume(0, "a", "4M");
    let mut daemon = Installed::new(&farm);
    daemon.dst(&format!("create a --alg linear {volume}"));
    let socket = farm.dir.join("upgraded.nbd");
    let uri = daemon.dst(&format!("start a --frontend nbd:{} --queues 2", socket.display()));
    let id = daemon.process.id();

    // What cannot run does not go on, and what runs does.
    daemon.install(|new| std::fs::write(new, "#!/bin/sh\nexit 1\n").unwrap());
    assert!(daemon.runs().to_string_lossy().ends_with("(deleted)"));
    let error = daemon.dst_fails("upgrade");
    assert!(error.contains("not upgraded") && error.contains("cannot go on"), "{error}");
    assert!(daemon.dst("status a --json").contains("\"started\""));

    // An NBD client is not cut without a word.
    let client = UnixStream::connect(&socket).unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        // Until it has its seat there is none to be cut, and the program is looked at.
        let error = daemon.dst_fails("upgrade");
        if error.contains("1 NBD client(s) of array 'a'") && error.contains("--force") {
            break;
        }
        assert!(error.contains("cannot go on") && Instant::now() < until, "{error}");
    }
    daemon.install(copy_program);
    assert!(daemon.dst_fails("upgrade").contains("NBD client(s)"));

    let told = daemon.dst("upgrade --force");
    assert!(told.starts_with("dstd 0.") && told.ends_with("is served anew") && told.contains(&uri), "{told}");
    assert!(daemon.process.outlives(Duration::ZERO));
    assert_eq!((daemon.process.id(), daemon.runs()), (id, daemon.dir.join("dstd")));
    drop(client);
    assert_eq!(std::fs::read_to_string(daemon.dir.join("tree/devices/a/state")).unwrap(), "started\n");
    assert!(crate::farm::run("nbdinfo", &["--size", &uri]).starts_with("4194304"));

    // Once more, as everything is now: it is no other program than before.
    assert!(daemon.dst("upgrade --force --json").contains("\"upgrades\": 2"));
    daemon.process.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(!daemon.process.outlives(Duration::from_secs(60)), "{}", farm.logs());
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(daemon.dir.to_str().unwrap()), "the tree is still mounted");
}

#[test]
fn two_roles_in_one_are_not_upgraded() {
    let farm = Farm::new(0);
    let mut command = Command::new(binary("dstd"));
    let dir = farm.dir.join("up");
    command.args(["up", "--listen", &crate::farm::free_address(), "--dir"]).arg(&dir);
    let _both = Process::start(&mut command, &farm.dir.join("up.log"));
    let socket = dir.join("dstd.sock");
    let until = Instant::now() + Duration::from_secs(30);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < until, "{}", farm.logs());
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = Command::new(binary("dst")).arg("--socket").arg(&socket).arg("upgrade").output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("start it again"), "{error}");
}
