//! Scrubs of real arrays that are in use: disks that have changed what they hold are found and put right, and nothing else is reported.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::farm::{self, Farm};
use crate::replicas::{ends_well, fio, in_sync};

const MIB: u64 = 1 << 20;

/// An array over so many servers, a replica of its one node on each, with something in it.
fn filled(servers: usize) -> (Farm, String) {
    let farm = Farm::new(servers);
    let at: Vec<String> = (0..servers).map(|server| farm.volume(server, "a", "24M")).collect();
    farm.dst(&format!("create pair --alg linear --replicas {servers} {}", at.join(",")));
    let uri = farm.start_nbd("pair", "--queues 2");
    in_sync(&farm);
    ends_well(fio(&uri, 2, &["--size=24m"]));
    (farm, uri)
}

/// A server's disk changes what it holds, and says nothing.
fn flip(farm: &Farm, server: usize, region: u64) {
    let file = std::fs::File::options().read(true).write(true).open(farm.servers[server].pool().join("a")).unwrap();
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, region * MIB + 4096).unwrap();
    bytes[7] ^= 1;
    file.write_all_at(&bytes, region * MIB + 4096).unwrap();
    file.sync_all().unwrap();
}

/// What is known of the scrub of the node.
fn kept(farm: &Farm) -> serde_json::Value {
    let json: serde_json::Value = serde_json::from_str(&farm.dst("scrub pair --show --json")).unwrap();
    json[0]["scrub"].clone()
}

fn counts(farm: &Farm) -> [u64; 3] {
    let scrub = kept(farm);
    ["different", "unreadable", "repaired"].map(|name| scrub[name].as_u64().unwrap())
}

fn all_the_same(farm: &Farm) {
    let volume = |server: usize| std::fs::read(farm.servers[server].pool().join("a")).unwrap();
    let first = volume(0);
    for server in 1..farm.servers.len() {
        let differs = first.iter().zip(&volume(server)).position(|(one, other)| one != other);
        assert_eq!(differs, None, "the first byte of server {server} that differs");
    }
}

#[test]
fn what_a_disk_has_changed_is_found_and_put_right_under_writes() {
    let (farm, uri) = filled(2);
    // Half of the array is written all the time.
    let writer = fio(&uri, 12, &["--size=12m"]);
    let said = farm.dst("scrub pair");
    assert!(said.contains("24M of 24M compared") && said.contains("0 region(s) differ"), "{said}");
    for region in [13, 14, 20] {
        flip(&farm, 1, region);
    }
    let said = farm.dst_fails("scrub pair n-0");
    assert!(said.contains("3 region(s) of pair are not the same on all replicas"), "{said}");
    assert_eq!(counts(&farm), [3, 0, 0]);
    let found = kept(&farm)["found"].clone();
    assert_eq!(
        (found[0]["start"].as_u64(), found[0]["sectors"].as_u64()),
        (Some(13 * 2048), Some(2 * 2048)),
        "{found}"
    );
    assert_eq!(found[1]["start"].as_u64(), Some(20 * 2048), "{found}");
    assert!(found[0].get("at_fault").is_none(), "nobody can say which of two is right: {found}");
    let status = farm.dst("status pair");
    assert!(status.contains("n-0: the last scrub has found: 3 region(s) differ"), "{status}");
    let refused = farm.dst_fails("scrub pair --repair");
    assert!(refused.contains("nobody can say which of them is right"), "{refused}");
    let said = farm.dst("scrub pair --repair --from 0");
    assert!(said.contains("3 region(s) differ, 0 cannot be read, 3 put right"), "{said}");
    farm.dst("scrub pair");
    assert_eq!(counts(&farm), [0; 3]);
    ends_well(writer);
    farm.dst("stop pair");
    all_the_same(&farm);
    // The result outlives the array's stop and the daemon.
    assert_eq!(kept(&farm)["state"], "done");
}

