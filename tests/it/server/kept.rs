//! What a server keeps beside the data: claims and labels, across deaths, on a full disk, in damaged files.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use dst::errno::Errno;
use dst::limits;
use dst::store::state::{self, Book, SLOT_BYTES, State};
use dst::units::{Epoch, Id};
use dst::wire::frame::Op;
use dst::wire::volume::{Claim, LabelPut, List, Named, Page, Volume};

use super::client::{Dir, array, ask, assign, attach, create, named, pattern, refusal, start, stat, try_attach};
use super::survival::Process;

fn claim(session: u8, epoch: u64) -> Option<Claim> {
    Some(Claim { epoch: Epoch(epoch), owner: Id([session; 16]), host: Id([0xb; 16]) })
}

fn label(session: u8, epoch: u64, text: &str) -> LabelPut {
    let owner = Id([session; 16]);
    LabelPut { name: "v".to_owned(), array: array().id, epoch: Epoch(epoch), owner, label: text.to_owned() }
}

fn state_path(dir: &Dir) -> PathBuf {
    dir.path().join(".v.state")
}

#[test]
fn a_claim_outlives_its_server() {
    let dir = Dir::new();
    let process = Process::start(dir.path());
    create(process.address, "v", 1 << 20, false);
    assert_eq!(assign(process.address, "v").claim, None);
    attach(process.address, "v", (1, 4, 0)).write(0, &pattern(1, 512)).unwrap();
    let _client = attach(process.address, "v", (2, 5, 0));
    assert_eq!(stat(process.address, "v").claim, claim(2, 5));
    drop(process);
    let mut process = Process::start(dir.path());
    for round in 0..3 {
        assert_eq!(stat(process.address, "v").claim, claim(2, 5), "before anybody attaches, too");
        for fenced in [(1, 4, 0), (1, 5, 0), (3, 5, 2), (2, 4, 0)] {
            let (errno, text) = try_attach(process.address, "v", fenced).err().unwrap();
            assert_eq!(errno, Errno::EBADE, "round {round}: {fenced:?}");
            assert!(text.contains("epoch 5"), "{text}");
        }
        assert_eq!(attach(process.address, "v", (2, 5, 0)).read(0, 1).unwrap(), pattern(1, 512));
        drop(process);
        process = Process::start(dir.path());
    }
    attach(process.address, "v", (3, 6, 0));
    assert_eq!(try_attach(process.address, "v", (2, 5, 0)).err().unwrap().0, Errno::EBADE);
}

#[test]
fn a_volume_is_blank_until_something_is_written_to_it() {
    let dir = Dir::new();
    let process = Process::start(dir.path());
    let address = process.address;
    for (name, sparse) in [("v", false), ("w", true)] {
        create(address, name, 1 << 20, sparse);
        assert!(assign(address, name).blank);
        let mut client = attach(address, name, (1, 4, 0));
        assert_eq!(client.read(0, 8).unwrap(), vec![0; 4096]);
        assert!(stat(address, name).blank);
        client.write(0, &vec![0; 512]).unwrap();
        assert!(!stat(address, name).blank, "zeros too");
    }
    ask::<_, Volume>(address, Op::VolumeFree, &named("v", true)).unwrap();
    assert!(!stat(address, "v").blank);
    drop(process);
    let process = Process::start(dir.path());
    assert!(!assign(process.address, "v").blank && !stat(process.address, "w").blank);
}

