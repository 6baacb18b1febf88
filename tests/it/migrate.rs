//! Nodes that are suspended, and that move to other servers, while fio writes and verifies: nothing is lost, nothing fails.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::farm::Farm;
use crate::replicas::{ends_well, fio};

/// A linear array of two nodes on two servers, and a volume on each that nobody uses.
fn linear(farm: &Farm) -> String {
    for server in 0..2 {
        farm.volume(server, "spare", "24M");
    }
    let at = |server: usize| farm.volume(server, "a", "24M");
    farm.dst(&format!("create line --alg linear {} {}", at(0), at(1)));
    farm.start_nbd("line", "--queues 2")
}

fn shown(farm: &Farm) -> serde_json::Value {
    let json: serde_json::Value = serde_json::from_str(&farm.dst("status line --json")).unwrap();
    if json.is_array() { json[0].clone() } else { json }
}

fn wait_until(farm: &Farm, what: &str, so: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    let until = Instant::now() + Duration::from_secs(40);
    loop {
        let array = shown(farm);
        if so(&array) {
            return array;
        }
        assert!(Instant::now() < until, "not {what}:\n{}\n{}", farm.dst("status line"), farm.logs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Two writers, each with a node of its own.
fn writers(uri: &str, seconds: u32) -> [Child; 2] {
    [0, 24].map(|offset| fio(uri, seconds, &[&format!("--offset={offset}m"), "--size=24m"]))
}

#[test]
fn requests_of_a_suspended_node_wait_and_those_of_another_go_on() {
    let farm = Farm::new(2);
    let uri = linear(&farm);
    let writers = writers(&uri, 8);
    std::thread::sleep(Duration::from_secs(1));
    farm.dst("suspend line n-0 --ttl none");
    let before = wait_until(&farm, "waiting", |array| array["nodes"][0]["parked"].as_u64().unwrap_or(0) > 0);
    assert_eq!(before["nodes"][0]["gate"], "frozen", "{before}");
    let refused = farm.try_dst("stop line");
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("request(s) wait at suspended nodes"), "{refused}");
    std::thread::sleep(Duration::from_secs(1));
    let after = shown(&farm);
    let writes = |array: &serde_json::Value, node: usize| array["nodes"][node]["counters"]["writes"].as_u64().unwrap();
    assert_eq!(writes(&before, 0), writes(&after, 0), "nothing reaches the node");
    assert!(writes(&after, 1) > writes(&before, 1), "the other one goes on");
    farm.dst("resume line n-0");
    wait_until(&farm, "going on", |array| writes(array, 0) > writes(&after, 0));
    // And with an end.
    farm.dst("suspend line n-49152 --ttl 1s");
    wait_until(&farm, "open again", |array| array["nodes"][1].get("suspend").is_none());
    writers.into_iter().for_each(ends_well);
    farm.dst("stop line");
}

#[test]
fn a_suspend_outlives_the_daemon() {
    let mut farm = Farm::new(2);
    let uri = linear(&farm);
    farm.dst("suspend line n-0 --ttl none");
    farm.kill_array();
    farm.start_array();
    farm.wait_until_started("line");
    let reader = fio(&uri, 2, &["--offset=0", "--size=24m"]);
    let waits = |array: &serde_json::Value| array["nodes"][0]["parked"].as_u64().unwrap_or(0) > 0;
    let array = wait_until(&farm, "waiting", |array| waits(array) && array["nodes"][0]["gate"] == "frozen");
    assert_eq!(array["nodes"][0]["counters"]["writes"], 0, "not one has come through");
    farm.dst("resume line n-0");
    ends_well(reader);
    farm.dst("stop line");
}

/// Moves the first node. On a busy machine a target may be slower than a target may be, and is left: once more, then.
fn migrate(farm: &Farm, target: &str) -> String {
    for _ in 0..4 {
        let output = farm.try_dst(&format!("migrate line n-0 --to {target} --json --max-freeze 5s"));
        if output.status.success() {
            return String::from_utf8(output.stdout).unwrap();
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("failed, or was too slow"), "{said}\n{}", farm.logs());
        std::thread::sleep(Duration::from_secs(1));
    }
    panic!("{target} is too slow every time\n{}", farm.logs());
}

#[test]
fn a_node_moves_back_and_forth_under_writes() {
    let rounds: u32 = std::env::var("MOVES").map_or(20, |rounds| rounds.parse().unwrap());
    let mut farm = Farm::new(2);
    let uri = linear(&farm);
    let writer = fio(&uri, 20 + 2 * rounds, &["--size=48m"]);
    let mut slowest = 0;
    for round in 0..rounds {
        let to = if round % 2 == 0 { (1, "spare") } else { (0, "a") };
        let target = format!("{}/{}", farm.servers[to.0].address, to.1);
        if round % 4 == 3 {
            // One of the two servers dies on the way. The node stays, or has moved; the writer only waits.
            farm.dst(&format!("migrate line n-0 --to {target} --rate 20M --detach"));
            std::thread::sleep(Duration::from_millis(u64::from(round) * 37 % 1200));
            farm.servers[(round / 4 % 2) as usize].kill();
            std::thread::sleep(Duration::from_millis(300));
            farm.servers[(round / 4 % 2) as usize].start();
            wait_until(&farm, "over", |array| array["nodes"][0].get("migration").is_none());
        }
        if shown(&farm)["nodes"][0]["replicas"][0]["target"] == target.as_str() {
            continue;
        }
        let said = migrate(&farm, &target);
        let certificate: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&certificate["state"], &certificate["regions"]), (&"done".into(), &24.into()), "{said}");
        assert!(certificate["root"].as_str().is_some_and(|root| root.len() == 64), "{said}");
        slowest = slowest.max(certificate["freeze_nanos"].as_u64().unwrap());
    }
    ends_well(writer);
    println!("migrate: {rounds} rounds, the longest freeze {} ms", slowest / 1_000_000);
    // Nothing is left behind.
    let until = Instant::now() + Duration::from_secs(20);
    for server in 0..2 {
        loop {
            let list = farm.dst(&format!("volume list {} --json", farm.servers[server].address));
            let volumes: serde_json::Value = serde_json::from_str(&list).unwrap();
            let used = volumes.as_array().unwrap().iter().filter(|volume| !volume["array"].is_null()).count();
            if used == 1 + usize::from(server == 1 && rounds % 2 == 1) || server == 1 && used == 1 {
                break;
            }
            assert!(Instant::now() < until, "{list}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    farm.dst("stop line");
}

#[test]
fn the_old_and_the_new_volume_hold_the_same() {
    let farm = Farm::new(2);
    let uri = linear(&farm);
    ends_well(fio(&uri, 2, &["--size=48m"]));
    farm.dst(&format!("migrate line n-0 --to {}/", farm.servers[1].address));
    let to = shown(&farm)["nodes"][0]["replicas"][0]["target"].as_str().unwrap().to_owned();
    let name = to.rsplit('/').next().unwrap();
    let old = std::fs::read(farm.servers[0].pool().join("a")).unwrap();
    let new = std::fs::read(farm.servers[1].pool().join(name)).unwrap();
    assert!(old.iter().any(|byte| *byte != 0), "nothing was written");
    assert!(old == new);
    let shown = farm.dst("migration show line n-0");
    assert!(shown.contains("verified: 24 regions"), "{shown}");
    let unverified = farm.dst(&format!("migrate line n-0 --to {}/a --no-verify", farm.servers[0].address));
    assert!(unverified.contains("NOT VERIFIED"), "{unverified}");
    farm.dst("stop line");
}

#[test]
fn a_migration_goes_on_where_it_was_when_its_daemon_has_died() {
    let mut farm = Farm::new(3);
    let uri = linear(&farm);
    let target = farm.volume(2, "spare", "24M");
    ends_well(fio(&uri, 2, &["--size=24m"]));
    // 10 s after the first region what was copied is flushed and noted for the second time; all of it would take 20 s.
    farm.dst(&format!("migrate line n-0 --to {target} --rate 1200K --max-freeze 5s --detach"));
    let copied = |array: &serde_json::Value| array["nodes"][0]["migration"]["copied"].as_u64().unwrap_or(0);
    let before = copied(&wait_until(&farm, "half copied", |array| copied(array) > 13 << 20));
    farm.kill_array();
    // Its destination is away: what is written meanwhile, below where the copy was, only the source's region log knows.
    farm.servers[2].kill();
    farm.start_array();
    farm.wait_until_started("line");
    let waits = wait_until(&farm, "waiting", |array| !array["nodes"][0]["migration"]["why"].is_null());
    let kept = copied(&waits);
    assert!(kept > 8 << 20 && kept <= before, "{kept} of {before}: {waits}");
    ends_well(fio(&uri, 2, &["--size=4m"]));
    farm.servers[2].start();
    let resumed = wait_until(&farm, "going on", |array| array["nodes"][0]["migration"]["state"] == "copying");
    assert_eq!(resumed["nodes"][0]["migration"]["resumed"], kept, "{resumed}");
    let writer = fio(&uri, 4, &["--size=24m"]);
    wait_until(&farm, "over", |array| array["nodes"][0].get("migration").is_none());
    ends_well(writer);
    let said = farm.dst("migration show line n-0");
    assert!(said.contains("done") && said.contains("verified: 24 regions"), "{said}");
    assert!(said.contains("was interrupted, and has gone on at"), "{said}");
    farm.dst("stop line");
}

/// Every change of a record of this process takes two seconds from now on.
fn slow_records(process: u32) -> Child {
    let renames = "rename,renameat,renameat2";
    let mut tracer = Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-e", &format!("trace={renames}")])
        .args(["-e", &format!("inject={renames}:delay_enter=2000000"), "-p", &process.to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(tracer.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("attached"), "{line}");
    // It must not stop for want of a reader.
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    tracer
}

/// Whether qemu-img finds no difference.
fn alike(farm: &Farm) -> bool {
    let volumes = [farm.servers[0].pool().join("a"), farm.servers[1].pool().join("spare")];
    let compared = Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).args(volumes).output().unwrap();
    let said = String::from_utf8_lossy(&compared.stdout).into_owned();
    assert!(
        compared.status.code().is_some_and(|code| code <= 1),
        "{said}\n{}",
        String::from_utf8_lossy(&compared.stderr)
    );
    compared.status.success()
}

#[test]
fn at_the_commit_another_program_finds_the_old_and_the_new_volume_alike() {
    let farm = Farm::new(2);
    let uri = linear(&farm);
    let writer = fio(&uri, 15, &["--size=24m"]);
    std::thread::sleep(Duration::from_millis(500));
    assert!(!alike(&farm), "the one has data, the other one none");
    let mut tracer = slow_records(farm.array_id());
    farm.dst(&format!("migrate line n-0 --to {}/spare --max-freeze 5s --detach", farm.servers[1].address));
    let committing = |array: &serde_json::Value| {
        let node = &array["nodes"][0];
        node["migration"]["state"] == "cut_over" && node["parked"].as_u64().unwrap_or(0) > 0
    };
    wait_until(&farm, "at the commit", committing);
    // What is in flight ends, and is flushed, in a fraction of this; the record takes longer.
    std::thread::sleep(Duration::from_millis(700));
    let same = alike(&farm);
    assert!(committing(&shown(&farm)), "it was over before they were compared:\n{}", farm.logs());
    assert!(same, "they differ at the commit");
    // It lets go of the daemon in its own way.
    kill(Pid::from_raw(tracer.id().cast_signed()), Signal::SIGTERM).unwrap();
    tracer.wait().unwrap();
    wait_until(&farm, "over", |array| array["nodes"][0].get("migration").is_none());
    ends_well(writer);
    assert!(!alike(&farm), "the writer went on with the new one alone");
    farm.dst("stop line");
}

#[test]
fn what_cannot_be_moved_is_refused_by_name() {
    let farm = Farm::new(2);
    linear(&farm);
    let small = farm.volume(0, "small", "4M");
    let own = format!("{}/a", farm.servers[0].address);
    for (words, why) in [
        (format!("migrate line n-0 --to {own}"), "lives on"),
        (format!("migrate line n-0 --to {small}"), "too small with 4M: the node has 24M"),
        (format!("migrate line n-0 --to {}/a", farm.servers[1].address), "is in use already"),
        ("migrate line n-8 --to 127.0.0.1:1/".to_owned(), "has no node n-8"),
        ("migrate line n-0 --to 127.0.0.1:1/".to_owned(), "does not answer"),
        ("resume line n-0".to_owned(), "is not suspended"),
        ("migration abort line n-0".to_owned(), "is not moving"),
        (format!("replace line n-0 --to {}/spare", farm.servers[0].address), "is not suspended"),
    ] {
        let said = farm.dst_fails(&words);
        assert!(said.contains(why), "{words}: {said}");
    }
    farm.dst("suspend line n-0");
    let spare = format!("{}/spare", farm.servers[0].address);
    let said = farm.dst_fails(&format!("replace line n-0 --to {spare}"));
    assert!(said.contains("it would be lost"), "{said}");
    farm.dst(&format!("replace line n-0 --to {spare} --force"));
    farm.dst("resume line n-0");
    assert_eq!(shown(&farm)["nodes"][0]["replicas"][0]["target"], spare.as_str());
    farm.dst("stop line");
}