#[test]
fn two_of_three_put_the_third_right() {
    let (farm, uri) = filled(3);
    let writer = fio(&uri, 8, &["--size=12m"]);
    flip(&farm, 0, 15);
    flip(&farm, 2, 22);
    let said = farm.dst("scrub pair --repair");
    assert!(said.contains("2 region(s) differ, 0 cannot be read, 2 put right"), "{said}");
    assert!(said.contains("different on replica 0") && said.contains("different on replica 2"), "{said}");
    ends_well(writer);
    farm.dst("stop pair");
    all_the_same(&farm);
}

#[test]
fn what_cannot_be_read_is_told_and_written_anew() {
    let (farm, uri) = filled(2);
    // The file ends before the volume does: what is behind cannot be read.
    let file = std::fs::File::options().write(true).open(farm.servers[1].pool().join("a")).unwrap();
    file.set_len(20 * MIB).unwrap();
    // Reads go on, from the other one, and are counted; nothing is written.
    farm::run("nbdcopy", &[&uri, "null:"]);
    let rescued: u64 = farm.dst("get devices/pair/n-0/replicas/1/rescued_reads").parse().unwrap();
    assert!(rescued > 0 && farm.dst("get devices/pair/n-0/replicas/0/rescued_reads") == "0");
    let status = farm.dst("status pair");
    assert!(
        status.contains(&format!("{rescued} read(s) were refused here and answered by another replica")),
        "{status}"
    );
    let said = farm.dst_fails("scrub pair");
    assert!(said.contains("4 region(s) of pair are not the same"), "{said}");
    let shown = farm.dst("scrub pair --show");
    assert!(shown.contains("unreadable on replica 1"), "{shown}");
    assert_eq!(counts(&farm), [0, 4, 0]);
    farm.dst("scrub pair --repair --from 0");
    assert_eq!(counts(&farm), [0, 4, 4]);
    farm.dst("stop pair");
    all_the_same(&farm);
}

#[test]
fn a_scrub_waits_goes_on_and_ends_when_it_is_asked_to() {
    let (mut farm, _) = filled(2);
    let said = farm.dst_fails("scrub pair --abort");
    assert!(said.contains("node n-0 is not being scrubbed"), "{said}");
    farm.dst("suspend pair n-0 --ttl none");
    farm.dst("scrub pair --detach --rate 4M");
    let said = farm.dst_fails("scrub pair");
    assert!(said.contains("is being scrubbed already"), "{said}");
    let until = Instant::now() + Duration::from_secs(30);
    while kept(&farm)["why"] != "waits: the node is suspended" {
        assert!(Instant::now() < until, "{}", kept(&farm));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(farm.dst("get devices/pair/n-0/scrub"), "running 0 49152 0");
    farm.dst("resume pair n-0");
    while kept(&farm)["compared"].as_u64().unwrap() < 2 * MIB {
        assert!(Instant::now() < until, "{}", kept(&farm));
        std::thread::sleep(Duration::from_millis(50));
    }
    let said = farm.dst("scrub pair --abort");
    assert!(said.contains("n-0: scrub aborted"), "{said}");
    assert!(kept(&farm)["compared"].as_u64().unwrap() < 24 * MIB);
    // One that is under way when the daemon dies was interrupted, and says so.
    farm.dst("set devices/pair/n-0/scrub check");
    farm.dst("scrub pair --abort");
    farm.dst("scrub pair --detach --rate 1M");
    farm.kill_array();
    farm.start_array();
    farm.wait_until_started("pair");
    assert_eq!(kept(&farm)["state"], "interrupted");
    farm.dst("stop pair");
    let said = farm.dst_fails("scrub pair");
    assert!(said.contains("array 'pair' is not started"), "{said}");
}

#[test]
fn a_node_with_one_replica_has_nothing_to_be_compared_with() {
    let farm = Farm::new(1);
    farm.dst(&format!("create pair --alg linear {}", farm.volume(0, "a", "4M")));
    farm.start_nbd("pair", "");
    let said = farm.dst_fails("scrub pair");
    assert!(said.contains("node n-0 has one replica: there is nothing to compare it with"), "{said}");
}
