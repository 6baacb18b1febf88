//! The command line against real daemons: every verb, the same data as JSON, and errors that say what, why and what to do next.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::farm::{Farm, free_address};

fn json(farm: &Farm, words: &str) -> Value {
    serde_json::from_str(&farm.dst(&format!("{words} --json"))).unwrap()
}

/// All of `words` are in `text`.
fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_life_of_an_array() {
    let farm = Farm::new(2);
    says(&farm.dst("list"), &["no arrays", "dst create"]);
    let (a, b) = (farm.volume(0, "a", "64M"), farm.volume(1, "b", "32M"));
    says(
        &farm.dst(&format!("create wide --alg striped --chunk 128K {a} {b}")),
        &["created wide: 64M, striped 128K, 2 nodes"],
    );
    let made = json(&farm, "status wide");
    assert_eq!((made["state"].as_str(), made["spec"]["size"].as_u64()), (Some("stopped"), Some(64 << 20)));
    assert_eq!(made["nodes"][1]["name"], "n-256");
    let stat = json(&farm, &format!("volume stat {b}"));
    assert_eq!((stat["array"]["name"].as_str(), stat["array"]["node"].as_str()), (Some("wide"), Some("n-256")));
    says(&farm.dst(&format!("volume list {}", farm.servers[0].address)), &["NAME", "a", "64M", "wide", "n-0"]);

    let uri = farm.start_nbd("wide", "--queues 2 --depth 32 --io-timeout 5s");
    let started = json(&farm, "status wide");
    assert_eq!((started["state"].as_str(), started["device"].as_str()), (Some("started"), Some(uri.as_str())));
    assert_eq!(started["spec"]["run"]["io_timeout"], "5s");
    wait_for("both nodes are connected", || {
        json(&farm, "status wide")["nodes"].as_array().unwrap().iter().all(|node| node["state"] == "connected")
    });
    says(
        &farm.dst("status"),
        &["wide: started as nbd", "epoch 1", "2 queues, depth 32, I/O timeout 5s", &a, "connected"],
    );
    says(&farm.dst("list"), &["wide", "started", "64M", "striped 128K", &uri]);
    let listed = json(&farm, "list");
    assert_eq!(listed["arrays"][0]["name"], "wide");

    assert_eq!(farm.dst("stop wide"), "stopped wide");
    farm.start_nbd("wide", "");
    assert_eq!(json(&farm, "status wide")["spec"]["epoch"], 2);
    farm.dst("stop wide");
    assert_eq!(farm.dst("remove wide"), "removed wide");
    assert!(json(&farm, &format!("volume stat {a}"))["array"].is_null());
    farm.dst(&format!("volume remove {a}"));
    says(&farm.dst_fails(&format!("volume stat {a}")), &[&farm.servers[0].address, "a"]);
}

