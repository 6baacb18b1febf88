//! The rules of a volume against a model of the world: random attaches, requests, completions, failures and losses.

mod kept;
mod log;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;

use super::*;
use crate::store::session::Claim;
use crate::store::state;
use crate::wire::frame::{Op, flags};
use crate::wire::session::features;
use crate::wire::volume::{RegionPage, Regions};

const SECTORS: u64 = 1 << 20;
const ARRAY: Id = Id([0xa; 16]);

fn member() -> Member {
    Member { id: ARRAY, name: "storage".to_owned(), node: "n-0".to_owned() }
}

const BOOT: Id = Id([6; 16]);
/// Two pages of small regions.
const LAYOUT: Layout = Layout { region_sectors: 256, regions: SECTORS / 256 };
const VOLUME: Id = Id([1; 16]);

/// A volume whose server begins to serve with this state file.
fn volume_from(file: &[u8]) -> Volume {
    let config = Config {
        name: "v".to_owned(),
        id: VOLUME,
        instance: Id([2; 16]),
        boot: BOOT,
        sparse: true,
        write_through: false,
    };
    let log = Log::load(&file[state::SLOTS_BYTES..], LAYOUT);
    Volume::new(config, SECTORS, Book::new(VOLUME, state::load(file, VOLUME).unwrap()), Some(log))
}

fn volume(sparse: bool) -> Volume {
    volume_with(sparse, false)
}

fn volume_with(sparse: bool, write_through: bool) -> Volume {
    let (name, instance) = ("v".to_owned(), Id([2; 16]));
    let config = Config { name, id: Id([1; 16]), instance, boot: BOOT, sparse, write_through };
    Volume::new(config, SECTORS, Book::new(Id([1; 16]), (0, State::default())), None)
}

fn hello(session: u8, channel: u16) -> Hello {
    let (session, volume) = (Id([session; 16]), "v".to_owned());
    Hello { versions: (1, 1), features: features::OURS, array: ARRAY, session, host: Id([3; 16]), channel, volume }
}

fn effects(volume: &mut Volume) -> Vec<Effect> {
    std::iter::from_fn(|| volume.poll_effect()).collect()
}

fn attach(volume: &mut Volume, conn: u64, session: u8, epoch: u64, channel: u16) -> Vec<Effect> {
    let (hello, member) = (hello(session, channel), member());
    volume.handle(Event::Attach { conn: Conn(conn), hello: &hello, epoch: Epoch(epoch), assigned: Some(&member) });
    settled(volume)
}

/// What is left to do when everything that is to be saved has been.
fn settled(volume: &mut Volume) -> Vec<Effect> {
    let mut all = effects(volume);
    while let Some(at) = all.iter().position(|effect| matches!(effect, Effect::Save(_))) {
        all.remove(at);
        volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
        all.extend(effects(volume));
    }
    all
}

/// A request that was never asked before.
fn header(op: Op, epoch: u64, fua: bool) -> Header {
    static SEQUENCE: AtomicU32 = AtomicU32::new(0);
    let extent = if op.has_range() { Extent::new(8, 8) } else { Extent::default() };
    let mut header = Header::request(op, 1, SEQUENCE.fetch_add(1, Relaxed), Epoch(epoch), extent);
    if op == Op::Write {
        header = header.with_body(header.length, 0);
    }
    header.flags |= if fua { flags::FUA } else { 0 };
    header
}

fn ask(volume: &mut Volume, slot: u16, header: &Header) -> Vec<Effect> {
    volume.handle(Event::Request { conn: Conn(0), slot: Slot(slot), header, intact: true });
    effects(volume)
}

/// The one piece of work among effects.
fn work(effects: &[Effect]) -> Work {
    match effects {
        [Effect::Disk(work)] => *work,
        other => panic!("{other:?}"),
    }
}

fn done(volume: &mut Volume, work: Work, result: Result<(), Errno>) -> Vec<Effect> {
    volume.handle(Event::DiskDone { job: work.job, result });
    effects(volume)
}

fn answer(effects: &[Effect]) -> Result<(), Errno> {
    match effects {
        [Effect::Reply { header, .. }] => header.result(),
        other => panic!("{other:?}"),
    }
}

