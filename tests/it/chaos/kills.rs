//! SIGKILL at random instants, while a journal says what was acknowledged: nothing of it is lost, nothing dead comes back.

use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::dice::Dice;
use super::journal::{self, Floor, Habits, Journal};
use super::{rounds, seed};
use crate::farm::{Farm, run};
use crate::host::array;

const SERVERS: usize = 2;
const CONNECTIONS: u64 = 3;
const NAME: &str = "kills";
const HABITS: Habits = Habits { flush: 40, durable: 12 };

/// Who dies in a round.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Server(usize),
    AllServers,
    Daemon,
    /// Again while it comes back.
    DaemonTwice,
    /// The whole machine's processes, in this order: the daemon, the servers.
    Everybody,
    /// The other order.
    ServersThenDaemon,
}

impl Victim {
    fn draw(dice: &mut Dice) -> Victim {
        match dice.below(10) {
            0..=2 => Victim::Server(dice.index(SERVERS)),
            3 => Victim::AllServers,
            4..=6 => Victim::Daemon,
            7 => Victim::DaemonTwice,
            8 => Victim::Everybody,
            _ => Victim::ServersThenDaemon,
        }
    }

    fn spares_daemon(self) -> bool {
        matches!(self, Victim::Server(_) | Victim::AllServers)
    }

    fn kill(self, farm: &mut Farm, dice: &mut Dice) {
        match self {
            Victim::Server(index) => farm.servers[index].kill(),
            Victim::AllServers => farm.servers.iter_mut().for_each(|server| server.kill()),
            Victim::Daemon | Victim::DaemonTwice => farm.kill_array(),
            Victim::Everybody | Victim::ServersThenDaemon => {
                let servers_first = matches!(self, Victim::ServersThenDaemon);
                if !servers_first {
                    farm.kill_array();
                }
                for server in &mut farm.servers {
                    server.kill();
                    std::thread::sleep(dice.millis(0, 20));
                }
                farm.kill_array();
            }
        }
    }

    fn revive(self, farm: &mut Farm, dice: &mut Dice) {
        std::thread::sleep(dice.millis(0, 60));
        match self {
            Victim::Server(index) => farm.servers[index].start(),
            Victim::AllServers => farm.servers.iter_mut().for_each(|server| server.start()),
            Victim::Daemon => farm.start_array(),
            Victim::DaemonTwice => {
                farm.start_array();
                std::thread::sleep(dice.millis(0, 150));
                farm.kill_array();
                farm.start_array();
            }
            Victim::Everybody | Victim::ServersThenDaemon => {
                // Either may be there first.
                let servers_first = dice.one_in(2);
                if !servers_first {
                    farm.start_array();
                }
                farm.servers.iter_mut().for_each(|server| server.start());
                if servers_first {
                    farm.start_array();
                }
            }
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_processes_die() {
    let (rounds, seed) = (rounds(), seed());
    let mut dice = Dice::new(seed);
    let mut farm = Farm::new(SERVERS);
    let volumes: Vec<String> = (0..SERVERS).map(|index| farm.volume(index, &format!("k{index}"), "8M")).collect();
    farm.dst(&format!("create {NAME} --alg striped --chunk 8K {}", volumes.join(" ")));
    farm.start_nbd(NAME, "--queues 2");
    let path = farm.dir.join(format!("{NAME}.nbd"));
    let journal = Mutex::new(Journal::new(16 << 20));
    let mut slowest = Duration::ZERO;
    for round in 0..rounds {
        let victim = Victim::draw(&mut dice);
        let stop = AtomicBool::new(false);
        let came_back = std::thread::scope(|scope| {
            let writers =
                journal::writers(scope, CONNECTIONS, seed ^ u64::from(round) << 8, HABITS, (&path, &journal, &stop));
            std::thread::sleep(dice.millis(50, 600));
            victim.kill(&mut farm, &mut dice);
            if victim.spares_daemon() {
                victim.revive(&mut farm, &mut dice);
                // The writers never notice more than a pause.
                std::thread::sleep(dice.millis(0, 300));
            }
            stop.store(true, Ordering::Relaxed);
            for writer in writers {
                let ended = writer.join().unwrap();
                let fine = ended.is_ok() || !victim.spares_daemon();
                assert!(fine, "SEED={seed}, round {round}, {victim:?}: {ended:?}\n{}", farm.logs());
            }
            let from = Instant::now();
            if !victim.spares_daemon() {
                victim.revive(&mut farm, &mut dice);
                farm.wait_until_started(NAME);
            }
            from.elapsed()
        });
        slowest = slowest.max(came_back);
        let verdict = journal.lock().unwrap().verify(&path, Floor::Acknowledged);
        if let Err(why) = verdict {
            panic!("SEED={seed}, round {round}, {victim:?}: {why}\n{}", farm.logs());
        }
    }
    let journal = journal.into_inner().unwrap();
    println!(
        "kills: SEED={seed}: {rounds} rounds, {} changes and flushes acknowledged, {} of them flushes, 0 lost; a daemon was back after \
         {} ms at most",
        journal.acknowledged,
        journal.flushes,
        slowest.as_millis()
    );
    assert!(journal.acknowledged > u64::from(rounds) * 100, "hardly anything was written");
    farm.dst(&format!("stop {NAME}"));
}

/// Writes and verifies `area` in the background.
fn fio_in_background(uri: &str, area: [&str; 2], seconds: u32) -> Child {
    Command::new("fio")
        .args([
            "--name=storm",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randrw",
            "--bs=16k",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--verify_fatal=1",
            "--verify_backlog=256",
            "--time_based",
            "--serialize_overlap=1",
            "--fsync=100",
            &format!("--runtime={seconds}"),
        ])
        .args(area)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn servers_killed_under_load_lose_nothing() {
    let mut farm = Farm::new(3);
    let uri = array(&farm, "storm", "striped", &["24M", "24M", "24M"], "--chunk 16K");
    let mut fio = fio_in_background(&uri, ["--offset=0", "--size=100%"], 20);
    for round in 0..8 {
        std::thread::sleep(Duration::from_millis(1300));
        let server = &mut farm.servers[round % 3];
        server.kill();
        std::thread::sleep(Duration::from_millis(if round % 2 == 0 { 0 } else { 600 }));
        server.start();
    }
    let status = fio.wait().unwrap();
    assert!(status.success(), "fio: {status}\n{}", farm.logs());
    let shown = farm.dst("status storm");
    assert!(shown.contains("connected"), "{shown}");
    farm.dst("stop storm");
}

#[test]
fn a_daemon_killed_under_load_comes_back_with_everything_flushed() {
    let mut farm = Farm::new(2);
    let uri = array(&farm, "phoenix", "striped", &["32M", "32M"], "--chunk 8K");
    for round in 0..3 {
        // Written and flushed: it must be there after the kill, whatever else was in flight.
        let pattern = format!("0x{:02x}", 0x31 + round);
        run("qemu-io", &["-f", "raw", "-c", &format!("write -P {pattern} 1M 8M"), "-c", "flush", &uri]);
        let mut fio = fio_in_background(&uri, ["--offset=16m", "--size=40m"], 30);
        std::thread::sleep(Duration::from_millis(700));
        farm.kill_array();
        assert!(!fio.wait().unwrap().success(), "its device is gone");
        farm.start_array();
        farm.wait_until_started("phoenix");
        run("qemu-io", &["-f", "raw", "-c", &format!("read -P {pattern} 1M 8M"), &uri]);
    }
    farm.dst("stop phoenix");
}
