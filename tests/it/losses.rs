//! Machines that come back without what they had acknowledged, with real processes: the machine of a server that was killed boots
//! anew (its volumes' state files say so), and what was not flushed there is gone.

use std::path::PathBuf;

use dst::control::spec::ArraySpec;
use dst::store::record::Record;
use dst::store::state::{self, Book};
use dst::units::Id;

use crate::farm::Farm;
use crate::hosts::{Client, says, wait_for};

const EIO: u32 = 5;

/// The machine of a server that does not run is started again: it was another boot that wrote its volumes.
fn reboot(farm: &Farm, server: usize, volume: &str) {
    let pool = farm.servers[server].pool();
    let record = Record::decode(&std::fs::read(pool.join(format!("{volume}.dst"))).unwrap()).unwrap();
    let path = pool.join(format!(".{volume}.state"));
    let mut bytes = std::fs::read(&path).unwrap();
    let mut book = Book::new(record.id, state::load(&bytes, record.id).unwrap());
    book.change(|state| state.boot = Id([0xbb; 16]));
    let write = book.start().unwrap();
    let at = usize::try_from(write.offset).unwrap();
    bytes[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
    std::fs::write(path, bytes).unwrap();
}

/// The first block of a volume is as it was before it was written.
fn lose(farm: &Farm, server: usize, volume: &str) {
    let path = farm.servers[server].pool().join(volume);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[..4096].fill(0);
    std::fs::write(path, bytes).unwrap();
}

/// The power of a server's machine goes, and with it what was not flushed.
fn cut(farm: &mut Farm, server: usize, volume: &str) {
    farm.servers[server].kill();
    reboot(farm, server, volume);
    lose(farm, server, volume);
}

fn nbd(farm: &Farm) -> PathBuf {
    farm.dir.join("one.nbd")
}

/// An array `one` with these targets of its only node, started, whose first block was written and not flushed.
fn written(farm: &Farm, targets: &[String]) -> Client {
    let (count, targets) = (targets.len(), targets.join(","));
    farm.dst(&format!("create one --alg linear --replicas {count} {targets}"));
    farm.start_nbd("one", "");
    let mut client = Client::new(&nbd(farm));
    assert_eq!(client.write(b'A'), 0);
    client
}

fn in_sync(farm: &Farm, replicas: usize) {
    let all = |text: &str| text.matches("\"in_sync\"").count() == replicas && !text.contains("\"lost\"");
    wait_for("all in sync", || all(&farm.dst("status one --json")));
}

fn next_daemon(farm: &mut Farm) -> Client {
    farm.kill_array();
    farm.start_array();
    farm.wait_until_started("one");
    Client::new(&nbd(farm))
}

#[test]
fn the_only_copy_serves_nothing_until_its_loss_is_accepted() {
    let mut farm = Farm::new(1);
    let volume = farm.volume(0, "a", "8M");
    drop(written(&farm, &[volume]));
    says(&farm.dst_fails("accept-loss one n-0"), &["n-0", "has lost nothing"]);
    farm.kill_array();
    cut(&mut farm, 0, "a");
    farm.servers[0].start();
    for _ in 0..2 {
        let mut client = next_daemon(&mut farm);
        assert_eq!((client.read_fails(), client.write(b'B'), client.flush()), (EIO, EIO, EIO));
        for words in ["status one", "why one"] {
            says(&farm.dst(words), &["n-0: lost acknowledged writes", "dst accept-loss one n-0"]);
        }
        assert_eq!(farm.dst("get devices/one/n-0/state"), "lost");
    }
    says(&farm.dst("accept-loss one n-0"), &["accepted: n-0 of one"]);
    let mut client = Client::new(&nbd(&farm));
    wait_for("it is served", || !farm.dst("status one").contains("lost"));
    assert_eq!((client.read(), client.write(b'C'), client.flush()), (0, 0, 0));
    assert_eq!(next_daemon(&mut farm).read(), b'C', "it is accepted for good");
}

#[test]
fn a_loss_under_a_running_array_outlives_its_stop_and_is_accepted_then() {
    let mut farm = Farm::new(1);
    let volume = farm.volume(0, "a", "8M");
    let mut client = written(&farm, &[volume]);
    cut(&mut farm, 0, "a");
    farm.servers[0].start();
    assert_eq!(client.read_fails(), EIO);
    drop(client);
    farm.dst("stop one");
    farm.start_nbd("one", "");
    assert_eq!(Client::new(&nbd(&farm)).read_fails(), EIO);
    farm.dst("stop one");
    farm.dst("accept-loss one n-0");
    farm.start_nbd("one", "");
    assert_eq!(Client::new(&nbd(&farm)).read(), 0);
}

#[test]
fn a_server_that_boots_while_the_daemon_is_down_is_synced_again() {
    let mut farm = Farm::new(2);
    let volumes = [farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M")];
    drop(written(&farm, &volumes));
    farm.kill_array();
    // The one that would be gone by.
    cut(&mut farm, 0, "a");
    farm.servers[0].start();
    assert_eq!(next_daemon(&mut farm).read(), b'A', "the other one has it");
    in_sync(&farm, 2);
    farm.dst("stop one");
    let [one, other] =
        [(0, "a"), (1, "b")].map(|(at, name)| std::fs::read(farm.servers[at].pool().join(name)).unwrap());
    assert!(one[0] == b'A' && one == other);
}

#[test]
fn after_a_power_cut_of_the_whole_site_the_array_starts() {
    let mut farm = Farm::new(2);
    let volumes = [farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M")];
    drop(written(&farm, &volumes));
    farm.kill_array();
    cut(&mut farm, 0, "a");
    cut(&mut farm, 1, "b");
    let path = farm.dir.join("state/arrays/one.json");
    let mut spec = ArraySpec::decode("one", &std::fs::read(&path).unwrap()).unwrap();
    assert!(spec.memory.shown.is_some());
    spec.memory.shown = Some(Id([0xcc; 16]));
    std::fs::write(path, spec.encode().unwrap()).unwrap();
    (0..2).for_each(|server| farm.servers[server].start());
    let mut client = next_daemon(&mut farm);
    assert_eq!((client.read(), client.write(b'B'), client.flush()), (0, 0, 0));
    in_sync(&farm, 2);
}

#[test]
fn what_is_written_through_is_not_lost() {
    let mut farm = Farm::new(1);
    let volume = format!("{}/a", farm.servers[0].address);
    says(&farm.dst(&format!("volume create {volume} --size 8M --write-through")), &["8M, write-through"]);
    says(&farm.dst(&format!("volume list {}", farm.servers[0].address)), &["preallocated, write-through"]);
    drop(written(&farm, &[volume]));
    farm.kill_array();
    farm.servers[0].kill();
    reboot(&farm, 0, "a");
    farm.servers[0].start();
    let mut client = next_daemon(&mut farm);
    assert_eq!((client.read(), client.flush()), (b'A', 0));
    assert!(!farm.dst("status one").contains("lost"));
}
