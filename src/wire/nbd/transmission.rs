//! The second phase of NBD: requests and their answers. Pure: a request's 28 bytes in, what is to be done out, and the head of
//! the answer.
//!
//! Every number of a client is checked here once: alignment, range, length, flags. What passes is a [`Request`] that the engine
//! can trust.

use crate::engine::request::{Request, RequestOp};
use crate::errno::{self, Errno};
use crate::limits;
use crate::units::{Extent, SECTOR_BYTES};
use crate::wire::nbd::export::{ALLOCATION_CONTEXT, BadClient, Cursor, Export, Terms};

/// Bytes of a request, without a write's data.
pub const REQUEST_BYTES: usize = 28;
/// Room for the head of any answer, bytes.
pub const REPLY_HEAD_BYTES_MAX: usize = 64;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const CHUNK_DONE: u16 = 1;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = (1 << 15) + 1;

mod command {
    pub(super) const READ: u16 = 0;
    pub(super) const WRITE: u16 = 1;
    pub(super) const DISC: u16 = 2;
    pub(super) const FLUSH: u16 = 3;
    pub(super) const TRIM: u16 = 4;
    pub(super) const CACHE: u16 = 5;
    pub(super) const WRITE_ZEROES: u16 = 6;
    pub(super) const BLOCK_STATUS: u16 = 7;
}

mod flag {
    pub(super) const FUA: u16 = 1 << 0;
    pub(super) const NO_HOLE: u16 = 1 << 1;
    pub(super) const DF: u16 = 1 << 2;
    pub(super) const REQ_ONE: u16 = 1 << 3;
}

/// A request as it arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Flags.
    pub flags: u16,
    /// Which command.
    pub code: u16,
    /// The client's name for it.
    pub cookie: u64,
    /// Where, bytes.
    pub offset: u64,
    /// How much, bytes.
    pub length: u32,
}

/// How an answer looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// The cookie and an error number.
    #[default]
    Plain,
    /// With the data that was read.
    Data,
    /// With the state of the blocks.
    BlockStatus,
}

/// What must be known of a request to answer it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// The client's name for it.
    pub cookie: u64,
    /// Where, bytes.
    pub offset: u64,
    /// How much, bytes.
    pub length: u32,
    /// How the answer looks.
    pub form: Form,
}

/// What is to be done about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The engine's.
    Engine(Request),
    /// Nothing: this is the result.
    Answer(Result<(), Errno>),
    /// The client leaves: answer what is in flight, then close.
    Disconnect,
}

/// The judgement on a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// For the answer.
    pub pending: Pending,
    /// Bytes of data that follow the request and must be taken, whatever is done with them.
    pub payload: u32,
    /// What is to be done.
    pub work: Work,
}

