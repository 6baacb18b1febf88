//! Arrays that become larger, on real daemons and files.

use std::os::unix::fs::FileExt;

use crate::farm::{Farm, run};
use crate::replicas::in_sync;

fn qemu_io(uri: &str, words: &[&str]) {
    let words = words.iter().flat_map(|word| ["-c", word]);
    run("qemu-io", &["-f", "raw"].into_iter().chain(words).chain([uri]).collect::<Vec<&str>>());
}

fn resize(farm: &Farm, server: usize, name: &str, size: &str) {
    farm.dst(&format!("volume resize {}/{name} --size {size}", farm.servers[server].address));
}

#[test]
fn a_striped_array_takes_up_what_its_volumes_have() {
    let mut farm = Farm::new(2);
    let targets = [farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M")];
    farm.dst(&format!("create big --alg striped {}", targets.join(" ")));
    let uri = farm.start_nbd("big", "");
    qemu_io(&uri, &["write -P 7 0 16M", "flush"]);
    resize(&farm, 0, "a", "20M");
    let said = farm.dst_fails("grow big");
    assert!(said.contains("those of n-128 have no room for a further chunk"), "{said}");
    resize(&farm, 1, "b", "16M");
    let output = farm.try_dst("grow big");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "big still has 16M, striped 64K, 2 nodes\n");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("grows with 'dst stop big' and 'dst start big': a client of NBD"), "{said}");
    assert!(farm.dst("status big").contains("takes up what its volumes have when it is started the next time"));
    // Also when the daemon dies before that: then the array comes back as it was.
    farm.kill_array();
    farm.start_array();
    farm.wait_until_started("big");
    assert!(farm.dst("status big").contains("16M, striped"));
    farm.dst("stop big");
    let uri = farm.start_nbd("big", "");
    assert!(farm.dst("status big").contains("32M, striped"));
    qemu_io(&uri, &["read -P 7 0 16M", "read -P 0 16M 16M", "write -P 9 16M 16M", "flush"]);
    farm.dst("stop big");
    let uri = farm.start_nbd("big", "");
    qemu_io(&uri, &["read -P 7 0 16M", "read -P 9 16M 16M"]);
    let said = farm.dst_fails("grow big");
    assert!(said.contains("array 'big' cannot grow"), "{said}");
    farm.dst("stop big");
}

#[test]
fn what_two_replicas_hold_behind_the_former_end_becomes_the_same() {
    let farm = Farm::new(2);
    let targets = [farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M")];
    farm.dst(&format!("create pair --alg linear --replicas 2 {}", targets.join(",")));
    let uri = farm.start_nbd("pair", "");
    in_sync(&farm);
    qemu_io(&uri, &["write -P 7 0 8M", "flush"]);
    farm.dst("stop pair");
    for (server, name, at) in [(0, "a", 10), (1, "b", 15)] {
        resize(&farm, server, name, "24M");
        // What was there before, different on each: behind the first megabytes nothing on one, something on the other, and the reverse.
        let file = std::fs::File::options().write(true).open(farm.servers[server].pool().join(name)).unwrap();
        file.write_all_at(&vec![1; 3 << 20], at << 20).unwrap();
    }
    let said = farm.try_dst("grow pair");
    assert!(
        String::from_utf8_lossy(&said.stderr).contains("grows with 'dst start pair': it is stopped now"),
        "{said:?}"
    );
    let uri = farm.start_nbd("pair", "");
    in_sync(&farm);
    assert!(farm.dst("status pair").contains("24M, linear"));
    qemu_io(&uri, &["read -P 7 0 8M", "read -P 1 10M 3M", "read -P 0 13M 11M"]);
    farm.dst("scrub pair");
    farm.dst("stop pair");
    let [one, other] = [(0, "a"), (1, "b")]
        .map(|(at, name): (usize, &str)| std::fs::read(farm.servers[at].pool().join(name)).unwrap());
    assert_eq!(one.iter().zip(&other).position(|(one, other)| one != other), None, "the first byte that differs");
}

#[test]
fn a_linear_array_gets_a_further_node() {
    let farm = Farm::new(1);
    let first = farm.volume(0, "a", "8M");
    farm.dst(&format!("create long --alg linear {first}"));
    let uri = farm.start_nbd("long", "");
    qemu_io(&uri, &["write -P 3 0 8M", "flush"]);
    let second = farm.volume(0, "b", "16M");
    let said = farm.dst_fails(&format!("grow long {second}"));
    assert!(said.contains("'dst stop long' first"), "{said}");
    farm.dst("stop long");
    assert_eq!(farm.dst(&format!("grow long {second} --size 4M")), "long has 12M, linear, 2 nodes");
    resize(&farm, 0, "a", "32M");
    // The node uses less than its volume has, as was said; now it is the last one, and may have all of it.
    farm.dst("grow long");
    let uri = farm.start_nbd("long", "");
    assert!(farm.dst("status long").contains("24M, linear"));
    qemu_io(&uri, &["read -P 3 0 8M", "write -P 4 8M 16M", "read -P 3 0 8M", "read -P 4 8M 16M"]);
    resize(&farm, 0, "a", "40M");
    let said = farm.dst_fails("grow long");
    assert!(said.contains("only the last node can become larger"), "{said}");
    farm.dst("stop long");
}
