//! Power cuts: a disk with a volatile cache loses it under a server. What was flushed is there; what was not may be older, and nothing
//! is anything else. Needs a disk whose power can be cut, so it runs in the virtual machine alone (`tests/vm/power-test.sh`).

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::dice::Dice;
use super::journal::{self, Floor, Habits, Journal};
use super::seed;
use crate::farm::{Farm, run};

const NAME: &str = "power";
/// Rarely, so that there is something to lose.
const HABITS: Habits = Habits { flush: 200, durable: 200 };
const CONNECTIONS: u64 = 2;

/// A null_blk device: its folder in configfs, the device, and where the filesystem on it is mounted.
struct Disk {
    switch: PathBuf,
    device: String,
    mount: String,
}

impl Disk {
    fn new() -> Option<Disk> {
        let name = std::env::var("DST_TEST_NULL_BLK").ok()?;
        let disk = Disk {
            switch: PathBuf::from(format!("/sys/kernel/config/nullb/{name}/power")),
            device: format!("/dev/{name}"),
            mount: std::env::temp_dir().join("power").to_str().unwrap().to_owned(),
        };
        std::fs::create_dir_all(&disk.mount).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-E", "nodiscard,lazy_itable_init=0", &disk.device]);
        disk.attach();
        Some(disk)
    }

    fn attach(&self) {
        run("mount", &[&self.device, &self.mount]);
    }

    /// The kernel takes a mounted disk away in good order: the filesystem would write out everything first. So it is stopped before, at
    /// once and without a last word.
    fn cut(&self) {
        let without_log = 2u32;
        let root = std::fs::File::open(&self.mount).unwrap();
        let request = nix::request_code_read!(b'X', 125, size_of::<u32>());
        #[allow(unsafe_code)]
        // SAFETY: FS_IOC_SHUTDOWN reads one number from the pointer, which is valid for the call.
        let result = unsafe { nix::libc::ioctl(root.as_raw_fd(), request, &raw const without_log) };
        assert_eq!(result, 0, "the filesystem cannot be stopped: {}", std::io::Error::last_os_error());
        drop(root);
        std::fs::write(&self.switch, "0").unwrap();
    }

    fn back(&self) {
        run("umount", &[&self.mount]);
        std::fs::write(&self.switch, "1").unwrap();
        self.attach();
    }
}

#[test]
fn what_was_flushed_survives_a_power_cut() {
    let Some(disk) = Disk::new() else { return };
    let (seed, rounds) = (seed(), std::env::var("ROUNDS").map_or(8u32, |rounds| rounds.parse().unwrap()));
    let mut dice = Dice::new(seed);
    let mut farm = Farm::with_pools(&[PathBuf::from(&disk.mount).join("pool")]);
    let volume = farm.volume(0, "v", "24M");
    farm.dst(&format!("create {NAME} --alg linear {volume}"));
    farm.start_nbd(NAME, "--queues 2");
    // Everything so far is as durable as it will ever be: only the array's data is on trial.
    run("sync", &[]);
    let path = farm.dir.join(format!("{NAME}.nbd"));
    let journal = Mutex::new(Journal::new(24 << 20));
    let mut lost = 0;
    for round in 0..rounds {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for number in 0..CONNECTIONS {
                let dice = Dice::new(seed ^ u64::from(round) << 8 ^ number << 40);
                let (path, journal, stop) = (&path, &journal, &stop);
                // It ends with an error: of the disk, or because nobody is there.
                scope.spawn(move || drop(journal::write(path, journal, HABITS, dice, stop)));
            }
            std::thread::sleep(dice.millis(500, 3000));
            if dice.one_in(2) {
                disk.cut();
                std::thread::sleep(dice.millis(0, 50));
                farm.servers[0].kill();
            } else {
                farm.servers[0].kill();
                disk.cut();
            }
            farm.kill_array();
            stop.store(true, Ordering::Relaxed);
        });
        disk.back();
        farm.servers[0].start();
        farm.start_array();
        farm.wait_until_started(NAME);
        let mut journal = journal.lock().unwrap();
        lost += journal.count_lost(&path);
        if let Err(why) = journal.verify(&path, Floor::Flushed) {
            panic!("SEED={seed}, round {round}: {why}\n{}", farm.logs());
        }
    }
    let journal = journal.into_inner().unwrap();
    println!(
        "power: SEED={seed}: {rounds} power cuts, {} changes and flushes acknowledged, {} of them flushes; {lost} blocks lost what was \
         acknowledged and not flushed, none what was flushed",
        journal.acknowledged, journal.flushes
    );
    assert!(
        lost > 100 && journal.flushes > u64::from(rounds),
        "the disk has hardly lost anything: this proves nothing"
    );
    farm.dst(&format!("stop {NAME}"));
    drop(farm);
    std::thread::sleep(Duration::from_millis(100));
    let _ = Command::new("umount").arg(&disk.mount).status();
}
