//! The command line of 2007 against real daemons: the diary's own calls.

use std::process::{Command, Output};

use crate::farm::{Farm, binary};

/// Runs `dst` as the diary does; arrays are shown over NBD, because the machine may have no ublk.
fn dst(farm: &Farm, words: &str) -> Output {
    Command::new(binary("dst"))
        .args(words.split_whitespace())
        .env("DST_SOCKET", farm.dir.join("dstd.sock"))
        .env("DST_FRONTEND", format!("nbd:{}", farm.dir.join("storage.nbd").display()))
        .output()
        .unwrap()
}

fn done(farm: &Farm, words: &str) -> String {
    let output = dst(farm, words);
    assert!(output.status.success(), "dst {words}: {}\n{}", String::from_utf8_lossy(&output.stderr), farm.logs());
    String::from_utf8(output.stdout).unwrap()
}

fn refused(farm: &Farm, words: &str, code: i32) -> String {
    let output = dst(farm, words);
    assert_eq!(output.status.code(), Some(code), "dst {words}: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
}

/// The host and port of a server as the diary names it.
fn place(farm: &Farm, server: usize) -> String {
    let (host, port) = farm.servers[server].address.split_once(':').unwrap();
    format!("-a {host} -p {port}")
}

#[test]
fn the_calls_of_the_diary() {
    let farm = Farm::new(2);
    farm.volume(0, "data", "400K");
    farm.volume(1, "data", "400K");
    let (kano, via) = (place(&farm, 0), place(&farm, 1));
    done(&farm, &format!("-n storage -A alg_linear -f /dev/dst {kano}"));
    assert_eq!(farm.dst("get devices/storage/nodes"), "sectors (start [size]): 0 [800]");
    assert_eq!(farm.dst("get devices/storage/state"), "stopped");
    let shown = done(&farm, &format!("-n storage -A alg_linear -f /dev/dst {via} -R"));
    assert!(shown.lines().last().unwrap().starts_with("nbd+unix:"), "{shown}");
    let (kano, via) = (&farm.servers[0].address, &farm.servers[1].address);
    let tree = farm.dst("tree");
    for line in [
        "devices/storage/alg : alg_linear".to_owned(),
        format!("devices/storage/n-800/type : R: {via}"),
        "devices/storage/n-800/size : 800".to_owned(),
        "devices/storage/n-800/start : 800".to_owned(),
        format!("devices/storage/n-0/type : R: {kano}"),
        "devices/storage/n-0/size : 800".to_owned(),
        "devices/storage/n-0/start : 0".to_owned(),
        "devices/storage/remove_all_nodes".to_owned(),
        "devices/storage/nodes : sectors (start [size]): 0 [800] | 800 [800]".to_owned(),
        "devices/storage/name : storage".to_owned(),
        "devices/storage/state : started".to_owned(),
    ] {
        assert!(tree.lines().any(|other| other == line), "{line} is not in\n{tree}");
    }
    done(&farm, "-n storage -A alg_linear -f /dev/dst -D");
    assert!(farm.dst("list").contains("no arrays"));
    assert!(farm.dst(&format!("volume stat {kano}/data --json")).contains("\"array\": null"));
}

#[test]
fn volumes_sizes_and_removal() {
    let farm = Farm::new(2);
    let (kano, via) = (place(&farm, 0), place(&farm, 1));
    let none = refused(&farm, &format!("-n storage -A alg_linear {kano}"), 1);
    assert!(none.contains("has no free volume") && none.contains("dst volume create"), "{none}");
    farm.volume(0, "one", "800K");
    farm.volume(0, "two", "800K");
    farm.volume(1, "data", "800K");
    let several = refused(&farm, &format!("-n storage -A alg_linear {kano}"), 1);
    assert!(several.contains("2 free volumes") && several.contains("one, two"), "{several}");
    let named = kano.replacen(" -p", "/one -p", 1);
    assert!(refused(&farm, &format!("-n storage {named}"), 1).contains("-A says how"));
    let socket = farm.dir.join("dstd.sock");
    done(&farm, &format!("-n storage -A alg_linear {named} -s 0 -S 800 -b 16 -f {}", socket.display()));
    assert!(refused(&farm, &format!("-n storage -A alg_linear {kano} -s 8"), 1).contains("begins at sector 800"));
    assert!(refused(&farm, &format!("-n storage -A alg_linear {via} -S 9999"), 1).contains("a multiple of 4K"));
    done(&farm, &format!("-n storage -A alg_linear {via} -s 800"));
    assert_eq!(farm.dst("get devices/storage/nodes"), "sectors (start [size]): 0 [800] | 800 [1600]");
    let disk = farm.dir.join("disk");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    done(&farm, &format!("-n storage -A alg_linear -d {}", disk.display()));
    assert!(refused(&farm, &format!("-n storage -r {via}"), 1).contains("is not the last one"));
    done(&farm, &format!("-n storage -r -d {}", disk.display()));
    done(&farm, "-n storage -r -s 800");
    assert_eq!(farm.dst("get devices/storage/nodes"), "sectors (start [size]): 0 [800]");
    assert!(refused(&farm, &format!("-n storage -r {via}"), 1).contains("no such node"));
    assert!(refused(&farm, "-n none -D", 1).contains("no array 'none'"));
    let usage = refused(&farm, "-n storage", 2);
    assert!(usage.contains("nothing is to be done") && usage.contains("Usage: dst -n storage_name"), "{usage}");
    assert!(done(&farm, "-n storage -h").starts_with("Usage: dst -n storage_name -A algorithm -b backlog"));
    assert!(done(&farm, "--help").contains("-R <start array> -D <del array> -h <help>"));
}

#[test]
fn each_call_of_a_mirror_adds_a_copy() {
    let farm = Farm::new(3);
    for server in 0..3 {
        farm.volume(server, "data", "1M");
    }
    done(&farm, &format!("-n twin -A alg_mirror {}", place(&farm, 0)));
    done(&farm, &format!("-n twin -A alg_mirror {}", place(&farm, 1)));
    done(&farm, &format!("-n twin -A alg_mirror {} -R", place(&farm, 2)));
    assert_eq!(farm.dst("get devices/twin/nodes"), "sectors (start [size]): 0 [2048]");
    assert!(farm.dst("tree devices/twin/n-0/replicas").contains("devices/twin/n-0/replicas/2/target"));
    farm.dst("stop twin");
    done(&farm, &format!("-n twin -r {}", place(&farm, 1)));
    assert!(!farm.dst("tree devices/twin/n-0/replicas").contains("replicas/2/"));
    assert!(refused(&farm, "-n twin -r -s 0", 1).contains("has 2 copies"));
    done(&farm, "-n twin -D");
}