fn attached(sparse: bool) -> Volume {
    served(volume(sparse))
}

fn served(mut volume: Volume) -> Volume {
    let welcome = attach(&mut volume, 0, 1, 1, 0);
    assert!(matches!(welcome[..], [Effect::Welcome { .. }]), "{welcome:?}");
    // The first change of a server's life waits until it is durable that there may be something to lose.
    assert!(matches!(ask(&mut volume, 0, &header(Op::Write, 1, false))[..], [Effect::Save(_)]));
    volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
    let first = work(&effects(&mut volume));
    done(&mut volume, first, Ok(()));
    volume
}

#[test]
fn each_op_becomes_its_work() {
    for (sparse, op, fua, expected) in [
        (false, Op::Read, false, DiskOp::Read),
        (false, Op::Write, false, DiskOp::Write { durable: false }),
        (false, Op::Write, true, DiskOp::Write { durable: true }),
        (false, Op::Discard, false, DiskOp::Zero),
        (true, Op::Discard, false, DiskOp::Punch),
        (false, Op::WriteZeroes, false, DiskOp::Zero),
        (true, Op::WriteZeroes, false, DiskOp::Zero),
        (true, Op::Flush, false, DiskOp::Sync),
        (true, Op::Digest, false, DiskOp::Digest),
    ] {
        let mut volume = attached(sparse);
        let asked = header(op, 1, fua);
        let work = work(&ask(&mut volume, 3, &asked));
        assert_eq!(work.op, expected, "{op:?} sparse {sparse}");
        assert_eq!(work.place.is_some(), op != Op::Flush);
        assert_eq!(work.extent, asked.extent());
        let all = done(&mut volume, work, Ok(()));
        let [Effect::Reply { conn: Conn(0), slot: Slot(3), header }] = all[..] else { panic!("{all:?}") };
        let point = header.point();
        assert_eq!(point > 0, op == Op::Flush);
        let expected = asked.reply(Ok(()));
        assert_eq!(header, if op == Op::Flush { expected.with_point(point) } else { expected });
    }
}

#[test]
fn a_volume_that_is_written_through_has_nothing_to_flush_and_nothing_to_lose() {
    let mut volume = served(volume_with(false, true));
    let first = work(&ask(&mut volume, 0, &header(Op::Flush, 1, false)));
    assert_eq!(first.op, DiskOp::Sync, "what was written before this server started is not known");
    done(&mut volume, first, Ok(()));
    let write = work(&ask(&mut volume, 0, &header(Op::Write, 1, false)));
    assert_eq!(write.op, DiskOp::Write { durable: true });
    assert_eq!(answer(&done(&mut volume, write, Ok(()))), Ok(()));
    assert_eq!(answer(&ask(&mut volume, 0, &header(Op::Flush, 1, false))), Ok(()), "at once");
    let zero = work(&ask(&mut volume, 0, &header(Op::WriteZeroes, 1, false)));
    let sync = work(&done(&mut volume, zero, Ok(())));
    assert_eq!(sync.op, DiskOp::Sync, "it is durable before it is answered");
    assert_eq!(answer(&done(&mut volume, sync, Ok(()))), Ok(()));
    // Another boot of its machine.
    let config = Config { boot: Id([7; 16]), ..volume.config.clone() };
    let state = volume.state().clone();
    assert!(state.dirty);
    let mut next = Volume::new(config, SECTORS, Book::new(Id([1; 16]), (1, state)), None);
    let all = attach(&mut next, 0, 1, 1, 0);
    let [Effect::Welcome { welcome, .. }] = all[..] else { panic!("{all:?}") };
    assert_eq!(welcome.losses, 0);
}

