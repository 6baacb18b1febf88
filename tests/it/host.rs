//! Whole arrays at host speed, through the NBD frontend and real tools: what was written is what is read, whatever the layout.
//! `chaos` has the same arrays while processes die.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::farm::{Farm, run};

/// Four jobs of 64 requests in flight write and verify their own quarter of the device, 512 B to 1 MiB at random places.
fn fio_verify(uri: &str, megabytes_per_job: u32, seconds_max: u32) {
    let size = format!("--size={megabytes_per_job}m");
    let step = format!("--offset_increment={megabytes_per_job}m");
    let limit = format!("--runtime={seconds_max}");
    run(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randwrite",
            "--bsrange=512-1m",
            "--ba=512",
            "--iodepth=64",
            "--numjobs=4",
            "--thread",
            "--group_reporting",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--verify_fatal=1",
            "--do_verify=1",
            "--fsync=200",
            "--randrepeat=0",
            &size,
            &step,
            &limit,
        ],
    );
}

pub(crate) fn array(farm: &Farm, name: &str, alg: &str, sizes: &[&str], options: &str) -> String {
    let servers = farm.servers.len();
    let volumes: Vec<String> = sizes
        .iter()
        .enumerate()
        .map(|(index, size)| farm.volume(index % servers, &format!("{name}{index}"), size))
        .collect();
    farm.dst(&format!("create {name} --alg {alg} {options} {}", volumes.join(" ")));
    farm.start_nbd(name, "--queues 2")
}

#[test]
fn fio_verifies_one_to_eight_nodes() {
    let farm = Farm::new(3);
    let shapes: [(&str, &str, &[&str], &str); 5] = [
        ("one", "linear", &["260M"], ""),
        ("two", "striped", &["130M", "130M"], "--chunk 4K"),
        ("three", "linear", &["100M", "4K", "161M"], ""),
        ("five", "striped", &["56M", "60M", "52M", "64M", "52M"], "--chunk 64K"),
        ("eight", "striped", &["33M"; 8], "--chunk 1M"),
    ];
    for (name, alg, sizes, options) in shapes {
        let uri = array(&farm, name, alg, sizes, options);
        fio_verify(&uri, 64, 60);
        farm.dst(&format!("stop {name}"));
        farm.dst(&format!("remove {name}"));
    }
}

/// The same without checksums of data, while a node moves: what is copied has them all the same.
#[test]
fn without_data_digests_nothing_else_changes() {
    let farm = Farm::new(3);
    let volumes = [farm.volume(0, "bare0", "130M"), farm.volume(1, "bare1", "130M")];
    farm.dst(&format!("create bare --alg striped --chunk 64K {}", volumes.join(" ")));
    let run_options = || {
        let shown: serde_json::Value = serde_json::from_str(&farm.dst("status bare --json")).unwrap();
        shown["spec"]["run"].clone()
    };
    let uri = farm.start_nbd("bare", "--queues 2 --data-digest none");
    assert_eq!(run_options()["data_digest"], "none");
    assert!(farm.dst("status bare").contains("no data digest"));
    std::thread::scope(|scope| {
        scope.spawn(|| fio_verify(&uri, 64, 60));
        let to = format!("{}/bare2", farm.servers[2].address);
        farm.dst(&format!("migrate bare n-0 --to {to} --max-freeze 5s"));
    });
    farm.dst("stop bare");
    let refused = String::from_utf8(farm.try_dst("start bare --data-digest md5").stderr).unwrap();
    assert!(refused.contains("use crc32c or none"), "{refused}");
    // It is said at each start, and not kept.
    farm.start_nbd("bare", "");
    assert_eq!(run_options()["data_digest"], serde_json::Value::Null);
}