#[test]
fn a_server_that_does_not_answer_is_named() {
    let mut farm = Farm::new(2);
    let (a, b) = (farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M"));
    let nobody = free_address();
    let error = farm.dst_fails(&format!("create x --alg linear {a} {nobody}/v"));
    says(
        &error,
        &[&format!("target 2 ({nobody}/v)"), "connection refused", "is 'dstd server' running", "nothing was changed"],
    );
    says(
        &farm.dst_fails(&format!("volume list {nobody}")),
        &[&nobody, "connection refused", "is 'dstd server' running"],
    );
    says(
        &farm.dst_fails(&format!("create x --alg linear {a} {}/none", farm.servers[1].address)),
        &["target 2", "none"],
    );
    says(&farm.dst_fails("create x --alg linear no-such-host.invalid/v"), &["no-such-host.invalid", "not known"]);
    assert!(json(&farm, &format!("volume stat {a}"))["array"].is_null(), "nothing is half done");
    says(&farm.dst("list"), &["no arrays"]);

    farm.dst(&format!("create pair --alg linear {a} {b}"));
    let address = farm.servers[1].address.clone();
    farm.servers[1].kill();
    let error = farm.dst_fails("start pair");
    says(&error, &["array 'pair' cannot start: node n-16384", &b, &address, "connection refused"]);
    assert_eq!(json(&farm, "status pair")["state"], "stopped");
    let error = farm.dst_fails("remove pair");
    says(
        &error,
        &["not removed", "node n-16384", &b, "'dst remove pair --force'", &format!("dst volume free {b} --force")],
    );
    let output = farm.try_dst("remove pair --force");
    assert!(output.status.success());
    says(&String::from_utf8_lossy(&output.stderr), &[&format!("{b} stays assigned to 'pair'"), "dst volume free"]);
    farm.servers[1].start();
    let error = farm.dst_fails(&format!("create again --alg linear {a} {b}"));
    says(&error, &["target 2", "in use by array 'pair' (node n-16384)", &format!("dst volume free {b} --force")]);
    farm.dst_fails(&format!("volume free {b}"));
    farm.dst(&format!("volume free {b} --force"));
    farm.dst(&format!("create again --alg linear {a} {b}"));
}

#[test]
fn names_sizes_and_owners_are_checked() {
    let farm = Farm::new(1);
    let (a, b) = (farm.volume(0, "a", "8M"), farm.volume(0, "b", "4K"));
    farm.dst(&format!("create one --alg linear {a}"));
    says(
        &farm.dst_fails(&format!("create one --alg linear {b}")),
        &["there is an array 'one' already", "'dst remove one' first"],
    );
    says(&farm.dst_fails(&format!("create two --alg linear {a}")), &["target 1", "in use by array 'one' (node n-0)"]);
    says(&farm.dst_fails(&format!("create two --alg striped {b}")), &["target 1", "too small with 4K: at least 64K"]);
    says(&farm.dst_fails(&format!("create two --alg linear {b} {b}")), &["given twice"]);
    // The same address, in other words.
    let alias = b.replacen("127.", "0x7f.", 1);
    says(&farm.dst_fails(&format!("create two --alg linear {b} {alias}")), &["same volume as target 1"]);
    says(&farm.dst_fails(&format!("create two --alg linear --chunk 64K {b}")), &["linear array has no chunk"]);
    says(&farm.dst_fails(&format!("create two --alg striped --chunk 96K {b}")), &["power of two"]);
    says(
        &farm.dst_fails(&format!("create two --alg linear {}/gone", farm.dir.display())),
        &["no such file", "create it first"],
    );
    says(&farm.dst_fails("start none"), &["there is no array 'none'", "dst list"]);
    says(&farm.dst_fails(&format!("volume remove {a}")), &["one"]);
    says(&farm.dst_fails("stop one"), &["not started"]);
    farm.start_nbd("one", "");
    says(&farm.dst_fails("start one"), &["started already", "nbd"]);
    says(&farm.dst_fails("remove one"), &["'dst stop one' first"]);
    farm.dst("stop one");
    farm.dst_fails(&format!("volume resize {a} --size 4M"));
    for words in ["", "create", "create a/b --alg linear h/v", "start one --frontend fuse", "frobnicate"] {
        assert_eq!(farm.try_dst(words).status.code(), Some(2), "dst {words}");
    }
    assert!(farm.dst("--version").starts_with("dst "));
}

/// A client that has the export open.
fn nbd_client(path: &std::path::Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    // Fixed newstyle without zeroes; EXPORT_NAME "one".
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x03one").unwrap();
    let mut export = [0; 10];
    stream.read_exact(&mut export).unwrap();
    stream
}

#[test]
fn what_is_in_use_is_not_taken_away() {
    let farm = Farm::new(1);
    let a = farm.volume(0, "a", "8M");
    farm.dst(&format!("create one --alg linear {a}"));
    farm.start_nbd("one", "");
    let client = nbd_client(&farm.dir.join("one.nbd"));
    says(&farm.dst_fails("stop one"), &["'one' is not stopped", "1 NBD client", "--force"]);
    assert_eq!(json(&farm, "status one")["state"], "started");
    farm.dst_fails(&format!("volume remove {a} --force"));
    farm.dst("stop one --force");
    drop(client);
    says(&farm.dst_fails("start one --frontend nbd:0.0.0.0:0"), &["unencrypted", "unix socket", "--danger-cleartext"]);
    farm.dst("remove one");

    // A block device needs a module that most test machines do not have.
    if !std::path::Path::new("/dev/ublk-control").exists() {
        farm.dst(&format!("create two --alg linear {a}"));
        says(&farm.dst_fails("start two"), &["array 'two' cannot start", "ublk"]);
        assert_eq!(json(&farm, "status two")["state"], "stopped");
    }
}

#[test]
fn who_may_not_is_told() {
    let farm = Farm::new(0);
    let nowhere = farm.dir.join("none.sock");
    let dst = |socket: &std::path::Path, uid: Option<u32>| {
        let mut command = Command::new(crate::farm::binary("dst"));
        command.arg("--socket").arg(socket).arg("list").current_dir("/");
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        command.output()
    };
    let output = dst(&nowhere, None).unwrap();
    says(&String::from_utf8_lossy(&output.stderr), &["there is no dstd at", "none.sock", "'dstd array'", "--socket"]);
    // As somebody else, where this test may become somebody else and the binary is theirs to run.
    if let Ok(output) = dst(&farm.dir.join("dstd.sock"), Some(65534)) {
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        says(&error, &["no permission", "dstd.sock", "run dst as root"]);
    }
    // A second daemon on the same directory or socket.
    let second = |state: &str, socket: &str| {
        let mut command = Command::new(crate::farm::binary("dstd"));
        command.arg("array").arg("--state-dir").arg(farm.dir.join(state));
        let output = command.arg("--socket").arg(farm.dir.join(socket)).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    says(&second("state", "other.sock"), &["in use by another dstd", "--state-dir"]);
    says(&second("other", "dstd.sock"), &["another dstd serves", "--socket"]);
}

#[test]
fn a_corrupt_record_is_named_and_nothing_else_suffers() {
    let mut farm = Farm::new(1);
    let (a, b) = (farm.volume(0, "a", "8M"), farm.volume(0, "b", "8M"));
    farm.dst(&format!("create bad --alg linear {a}"));
    farm.dst(&format!("create good --alg linear {b}"));
    farm.kill_array();
    let path = farm.dir.join("state/arrays/bad.json");
    let record = std::fs::File::options().write(true).open(&path).unwrap();
    record.write_all_at(b"#", 60).unwrap();
    farm.start_array();
    let words = ["bad.json is damaged", "checksum", "Put a good copy in its place"];
    says(&farm.dst_fails("start bad"), &words);
    says(&farm.dst_fails(&format!("create bad --alg linear {a}")), &words);
    says(&farm.dst("list"), &["bad", "corrupt", "bad.json is damaged"]);
    farm.start_nbd("good", "");
    farm.dst("stop good");
}

#[test]
fn what_was_started_comes_back_when_its_servers_do() {
    let mut farm = Farm::new(2);
    let (a, b) = (farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M"));
    farm.dst(&format!("create pair --alg linear {a} {b}"));
    let uri = farm.start_nbd("pair", "--queues 1 --depth 16");
    farm.kill_array();
    farm.servers.iter_mut().for_each(crate::farm::Server::kill);
    farm.start_array();
    let address = farm.servers[0].address.clone();
    let reason = format!("{address} does not answer: connection refused");
    wait_for("the reason is shown", || farm.dst("status pair").contains(&reason));
    says(
        &farm.dst("status pair"),
        &["pair: starting", "waiting for", "node n-0", &a, "connection refused", "(and 1 more node)"],
    );
    says(&farm.dst_fails("start pair"), &["in the background", "'dst stop pair'"]);
    farm.servers.iter_mut().for_each(crate::farm::Server::start);
    wait_for("it has come back", || json(&farm, "status pair")["state"] == "started");
    let back = json(&farm, "status pair");
    assert_eq!((back["device"].as_str(), back["spec"]["run"]["depth"].as_u64()), (Some(uri.as_str()), Some(16)));
    farm.dst("stop pair");
    farm.kill_array();
    farm.start_array();
    assert_eq!(json(&farm, "status pair")["state"], "stopped");
}

#[test]
fn local_targets_know_their_array() {
    let farm = Farm::new(0);
    let path = farm.dir.join("disk");
    std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    let path = path.to_str().unwrap();
    farm.dst(&format!("create one --alg linear {path}"));
    let error = farm.dst_fails(&format!("create two --alg linear {path}"));
    says(&error, &["in use by array 'one'", &format!("dst volume free {path} --force")]);
    says(&farm.dst_fails(&format!("volume free {path}")), &["node n-0 of array 'one'", "--force"]);
    farm.start_nbd("one", "");
    wait_for("it is connected", || json(&farm, "status one")["nodes"][0]["state"] == "connected");
    farm.dst("stop one");
    farm.dst("remove one");
    farm.dst(&format!("create two --alg linear {path}"));
    std::fs::File::options().write(true).open(path).unwrap().set_len(8 << 20).unwrap();
    says(&farm.dst_fails("start two"), &["node n-0", "too small", "has 8M", "uses 16M"]);
    farm.dst(&format!("volume free {path} --force"));
    says(&farm.dst_fails("start two"), &["not assigned to this array any more"]);
}

#[test]
fn one_process_is_enough() {
    let dir = std::env::temp_dir().join(format!("dst-up-{}", std::process::id()));
    let address = free_address();
    let mut command = Command::new(crate::farm::binary("dstd"));
    command.arg("up").arg("--dir").arg(&dir).args(["--listen", &address]);
    let mut child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let socket = dir.join("dstd.sock");
    wait_for("dstd up", || UnixStream::connect(&socket).is_ok());
    let dst = |words: &str| {
        let mut command = Command::new(crate::farm::binary("dst"));
        command.env("DST_SOCKET", &socket).args(words.split(' '));
        let output = command.output().unwrap();
        assert!(output.status.success(), "dst {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    dst(&format!("volume create {address}/a --size 8M --sparse"));
    dst(&format!("create one --alg linear {address}/a"));
    let nbd = dir.join("one.nbd");
    dst(&format!("start one --frontend nbd:{}", nbd.display()));
    drop(nbd_client(&nbd));
    // It ends by itself when it is asked to, with an array started, and tells what to type while it runs.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
    let mut printed = String::new();
    child.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    says(&printed, &[&format!("export DST_SOCKET={}", socket.display()), &address]);
    assert!(!socket.exists());
    std::fs::remove_dir_all(&dir).unwrap();
}