#[test]
fn a_label_is_kept_for_its_array() {
    let dir = Dir::new();
    let process = Process::start(dir.path());
    let address = process.address;
    create(address, "v", 1 << 20, false);
    assign(address, "v");
    let put = |address, put: &LabelPut| ask::<_, Volume>(address, Op::LabelPut, put);
    assert_eq!(refusal(put(address, &label(1, 1, "early"))).0, Errno::EBADE, "nobody has claimed it");
    let client = attach(address, "v", (1, 1, 0));
    let longest = "\"\n\\".repeat(limits::LABEL_BYTES_MAX / 3);
    assert_eq!(put(address, &label(1, 1, &longest)).unwrap().label, Some(longest.clone()));
    for (wrong, errno) in [
        (label(1, 2, "x"), Errno::EBADE),
        (label(2, 1, "x"), Errno::EBADE),
        (LabelPut { array: Id([9; 16]), ..label(1, 1, "x") }, Errno::EBADE),
        (LabelPut { name: "w".to_owned(), ..label(1, 1, "x") }, Errno::ENOENT),
        (label(1, 1, &"x".repeat(limits::LABEL_BYTES_MAX + 1)), Errno::EINVAL),
    ] {
        assert_eq!(refusal(put(address, &wrong)).0, errno);
    }
    assert_eq!(stat(address, "v").label, Some(longest.clone()));
    let page: Page = ask(address, Op::VolumeList, &List::default()).unwrap();
    assert_eq!((page.volumes[0].label.clone(), page.volumes[0].claim), (None, claim(1, 1)));
    drop((client, process));
    let process = Process::start(dir.path());
    let address = process.address;
    assert_eq!(stat(address, "v").label, Some(longest));
    // Without a session, too: the claim is enough.
    assert_eq!(put(address, &label(1, 1, "second")).unwrap().label.as_deref(), Some("second"));
    let ours = Named { array: Some(array().id), ..named("v", false) };
    let freed: Volume = ask(address, Op::VolumeFree, &ours).unwrap();
    assert_eq!((freed.array, freed.claim), (None, None));
    assert_eq!(stat(address, "v").label.as_deref(), Some("second"), "it may say where the data has gone");
    let again = assign(address, "v");
    assert_eq!((again.claim, again.label), (None, None), "who frees a volume gives up its claim");
    attach(address, "v", (3, 1, 0));
}

/// What the state file says.
fn found(dir: &Dir, volume: Id) -> State {
    state::load(&std::fs::read(state_path(dir)).unwrap(), volume).unwrap().1
}

/// The machine has been started again since: the state is of another boot.
fn reboot(dir: &Dir, volume: Id) {
    let mut bytes = std::fs::read(state_path(dir)).unwrap();
    let mut book = Book::new(volume, state::load(&bytes, volume).unwrap());
    book.change(|state| state.boot = Id([0xbb; 16]));
    let write = book.start().unwrap();
    let at = usize::try_from(write.offset).unwrap();
    bytes[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
    std::fs::write(state_path(dir), bytes).unwrap();
}

#[test]
fn losses_are_told_after_a_power_cut_and_only_then() {
    let dir = Dir::new();
    let mut process = Process::start(dir.path());
    let volume = create(process.address, "v", 1 << 20, false).id;
    assign(process.address, "v");
    let losses = |process: &Process, writes: bool| {
        let mut client = attach(process.address, "v", (1, 1, 0));
        if writes {
            client.write(0, &pattern(1, 4096)).unwrap();
            assert!(found(&dir, volume).dirty, "it is durable before the answer");
        }
        client.welcome.losses
    };
    assert_eq!(losses(&process, true), 0);
    // The process dies.
    for _ in 0..2 {
        drop(process);
        process = Process::start(dir.path());
        assert_eq!(losses(&process, true), 0);
    }
    // The machine dies.
    for expected in 1..3 {
        drop(process);
        reboot(&dir, volume);
        process = Process::start(dir.path());
        assert_eq!(losses(&process, false), expected);
        assert_eq!(losses(&process, true), expected);
    }
    // It is stopped in order.
    drop(process);
    let (server, address) = start(dir.path());
    attach(address, "v", (1, 1, 0)).write(8, &pattern(2, 4096)).unwrap();
    server.stop();
    assert!(!found(&dir, volume).dirty);
    reboot(&dir, volume);
    let process = Process::start(dir.path());
    assert_eq!(losses(&process, false), 2);
}

/// A pool on a filesystem of its own.
pub(super) struct Mount(Dir);

impl Mount {
    pub(super) fn new(bytes: &str) -> Option<Mount> {
        let dir = Dir::new();
        let options = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Mount(dir));
        }
        eprintln!("skipped: nothing can be mounted here");
        None
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn a_full_pool_stops_neither_claims_nor_labels() {
    let Some(mount) = Mount::new("8m") else { return };
    let (_server, address) = start(mount.path());
    create(address, "v", 1 << 20, false);
    assign(address, "v");
    let filled = std::fs::write(mount.path().join("filler~"), vec![1; 16 << 20]);
    assert!(filled.is_err(), "the pool is full");
    for epoch in 1..20 {
        let mut client = attach(address, "v", (1, epoch, 0));
        client.write(0, &pattern(1, 4096)).unwrap();
        client.flush().unwrap();
        let text = "x".repeat(limits::LABEL_BYTES_MAX - usize::try_from(epoch).unwrap());
        ask::<_, Volume>(address, Op::LabelPut, &label(1, epoch, &text)).unwrap();
    }
    assert_eq!(stat(address, "v").claim, claim(1, 19));
}

#[test]
fn the_state_file_has_all_its_space_from_the_start() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    create(address, "v", 1 << 30, true);
    let space = |dir: &Dir| {
        let file = std::fs::metadata(state_path(dir)).unwrap();
        (file.len(), file.blocks())
    };
    let before = space(&dir);
    assert!(before.1 * 512 >= before.0, "{before:?}");
    assign(address, "v");
    for epoch in 1..5 {
        attach(address, "v", (1, epoch, 0));
        ask::<_, Volume>(address, Op::LabelPut, &label(1, epoch, &"x".repeat(limits::LABEL_BYTES_MAX))).unwrap();
    }
    assert_eq!(space(&dir), before);
    server.stop();
    // A pool of an earlier version has volumes without one.
    std::fs::remove_file(state_path(&dir)).unwrap();
    let (_server, address) = start(dir.path());
    assert_eq!(stat(address, "v").claim, None);
    attach(address, "v", (1, 1, 0));
    assert_eq!(space(&dir), before);
}