/// A server's volume and a local file on a tmpfs: there reads and writes are done at once, not by the ring.
#[test]
fn what_lies_in_memory_is_what_was_written() {
    let dir = Path::new("/dev/shm").join(format!("dst-it-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("file");
    std::fs::File::create(&file).unwrap().set_len(130 << 20).unwrap();
    let farm = Farm::below(&dir, &[dir.join("pool")]);
    let volume = farm.volume(0, "volume", "130M");
    farm.dst(&format!("create memory --alg striped {volume} {}", file.display()));
    let uri = farm.start_nbd("memory", "--queues 2");
    fio_verify(&uri, 64, 60);
    // Holes are punched; zeros that are to keep their space are written, for a tmpfs has no other way.
    let script = [
        "write -P 0xab 0 8M",
        "write -z 1M 1M",
        "discard 2M 2M",
        "write -z -u 5M 1000K",
        "flush",
        "read -P 0xab 0 1M",
        "read -P 0 1M 3M",
        "read -P 0xab 4M 1M",
        "read -P 0 5M 1000K",
        "read -P 0xab 6120K 2072K",
    ];
    let mut words = vec!["-f", "raw"];
    script.iter().for_each(|line| words.extend(["-c", line]));
    words.push(&uri);
    let said = run("qemu-io", &words);
    assert!(!said.contains("failed"), "{said}");
    // The end of a file that somebody has cut is an error, not zeros.
    std::fs::File::options().write(true).open(&file).unwrap().set_len(1 << 20).unwrap();
    let said = Command::new("qemu-io").args(["-f", "raw", "-c", "read 200M 1M", &uri]).output().unwrap();
    assert!(String::from_utf8_lossy(&said.stdout).contains("Input/output error"), "{said:?}");
    drop(farm);
    let _ = std::fs::remove_dir_all(&dir);
}

#[test]
fn images_survive_the_round_trip() {
    let farm = Farm::new(2);
    let uri = array(&farm, "images", "striped", &["32M", "32M"], "--chunk 32K");
    let (image, back) = (farm.dir.join("image"), farm.dir.join("back"));
    let mut bytes = vec![0u8; 64 << 20];
    let mut state = 88u64;
    for (index, byte) in bytes.iter_mut().enumerate() {
        // Some of it is zeros, so that holes and zeroing are used too.
        if index >> 20 & 3 != 1 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = state.to_le_bytes()[6];
        }
    }
    std::fs::write(&image, &bytes).unwrap();
    let (image_path, back_path) = (image.to_str().unwrap(), back.to_str().unwrap());
    run("nbdcopy", &[image_path, &uri]);
    run("nbdcopy", &[&uri, back_path]);
    assert!(std::fs::read(&back).unwrap() == bytes, "what comes back is not what went in");
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image_path, &uri]);

    // And it is where the layout says: chunk c of the image on volume c mod 2.
    let pools: Vec<Vec<u8>> =
        (0..2).map(|index| std::fs::read(farm.servers[index].pool().join(format!("images{index}"))).unwrap()).collect();
    for (index, chunk) in bytes.chunks(32 << 10).enumerate() {
        let at = (index / 2) * (32 << 10);
        assert!(pools[index % 2][at..at + chunk.len()] == *chunk, "chunk {index}");
    }
    farm.dst("stop images");
}

#[test]
fn the_export_says_what_it_can() {
    let farm = Farm::new(1);
    let uri = array(&farm, "caps", "linear", &["8M"], "--block 4096");
    for can in ["flush", "fua", "trim", "zero", "multi-conn", "cache", "df"] {
        run("nbdinfo", &["--can", can, &uri]);
    }
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), (8 << 20).to_string());
    let info = run("nbdinfo", &["--json", &uri]);
    assert!(info.contains("\"block_size_minimum\": 4096"), "{info}");
    assert!(run("nbdinfo", &["--map", &uri]).contains("data"));
    farm.dst("stop caps");
}

#[test]
fn a_server_that_stays_away_ends_in_a_timeout_and_the_others_go_on() {
    let mut farm = Farm::new(2);
    let volumes = [farm.volume(0, "near", "8M"), farm.volume(1, "far", "8M")];
    farm.dst(&format!("create pair --alg linear {} {}", volumes[0], volumes[1]));
    let uri = farm.start_nbd("pair", "--io-timeout 2s");
    farm.servers[1].kill();
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 1M", "-c", "read -P 1 0 1M", &uri]);
    let output = Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 2 12M 64k", &uri]).output().unwrap();
    assert!(!output.status.success() || String::from_utf8_lossy(&output.stdout).contains("failed"));
    let shown = farm.dst("status pair");
    assert!(shown.contains("reconnecting"), "{shown}");
    farm.servers[1].start();
    std::thread::sleep(Duration::from_secs(6));
    run("qemu-io", &["-f", "raw", "-c", "write -P 2 12M 64k", "-c", "flush", "-c", "read -P 2 12M 64k", &uri]);
    farm.dst("stop pair");
}

#[test]
fn local_files_and_servers_mix() {
    let farm = Farm::new(1);
    let file = farm.dir.join("local.img");
    std::fs::File::create(&file).unwrap().set_len(130 << 20).unwrap();
    let volume = farm.volume(0, "mixed", "130M");
    farm.dst(&format!("create mixed --alg striped --chunk 16K {volume} {}", file.display()));
    let uri = farm.start_nbd("mixed", "--queues 2");
    fio_verify(&uri, 64, 60);
    run("qemu-io", &["-f", "raw", "-c", "discard 1M 64M", "-c", "read -P 0 1M 64M", &uri]);
    farm.dst("stop mixed");
    farm.dst("remove mixed");
}
