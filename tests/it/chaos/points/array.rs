//! The array daemon and its records.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{DEATH, MOST, Tally};
use crate::chaos::trap::Trap;
use crate::farm::{Farm, run};

const NAME: &str = "points";
/// What a new daemon needs at most to end what its predecessor had begun.
const SETTLE: Duration = Duration::from_secs(20);

/// The array's state, where its replicas live, and whether the volumes have an owner.
type Picture = (Option<String>, Vec<String>, Vec<bool>);

struct Bed {
    farm: Farm,
    volumes: Vec<String>,
    /// Of no array, but as a second replica.
    spare: String,
}

impl Bed {
    /// Two volumes with data that was written through an array, and one to spare.
    fn new() -> Bed {
        let farm = Farm::new(2);
        let volumes = (0..2).map(|index| farm.volume(index, "v", "1M")).collect();
        let spare = farm.volume(0, "spare", "1M");
        let bed = Bed { farm, volumes, spare };
        bed.create();
        bed.start();
        run("qemu-io", &["-f", "raw", "-c", "write -P 0x5d 0 2M", "-c", "flush", &bed.uri()]);
        bed.leave();
        bed
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///{NAME}?socket={}", self.farm.dir.join(format!("{NAME}.nbd")).display())
    }

    fn words(&self, verb: &str) -> String {
        match verb {
            "create" => format!("create {NAME} --alg striped --chunk 16K {}", self.volumes.join(" ")),
            "start" => format!("start {NAME} --queues 2 --frontend nbd:{}/{NAME}.nbd", self.farm.dir.display()),
            "replica add" => format!("replica add {NAME} n-0 {}", self.spare),
            "replica remove" => format!("replica remove {NAME} n-0 1"),
            verb => format!("{verb} {NAME}"),
        }
    }

    fn create(&self) {
        self.farm.dst(&self.words("create"));
    }

    fn start(&self) {
        self.farm.dst(&self.words("start"));
    }

    fn array(&self) -> Option<Value> {
        let listed: Value = serde_json::from_str(&self.farm.dst("list --json")).unwrap();
        listed["arrays"].as_array().unwrap().iter().find(|array| array["name"] == NAME).cloned()
    }

    fn state(&self) -> Option<String> {
        self.array().map(|array| array["state"].as_str().unwrap().to_owned())
    }

    fn picture(&self) -> Picture {
        let owned = |target: &String| {
            let volume: Value = serde_json::from_str(&self.farm.dst(&format!("volume stat {target} --json"))).unwrap();
            !volume["array"].is_null()
        };
        let array = self.array().unwrap_or_default();
        let nodes = array["nodes"].as_array().into_iter().flatten();
        let replicas = nodes.flat_map(|node| node["replicas"].as_array().into_iter().flatten());
        let targets = replicas.map(|replica| replica["target"].as_str().unwrap().to_owned()).collect();
        let state = array["state"].as_str().map(str::to_owned);
        (state, targets, self.volumes.iter().chain([&self.spare]).map(owned).collect())
    }

    /// Waits until the array is as it is to be in one of two ways.
    fn settled(&self, at: &str, allowed: [&Picture; 2]) -> Picture {
        let until = Instant::now() + SETTLE;
        loop {
            let found = self.picture();
            if allowed.contains(&&found) {
                return found;
            }
            assert!(
                Instant::now() < until,
                "{at}: it stays {found:?}: {}\n{}",
                self.farm.dst("status"),
                self.farm.logs()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn restart(&mut self) {
        self.farm.kill_array();
        self.farm.start_array();
    }

    /// From whatever it is to nothing, through everything that is left to do; its data is there.
    fn leave(&self) {
        if self.state().is_none() {
            self.create();
        }
        if self.picture().1.contains(&self.spare) {
            self.farm.dst(&self.words("replica remove"));
        }
        if self.state().as_deref() == Some("stopped") {
            self.start();
        }
        run("qemu-io", &["-f", "raw", "-c", "read -P 0x5d 0 2M", &self.uri()]);
        self.farm.dst(&self.words("stop"));
        self.farm.dst(&self.words("remove"));
        assert_eq!(self.picture(), (None, vec![], vec![false; 3]));
    }
}

/// Dies before each call of `verb`, after the verbs of `prepare`.
fn survives(verb: &str, prepare: &[&str]) {
    let mut bed = Bed::new();
    let bring = |bed: &Bed| prepare.iter().for_each(|verb| drop(bed.farm.dst(&bed.words(verb))));
    bring(&bed);
    let before = bed.picture();
    bed.farm.dst(&bed.words(verb));
    let after = bed.picture();
    assert_ne!(before, after);
    bed.leave();
    let mut tally = Tally::default();
    for nth in 1..=MOST {
        bring(&bed);
        let trap = Trap::set(bed.farm.array_id(), nth);
        let output = bed.farm.try_dst(&bed.words(verb));
        let answered = output.status.success();
        let patience = if answered { Duration::from_millis(30) } else { DEATH };
        bed.farm.array_process().unwrap().outlives(patience);
        let Some(death) = trap.release() else {
            assert!(answered, "{verb}: {}", String::from_utf8_lossy(&output.stderr));
            break;
        };
        let at = format!("{verb}, killed before call {nth}, {death}");
        bed.restart();
        let found = bed.settled(&at, [&before, &after]);
        assert!(!answered || found == after, "{at}: it was answered, and is undone");
        bed.restart();
        // What is left to do is done in the background: it may not have been at the first look.
        let again = bed.settled(&at, [&before, &after]);
        assert!(again == found || again == after, "{at}: another start took it back");
        tally.count(again == after);
        bed.leave();
    }
    tally.report(&format!("array {verb}"));
}

#[test]
fn the_daemon_dies_while_it_makes_an_array() {
    survives("create", &[]);
}

#[test]
fn the_daemon_dies_while_it_starts_an_array() {
    survives("start", &["create"]);
}

#[test]
fn the_daemon_dies_while_it_stops_an_array() {
    survives("stop", &["create", "start"]);
}

#[test]
fn the_daemon_dies_while_it_removes_an_array() {
    survives("remove", &["create"]);
}

#[test]
fn the_daemon_dies_while_it_adds_a_replica() {
    survives("replica add", &["create"]);
}

#[test]
fn the_daemon_dies_while_it_removes_a_replica() {
    survives("replica remove", &["create", "replica add"]);
}

/// A server that is slow at its disk has the dead daemon's request still in its hands when the next daemon takes it back.
#[test]
fn what_a_dead_daemon_still_has_at_a_slow_server_is_taken_back_too() {
    let mut bed = Bed::new();
    let server = bed.farm.servers[0].process().unwrap().id();
    let mut slow = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", "inject=fsync:delay_enter=700000", "-p", &server.to_string()])
        .spawn()
        .expect("strace: `make setup` installs it");
    std::thread::sleep(Duration::from_millis(500));
    let words = bed.words("create");
    std::thread::scope(|scope| {
        let create = scope.spawn(|| bed.farm.try_dst(&words));
        std::thread::sleep(Duration::from_millis(500));
        kill(Pid::from_raw(bed.farm.array_id().cast_signed()), Signal::SIGKILL).unwrap();
        assert!(!create.join().unwrap().status.success(), "the server was not slow");
    });
    bed.restart();
    let nothing = (None, vec![], vec![false; 3]);
    bed.settled("create at a slow server", [&nothing, &nothing]);
    kill(Pid::from_raw(slow.id().cast_signed()), Signal::SIGINT).unwrap();
    slow.wait().unwrap();
    // What is still to come has come.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(bed.picture(), nothing);
    bed.leave();
}
