//! A server and its volumes.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dst::units::{Epoch, Extent, Id, Lba};
use dst::wire::frame::{Header, Op, data_crc, flags, message_crc};
use dst::wire::volume::{self as wire, Assign, CallError, Create, LabelPut, List, Named, Page, Resize, Volume};

use super::{DEATH, MOST, Tally};
use crate::chaos::trap::Trap;
use crate::farm::{Server, run};
use crate::server::client::{self, Client, Dir, ask, pattern, try_attach};

/// Bytes of the volume that has data.
const FULL: usize = 96 << 10;

/// Never the same, always greater: every attachment is a new daemon's.
fn next_epoch() -> u64 {
    static EPOCH: AtomicU64 = AtomicU64::new(1);
    EPOCH.fetch_add(1, Ordering::Relaxed)
}

/// The session of an epoch: a byte of its id, and not zero, which is nobody's.
fn session_of(epoch: u64) -> u8 {
    u8::try_from(epoch % 255 + 1).unwrap()
}

fn attach(address: &str, name: &str) -> Client {
    let epoch = next_epoch();
    try_attach(address.parse().unwrap(), name, (session_of(epoch), epoch, 0)).unwrap()
}

/// What a volume is, apart from what differs from one making of it to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    size: u64,
    sparse: bool,
    array: Option<Id>,
    problem: Option<String>,
}

/// The volumes, and the files of the pool.
type Picture = (BTreeMap<String, Shown>, Vec<String>);

struct Bed {
    _dir: Dir,
    server: Server,
    template: PathBuf,
    /// Bytes of `full` that have its pattern.
    kept: usize,
}

impl Bed {
    /// A pool with `full`, assigned and full of a pattern, `sparse`, and what `prepare` adds.
    fn new(prepare: fn(&str)) -> Bed {
        let dir = Dir::new();
        let server = Server::new(dir.path(), 0);
        let template = dir.path().join("template");
        let mut bed = Bed { _dir: dir, server, template, kept: FULL };
        bed.server.start();
        let address = bed.address();
        client::create(address.parse().unwrap(), "full", FULL as u64, false);
        client::assign(address.parse().unwrap(), "full");
        client::create(address.parse().unwrap(), "sparse", 1 << 20, true);
        let mut full = attach(&address, "full");
        full.write(0, &pattern(3, FULL)).unwrap();
        full.flush().unwrap();
        drop(full);
        bed.detached();
        prepare(&address);
        bed.kept = FULL.min(usize::try_from(client::stat(address.parse().unwrap(), "full").size).unwrap());
        bed.server.kill();
        copy(bed.server.pool(), &bed.template);
        bed
    }

    fn address(&self) -> String {
        self.server.address.clone()
    }