#[test]
fn what_is_wrong_never_reaches_the_disk() {
    let mut volume = attached(false);
    let write = header(Op::Write, 1, false);
    volume.handle(Event::Request { conn: Conn(0), slot: Slot(0), header: &write, intact: false });
    assert_eq!(answer(&effects(&mut volume)), Err(Errno::EILSEQ));
    let bare = Header { flags: 0, ..write };
    assert_eq!(answer(&ask(&mut volume, 0, &bare)), Err(Errno::EILSEQ));
    let outside = Header { lba: crate::units::Lba(SECTORS - 7), ..header(Op::Read, 1, false) };
    assert_eq!(answer(&ask(&mut volume, 0, &outside)), Err(Errno::EINVAL));
    assert_eq!(answer(&ask(&mut volume, 0, &header(Op::Read, 2, false))), Err(Errno::EBADE));
    assert_eq!(answer(&ask(&mut volume, 0, &header(Op::Keepalive, 9, false))), Ok(()));
    volume.handle(Event::Resized { sectors: SECTORS * 2, layout: None });
    assert_eq!(work(&ask(&mut volume, 0, &outside)).op, DiskOp::Read);
    let again = header(Op::Hello, 1, false);
    assert!(matches!(ask(&mut volume, 1, &again)[..], [Effect::Close { .. }]));
    assert_eq!(ask(&mut volume, 1, &write), [], "nothing is taken from a closed connection");
}

#[test]
fn a_durable_zero_is_flushed_before_its_answer() {
    let mut volume = attached(true);
    let zero = work(&ask(&mut volume, 0, &header(Op::WriteZeroes, 1, true)));
    let sync = work(&done(&mut volume, zero, Ok(())));
    assert_eq!(sync.op, DiskOp::Sync);
    assert_eq!(answer(&done(&mut volume, sync, Ok(()))), Ok(()));
    let zero = work(&ask(&mut volume, 0, &header(Op::Discard, 1, true)));
    assert_eq!(answer(&done(&mut volume, zero, Err(Errno::ENOSPC))), Err(Errno::ENOSPC));
}

#[test]
fn a_failed_flush_says_why_once_and_is_never_undone() {
    let mut volume = attached(false);
    let sync = work(&ask(&mut volume, 0, &header(Op::Flush, 1, false)));
    assert_eq!(ask(&mut volume, 1, &header(Op::Flush, 1, false)), [], "it shares the sync in flight");
    let save = done(&mut volume, sync, Err(Errno::ENOSPC));
    assert!(matches!(save[..], [Effect::Save(_)]), "it is durable before anybody is told: {save:?}");
    assert_eq!(ask(&mut volume, 2, &header(Op::Flush, 1, false)), []);
    volume.handle(Event::Saved { part: Part::State, result: Ok(()) });
    assert!(volume.state().flush_failed);
    let mut answers = effects(&mut volume);
    assert_eq!(answer(&answers[2..]), Err(Errno::EIO));
    answers.truncate(2);
    answers.iter().for_each(|one| assert_eq!(answer(std::slice::from_ref(one)), Err(Errno::ENOSPC)));
    let write = work(&ask(&mut volume, 0, &header(Op::Write, 1, false)));
    assert_eq!(answer(&done(&mut volume, write, Ok(()))), Ok(()));
    assert_eq!(answer(&ask(&mut volume, 0, &header(Op::Flush, 1, false))), Err(Errno::EIO));
    // Not even for another session.
    attach(&mut volume, 1, 2, 2, 0);
    let flush = header(Op::Flush, 2, false);
    volume.handle(Event::Request { conn: Conn(1), slot: Slot(0), header: &flush, intact: true });
    assert_eq!(answer(&effects(&mut volume)), Err(Errno::EIO));
}

#[test]
fn a_clean_volume_answers_a_flush_at_once() {
    let mut volume = attached(false);
    let sync = work(&ask(&mut volume, 0, &header(Op::Flush, 1, false)));
    done(&mut volume, sync, Ok(()));
    assert_eq!(answer(&ask(&mut volume, 0, &header(Op::Flush, 1, false))), Ok(()));
    let write = work(&ask(&mut volume, 0, &header(Op::Write, 1, true)));
    done(&mut volume, write, Ok(()));
    assert_eq!(answer(&ask(&mut volume, 0, &header(Op::Flush, 1, false))), Ok(()), "a durable write needs no flush");
    let write = work(&ask(&mut volume, 0, &header(Op::Write, 1, false)));
    done(&mut volume, write, Err(Errno::EIO));
    assert_eq!(work(&ask(&mut volume, 0, &header(Op::Flush, 1, false))).op, DiskOp::Sync);
}

