//! What the fuzzer is let loose on: each decoder that a stranger's bytes reach, with what must hold whatever they are. The
//! integration tests replay the corpus in `tests/data/corpus` through the same functions.

use dst::control::member::MemberLabel;
use dst::engine::request::RequestOp;
use dst::limits;
use dst::units::{Epoch, Extent};
use dst::wire::frame::{HEADER_BYTES, Header, Op, message_crc};
use dst::wire::nbd::export::{Export, Terms};
use dst::wire::nbd::handshake::{Handshake, Step};
use dst::wire::nbd::transmission::{Command, REQUEST_BYTES, Reply, Work};
use dst::wire::session::{Hello, Welcome};
use dst::wire::volume;

pub mod server;

/// A target: its name, which is that of its corpus, and its entry.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 5] =
    [("frame", frame), ("session", session), ("volume", volume), ("nbd", nbd), ("server", server::run)];

/// The header of a frame, as it is and with its checksum put right.
pub fn frame(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else { return };
    for bytes in [*bytes, sealed(bytes)] {
        let bytes = &bytes;
        let Ok(header) = Header::decode(bytes) else { continue };
        assert_eq!(&header.encode(), bytes, "one header has one encoding");
        assert!(header.body_bytes <= limits::PAYLOAD_BYTES_MAX);
        assert!(header.extent().within(limits::ARRAY_SECTORS_MAX));
        let reply = header.reply(Ok(()));
        assert!(
            matches!(header.op, Op::Read | Op::Digest) || header.is_reply() || Header::decode(&reply.encode()).is_ok()
        );
    }
}

/// The header with its checksum put right: no fuzzer guesses that.
pub fn sealed(bytes: &[u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
    let mut sealed = *bytes;
    // It is that of messages, over all that comes before it.
    let crc = message_crc(&bytes[..60]);
    sealed[60..64].copy_from_slice(&crc.to_le_bytes());
    sealed
}

/// HELLO and its answer.
pub fn session(bytes: &[u8]) {
    if let Ok(hello) = Hello::decode(bytes) {
        assert_eq!(hello.encode(), bytes, "one HELLO has one encoding");
        let _ = hello.common_version();
    }
    if let Ok(welcome) = Welcome::decode(bytes) {
        assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome));
    }
}

/// The volume messages: a body of each kind, and a whole answer as a client reads it.
pub fn volume(bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let request = Header::request(Op::VolumeList, 0, 0, Epoch(0), Extent::default());
    let header = request.with_body(length, message_crc(bytes));
    let _ = volume::decode_message::<volume::Volume>(&header, bytes);
    let _ = volume::decode_message::<volume::Create>(&header, bytes);
    let _ = volume::decode_message::<volume::Named>(&header, bytes);
    let _ = volume::decode_message::<volume::Resize>(&header, bytes);
    let _ = volume::decode_message::<volume::Assign>(&header, bytes);
    let _ = volume::decode_message::<volume::LabelPut>(&header, bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = MemberLabel::decode(text);
        // With its checksum put right, as whoever holds a claim could store it.
        if let Some((_, body)) = text.split_once('\n') {
            let _ = MemberLabel::decode(&format!("dst member 1 {:08x}\n{body}", message_crc(body.as_bytes())));
        }
    }
    let _ = volume::decode_message::<volume::Regions>(&header, bytes);
    let _ = volume::decode_message::<volume::RegionPage>(&header, bytes);
    let _ = volume::decode_message::<volume::List>(&header, bytes);
    let _ = volume::decode_message::<volume::Explained>(&header, bytes);
    if let Ok(page) = volume::decode_message::<volume::Page>(&header, bytes)
        && let Ok(frame) = volume::encode_message(request, &page)
    {
        let again = Header::decode(frame.first_chunk().expect("a frame starts with a header")).expect("our own header");
        let body = &frame[HEADER_BYTES..];
        assert_eq!(volume::decode_message::<volume::Page>(&again, body), Ok(page));
    }
    let mut stream = Stream(bytes);
    let _ = volume::call::<_, _, volume::Page>(&mut stream, Op::VolumeList, &volume::List::default());
}

/// A peer that says `0`, whatever it is told.
struct Stream<'a>(&'a [u8]);

impl std::io::Read for Stream<'_> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(to)
    }
}

impl std::io::Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An NBD client from its first byte: the handshake, then requests until the bytes end or it is disconnected.
pub fn nbd(bytes: &[u8]) {
    let export = Export {
        name: "arr".to_owned(),
        description: "fuzzed".to_owned(),
        sectors: 1 << 24,
        block_bytes: 4096,
        preferred_bytes: 65536,
    };
    if let Some((terms, rest)) = shake(&export, bytes) {
        transmit(&export, terms, rest);
    }
}

fn shake<'a>(export: &Export, mut bytes: &'a [u8]) -> Option<(Terms, &'a [u8])> {
    let mut handshake = Handshake::default();
    let mut answer = Vec::new();
    loop {
        answer.clear();
        let step = handshake.handle(export, bytes, &mut answer).ok()?;
        assert!(answer.len() <= limits::NBD_OPTION_BYTES_MAX as usize, "an answer is bounded");
        match step {
            Step::More => {
                assert!(bytes.len() <= limits::NBD_OPTION_BYTES_MAX as usize + 16, "what is waited for is bounded");
                return None;
            }
            Step::Next(used) => {
                assert!(used > 0);
                bytes = &bytes[used..];
            }
            Step::Begin(used, terms) => return Some((terms, &bytes[used..])),
            Step::End => return None,
        }
    }
}

fn transmit(export: &Export, terms: Terms, mut bytes: &[u8]) {
    while let Some((head, rest)) = bytes.split_first_chunk::<REQUEST_BYTES>() {
        let Ok(verdict) = Command::decode(head).and_then(|command| command.judge(export, terms)) else { return };
        assert!(verdict.payload <= limits::NBD_SKIP_BYTES_MAX);
        let result = match verdict.work {
            Work::Engine(request) => {
                assert!(request.extent.within(export.sectors));
                let has_data = matches!(request.op, RequestOp::Read | RequestOp::Write { .. });
                assert!(!has_data || request.extent.bytes() <= u64::from(limits::PAYLOAD_BYTES_MAX));
                assert!(request.op == RequestOp::Flush || request.extent.sectors.is_multiple_of(8));
                Ok(())
            }
            Work::Answer(result) => result,
            Work::Disconnect => return,
        };
        let reply = Reply::new(&verdict.pending, result, terms);
        assert!(reply.head().len() >= 16 && reply.data_bytes <= limits::PAYLOAD_BYTES_MAX as usize);
        bytes = rest.get(verdict.payload as usize..).unwrap_or_default();
    }
}