impl Command {
    /// Decodes; only the magic can be wrong.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Command, BadClient> {
        let mut cursor = Cursor(bytes);
        if cursor.u32() != Some(REQUEST_MAGIC) {
            return Err(BadClient("a request without its magic"));
        }
        let parse = |cursor: &mut Cursor<'_>| {
            Some(Command {
                flags: cursor.u16()?,
                code: cursor.u16()?,
                cookie: cursor.u64()?,
                offset: cursor.u64()?,
                length: cursor.u32()?,
            })
        };
        parse(&mut cursor).ok_or(BadClient("a request is too short"))
    }

    /// Checks the request against the export. `Err` where the stream cannot go on: more data announced than will be skipped.
    pub fn judge(&self, export: &Export, terms: Terms) -> Result<Verdict, BadClient> {
        let payload = if self.code == command::WRITE { self.length } else { 0 };
        if payload > limits::NBD_SKIP_BYTES_MAX {
            return Err(BadClient("a write is too long"));
        }
        let form = match self.code {
            command::READ => Form::Data,
            command::BLOCK_STATUS => Form::BlockStatus,
            _ => Form::Plain,
        };
        let pending = Pending { cookie: self.cookie, offset: self.offset, length: self.length, form };
        let work = self.work(export, terms).unwrap_or_else(|error| Work::Answer(Err(error)));
        Ok(Verdict { pending, payload, work })
    }

    fn work(&self, export: &Export, terms: Terms) -> Result<Work, Errno> {
        let known = match self.code {
            command::READ => flag::FUA | flag::DF,
            command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE,
            command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
            _ => flag::FUA,
        };
        if self.code == command::DISC {
            return Ok(Work::Disconnect);
        }
        if self.flags & !known != 0 {
            return Err(Errno::EINVAL);
        }
        let fua = self.flags & flag::FUA != 0;
        let op = match self.code {
            command::READ => RequestOp::Read,
            command::WRITE => RequestOp::Write { fua },
            command::FLUSH if self.offset == 0 && self.length == 0 => {
                return Ok(Work::Engine(Request::new(RequestOp::Flush, Extent::default())));
            }
            // A discard leaves zeros, so a durable one is a durable write of zeros that may free its space.
            command::TRIM if fua => RequestOp::WriteZeroes { keep: false, fua },
            command::TRIM => RequestOp::Discard,
            command::WRITE_ZEROES => RequestOp::WriteZeroes { keep: self.flags & flag::NO_HOLE != 0, fua },
            command::CACHE => return self.extent(export).map(|_| Work::Answer(Ok(()))),
            command::BLOCK_STATUS if terms.allocation => return self.extent(export).map(|_| Work::Answer(Ok(()))),
            _ => return Err(Errno::EINVAL),
        };
        let extent = self.extent(export)?;
        if matches!(op, RequestOp::Read | RequestOp::Write { .. }) && self.length > export.payload_bytes_max() {
            return Err(Errno::EINVAL);
        }
        Ok(Work::Engine(Request::new(op, extent)))
    }

    /// The range, if it is aligned, not empty and on the device.
    fn extent(&self, export: &Export) -> Result<Extent, Errno> {
        let block = u64::from(export.block_bytes);
        if self.length == 0 || !self.offset.is_multiple_of(block) || !u64::from(self.length).is_multiple_of(block) {
            return Err(Errno::EINVAL);
        }
        let extent = Extent::new(self.offset / SECTOR_BYTES, u64::from(self.length) / SECTOR_BYTES);
        if extent.within(export.sectors) {
            return Ok(extent);
        }
        // The protocol asks for "no space" where a write goes past the end.
        let grows = matches!(self.code, command::WRITE | command::WRITE_ZEROES);
        Err(if grows { Errno::ENOSPC } else { Errno::EINVAL })
    }
}

/// The head of an answer, and how much data of the tag's buffer follows it.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    head: [u8; REPLY_HEAD_BYTES_MAX],
    head_bytes: usize,
    /// Bytes of data that follow the head.
    pub data_bytes: usize,
}

impl Reply {
    /// The answer to a request.
    pub fn new(pending: &Pending, result: Result<(), Errno>, terms: Terms) -> Reply {
        let mut reply = Reply { head: [0; REPLY_HEAD_BYTES_MAX], head_bytes: 0, data_bytes: 0 };
        let structured = terms.structured && pending.form != Form::Plain;
        match (result, pending.form) {
            (Err(error), _) if structured => {
                reply.chunk(CHUNK_ERROR, pending, 6);
                reply.put(&errno::to_nbd(error).to_be_bytes());
                // No text follows.
                reply.put(&0u16.to_be_bytes());
            }
            (Ok(()), Form::Data) if structured => {
                // Bounded by PAYLOAD_BYTES_MAX, so the sum fits.
                reply.chunk(CHUNK_OFFSET_DATA, pending, 8 + pending.length);
                reply.put(&pending.offset.to_be_bytes());
                reply.data_bytes = pending.length as usize;
            }
            (Ok(()), Form::BlockStatus) => {
                reply.chunk(CHUNK_BLOCK_STATUS, pending, 12);
                reply.put(&ALLOCATION_CONTEXT.to_be_bytes());
                reply.put(&pending.length.to_be_bytes());
                // Neither a hole nor known to read as zeros.
                reply.put(&0u32.to_be_bytes());
            }
            (result, form) => {
                reply.put(&SIMPLE_MAGIC.to_be_bytes());
                reply.put(&result.map_or_else(errno::to_nbd, |()| 0).to_be_bytes());
                reply.put(&pending.cookie.to_be_bytes());
                if result.is_ok() && form == Form::Data {
                    reply.data_bytes = pending.length as usize;
                }
            }
        }
        reply
    }