    /// Waits until the server knows that nobody is attached.
    fn detached(&self) {
        while client::stat(self.address().parse().unwrap(), "full").connections > 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// As at the beginning, with a new server.
    fn reset(&mut self) {
        self.server.kill();
        let pool = self.server.pool().to_owned();
        std::fs::remove_dir_all(&pool).unwrap();
        copy(&self.template, &pool);
        self.server.start();
    }

    fn picture(&self) -> Picture {
        let page: Page = ask(self.address().parse().unwrap(), Op::VolumeList, &List { after: None }).unwrap();
        let shown = |volume: Volume| Shown {
            size: volume.size,
            sparse: volume.sparse,
            array: volume.array.map(|member| member.id),
            problem: volume.problem,
        };
        let volumes = page.volumes.into_iter().map(|volume| (volume.name.clone(), shown(volume))).collect();
        let files = std::fs::read_dir(self.server.pool()).unwrap();
        let mut files: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        (volumes, files)
    }

    /// What `full` has on it, as far as it is still there: nothing that was written is lost, and what is beyond reads as zeros.
    fn check_full(&self, picture: &Picture) {
        let Some(shown) = picture.0.get("full").filter(|shown| shown.array.is_some()) else { return };
        let mut client = attach(&self.address(), "full");
        let size = usize::try_from(shown.size).unwrap();
        let data = client.read(0, shown.size / 512).unwrap();
        let kept = size.min(self.kept);
        assert!(data[..kept] == pattern(3, FULL)[..kept], "its data has changed");
        assert!(data[kept..].iter().all(|byte| *byte == 0), "what is new is not zeros");
        drop(client);
        self.detached();
    }
}

fn copy(from: &Path, to: &Path) {
    run("cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
}

/// What is done while the server dies.
type Act = fn(&str) -> Result<(), CallError>;

/// Dies at each call of `act`: before it has happened, or after.
fn survives(what: &str, prepare: fn(&str), act: Act) {
    let mut bed = Bed::new(prepare);
    bed.reset();
    let before = bed.picture();
    bed.check_full(&before);
    act(&bed.address()).unwrap();
    let after = bed.picture();
    assert_ne!(before, after);
    let mut tally = Tally::default();
    for nth in 1..=MOST {
        bed.reset();
        let trap = Trap::set(bed.server.process_id(), nth);
        let answer = act(&bed.address());
        let patience = if answer.is_ok() { Duration::from_millis(30) } else { DEATH };
        bed.server.process().unwrap().outlives(patience);
        let Some(death) = trap.release() else {
            assert!(answer.is_ok(), "{what}: refused: {answer:?}");
            break;
        };
        let at = format!("{what}, killed before call {nth}, {death}");
        bed.server.kill();
        bed.server.start();
        let found = bed.picture();
        assert!(
            found == after || (answer.is_err() && found == before),
            "{at}: answered {answer:?}, and now {found:#?}"
        );
        bed.check_full(&found);
        bed.server.kill();
        bed.server.start();
        assert_eq!(bed.picture(), found, "{at}: another start, another pool");
        if found == before {
            act(&bed.address()).unwrap_or_else(|error| panic!("{at}: it cannot be done again: {error:?}"));
            assert_eq!(bed.picture(), after, "{at}: done again");
        }
        tally.count(found == after);
    }
    tally.report(&format!("volume {what}"));
}

fn call<Q: serde::Serialize>(address: &str, op: Op, question: &Q) -> Result<(), CallError> {
    // It may have died already, of an idle thread's call.
    let mut stream = TcpStream::connect(address).map_err(CallError::Transport)?;
    wire::call::<_, _, Volume>(&mut stream, op, question).map(drop)
}

#[test]
fn a_server_dies_while_it_makes_a_volume() {
    for (what, act) in [
        ("create, preallocated", (|address| new(address, false)) as Act),
        ("create, sparse", |address| new(address, true)),
    ] {
        survives(what, |_| {}, act);
    }
}

fn new(address: &str, sparse: bool) -> Result<(), CallError> {
    call(address, Op::VolumeCreate, &Create { name: "new".to_owned(), size: 64 << 10, sparse, write_through: false })
}

fn resize(address: &str, size: usize) -> Result<(), CallError> {
    call(address, Op::VolumeResize, &Resize { name: "full".to_owned(), size: size as u64, force: true })
}

#[test]
fn a_server_dies_while_it_resizes_a_volume() {
    survives("resize, larger", |_| {}, |address| resize(address, FULL * 2));
    survives("resize, smaller", |_| {}, |address| resize(address, FULL / 2));
    // Smaller and larger again, in one go: what was cut off does not come back, whichever of the two was interrupted.
    survives("resize, larger again", |address| resize(address, FULL / 2).unwrap(), |address| resize(address, FULL * 2));
}

#[test]
fn a_server_dies_while_a_volume_changes_hands() {
    let assign: Act =
        |address| call(address, Op::VolumeAssign, &Assign { name: "sparse".to_owned(), array: client::array() });
    let free: Act = |address| {
        let named = Named { array: Some(client::array().id), ..client::named("full", false) };
        call(address, Op::VolumeFree, &named)
    };
    let remove: Act = |address| call(address, Op::VolumeRemove, &client::named("sparse", false));
    survives("assign", |_| {}, assign);
    survives("free", |_| {}, free);
    survives("remove", |_| {}, remove);
}

/// What was answered of a new daemon's first requests.
#[derive(Debug, Default)]
struct Answered {
    welcome: bool,
    durable: bool,
    written: bool,
    flushed: bool,
}

/// Attaches, writes durably, writes, flushes. Where the durable write and the other one go: sectors.
const DURABLE: (u64, usize) = (0, 24);
const WRITTEN: (u64, usize) = (40, 100);

fn write(address: &str, epoch: u64, answered: &mut Answered) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    let body = client::hello("full", (session_of(epoch), epoch, 0)).encode();
    let hello = Header::request(Op::Hello, 7, 9, Epoch(epoch), Extent::default());
    let hello = hello.with_body(u32::try_from(body.len()).unwrap(), message_crc(&body));
    stream.write_all(&[&hello.encode()[..], &body[..]].concat())?;
    answered.welcome = client::read_frame(&mut stream)?.0.result().is_ok();
    for (tag, (lba, sectors), flag, answered) in [
        (1, DURABLE, flags::FUA, &mut answered.durable),
        (2, WRITTEN, 0, &mut answered.written),
        (3, (0, 0), 0, &mut answered.flushed),
    ] {
        let op = if sectors > 0 { Op::Write } else { Op::Flush };
        let mut header = Header::request(op, tag, tag, Epoch(epoch), Extent::new(lba, sectors as u64));
        let data = pattern(9, sectors * 512);
        if sectors > 0 {
            header = header.with_body(header.length, data_crc(&data, Lba(lba)));
            header.flags |= flag;
        }
        stream.write_all(&[&header.encode()[..], &data[..]].concat())?;
        *answered = client::read_frame(&mut stream)?.0.result().is_ok();
    }
    Ok(())
}

#[test]
fn a_server_dies_while_it_writes() {
    let mut bed = Bed::new(|_| {});
    let mut tally = Tally::default();
    for nth in 1..=MOST {
        bed.reset();
        let trap = Trap::set(bed.server.process_id(), nth);
        let mut answered = Answered::default();
        let epoch = next_epoch();
        let whole = write(&bed.address(), epoch, &mut answered).is_ok();
        bed.server.process().unwrap().outlives(if whole { Duration::from_millis(30) } else { DEATH });
        let Some(death) = trap.release() else {
            assert!(answered.flushed, "{answered:?}");
            break;
        };
        bed.server.kill();
        bed.server.start();
        let claimed = client::stat(bed.address().parse().unwrap(), "full").claim.map_or(0, |claim| claim.epoch.0);
        let fine = claimed == epoch || (claimed < epoch && !answered.welcome);
        assert!(fine, "killed before call {nth}, {death}: {answered:?} in epoch {epoch}, and epoch {claimed} has it");
        let mut client = attach(&bed.address(), "full");
        for ((lba, sectors), certain) in [(DURABLE, answered.durable), (WRITTEN, answered.written)] {
            let found = client.read(lba, sectors as u64).unwrap();
            let old = &pattern(3, FULL)[usize::try_from(lba).unwrap() * 512..];
            for (at, ((found, old), new)) in
                found.chunks(512).zip(old.chunks(512)).zip(pattern(9, sectors * 512).chunks(512)).enumerate()
            {
                let fine = found == new || (!certain && found == old);
                assert!(fine, "killed before call {nth}, {death}: {answered:?}, and sector {lba} + {at} is another");
            }
        }
        client.flush().unwrap();
        tally.count(answered.durable);
    }
    tally.report("attach, write, flush");
}

#[test]
fn a_server_dies_while_it_takes_a_label() {
    let mut bed = Bed::new(|_| {});
    let mut tally = Tally::default();
    for nth in 1..=MOST {
        bed.reset();
        let epoch = next_epoch();
        let session = session_of(epoch);
        try_attach(bed.address().parse().unwrap(), "full", (session, epoch, 0)).unwrap();
        let put = |label: &str| {
            let (name, owner) = ("full".to_owned(), Id([session; 16]));
            let ask = LabelPut { name, array: client::array().id, epoch: Epoch(epoch), owner, label: label.to_owned() };
            call(&bed.address(), Op::LabelPut, &ask)
        };
        put("old").unwrap();
        let trap = Trap::set(bed.server.process_id(), nth);
        let answer = put("new");
        let patience = if answer.is_ok() { Duration::from_millis(30) } else { DEATH };
        bed.server.process().unwrap().outlives(patience);
        let Some(death) = trap.release() else {
            assert!(answer.is_ok(), "{answer:?}");
            break;
        };
        for start in 1..=2 {
            bed.server.kill();
            bed.server.start();
            let found = client::stat(bed.address().parse().unwrap(), "full");
            let label = found.label.as_deref();
            let fine = label == Some("new") || (label == Some("old") && answer.is_err());
            assert!(fine, "killed before call {nth}, {death}: start {start} finds {label:?}, answered {answer:?}");
            assert_eq!(found.claim.map(|claim| claim.epoch.0), Some(epoch), "the claim is as it was");
            if start == 2 {
                tally.count(label == Some("new"));
            }
        }
    }
    tally.report("label");
}