/// What the world knows of a connection.
#[derive(Debug)]
struct Peer {
    claim: (u8, u64),
    channel: u16,
    live: bool,
    closed: bool,
    /// Requests without an answer, by slot: what a flush must cover.
    asked: BTreeMap<u16, (Op, bool, usize)>,
}

#[derive(Clone, Debug)]
enum Action {
    Attach {
        session: u8,
        epoch: u64,
        channel: u16,
    },
    Request {
        peer: prop::sample::Index,
        op: Op,
        fua: bool,
    },
    Done {
        work: prop::sample::Index,
        fails: bool,
    },
    Gone {
        peer: prop::sample::Index,
    },
    Saved {
        fails: bool,
    },
    /// The server dies while it saves or not, and comes back.
    Restart {
        landed: bool,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let op = prop::sample::select(vec![Op::Read, Op::Write, Op::Flush, Op::Flush, Op::Discard, Op::WriteZeroes]);
    prop_oneof![
        2 => (0u8..3, 0u64..4, 0u16..3).prop_map(|(more, epoch, channel)| Action::Attach { session: 1 + more, epoch, channel }),
        10 => (any::<prop::sample::Index>(), op, prop::bool::weighted(0.2)).prop_map(|(peer, op, fua)| Action::Request { peer, op, fua }),
        9 => (any::<prop::sample::Index>(), prop::bool::weighted(0.02)).prop_map(|(work, fails)| Action::Done { work, fails }),
        1 => any::<prop::sample::Index>().prop_map(|peer| Action::Gone { peer }),
        6 => prop::bool::weighted(0.05).prop_map(|fails| Action::Saved { fails }),
        1 => any::<bool>().prop_map(|landed| Action::Restart { landed }),
    ]
}

/// The world: connections, a disk that forgets what no sync covered, and what was promised.
struct World {
    rules: Volume,
    peers: BTreeMap<u64, Peer>,
    /// Work on the disk; a sync with how many writes were done when it was asked for.
    disk: Vec<(Work, usize)>,
    /// Writes done, the unknown past being the first; and how many of them are durable.
    written: usize,
    durable: usize,
    /// Somebody was told that a sync has failed.
    sync_failed: bool,
    /// The state file, and the write to it that is on its way.
    file: Vec<u8>,
    saving: Vec<Write>,
    /// A write of it has failed.
    unsaved: bool,
    /// The latest claim that was ever welcomed.
    held: Option<Claim>,
    next: u64,
}

impl World {
    fn new() -> World {
        World {
            rules: volume(true),
            peers: BTreeMap::new(),
            disk: Vec::new(),
            written: 1,
            durable: 0,
            sync_failed: false,
            file: state::fresh(VOLUME, Some(LAYOUT)),
            saving: Vec::new(),
            unsaved: false,
            held: None,
            next: 0,
        }
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::Attach { session, epoch, channel } => {
                let conn = self.next;
                self.next += 1;
                let claim = (*session, *epoch);
                let peer = Peer { claim, channel: *channel, live: false, closed: false, asked: BTreeMap::new() };
                self.peers.insert(conn, peer);
                let (hello, member) = (hello(*session, *channel), member());
                let (conn, epoch) = (Conn(conn), Epoch(*epoch));
                self.rules.handle(Event::Attach { conn, hello: &hello, epoch, assigned: Some(&member) });
                let all = effects(&mut self.rules);
                self.check(all);
            }
            Action::Request { peer, op, fua } => {
                let Some((conn, peer)) = pick(&mut self.peers, peer) else { return };
                let slot = (0..).find(|slot| !peer.asked.contains_key(slot)).unwrap();
                let fua = *fua && matches!(op, Op::Write | Op::Discard | Op::WriteZeroes);
                // Requests of a connection that is not welcome are dropped; the world would not even read them.
                if peer.live && !peer.closed {
                    peer.asked.insert(slot, (*op, fua, self.written));
                }
                let header = header(*op, peer.claim.1, fua);
                self.rules.handle(Event::Request { conn: Conn(conn), slot: Slot(slot), header: &header, intact: true });
                let all = effects(&mut self.rules);
                self.check(all);
            }
            Action::Done { work, fails } => {
                if !self.disk.is_empty() {
                    let at = work.index(self.disk.len());
                    self.done(at, *fails);
                }
            }
            Action::Gone { peer } => {
                let Some((conn, _)) = pick(&mut self.peers, peer) else { return };
                self.peers.remove(&conn);
                self.rules.handle(Event::Gone { conn: Conn(conn) });
                let all = effects(&mut self.rules);
                self.check(all);
            }
            Action::Saved { fails } => self.saved(!fails),
            Action::Restart { landed } => {
                for write in std::mem::take(&mut self.saving) {
                    if *landed {
                        self.put(&write);
                    }
                }
                self.peers.clear();
                self.disk.clear();
                self.rules = volume_from(&self.file);
                // Its first flush has to sync whatever was written.
                self.written += 1;
            }
        }
    }

