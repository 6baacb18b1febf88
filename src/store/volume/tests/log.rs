//! The region log of two servers that hold the same data, and a client that may die at any moment: whatever they could then differ
//! in is marked on at least one of them.

use std::collections::BTreeSet;

use super::*;

/// Regions that are written, on both pages of the log.
const PLACES: [u64; 4] = [0, 1, 7, crate::store::region::PAGE_REGIONS + 3];

/// A value, and when it was written.
type Written = (u64, u64);

/// One server, and what of its disk a power cut could leave.
struct Side {
    rules: Volume,
    file: Vec<u8>,
    saves: Vec<Write>,
    /// Work with its value; a sync with what it covers.
    jobs: Vec<(Work, u64)>,
    /// Frames on their way, with the values of writes. They come by several connections, so in any order.
    inbox: Vec<(Header, u64)>,
    asked: BTreeMap<u16, u64>,
    slot: u16,
    clock: u64,
    /// What each place may hold: the first value is durable, each later one may be.
    holds: Vec<Vec<Written>>,
    answers: Vec<Header>,
}

impl Side {
    fn new(instance: u8) -> Side {
        let file = state::fresh(VOLUME, Some(LAYOUT));
        let config = Config {
            name: "v".to_owned(),
            id: VOLUME,
            instance: Id([instance; 16]),
            boot: BOOT,
            sparse: false,
            write_through: false,
        };
        let log = Log::load(&file[state::SLOTS_BYTES..], LAYOUT);
        let rules = Volume::new(config, SECTORS, Book::new(VOLUME, state::load(&file, VOLUME).unwrap()), Some(log));
        let holds = vec![vec![(0, 0)]; PLACES.len()];
        let (saves, jobs, inbox, answers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut side =
            Side { rules, file, saves, jobs, inbox, asked: BTreeMap::new(), slot: 0, clock: 0, holds, answers };
        let (hello, member) = (hello(1, 0), member());
        let (hello, assigned) = (&hello, Some(&member));
        side.tell(Event::Attach { conn: Conn(0), hello, epoch: Epoch(1), assigned });
        side.saved(0, true);
        side
    }

    fn tell(&mut self, event: Event<'_>) {
        self.rules.handle(event);
        for effect in effects(&mut self.rules) {
            match effect {
                Effect::Save(write) => {
                    assert!(self.saves.iter().all(|other| other.part != write.part), "two writes of a part");
                    self.saves.push(write);
                }
                Effect::Disk(work) => {
                    assert!(!work.op.changes() || self.log().is_durable(work.extent), "not marked yet");
                    let value = work.place.map_or(self.clock, |(_, slot)| self.asked[&slot.0]);
                    self.jobs.push((work, value));
                }
                Effect::Reply { header, .. } => self.answers.push(header),
                Effect::Welcome { welcome, .. } => assert_ne!(welcome.features & features::REGION_LOG, 0),
                other => panic!("{other:?}"),
            }
        }
    }

    fn saved(&mut self, at: usize, lands: bool) {
        if self.saves.is_empty() {
            return;
        }
        let write = self.saves.remove(at % self.saves.len());
        if lands {
            put(&mut self.file, &write);
        }
        let result = if lands { Ok(()) } else { Err(Errno::EIO) };
        self.tell(Event::Saved { part: write.part, result });
    }

    fn deliver(&mut self, at: usize) {
        if self.inbox.is_empty() {
            return;
        }
        let (header, value) = self.inbox.remove(at % self.inbox.len());
        self.slot = (self.slot + 1) % 1000;
        self.asked.insert(self.slot, value);
        self.tell(Event::Request { conn: Conn(0), slot: Slot(self.slot), header: &header, intact: true });
    }

    fn done(&mut self, at: usize) {
        if self.jobs.is_empty() {
            return;
        }
        let (work, value) = self.jobs.remove(at % self.jobs.len());
        self.clock += 1;
        if let Some(place) = place_of(&work).filter(|_| work.op.changes()) {
            let holds = &mut self.holds[place];
            if work.op == (DiskOp::Write { durable: true }) {
                holds.clear();
            }
            holds.push((self.clock, value));
        } else if work.op == DiskOp::Sync {
            for holds in &mut self.holds {
                let covered = holds.iter().filter(|(when, _)| *when <= value).count();
                holds.drain(..covered.saturating_sub(1));
            }
        }
        self.tell(Event::DiskDone { job: work.job, result: Ok(()) });
    }

    /// Everything that the place may hold after a crash.
    fn possible(&self, place: usize) -> BTreeSet<u64> {
        let flying = self.jobs.iter().filter(|(work, _)| work.op.changes() && place_of(work) == Some(place));
        self.holds[place].iter().map(|(_, value)| *value).chain(flying.map(|(_, value)| *value)).collect()
    }

    fn log(&self) -> Log {
        Log::load(&self.file[state::SLOTS_BYTES..], LAYOUT)
    }

    /// Whether the place is marked on the disk, whatever becomes of the writes on their way.
    fn is_marked(&self, place: usize) -> bool {
        let mut landed = self.file.clone();
        self.saves.iter().for_each(|write| put(&mut landed, write));
        let region = Extent::new(PLACES[place] * LAYOUT.region_sectors, 1);
        let landed = Log::load(&landed[state::SLOTS_BYTES..], LAYOUT);
        self.log().is_durable(region) && landed.is_durable(region)
    }
}

fn put(file: &mut [u8], write: &Write) {
    let at = usize::try_from(write.offset).unwrap();
    file[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
}

fn place_of(work: &Work) -> Option<usize> {
    let region = work.extent.start.0 / LAYOUT.region_sectors;
    PLACES.iter().position(|place| *place == region)
}

/// What the client remembers of a flush: the servers' points, and the writes that were not complete when it was answered.
#[derive(Clone, Default)]
struct Candidate {
    points: [u64; 2],
    open: BTreeSet<usize>,
}

/// The client: one write of a place at a time, one flush at a time.
#[derive(Default)]
struct Client {
    value: u64,
    sequence: u32,
    /// The sides whose answer is missing, by place.
    writing: BTreeMap<usize, [bool; 2]>,
    /// The flush on its way: whose answers are missing, what they said, and whether the candidate was complete before it began.
    flushing: Option<([bool; 2], [u64; 2], bool)>,
    candidate: Option<Candidate>,
    /// What may be said with the next flush.
    ready: [u64; 2],
    /// Something has failed: nothing may be cleaned any more.
    stale: bool,
}

struct Pair {
    sides: [Side; 2],
    client: Client,
    cleaned: bool,
}

impl Pair {
    fn new() -> Pair {
        Pair { sides: [Side::new(8), Side::new(9)], client: Client::default(), cleaned: false }
    }

    fn send(&mut self, header: Header, value: u64, points: [u64; 2]) {
        for (side, point) in self.sides.iter_mut().zip(points) {
            let header = if header.op == Op::Flush { header.with_point(point) } else { header };
            side.inbox.push((header, value));
        }
    }

    fn header(&mut self, op: Op, extent: Extent, tag: usize) -> Header {
        self.client.sequence += 1;
        Header::request(op, u32::try_from(tag).unwrap(), self.client.sequence, Epoch(1), extent)
    }

    fn write(&mut self, place: usize, fua: bool) {
        if self.client.writing.contains_key(&place) {
            return;
        }
        self.client.value += 1;
        let extent = Extent::new(PLACES[place] * LAYOUT.region_sectors + 8, 8);
        let header = self.header(Op::Write, extent, place);
        let mut header = header.with_body(header.length, 0);
        header.flags |= if fua { flags::FUA } else { 0 };
        self.client.writing.insert(place, [true; 2]);
        self.send(header, self.client.value, [0; 2]);
    }

    fn flush(&mut self) {
        if self.client.flushing.is_some() {
            return;
        }
        let header = self.header(Op::Flush, Extent::default(), PLACES.len());
        let points = if self.client.stale { [0; 2] } else { self.client.ready };
        let complete = self.client.candidate.as_ref().is_some_and(|candidate| candidate.open.is_empty());
        self.client.flushing = Some(([true; 2], [0; 2], complete));
        self.send(header, 0, points);
    }

    fn collect(&mut self) {
        for at in 0..2 {
            for header in std::mem::take(&mut self.sides[at].answers) {
                self.client.stale |= header.status != 0;
                if header.op == Op::Flush {
                    self.flushed(at, header.point());
                } else {
                    let place = usize::try_from(header.tag).unwrap();
                    let open = self.client.writing.get_mut(&place).expect("it was asked");
                    open[at] = false;
                    if *open == [false; 2] {
                        self.client.writing.remove(&place);
                        if let Some(candidate) = &mut self.client.candidate {
                            candidate.open.remove(&place);
                        }
                    }
                }
            }
        }
    }

    fn flushed(&mut self, at: usize, point: u64) {
        let client = &mut self.client;
        let Some((open, points, complete)) = &mut client.flushing else { panic!("no flush was asked") };
        (open[at], points[at]) = (false, point);
        if *open != [false; 2] {
            return;
        }
        let open = client.writing.keys().copied().collect();
        let newer = Candidate { points: *points, open };
        match &mut client.candidate {
            // Every write that the candidate's syncs could have seen was complete before this flush, which covered it everywhere.
            Some(candidate) if *complete => {
                client.ready = candidate.points;
                *candidate = newer;
            }
            Some(_) => {}
            none => *none = Some(newer),
        }
        client.flushing = None;
    }

    fn act(&mut self, action: Step) {
        match action {
            Step::Write { place, fua } => self.write(place, fua),
            Step::Flush => self.flush(),
            Step::Deliver { side, at } => self.sides[side].deliver(at),
            Step::Done { side, at } => self.sides[side].done(at),
            Step::Saved { side, at, fails } => self.sides[side].saved(at, !fails),
            Step::Flushes { count } => (0..count).for_each(|_| self.whole_flush()),
        }
        self.collect();
        self.check();
    }

    /// A flush from its beginning to its end, while everything else stands still.
    fn whole_flush(&mut self) {
        self.flush();
        for at in 0..2 {
            let side = &mut self.sides[at];
            while let Some(flush) = side.inbox.iter().position(|(header, _)| header.op == Op::Flush) {
                side.deliver(flush);
            }
            while let Some(sync) = side.jobs.iter().position(|(work, _)| work.op == DiskOp::Sync) {
                side.done(sync);
            }
            self.collect();
            self.check();
        }
    }

    fn check(&mut self) {
        let [one, other] = &self.sides;
        for place in 0..PLACES.len() {
            let (a, b) = (one.possible(place), other.possible(place));
            let marked = one.is_marked(place) || other.is_marked(place);
            assert!(
                marked || (a == b && a.len() == 1),
                "place {place} may hold {a:?} and {b:?}, and is marked nowhere"
            );
            self.cleaned |= !marked && one.clock > 0 && !a.contains(&0);
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write { place: usize, fua: bool },
    Flush,
    Flushes { count: usize },
    Deliver { side: usize, at: usize },
    Done { side: usize, at: usize },
    Saved { side: usize, at: usize, fails: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let (side, at) = (0..2usize, 0..8usize);
    prop_oneof![
        6 => (0..PLACES.len(), prop::bool::weighted(0.2)).prop_map(|(place, fua)| Step::Write { place, fua }),
        2 => Just(Step::Flush),
        3 => (1..20usize).prop_map(|count| Step::Flushes { count }),
        14 => (side.clone(), at.clone()).prop_map(|(side, at)| Step::Deliver { side, at }),
        14 => (side.clone(), at.clone()).prop_map(|(side, at)| Step::Done { side, at }),
        12 => (side, at, prop::bool::weighted(0.004)).prop_map(|(side, at, fails)| Step::Saved { side, at, fails }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn what_may_differ_is_marked(steps in prop::collection::vec(step(), 1..400)) {
        let mut pair = Pair::new();
        steps.into_iter().for_each(|step| pair.act(step));
    }
}

/// The log would keep its promise by never cleaning anything.
#[test]
fn what_is_flushed_everywhere_is_cleaned_in_the_end() {
    let mut pair = Pair::new();
    let settle = |pair: &mut Pair| {
        for _ in 0..20 {
            for side in 0..2 {
                pair.act(Step::Deliver { side, at: 0 });
                pair.act(Step::Saved { side, at: 0, fails: false });
                pair.act(Step::Done { side, at: 0 });
            }
        }
    };
    (0..PLACES.len()).for_each(|place| pair.act(Step::Write { place, fua: false }));
    settle(&mut pair);
    assert!((0..PLACES.len()).all(|place| pair.sides[0].is_marked(place)));
    for _ in 0..6 {
        // One place is written all the time.
        pair.act(Step::Write { place: 1, fua: false });
        settle(&mut pair);
        pair.act(Step::Flushes { count: 16 });
        settle(&mut pair);
    }
    for side in &pair.sides {
        let marked: Vec<_> = (0..PLACES.len()).filter(|place| side.is_marked(*place)).collect();
        assert_eq!(marked, [1]);
    }
    assert!(pair.cleaned);
}

#[test]
fn the_claimant_is_told_what_is_marked() {
    let mut side = Side::new(8);
    let ask = |side: &mut Side, epoch, after| {
        let (name, owner) = ("v".to_owned(), Id([1; 16]));
        let ask = Regions { name, array: ARRAY, epoch: Epoch(epoch), owner, after };
        side.rules.handle(Event::Ask { number: 3, ask: Ask::Regions(&ask) });
        match &effects(&mut side.rules)[..] {
            [Effect::Answer { number: 3, result }] => result.clone().map_err(|(errno, _)| errno),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ask(&mut side, 2, None), Err(Errno::EBADE));
    for region in [7, 8, 1] {
        let header = Header::request(Op::Discard, 1, 7, Epoch(1), Extent::new(region * LAYOUT.region_sectors, 8));
        side.inbox.push((Header { sequence: u32::try_from(region).unwrap(), ..header }, 1));
        side.deliver(0);
    }
    let page = |marked: &[(u64, u64)]| {
        let region_bytes = LAYOUT.region_sectors * 512;
        Ok(Told::Regions(RegionPage { marked: marked.to_vec(), more: false, region_bytes }))
    };
    assert_eq!(ask(&mut side, 1, None), page(&[(1, 1), (7, 2)]), "what is about to be marked is told too");
    assert_eq!(ask(&mut side, 1, Some(7)), page(&[(8, 1)]));
    assert_eq!(ask(&mut side, 1, Some(u64::MAX)), page(&[]));
}

#[test]
fn a_mark_that_cannot_be_written_fails_its_change() {
    let mut side = Side::new(8);
    let ask = |side: &mut Side, sequence| {
        let header = Header::request(Op::WriteZeroes, 1, sequence, Epoch(1), Extent::new(0, 8));
        side.inbox.push((header, 1));
        side.deliver(0);
    };
    ask(&mut side, 1);
    assert_eq!(side.saves.len(), 2, "the mark, and that there is something to lose");
    let page = side.saves.iter().position(|write| write.part == Part::Page(0)).unwrap();
    side.saved(page, false);
    assert_eq!(side.answers.pop().map(|answer| answer.result()), Some(Err(Errno::EIO)));
    side.saved(0, true);
    assert!(side.jobs.is_empty());
    ask(&mut side, 2);
    side.saved(0, true);
    assert_eq!(side.jobs.len(), 1, "the next one tries again");
}

#[test]
fn a_strange_point_cleans_nothing() {
    for (strange, cleans) in [(0, false), (1, false), (u64::MAX, false), (1 << 39, true)] {
        let mut side = Side::new(8);
        let zero = Header::request(Op::WriteZeroes, 1, 1, Epoch(1), Extent::new(0, 8));
        side.inbox.push((zero, 1));
        side.deliver(0);
        side.saved(0, true);
        side.saved(0, true);
        side.done(0);
        for sequence in 2..100 {
            let flush = Header::request(Op::Flush, 2, sequence, Epoch(1), Extent::default());
            // Its own points are as good as any for a volume that is alone.
            let own = side.answers.last().map_or(0, Header::point);
            let point = if cleans { own } else { strange };
            side.inbox.push((flush.with_point(point), 0));
            side.deliver(0);
            side.done(0);
            side.saved(0, true);
        }
        assert_eq!(side.is_marked(0), !cleans, "{strange}");
    }
}
