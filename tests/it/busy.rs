//! How long threads look for what is due before they sleep: the option, and that data comes whole with and without.

use std::process::Command;

use crate::farm::{Farm, binary, run};

fn dstd_says(words: &[&str]) -> String {
    let output = Command::new(binary("dstd")).args(words).output().unwrap();
    assert!(!output.status.success(), "dstd {words:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_window_is_a_time_and_not_a_long_one() {
    let said = dstd_says(&["--busy-poll", "11ms", "server", "--pool", "/nonexistent"]);
    assert!(said.contains("longer than 10ms") && said.contains("0s turns it off"), "{said}");
    let said = dstd_says(&["--busy-poll", "soon", "server", "--pool", "/nonexistent"]);
    assert!(said.contains("'soon' is not a time"), "{said}");
}

#[test]
fn without_a_window_and_with_a_long_one_data_comes_whole() {
    for window in ["0s", "10ms"] {
        let mut farm = Farm::new(1);
        farm.kill_array();
        farm.start_array_in(&[], &[("DST_BUSY_POLL", window)]);
        let target = farm.volume(0, "a", "4M");
        farm.dst(&format!("create storage --alg linear {target}"));
        let uri = farm.start_nbd("storage", "--queues 1 --depth 16");
        // Little, which comes through a stage, and much, which is copied by others.
        for piece in ["4k", "1M"] {
            let (write, read) = (format!("write -P 7 1M {piece}"), format!("read -P 7 1M {piece}"));
            let said =
                run("qemu-io", &["-f", "raw", "-c", &write, "-c", "flush", "-c", &read, "-c", "read -P 0 0 4k", &uri]);
            assert!(!said.contains("failed"), "{window}: {said}");
        }
        farm.dst("stop storage");
    }
}
