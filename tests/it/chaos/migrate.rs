//! Nodes that move while processes die at random instants, and a journal says what was acknowledged: nothing of it is lost,
//! whichever process dies in whichever phase, and every migration ends.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::dice::Dice;
use super::journal::{self, Floor, Habits, Journal};
use super::{rounds, seed};
use crate::farm::Farm;

const SERVERS: usize = 3;
const CONNECTIONS: u64 = 3;
const NAME: &str = "moves";
const HABITS: Habits = Habits { flush: 40, durable: 12 };

/// The two homes of each node: server and volume.
const HOMES: [[(usize, &str); 2]; 2] = [[(0, "m0"), (1, "w0")], [(1, "m1"), (2, "w1")]];
const NODES: [&str; 2] = ["n-0", "n-16384"];

fn shown(farm: &Farm) -> serde_json::Value {
    let json: serde_json::Value = serde_json::from_str(&farm.dst(&format!("status {NAME} --json"))).unwrap();
    if json.is_array() { json[0].clone() } else { json }
}

/// The home that a node does not live in now.
fn other_home(farm: &Farm, node: usize) -> String {
    let homes = HOMES[node].map(|(server, name)| format!("{}/{name}", farm.servers[server].address));
    let now = shown(farm)["nodes"][node]["replicas"][0]["target"].as_str().unwrap().to_owned();
    homes.into_iter().find(|home| *home != now).unwrap()
}

fn wait_until_over(farm: &Farm, context: &str) {
    let until = Instant::now() + Duration::from_secs(60);
    while shown(farm)["nodes"].as_array().unwrap().iter().any(|node| node.get("migration").is_some()) {
        assert!(
            Instant::now() < until,
            "{context}: not over\n{}\n{}",
            farm.dst(&format!("status {NAME}")),
            farm.logs()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_processes_die_during_migrations() {
    let (rounds, seed) = (rounds(), seed());
    let mut dice = Dice::new(seed);
    let mut farm = Farm::new(SERVERS);
    for (server, name) in HOMES.into_iter().flatten() {
        farm.volume(server, name, "8M");
    }
    let first = HOMES.map(|homes| format!("{}/{}", farm.servers[homes[0].0].address, homes[0].1));
    farm.dst(&format!("create {NAME} --alg linear {} {}", first[0], first[1]));
    farm.start_nbd(NAME, "--queues 2");
    let path = farm.dir.join(format!("{NAME}.nbd"));
    let journal = Mutex::new(Journal::new(16 << 20));
    let (mut moved, mut killed) = (0, 0);
    for round in 0..rounds {
        let node = dice.index(2);
        let to = other_home(&farm, node);
        // The daemon as often as all servers together.
        let victim = (dice.one_in(4)).then(|| dice.index(2 * SERVERS));
        let context = format!("SEED={seed}, round {round}, {} to {to}, {victim:?} dies", NODES[node]);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writers =
                journal::writers(scope, CONNECTIONS, seed ^ u64::from(round) << 8, HABITS, (&path, &journal, &stop));
            std::thread::sleep(dice.millis(0, 50));
            let rate = ["16M", "0"][dice.index(2)];
            farm.dst(&format!("migrate {NAME} {} --to {to} --rate {rate} --max-freeze 2s --detach", NODES[node]));
            std::thread::sleep(dice.millis(0, if rate == "0" { 150 } else { 900 }));
            match victim {
                Some(server) if server < SERVERS => {
                    farm.servers[server].kill();
                    std::thread::sleep(dice.millis(0, 60));
                    farm.servers[server].start();
                }
                Some(_) => farm.kill_array(),
                None => {}
            }
            let spared = victim.is_none_or(|victim| victim < SERVERS);
            if spared {
                wait_until_over(&farm, &context);
            }
            stop.store(true, Ordering::Relaxed);
            for writer in writers {
                let ended = writer.join().unwrap();
                assert!(ended.is_ok() || !spared, "{context}: {ended:?}\n{}", farm.logs());
            }
            if !spared {
                farm.start_array();
                farm.wait_until_started(NAME);
                wait_until_over(&farm, &context);
            }
        });
        killed += u32::from(victim.is_some());
        moved += u32::from(other_home(&farm, node) != to);
        if let Err(why) = journal.lock().unwrap().verify(&path, Floor::Acknowledged) {
            panic!("{context}: {why}\n{}", farm.logs());
        }
    }
    println!("migrate: SEED={seed}: {rounds} rounds, {killed} with a death, {moved} nodes moved, 0 lost");
    assert!(moved > rounds / 2, "hardly anything has moved");
    farm.dst(&format!("stop {NAME}"));
}
