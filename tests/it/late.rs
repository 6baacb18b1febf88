//! The array daemon dies, and servers with it: the next one serves the nodes that can be served, and the others when they come. Data is
//! compared.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dst::control::why::Why;

use crate::farm::Farm;
use crate::replicas::{ends_well, fio};

const SOON: Duration = Duration::from_secs(40);

fn shown(farm: &Farm) -> serde_json::Value {
    let json: serde_json::Value = serde_json::from_str(&farm.dst("status line --json")).unwrap();
    if json.is_array() { json[0].clone() } else { json }
}

fn wait_until(farm: &Farm, what: &str, so: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    let until = Instant::now() + SOON;
    loop {
        let array = shown(farm);
        if so(&array) {
            return array;
        }
        assert!(Instant::now() < until, "not {what}:\n{}\n{}", farm.dst("status line"), farm.logs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_late(array: &serde_json::Value, node: usize) -> bool {
    array["nodes"][node]["late"].is_string()
}

/// Where nothing is written without a flush at the end: it would wait for the late node, too.
fn begin(uri: &str, commands: &[&str]) -> Child {
    let mut command = Command::new("qemu-io");
    if commands.iter().all(|words| words.starts_with("read")) {
        command.arg("-r");
    }
    command.args(["-f", "raw"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    for words in commands {
        command.args(["-c", words]);
    }
    command.arg(uri).spawn().unwrap()
}

/// What was done, and whether all of it was.
fn end(child: Child) -> Result<(), String> {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let bad = !output.status.success() || said.contains("failed") || said.contains("error");
    if bad { Err(said) } else { Ok(()) }
}

fn qemu(uri: &str, commands: &[&str]) -> Result<(), String> {
    end(begin(uri, commands))
}

/// A linear array of two nodes of 24M on two servers, written.
fn line(farm: &Farm, options: &str) -> String {
    let at = |server: usize| farm.volume(server, "a", "24M");
    farm.dst(&format!("create line --alg linear {} {}", at(0), at(1)));
    let uri = farm.start_nbd("line", options);
    qemu(&uri, &["write -P 17 0 24M", "write -P 34 24M 24M", "flush"]).unwrap();
    uri
}

#[test]
fn the_others_are_served_at_once_and_it_when_its_server_is_back() {
    let mut farm = Farm::new(2);
    let uri = line(&farm, "--queues 2");
    farm.kill_array();
    farm.servers[1].kill();
    for _ in 0..2 {
        farm.start_array();
        farm.wait_until_started("line");
        let array = shown(&farm);
        assert_eq!((is_late(&array, 0), is_late(&array, 1)), (false, true), "{array}");
        qemu(&uri, &["read -P 17 0 24M"]).unwrap();
        // And so does the one after this.
        farm.kill_array();
    }
    farm.start_array();
    farm.wait_until_started("line");
    let address = farm.servers[1].address.clone();
    for words in [farm.dst("status line"), farm.dst_fails("suspend line n-49152")] {
        assert!(words.contains("n-49152") && words.contains("late") && words.contains(&address), "{words}");
    }
    assert_eq!(farm.dst("get devices/line/n-49152/state").trim(), "late");
    ends_well(fio(&uri, 1, &["--size=12m", "--fsync=0"]));
    // One request over both nodes waits for the late one.
    let waiting = begin(&uri, &["write -P 68 24512k 128k", "read -P 68 24512k 128k"]);
    let until = Instant::now() + SOON;
    loop {
        let why: Why = serde_json::from_str(&farm.dst("why line --json")).unwrap();
        if let Some(entry) = why.waiting.iter().find(|entry| entry.node.as_deref() == Some("n-49152")) {
            assert!(entry.waits_for.contains("late") && entry.deadline.ends_with(": ETIMEDOUT"), "{entry:?}");
            break;
        }
        assert!(Instant::now() < until, "nobody waits:\n{}", farm.dst("status line"));
        std::thread::sleep(Duration::from_millis(50));
    }
    let writer = fio(&uri, 4, &["--size=12m"]);
    std::thread::sleep(Duration::from_secs(1));
    farm.servers[1].start();
    let array = wait_until(&farm, "served", |array| !is_late(array, 1));
    assert!(array["why"].is_null(), "{array}");
    end(waiting).unwrap();
    ends_well(writer);
    qemu(&uri, &["read -P 17 12M 11M", "read -P 34 25M 23M", "write -P 85 30M 4M", "flush", "read -P 85 30M 4M"])
        .unwrap();
    farm.dst("suspend line n-49152");
    farm.dst("resume line n-49152");
    farm.dst("stop line");
    let uri = farm.start_nbd("line", "");
    qemu(&uri, &["read -P 34 25M 5M", "read -P 85 30M 4M", "read -P 34 34M 14M"]).unwrap();
}

#[test]
fn what_waits_for_it_ends_after_its_time_and_a_stop_waits_for_nobody() {
    let mut farm = Farm::new(2);
    let uri = line(&farm, "--queues 1 --io-timeout 2s");
    farm.kill_array();
    farm.servers[1].kill();
    farm.start_array();
    farm.wait_until_started("line");
    let begun = Instant::now();
    assert!(qemu(&uri, &["read 30M 4k"]).is_err());
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(qemu(&uri, &["write -P 99 30M 4k"]).is_err());
    qemu(&uri, &["read -P 17 0 24M"]).unwrap();
    // What the dead daemon had written there is not known to be durable.
    assert!(qemu(&uri, &["flush"]).is_err());
    farm.dst("stop line");
    assert!(farm.dst_fails("start line").contains("n-49152"), "who asks is told");
    farm.servers[1].start();
    let uri = farm.start_nbd("line", "");
    // What was not sent before its time was over is not sent later.
    qemu(&uri, &["read -P 34 24M 24M"]).unwrap();
}

#[test]
fn of_two_replicas_the_first_that_comes_is_served_after_a_while_and_the_other_synced() {
    let mut farm = Farm::new(4);
    let at = |server: usize| farm.volume(server, "a", "24M");
    let nodes = [format!("{},{}", at(0), at(1)), format!("{},{}", at(2), at(3))];
    farm.dst(&format!("create line --alg linear --replicas 2 {} {}", nodes[0], nodes[1]));
    let uri = farm.start_nbd("line", "--queues 2");
    let replicas = |array: &serde_json::Value| -> Vec<String> {
        let replicas = array["nodes"].as_array().unwrap().iter().flat_map(|node| node["replicas"].as_array().unwrap());
        replicas.map(|replica| replica["state"].as_str().unwrap().to_owned()).collect()
    };
    let all_in_sync = |array: &serde_json::Value| replicas(array).iter().all(|state| state == "in_sync");
    wait_until(&farm, "in sync", all_in_sync);
    let mut writer = fio(&uri, 30, &["--offset=24m", "--size=24m"]);
    std::thread::sleep(Duration::from_secs(1));
    farm.kill_array();
    let _ = (writer.kill(), writer.wait());
    farm.servers[2].kill();
    farm.servers[3].kill();
    farm.start_array();
    farm.wait_until_started("line");
    assert!(is_late(&shown(&farm), 1));
    ends_well(fio(&uri, 2, &["--size=24m", "--fsync=0"]));
    farm.servers[3].start();
    wait_until(&farm, "served by one", |array| !is_late(array, 1));
    assert_eq!(replicas(&shown(&farm))[2..], ["stale", "in_sync"]);
    ends_well(fio(&uri, 2, &["--offset=24m", "--size=24m"]));
    farm.servers[2].start();
    wait_until(&farm, "in sync again", all_in_sync);
    farm.dst("stop line");
    for pair in [[0, 1], [2, 3]] {
        let [one, other] = pair.map(|server: usize| std::fs::read(farm.servers[server].pool().join("a")).unwrap());
        assert!(one == other, "the replicas on servers {pair:?} differ");
    }
}
