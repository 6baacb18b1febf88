//! Connections as two pipes of frames. A pipe keeps the order of what is sent; pipes know nothing of each other.
//!
//! Contract: frames are bytes where bytes matter: the header as it is on the wire, a body as one number per sector with the
//! checksum over these numbers. A frame arrives when its last byte does. A cut keeps any number of the frames on their way, and
//! any part of the next one.

use std::collections::VecDeque;

use dst::errno::Errno;
use dst::units::Lba;
use dst::wire::frame::{HEADER_BYTES, Header, bind_crc};

use crate::rng::Rng;

/// What follows a header.
pub(crate) enum Body {
    /// Nothing.
    None,
    /// Data, one number per sector.
    Data(Vec<u64>),
    /// A message.
    Message(Vec<u8>),
    /// The first sectors of data; the rest was cut off, with the connection.
    Partial(Vec<u64>),
    /// No frame: the connection has ended.
    End(Errno),
}

/// A frame on its way.
pub(crate) struct Frame {
    pub(crate) at: u64,
    pub(crate) header: [u8; HEADER_BYTES],
    pub(crate) body: Body,
}

/// One direction of a connection.
#[derive(Default)]
pub(crate) struct Pipe {
    pub(crate) frames: VecDeque<Frame>,
    /// The sender is busy until then.
    busy: u64,
    /// When the last frame arrives.
    last: u64,
    /// Nothing more is taken.
    pub(crate) cut: bool,
}

/// How fast a link is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Speed {
    /// One way, ns.
    pub(crate) latency: u64,
    /// More or less, ns.
    pub(crate) jitter: u64,
    /// Per byte, thousandths of a ns.
    pub(crate) per_byte: u64,
}

impl Pipe {
    /// Sends; the moment of arrival, if the pipe takes it.
    pub(crate) fn send(&mut self, now: u64, speed: Speed, rng: &mut Rng, frame: (&Header, Body)) -> Option<u64> {
        let (header, body) = frame;
        self.put(now, speed, rng, header.encode(), u64::from(header.body_bytes), body)
    }

    /// Ends the pipe after what is in it.
    pub(crate) fn end(&mut self, now: u64, speed: Speed, rng: &mut Rng, error: Errno) -> Option<u64> {
        let at = self.put(now, speed, rng, [0; HEADER_BYTES], 0, Body::End(error));
        self.cut = true;
        at
    }

    fn put(
        &mut self,
        now: u64,
        speed: Speed,
        rng: &mut Rng,
        header: [u8; HEADER_BYTES],
        bytes: u64,
        body: Body,
    ) -> Option<u64> {
        if self.cut {
            return None;
        }
        self.busy = self.busy.max(now) + (HEADER_BYTES as u64 + bytes) * speed.per_byte / 1000;
        let at = self.busy + speed.latency + rng.below(speed.jitter + 1);
        self.last = self.last.max(at);
        self.frames.push_back(Frame { at: self.last, header, body });
        Some(self.last)
    }

    /// When the sender has got rid of everything.
    pub(crate) fn sent_at(&self) -> u64 {
        self.busy
    }

    /// Cuts the pipe at any byte of what is on its way.
    pub(crate) fn cut(&mut self, rng: &mut Rng) {
        let kept = rng.index(self.frames.len() + 1);
        let torn = self.frames.drain(kept..).next();
        if let Some(Frame { at, header, body: Body::Data(mut values) }) = torn {
            values.truncate(rng.index(values.len() + 1));
            self.frames.push_back(Frame { at, header, body: Body::Partial(values) });
        }
        self.cut = true;
    }

    /// Nothing arrives any more.
    pub(crate) fn drop_all(&mut self) {
        self.frames.clear();
        self.cut = true;
    }

    /// After a stall nothing arrives before `at`.
    pub(crate) fn delay(&mut self, at: u64) -> Option<u64> {
        self.last = self.last.max(at);
        for frame in &mut self.frames {
            frame.at = frame.at.max(at);
        }
        self.frames.front().map(|frame| frame.at)
    }

    /// Takes the next frame that has arrived.
    pub(crate) fn take(&mut self, now: u64) -> Option<Frame> {
        self.frames.front().filter(|frame| frame.at <= now)?;
        self.frames.pop_front()
    }

    /// Damages the last frame on its way, as only checksums notice: a bit of the header or of the data, or the data belongs
    /// elsewhere, with a checksum that fits it.
    pub(crate) fn damage(&mut self, rng: &mut Rng) -> Option<Damage> {
        let last = self.frames.len().checked_sub(1)?;
        let header = Header::decode(&self.frames[last].header).ok()?;
        if rng.percent(40)
            && let Some(other) = self.like(last, &header)
        {
            return self.exchange(last, other);
        }
        let frame = &mut self.frames[last];
        if let Body::Data(values) = &mut frame.body
            && rng.percent(70)
        {
            let sector = rng.index(values.len());
            values[sector] ^= 1 << rng.below(64);
            return Some(Damage::Body(header));
        }
        if !matches!(frame.body, Body::Data(_) | Body::None) {
            return None;
        }
        frame.header[rng.index(HEADER_BYTES)] ^= 1 << rng.below(8);
        Some(Damage::Header)
    }

    /// Another frame with as much data as the one at `last`.
    fn like(&self, last: usize, header: &Header) -> Option<usize> {
        self.frames.iter().take(last).position(|frame| {
            let like = Header::decode(&frame.header).is_ok_and(|other| {
                other.op == header.op && other.body_bytes == header.body_bytes && other.lba != header.lba
            });
            like && matches!(frame.body, Body::Data(_))
        })
    }

    fn exchange(&mut self, last: usize, other: usize) -> Option<Damage> {
        let first = Header::decode(&self.frames[other].header).ok()?;
        let second = Header::decode(&self.frames[last].header).ok()?;
        let taken = std::mem::replace(&mut self.frames[last].body, Body::None);
        self.frames[last].body = std::mem::replace(&mut self.frames[other].body, taken);
        self.frames[last].header = Header { body_crc: first.body_crc, ..second }.encode();
        self.frames[other].header = Header { body_crc: second.body_crc, ..first }.encode();
        Some(Damage::Exchange(first, second))
    }
}

/// What was damaged.
pub(crate) enum Damage {
    Header,
    Body(Header),
    Exchange(Header, Header),
}

/// The checksum of data for `lba`, as it is computed here: over the numbers.
pub(crate) fn crc(values: &[u64], lba: Lba) -> u32 {
    let mut bytes = [0; 512];
    let mut crc = 0;
    for chunk in values.chunks(64) {
        for (to, value) in bytes.chunks_exact_mut(8).zip(chunk) {
            to.copy_from_slice(&value.to_le_bytes());
        }
        crc = crc32c::crc32c_append(crc, &bytes[..chunk.len() * 8]);
    }
    bind_crc(crc, lba)
}