    fn put(&mut self, write: &Write) {
        let at = usize::try_from(write.offset).unwrap();
        self.file[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
    }

    /// What a crash would leave.
    fn kept(&self) -> State {
        state::load(&self.file, VOLUME).unwrap().1
    }

    fn saved(&mut self, lands: bool) {
        if self.saving.is_empty() {
            return;
        }
        let write = self.saving.remove(0);
        self.unsaved |= !lands;
        if lands {
            self.put(&write);
        }
        self.rules.handle(Event::Saved { part: write.part, result: if lands { Ok(()) } else { Err(Errno::EIO) } });
        assert_eq!(*self.rules.state(), self.kept());
        let all = effects(&mut self.rules);
        self.check(all);
    }

    fn done(&mut self, at: usize, fails: bool) {
        let (work, covers) = self.disk.swap_remove(at);
        match work.op {
            DiskOp::Read => {}
            DiskOp::Sync if fails => {}
            DiskOp::Sync => self.durable = self.durable.max(covers),
            DiskOp::Write { durable: true } if !fails => {}
            _ => self.written += 1,
        }
        let all = done(&mut self.rules, work, if fails { Err(Errno::EIO) } else { Ok(()) });
        self.check(all);
    }

    fn check(&mut self, all: Vec<Effect>) {
        for effect in all {
            match effect {
                Effect::Disk(work) => {
                    if let Some((conn, _)) = work.place {
                        let peer = &self.peers[&conn.0];
                        assert!(peer.live && !peer.closed, "work for a connection that is not live");
                    } else {
                        assert!(!self.disk.iter().any(|(other, _)| other.op == DiskOp::Sync), "two syncs");
                        assert!(!self.sync_failed, "a sync after a failed one");
                    }
                    self.disk.push((work, self.written));
                }
                Effect::Save(write) => {
                    let other = self.saving.iter().any(|other| other.part == write.part);
                    assert!(!other, "two writes of one part");
                    self.saving.push(write);
                }
                Effect::Stopped => panic!("nobody stops it"),
                Effect::Answer { .. } => panic!("nobody has asked"),
                Effect::Reply { conn, slot, header } => self.replied(conn, slot, &header),
                Effect::Welcome { conn, welcome } => self.welcomed(conn, &welcome),
                Effect::Refuse { conn, errno, .. } => {
                    let (session, epoch) = self.peers[&conn.0].claim;
                    let held = self.kept().claim.map(|held| (held.epoch.0, held.session));
                    let fenced = held.is_some_and(|held| epoch <= held.0 && held != (epoch, Id([session; 16])));
                    assert!(
                        errno == Errno::EIO || (errno == Errno::EBADE && fenced),
                        "{errno}: {session}.{epoch} of {held:?}"
                    );
                    self.close(conn);
                }
                Effect::Close { conn, .. } => self.close(conn),
            }
        }
    }

    fn close(&mut self, conn: Conn) {
        let peer = self.peers.get_mut(&conn.0).unwrap();
        assert!(!peer.closed, "closed twice");
        peer.closed = true;
        peer.asked.clear();
    }

    fn replied(&mut self, conn: Conn, slot: Slot, header: &Header) {
        let peer = self.peers.get_mut(&conn.0).unwrap();
        assert!(peer.live && !peer.closed, "an answer on a connection that is not live");
        let (op, fua, written) = peer.asked.remove(&slot.0).expect("a request is answered once");
        assert_eq!(header.op, op);
        if op == Op::Flush && header.status != 0 {
            assert!(self.kept().flush_failed || self.unsaved, "a failure that a crash forgets was told");
            self.sync_failed |= self.kept().flush_failed;
        }
        let zeroes = fua && op != Op::Write;
        if (op == Op::Flush || zeroes) && header.status == 0 {
            assert!(!self.sync_failed, "a flush succeeds after one has failed");
            assert!(self.durable >= written, "{op:?}: {} of {written} writes are durable", self.durable);
        }
        if zeroes && header.status == 0 {
            // Its own write came after it was asked for.
            assert!(self.durable > written);
        }
    }

    fn welcomed(&mut self, conn: Conn, welcome: &Welcome) {
        assert_eq!((welcome.sectors, welcome.instance), (SECTORS, Id([2; 16])));
        let (claim, channel) = (self.peers[&conn.0].claim, self.peers[&conn.0].channel);
        let kept = self.kept().claim.expect("a claim is durable before its welcome");
        assert_eq!((kept.session, kept.epoch), (Id([claim.0; 16]), Epoch(claim.1)));
        let older = self
            .held
            .is_some_and(|held| kept.epoch < held.epoch || (kept.epoch == held.epoch && kept.session != held.session));
        assert!(!older, "{claim:?} is welcome after {:?}", self.held);
        self.held = Some(kept);
        for (number, other) in
            self.peers.iter().filter(|(number, other)| **number != conn.0 && other.live && !other.closed)
        {
            assert_eq!(other.claim, claim, "{number}: two claims are live");
            assert_ne!(other.channel, channel, "{number}: two connections of a channel are live");
        }
        let peer = self.peers.get_mut(&conn.0).unwrap();
        assert!(!peer.live && !peer.closed);
        peer.live = true;
    }

    /// What the disk still does for connections that a welcome had to wait for. `owners` knows every connection there ever was.
    fn overtaken(&self, conn: u64, owners: &BTreeMap<u64, ((u8, u64), u16)>) -> bool {
        let (claim, channel) = owners[&conn];
        self.disk.iter().filter_map(|(work, _)| work.place).any(|(former, _)| {
            let (their_claim, their_channel) = owners[&former.0];
            former.0 != conn && (their_claim != claim || their_channel == channel)
        })
    }
}

fn pick<'a>(peers: &'a mut BTreeMap<u64, Peer>, index: &prop::sample::Index) -> Option<(u64, &'a mut Peer)> {
    if peers.is_empty() {
        return None;
    }
    let at = index.index(peers.len());
    peers.iter_mut().nth(at).map(|(conn, peer)| (*conn, peer))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn nothing_promised_is_ever_broken(actions in prop::collection::vec(action(), 1..200)) {
        let mut world = World::new();
        let mut owners = BTreeMap::new();
        for action in &actions {
            if let Action::Attach { session, epoch, channel } = action {
                owners.insert(world.next, ((*session, *epoch), *channel));
            }
            let before: Vec<u64> = world.peers.iter().filter(|(_, peer)| peer.live).map(|(conn, _)| *conn).collect();
            world.act(action);
            for (conn, peer) in &world.peers {
                let new = peer.live && !before.contains(conn);
                prop_assert!(!new || !world.overtaken(*conn, &owners), "welcomed before its predecessors were done");
            }
        }
        // When the disk has answered everything, everyone has been.
        while !world.disk.is_empty() || !world.saving.is_empty() {
            world.saved(true);
            if !world.disk.is_empty() {
                world.done(0, false);
            }
        }
        for (conn, peer) in &world.peers {
            prop_assert!(peer.closed || peer.live, "{} still waits", conn);
            prop_assert!(peer.asked.is_empty(), "{}: no answer to {:?}", conn, peer.asked);
        }
    }
}
