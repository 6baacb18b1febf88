//! The rules of a volume on a server, under peers that send what they like and a disk that answers when it likes. The bytes are
//! a script: who connects, what each sends, which disk job ends, who goes.

use std::collections::BTreeMap;

use dst::errno::Errno;
use dst::store::budget::Budget;
use dst::store::region::{self, Layout, Log};
use dst::store::state::{Book, Part, State};
use dst::store::volume::{Config, Conn, Effect, Event, Job, Slot, Volume};
use dst::units::{Epoch, Id};
use dst::wire::frame::{HEADER_BYTES, Header};
use dst::wire::session::{Hello, features};
use dst::wire::volume::Member;

const SECTORS: u64 = 4096;
const CONNECTIONS: u64 = 24;

/// Where a connection stands, as its peer sees it.
#[derive(PartialEq, Eq)]
enum Stage {
    Greeting,
    Live,
    Closed,
}

struct Peer {
    stage: Stage,
    budget: Budget,
    /// Requests that are not answered.
    asked: BTreeMap<Slot, Header>,
}

struct World {
    volume: Volume,
    sectors: u64,
    peers: BTreeMap<Conn, Peer>,
    jobs: Vec<Job>,
    saving: Vec<Part>,
    next: u64,
}

/// Runs the script; then the disk ends everything, and every live peer must have all its answers.
pub fn run(script: &[u8]) {
    let id = |byte| Id([byte; 16]);
    let sparse = script.len().is_multiple_of(2);
    let config = Config { name: "v".to_owned(), id: id(9), instance: id(8), boot: id(7), sparse, write_through: false };
    let layout = Layout { region_sectors: 64, regions: (SECTORS + 256 * 8).div_ceil(64) };
    let log = Some(Log::load(&region::fresh(0..layout.pages()), layout));
    let volume = Volume::new(config, SECTORS, Book::new(id(9), (0, State::default())), log);
    let mut world =
        World { volume, sectors: SECTORS, peers: BTreeMap::new(), jobs: Vec::new(), saving: Vec::new(), next: 0 };
    let mut script = script;
    while let Some((&[what, which, how], rest)) = script.split_first_chunk::<3>() {
        script = rest;
        match what % 7 {
            0 => world.connect(which, how),
            1 | 2 => {
                let Some((frame, rest)) = script.split_first_chunk::<HEADER_BYTES>() else { break };
                script = rest;
                world.send(which, how, frame);
            }
            3 => world.disk(which, how),
            4 => world.go(which),
            6 => world.save(how),
            _ => {
                world.sectors = SECTORS + u64::from(which) * 8;
                let sectors = world.sectors;
                let layout = Layout::new(SECTORS + 256 * 8, 64);
                world.tell(Event::Resized { sectors, layout });
            }
        }
    }
    while !world.jobs.is_empty() || !world.saving.is_empty() {
        world.save(0);
        world.disk(0, 0);
    }
    for peer in world.peers.values() {
        assert!(peer.stage != Stage::Live || (peer.asked.is_empty() && peer.budget.is_whole()), "a request is lost");
        assert!(peer.stage != Stage::Greeting, "a HELLO is lost");
    }
}

impl World {
    fn connect(&mut self, which: u8, how: u8) {
        if self.peers.len() as u64 >= CONNECTIONS {
            return;
        }
        let conn = Conn(self.next);
        self.next += 1;
        self.peers.insert(conn, Peer { stage: Stage::Greeting, budget: Budget::default(), asked: BTreeMap::new() });
        let array = Id([1 + how % 2; 16]);
        let member = Member { id: array, name: "a".to_owned(), node: "n-0".to_owned() };
        let hello = Hello {
            versions: (1, 1),
            features: if how & 2 == 0 { features::OURS } else { 0 },
            array,
            session: Id([1 + (how >> 2) % 2; 16]),
            host: Id([7; 16]),
            channel: u16::from(which % 4),
            volume: "v".to_owned(),
        };
        let assigned = (how >> 3 != 1).then_some(&member);
        self.tell(Event::Attach { conn, hello: &hello, epoch: Epoch(u64::from(how >> 4) % 4), assigned });
    }

    fn send(&mut self, which: u8, how: u8, frame: &[u8; HEADER_BYTES]) {
        let Ok(header) = Header::decode(&super::sealed(frame)) else { return };
        let count = self.peers.len().max(1);
        let Some((conn, peer)) = self.peers.iter_mut().nth(usize::from(which) % count) else { return };
        if peer.stage != Stage::Live {
            return;
        }
        let conn = *conn;
        // What does not fit the budget is not read.
        let Some(slot) = peer.budget.take(&header) else { return };
        peer.asked.insert(slot, header);
        self.tell(Event::Request { conn, slot, header: &header, intact: how != 7 });
    }

    fn disk(&mut self, which: u8, how: u8) {
        if self.jobs.is_empty() {
            return;
        }
        let job = self.jobs.swap_remove(usize::from(which) % self.jobs.len());
        let result = match how {
            1 => Err(Errno::EIO),
            2 => Err(Errno::ENOSPC),
            _ => Ok(()),
        };
        self.tell(Event::DiskDone { job, result });
    }

    fn save(&mut self, how: u8) {
        if let Some(part) = self.saving.pop() {
            let result = if how == 1 { Err(Errno::EIO) } else { Ok(()) };
            self.tell(Event::Saved { part, result });
        }
    }

    fn go(&mut self, which: u8) {
        let count = self.peers.len().max(1);
        let Some(conn) = self.peers.keys().nth(usize::from(which) % count).copied() else { return };
        self.peers.remove(&conn);
        self.tell(Event::Gone { conn });
    }

    fn tell(&mut self, event: Event<'_>) {
        self.volume.handle(event);
        while let Some(effect) = self.volume.poll_effect() {
            self.obey(effect);
        }
    }

    fn obey(&mut self, effect: Effect) {
        match effect {
            Effect::Disk(work) => {
                assert!(!self.jobs.contains(&work.job), "a job's name is used twice");
                assert!(work.extent.within(self.sectors.max(SECTORS)), "work outside the volume");
                if let Some((conn, slot)) = work.place {
                    assert!(self.peers[&conn].asked.contains_key(&slot), "work that nobody asked for");
                }
                self.jobs.push(work.job);
            }
            Effect::Save(write) => {
                assert!(!self.saving.contains(&write.part), "two writes of one part");
                assert!(write.bytes.len().is_multiple_of(512));
                self.saving.push(write.part);
            }
            Effect::Stopped => panic!("nobody stops it"),
            Effect::Answer { .. } => panic!("nobody has asked"),
            Effect::Reply { conn, slot, header } => {
                let peer = self.peers.get_mut(&conn).expect("an answer to someone who has gone");
                assert!(peer.stage == Stage::Live, "an answer to a connection that is not live");
                let asked = peer.asked.remove(&slot).expect("an answer to nothing");
                assert!(header.is_reply() && (header.op, header.tag) == (asked.op, asked.tag));
                peer.budget.give(slot, &asked);
            }
            Effect::Welcome { conn, welcome } => {
                let peer = self.peers.get_mut(&conn).expect("a welcome to someone who has gone");
                assert!(peer.stage == Stage::Greeting, "welcomed twice");
                assert_eq!(welcome.sectors, self.sectors);
                peer.stage = Stage::Live;
            }
            Effect::Refuse { conn, .. } | Effect::Close { conn, .. } => {
                let peer = self.peers.get_mut(&conn).expect("someone who has gone is closed");
                assert!(peer.stage != Stage::Closed, "closed twice");
                peer.stage = Stage::Closed;
            }
        }
    }
}