    /// The bytes to send before the data.
    pub fn head(&self) -> &[u8] {
        &self.head[..self.head_bytes]
    }

    fn put(&mut self, bytes: &[u8]) {
        let end = self.head_bytes + bytes.len();
        self.head[self.head_bytes..end].copy_from_slice(bytes);
        self.head_bytes = end;
    }

    /// The start of the one chunk that is the whole answer.
    fn chunk(&mut self, kind: u16, pending: &Pending, length: u32) {
        self.put(&CHUNK_MAGIC.to_be_bytes());
        self.put(&CHUNK_DONE.to_be_bytes());
        self.put(&kind.to_be_bytes());
        self.put(&pending.cookie.to_be_bytes());
        self.put(&length.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TERMS: Terms = Terms { structured: true, allocation: true };

    fn export() -> Export {
        Export {
            name: "arr".to_owned(),
            description: String::new(),
            sectors: 1 << 30,
            block_bytes: 4096,
            preferred_bytes: 4096,
        }
    }

    fn judge(code: u16, flags: u16, offset: u64, length: u32) -> Verdict {
        Command { flags, code, cookie: 9, offset, length }.judge(&export(), TERMS).unwrap()
    }

    fn refused(code: u16, flags: u16, offset: u64, length: u32) -> Errno {
        match judge(code, flags, offset, length).work {
            Work::Answer(Err(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    fn asked(code: u16, flags: u16, offset: u64, length: u32) -> Request {
        match judge(code, flags, offset, length).work {
            Work::Engine(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn commands_become_requests() {
        let extent = Extent::new(8, 16);
        assert_eq!(asked(0, 0, 4096, 8192), Request::new(RequestOp::Read, extent));
        assert_eq!(asked(1, 1, 4096, 8192), Request::new(RequestOp::Write { fua: true }, extent));
        assert_eq!(judge(1, 0, 4096, 8192).payload, 8192);
        assert_eq!(asked(3, 0, 0, 0).op, RequestOp::Flush);
        assert_eq!(asked(4, 0, 4096, 8192).op, RequestOp::Discard);
        assert_eq!(asked(4, 1, 4096, 8192).op, RequestOp::WriteZeroes { keep: false, fua: true });
        assert_eq!(asked(6, 3, 4096, 8192).op, RequestOp::WriteZeroes { keep: true, fua: true });
        assert_eq!(asked(6, 0, 0, u32::MAX - 4095).extent.bytes(), (4 << 30) - 4096);
        assert_eq!(judge(2, 0xffff, u64::MAX, u32::MAX).work, Work::Disconnect);
        assert_eq!(judge(5, 0, 0, 4096).work, Work::Answer(Ok(())));
        assert_eq!(judge(7, flag::REQ_ONE, 0, 4096).work, Work::Answer(Ok(())));
    }

    #[test]
    fn each_field_at_its_bounds() {
        let end = export().bytes();
        let max = limits::PAYLOAD_BYTES_MAX;
        for code in [0, 4, 5, 7] {
            assert_eq!(refused(code, 0, end, 4096), Errno::EINVAL, "{code}");
            assert_eq!(refused(code, 0, u64::MAX - 4095, 4096), Errno::EINVAL);
            assert!(!matches!(judge(code, 0, end - 4096, 4096).work, Work::Answer(Err(_))));
        }
        for code in [1, 6] {
            assert_eq!(refused(code, 0, end, 4096), Errno::ENOSPC, "{code}");
            assert_eq!(refused(code, 0, u64::MAX - 4095, 4096), Errno::ENOSPC);
        }
        for code in [0, 1, 4, 5, 6, 7] {
            for (offset, length) in [(0, 0), (1, 4096), (512, 4096), (0, 1), (0, 512), (0, u32::MAX)] {
                if code != 1 || length <= limits::NBD_SKIP_BYTES_MAX {
                    assert_eq!(refused(code, 0, offset, length), Errno::EINVAL, "{code} {offset} {length}");
                }
            }
            for bit in [1 << 4, 1 << 5, 1 << 15] {
                assert_eq!(refused(code, bit, 0, 4096), Errno::EINVAL);
            }
        }
        for code in [0, 1] {
            assert!(asked(code, 0, 0, max).extent.bytes() == u64::from(max));
            assert_eq!(refused(code, 0, 0, max + 4096), Errno::EINVAL);
        }
        assert_eq!(judge(1, 0, 0, max + 4096).payload, max + 4096, "what is refused is skipped");
        let long = Command { flags: 0, code: 1, cookie: 0, offset: 0, length: limits::NBD_SKIP_BYTES_MAX + 1 };
        assert!(long.judge(&export(), TERMS).is_err());
        assert_eq!(refused(3, 0, 0, 1), Errno::EINVAL);
        assert_eq!(refused(8, 0, 0, 4096), Errno::EINVAL);
        assert_eq!(refused(u16::MAX, 0, 0, 4096), Errno::EINVAL);
        let none = Command { flags: 0, code: 7, cookie: 0, offset: 0, length: 4096 }.judge(&export(), Terms::default());
        assert_eq!(none.unwrap().work, Work::Answer(Err(Errno::EINVAL)));
    }

    #[test]
    fn answers_have_the_negotiated_form() {
        let pending = |form| Pending { cookie: 7, offset: 4096, length: 8192, form };
        let lengths = |form, result, terms| {
            let reply = Reply::new(&pending(form), result, terms);
            (reply.head().len(), reply.data_bytes)
        };
        let none = Terms::default();
        assert_eq!(lengths(Form::Plain, Ok(()), TERMS), (16, 0));
        assert_eq!(lengths(Form::Plain, Err(Errno::EIO), TERMS), (16, 0));
        assert_eq!(lengths(Form::Data, Ok(()), none), (16, 8192));
        assert_eq!(lengths(Form::Data, Err(Errno::EIO), none), (16, 0));
        assert_eq!(lengths(Form::Data, Ok(()), TERMS), (28, 8192));
        assert_eq!(lengths(Form::Data, Err(Errno::EIO), TERMS), (26, 0));
        assert_eq!(lengths(Form::BlockStatus, Ok(()), TERMS), (32, 0));
        assert_eq!(lengths(Form::BlockStatus, Err(Errno::EINVAL), TERMS), (26, 0));
        let error = Reply::new(&pending(Form::Plain), Err(Errno::ENOSPC), TERMS);
        assert_eq!(error.head(), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 7]);
        let data = Reply::new(&pending(Form::Data), Ok(()), TERMS);
        assert_eq!(data.head()[16..20], (8192u32 + 8).to_be_bytes(), "length of the chunk");
    }

    proptest! {
        #[test]
        fn whatever_passes_lies_on_the_device(code in 0u16..9, flags in 0u16..64, offset: u64, length: u32, page in 0u64..1 << 20) {
            for (offset, length) in [(offset, length), (page * 4096, length & !4095), (page * 4096, length % (1 << 21))] {
                let command = Command { flags, code, cookie: 1, offset, length };
                if let Ok(Verdict { work: Work::Engine(request), payload, .. }) = command.judge(&export(), TERMS) {
                    prop_assert!(request.extent.within(export().sectors));
                    prop_assert!(payload <= limits::PAYLOAD_BYTES_MAX);
                }
            }
        }

        #[test]
        fn any_bytes_decode_without_panic(bytes: [u8; REQUEST_BYTES]) {
            let mut bytes = bytes;
            let _ = Command::decode(&bytes);
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            let _ = Command::decode(&bytes).unwrap().judge(&export(), TERMS);
        }
    }
}