#[test]
fn a_damaged_state_is_never_taken_for_none() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    create(address, "v", 1 << 20, false);
    assign(address, "v");
    for epoch in [3, 4] {
        attach(address, "v", (1, epoch, 0));
    }
    server.stop();
    let whole = std::fs::read(state_path(&dir)).unwrap();
    let mut torn = whole.clone();
    // The second claim went to the first slot.
    torn[100] ^= 1;
    std::fs::write(state_path(&dir), &torn).unwrap();
    let (server, address) = start(dir.path());
    let left = stat(address, "v").claim.unwrap().epoch;
    torn[SLOT_BYTES + 100] ^= 1;
    server.stop();
    std::fs::write(state_path(&dir), &torn).unwrap();
    assert_eq!(left.0, 3, "the other half is what was before");
    let (server, address) = start(dir.path());
    let (errno, text) = try_attach(address, "v", (1, 9, 0)).err().unwrap();
    assert_eq!(errno, Errno::EIO);
    assert!(text.contains(".v.state") && text.contains("damaged"), "{text}");
    assert_eq!(std::fs::read(state_path(&dir)).unwrap(), torn);
    server.stop();
    std::fs::write(state_path(&dir), &whole).unwrap();
    let (_server, address) = start(dir.path());
    assert_eq!(try_attach(address, "v", (2, 4, 0)).err().unwrap().0, Errno::EBADE);
}

#[test]
fn what_a_crash_leaves_of_a_state_is_cleared_away() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    create(address, "v", 1 << 20, true);
    create(address, "w", 1 << 20, true);
    server.stop();
    let at = |name: &str| dir.path().join(name);
    // The record may come back; made and not finished; removed and not finished.
    std::fs::rename(at("w.dst"), at("w.dst~")).unwrap();
    std::fs::write(at(".v.dst.state"), b"half").unwrap();
    std::fs::write(at(".gone.state"), b"old").unwrap();
    let (_server, address) = start(dir.path());
    assert!(at(".v.state").exists() && at(".w.state").exists());
    assert!(!at(".v.dst.state").exists() && !at(".gone.state").exists());
    ask::<_, Volume>(address, Op::VolumeRemove, &named("v", true)).unwrap();
    assert!(!at(".v.state").exists());
}
