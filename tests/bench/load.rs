//! The load generator: one connection, so many requests in flight, in the dst protocol or in NBD. The same loop for both, so that
//! servers of different protocols can be compared.
//!
//! It does what its protocol asks of a client, digests of writes included, and looks at no data that it reads. Its connection is
//! a blocking one: it sends whatever is free, and takes whatever has come.

use std::io::{IoSlice, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use dst::units::{Epoch, Extent, Id};
use dst::wire::frame::{HEADER_BYTES, Header, Op, bind_crc, data_crc, message_crc};
use dst::wire::session::{HELLO_BYTES, Hello, WELCOME_BYTES, features};
use dst::wire::volume::{Assign, Create, Member, Volume, call};

use crate::meter::own_cpu;

/// Received at once at most.
const INTAKE_BYTES: usize = 1 << 20;

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// To a `dstd server`.
    Dst,
    /// To an NBD server.
    Nbd,
}

/// What is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) write: bool,
    pub(crate) bytes: usize,
    pub(crate) depth: usize,
}

impl Work {
    /// For people, such as `4k randread QD32`.
    pub(crate) fn name(&self) -> String {
        let op = if self.write { "write" } else { "read" };
        format!("{}k rand{op} QD{}", self.bytes >> 10, self.depth)
    }
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    /// Of the generator itself.
    pub(crate) cpu_seconds: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// The member that volumes of the benchmark belong to.
fn member() -> Member {
    Member { id: Id([0xbe; 16]), name: "bench".to_owned(), node: "n-0".to_owned() }
}

/// Makes a volume for the generator.
pub(crate) fn make_volume(address: &str, name: &str, size: u64) {
    let mut stream = connect(address);
    let create = Create { name: name.to_owned(), size, sparse: false, write_through: false };
    let _: Volume = call(&mut stream, Op::VolumeCreate, &create).unwrap();
    let _: Volume = call(&mut stream, Op::VolumeAssign, &Assign { name: name.to_owned(), array: member() }).unwrap();
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

/// What differs between the protocols.
struct Speech {
    dialect: Dialect,
    write: bool,
    bytes: usize,
    epoch: Epoch,
    payload_crc: u32,
}

impl Speech {
    /// The head of a request for the run of `bytes` bytes at `offset`.
    fn request(&self, slot: usize, sequence: u32, offset: u64, to: &mut Vec<u8>) {
        let tag = u32::try_from(slot).unwrap();
        let length = u32::try_from(self.bytes).unwrap();
        match self.dialect {
            Dialect::Dst => {
                let extent = Extent::new(offset / 512, self.bytes as u64 / 512);
                let op = if self.write { Op::Write } else { Op::Read };
                let header = Header::request(op, tag, sequence, self.epoch, extent);
                let header = if self.write {
                    header.with_body(length, bind_crc(self.payload_crc, extent.start))
                } else {
                    header
                };
                to.extend_from_slice(&header.encode());
            }
            Dialect::Nbd => {
                to.extend_from_slice(&0x2560_9513u32.to_be_bytes());
                to.extend_from_slice(&[0, 0, 0, u8::from(self.write)]);
                to.extend_from_slice(&u64::from(tag).to_be_bytes());
                to.extend_from_slice(&offset.to_be_bytes());
                to.extend_from_slice(&length.to_be_bytes());
            }
        }
    }

    fn reply_head_bytes(&self) -> usize {
        if self.dialect == Dialect::Dst { HEADER_BYTES } else { 16 }
    }

    /// The slot of an answer.
    fn slot(&self, head: &[u8]) -> usize {
        match self.dialect {
            Dialect::Dst => {
                let header = Header::decode(head.first_chunk().unwrap()).unwrap();
                header.result().unwrap();
                header.tag as usize
            }
            Dialect::Nbd => {
                assert_eq!(head[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "not a good simple reply");
                usize::try_from(u64::from_be_bytes(*head[8..].first_chunk().unwrap())).unwrap()
            }
        }
    }
}

/// Attaches; of NBD by the oldest way, which every server knows: answers are simple ones.
fn greet(stream: &mut TcpStream, dialect: Dialect, volume: &str, epoch: Epoch) {
    match dialect {
        Dialect::Dst => {
            let mut session = [0; 16];
            session[..8].copy_from_slice(&epoch.0.to_le_bytes());
            let hello = Hello {
                versions: (1, 1),
                features: features::DATA_CRC,
                array: member().id,
                session: Id(session),
                host: Id([0xb; 16]),
                channel: 0,
                volume: volume.to_owned(),
            };
            let body = hello.encode();
            let header = Header::request(Op::Hello, 0, 0, epoch, Extent::default());
            let header = header.with_body(u32::try_from(HELLO_BYTES).unwrap(), message_crc(&body));
            stream.write_all(&[&header.encode()[..], &body[..]].concat()).unwrap();
            let mut answer = [0; HEADER_BYTES];
            stream.read_exact(&mut answer).unwrap();
            Header::decode(&answer).unwrap().result().unwrap();
            stream.read_exact(&mut [0; WELCOME_BYTES]).unwrap();
        }
        Dialect::Nbd => {
            stream.read_exact(&mut [0; 18]).unwrap();
            // Fixed newstyle, no zeroes; EXPORT_NAME of the default export.
            stream.write_all(&[0, 0, 0, 3]).unwrap();
            stream.write_all(b"IHAVEOPT").unwrap();
            stream.write_all(&[0, 0, 0, 1, 0, 0, 0, 0]).unwrap();
            stream.read_exact(&mut [0; 10]).unwrap();
        }
    }
}

/// A small generator of places (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

/// Asks for `time` long, at random places of the first `span` bytes.
pub(crate) fn run(address: &str, dialect: Dialect, volume: &str, span: u64, work: Work, time: Duration) -> Outcome {
    let mut stream = connect(address);
    // Each run is a new owner of the volume.
    let epoch = Epoch(u64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos()).unwrap());
    greet(&mut stream, dialect, volume, epoch);
    let payload: Vec<u8> = (0..work.bytes).map(|at| ((at * 31) >> 3) as u8).collect();
    // The checksum alone, to be bound to each place; 0 is bound to nothing.
    let payload_crc = data_crc_alone(&payload);
    let speech = Speech { dialect, write: work.write, bytes: work.bytes, epoch, payload_crc };
    let mut random = Random(epoch.0 | 1);
    let mut free: Vec<usize> = (0..work.depth).collect();
    let mut begun = vec![Instant::now(); work.depth];
    let mut latencies: Vec<u32> = Vec::with_capacity(1 << 20);
    let mut intake = Intake::new();
    let mut sequence = 0u32;
    let (from, cpu_from) = (Instant::now(), own_cpu());
    loop {
        let now = Instant::now();
        let over = now.duration_since(from) >= time;
        if over && free.len() == work.depth {
            break;
        }
        if !over && !free.is_empty() {
            let mut heads = Vec::with_capacity(free.len() * HEADER_BYTES);
            for slot in &free {
                let offset = random.below(span / work.bytes as u64) * work.bytes as u64;
                sequence = sequence.wrapping_add(1);
                speech.request(*slot, sequence, offset, &mut heads);
                begun[*slot] = now;
            }
            send(&mut stream, &heads, free.len(), if work.write { &payload } else { &[] });
            free.clear();
        }
        intake.fill(&mut stream);
        let now = Instant::now();
        let body = if work.write { 0 } else { work.bytes };
        while let Some(slot) = intake.next(&speech, body) {
            latencies.push(u32::try_from(now.duration_since(begun[slot]).as_nanos()).unwrap_or(u32::MAX));
            free.push(slot);
        }
    }
    let seconds = from.elapsed().as_secs_f64();
    let cpu_seconds = own_cpu() - cpu_from;
    latencies.sort_unstable();
    let at = |share: f64| {
        let index = ((latencies.len() as f64 * share) as usize).min(latencies.len().saturating_sub(1));
        latencies.get(index).map_or(0.0, |nanos| f64::from(*nanos) / 1e3)
    };
    Outcome { requests: latencies.len() as u64, seconds, cpu_seconds, p50_us: at(0.5), p99_us: at(0.99) }
}

fn data_crc_alone(payload: &[u8]) -> u32 {
    let crc = message_crc(payload);
    debug_assert_eq!(bind_crc(crc, dst::units::Lba(8)), data_crc(payload, dst::units::Lba(8)));
    crc
}

fn send(stream: &mut TcpStream, heads: &[u8], count: usize, payload: &[u8]) {
    let each = heads.len() / count;
    let mut parts: Vec<IoSlice<'_>> = Vec::with_capacity(count * 2);
    for head in heads.chunks(each) {
        parts.push(IoSlice::new(head));
        if !payload.is_empty() {
            parts.push(IoSlice::new(payload));
        }
    }
    let mut rest = &mut parts[..];
    while !rest.is_empty() {
        let sent = stream.write_vectored(rest).unwrap();
        IoSlice::advance_slices(&mut rest, sent);
    }
}

/// What has arrived.
struct Intake {
    buffer: Vec<u8>,
    /// What of it is not taken yet.
    start: usize,
    end: usize,
}

impl Intake {
    fn new() -> Intake {
        Intake { buffer: vec![0; INTAKE_BYTES * 2], start: 0, end: 0 }
    }

    fn fill(&mut self, stream: &mut TcpStream) {
        if self.buffer.len() - self.end < INTAKE_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let got = stream.read(&mut self.buffer[self.end..][..INTAKE_BYTES]).unwrap();
        assert!(got > 0, "the server has closed the connection");
        self.end += got;
    }

    /// The slot of the next whole answer.
    fn next(&mut self, speech: &Speech, body: usize) -> Option<usize> {
        let head = speech.reply_head_bytes();
        if self.end - self.start < head + body {
            return None;
        }
        let slot = speech.slot(&self.buffer[self.start..][..head]);
        self.start += head + body;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        Some(slot)
    }
}
