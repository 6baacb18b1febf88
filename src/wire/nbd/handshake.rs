//! The first phase of NBD, "fixed newstyle": the server greets, the client haggles over options, then requests begin.
//!
//! Sans-io: [`Handshake::handle`] looks at the bytes that have arrived and says how many it used and what to answer. One message
//! at a time, so a client that does not take its answers is not read any further. A message is at most
//! [`limits::NBD_OPTION_BYTES_MAX`] long and so is its answer; whatever is out of order ends the connection.

use crate::limits;
use crate::wire::nbd::export::{ALLOCATION_CONTEXT, BadClient, Cursor, Export, Terms};

/// Bytes of the server's first message.
pub const GREETING_BYTES: usize = 18;

const GREETING_MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u16 = 1 << 0;
const NO_ZEROES: u16 = 1 << 1;
const OPTION_HEAD_BYTES: usize = 16;
/// Zeros that end the answer to EXPORT_NAME, unless both sides said that they want none.
const EXPORT_NAME_ZEROES: usize = 124;
const ALLOCATION: &[u8] = b"base:allocation";

mod option {
    pub(super) const EXPORT_NAME: u32 = 1;
    pub(super) const ABORT: u32 = 2;
    pub(super) const LIST: u32 = 3;
    pub(super) const INFO: u32 = 6;
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
    pub(super) const LIST_META_CONTEXT: u32 = 9;
    pub(super) const SET_META_CONTEXT: u32 = 10;
}

mod reply {
    pub(super) const ACK: u32 = 1;
    pub(super) const SERVER: u32 = 2;
    pub(super) const INFO: u32 = 3;
    pub(super) const META_CONTEXT: u32 = 4;
    pub(super) const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub(super) const ERR_INVALID: u32 = (1 << 31) + 3;
    pub(super) const ERR_UNKNOWN: u32 = (1 << 31) + 6;
}

mod info {
    pub(super) const EXPORT: u16 = 0;
    pub(super) const NAME: u16 = 1;
    pub(super) const DESCRIPTION: u16 = 2;
    pub(super) const BLOCK_SIZE: u16 = 3;
}

/// What became of the bytes that [`Handshake::handle`] was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next message is not whole yet; nothing was used.
    More,
    /// This many bytes were used. Send the answer, if there is one, and show the rest.
    Next(usize),
    /// This many bytes were used. Send the answer; what follows are requests.
    Begin(usize, Terms),
    /// The client has said good-bye. Send the answer and close.
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The client's flags come next.
    Greeted,
    /// An option comes next. Without `fixed` it can only be EXPORT_NAME.
    Haggling { fixed: bool, no_zeroes: bool },
    /// Nothing is expected any more.
    Over,
}

/// How the client called the export when it set a meta context: it holds for a GO with the same name only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Called {
    Default,
    ByName,
}

/// One client's handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    structured: bool,
    allocation: Option<Called>,
}

impl Default for Handshake {
    fn default() -> Handshake {
        Handshake { state: State::Greeted, structured: false, allocation: None }
    }
}

impl Handshake {
    /// What the server says first.
    pub fn greeting() -> [u8; GREETING_BYTES] {
        let mut bytes = [0; GREETING_BYTES];
        bytes[0..8].copy_from_slice(GREETING_MAGIC);
        bytes[8..16].copy_from_slice(OPTION_MAGIC);
        bytes[16..18].copy_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        bytes
    }

    /// Takes the next message off `input`, if it is whole, and appends the answer to `answer`.
    pub fn handle(&mut self, export: &Export, input: &[u8], answer: &mut Vec<u8>) -> Result<Step, BadClient> {
        match self.state {
            State::Greeted => self.client_flags(input),
            State::Haggling { fixed, no_zeroes } => {
                let Some((code, data)) = next_option(input)? else { return Ok(Step::More) };
                if !fixed && code != option::EXPORT_NAME {
                    return Err(BadClient("an option other than EXPORT_NAME without fixed newstyle"));
                }
                let used = OPTION_HEAD_BYTES + data.len();
                self.option(export, code, data, no_zeroes, used, answer)
            }
            State::Over => Err(BadClient("bytes after the end of the handshake")),
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> Result<Step, BadClient> {
        let mut cursor = Cursor(input);
        let Some(flags) = cursor.u32() else { return Ok(Step::More) };
        let (fixed, no_zeroes) = (u32::from(FIXED_NEWSTYLE), u32::from(NO_ZEROES));
        if flags & !(fixed | no_zeroes) != 0 {
            return Err(BadClient("unknown client flags"));
        }
        self.state = State::Haggling { fixed: flags & fixed != 0, no_zeroes: flags & no_zeroes != 0 };
        Ok(Step::Next(4))
    }

    fn option(
        &mut self,
        export: &Export,
        code: u32,
        data: &[u8],
        no_zeroes: bool,
        used: usize,
        answer: &mut Vec<u8>,
    ) -> Result<Step, BadClient> {
        let mut say = Answer { code, bytes: answer };
        match code {
            option::EXPORT_NAME => {
                let Some(called) = call(export, data) else { return Err(BadClient("no export of that name")) };
                let terms = self.begin(called);
                answer.extend_from_slice(&export.bytes().to_be_bytes());
                answer.extend_from_slice(&terms.flags().to_be_bytes());
                if !no_zeroes {
                    answer.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
                }
                return Ok(Step::Begin(used, terms));
            }
            option::ABORT => {
                say.reply(reply::ACK, &[]);
                self.state = State::Over;
                return Ok(Step::End);
            }
            option::LIST if data.is_empty() => {
                let name = export.name.as_bytes();
                say.reply(reply::SERVER, &[&length_of(name).to_be_bytes(), name, export.description.as_bytes()]);
                say.reply(reply::ACK, &[]);
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                say.reply(reply::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => say.reply(reply::ERR_INVALID, &[]),
            option::INFO | option::GO => match parse_info(data) {
                None => say.reply(reply::ERR_INVALID, &[]),
                Some((name, wanted)) => match call(export, name) {
                    None => say.reply(reply::ERR_UNKNOWN, &[]),
                    Some(called) => {
                        let terms = self.terms(called);
                        say.describe(export, terms, wanted);
                        if code == option::GO {
                            return Ok(Step::Begin(used, self.begin(called)));
                        }
                    }
                },
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(export, code, data, &mut say),
            // STARTTLS among them: there is no TLS here.
            _ => say.reply(reply::ERR_UNSUP, &[]),
        }
        Ok(Step::Next(used))
    }

    fn terms(&self, called: Called) -> Terms {
        Terms { structured: self.structured, allocation: self.structured && self.allocation == Some(called) }
    }

    fn begin(&mut self, called: Called) -> Terms {
        self.state = State::Over;
        self.terms(called)
    }

    fn meta_context(&mut self, export: &Export, code: u32, data: &[u8], say: &mut Answer<'_>) {
        let set = code == option::SET_META_CONTEXT;
        if set {
            self.allocation = None;
        }
        let Some((name, asked)) = parse_queries(data, set).filter(|_| self.structured) else {
            return say.reply(reply::ERR_INVALID, &[]);
        };
        let Some(called) = call(export, name) else {
            return say.reply(reply::ERR_UNKNOWN, &[]);
        };
        if asked {
            let id = if set { ALLOCATION_CONTEXT } else { 0 };
            say.reply(reply::META_CONTEXT, &[&id.to_be_bytes(), ALLOCATION]);
        }
        if set {
            self.allocation = asked.then_some(called);
        }
        say.reply(reply::ACK, &[]);
    }
}

/// Answers to one option.
struct Answer<'a> {
    code: u32,
    bytes: &'a mut Vec<u8>,
}

impl Answer<'_> {
    fn reply(&mut self, kind: u32, parts: &[&[u8]]) {
        let length: u32 = parts.iter().map(|part| length_of(part)).sum();
        self.bytes.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
        self.bytes.extend_from_slice(&self.code.to_be_bytes());
        self.bytes.extend_from_slice(&kind.to_be_bytes());
        self.bytes.extend_from_slice(&length.to_be_bytes());
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
    }

    /// The answer to INFO and GO. The block size is told whether or not it was asked for: it is a demand.
    fn describe(&mut self, export: &Export, terms: Terms, wanted: Wanted) {
        let (size, flags) = (export.bytes().to_be_bytes(), terms.flags().to_be_bytes());
        self.reply(reply::INFO, &[&info::EXPORT.to_be_bytes(), &size, &flags]);
        let least = export.block_bytes.to_be_bytes();
        let (best, most) = (export.preferred_bytes.to_be_bytes(), export.payload_bytes_max().to_be_bytes());
        self.reply(reply::INFO, &[&info::BLOCK_SIZE.to_be_bytes(), &least, &best, &most]);
        if wanted.name {
            self.reply(reply::INFO, &[&info::NAME.to_be_bytes(), export.name.as_bytes()]);
        }
        if wanted.description {
            self.reply(reply::INFO, &[&info::DESCRIPTION.to_be_bytes(), export.description.as_bytes()]);
        }
        self.reply(reply::ACK, &[]);
    }
}

/// Names, descriptions and the like are far below 4 GiB.
fn length_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

/// The option at the start of `input`: its code and its data.
fn next_option(input: &[u8]) -> Result<Option<(u32, &[u8])>, BadClient> {
    let mut cursor = Cursor(input);
    let Some(magic) = cursor.take(8) else { return Ok(None) };
    if magic != OPTION_MAGIC {
        return Err(BadClient("an option without its magic"));
    }
    let (Some(code), Some(length)) = (cursor.u32(), cursor.u32()) else { return Ok(None) };
    if length > limits::NBD_OPTION_BYTES_MAX {
        return Err(BadClient("an option is too long"));
    }
    Ok(cursor.take(length as usize).map(|data| (code, data)))
}

/// Whether this export is meant.
fn call(export: &Export, name: &[u8]) -> Option<Called> {
    match name {
        b"" => Some(Called::Default),
        name if name == export.name.as_bytes() => Some(Called::ByName),
        _ => None,
    }
}

/// What INFO or GO asks for beyond what is always told.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    name: bool,
    description: bool,
}

fn parse_info(data: &[u8]) -> Option<(&[u8], Wanted)> {
    let mut cursor = Cursor(data);
    let length = cursor.u32()?;
    let name = cursor.take(length as usize)?;
    let count = cursor.u16()?;
    let mut wanted = Wanted::default();
    for _ in 0..count {
        match cursor.u16()? {
            info::NAME => wanted.name = true,
            info::DESCRIPTION => wanted.description = true,
            _ => {}
        }
    }
    cursor.0.is_empty().then_some((name, wanted))
}

/// The export's name, and whether "base:allocation" is among the queries. Listing also understands "base:" and no query at
/// all, both meaning "what is there?".
fn parse_queries(data: &[u8], set: bool) -> Option<(&[u8], bool)> {
    let mut cursor = Cursor(data);
    let length = cursor.u32()?;
    let name = cursor.take(length as usize)?;
    let count = cursor.u32()?;
    let mut asked = count == 0 && !set;
    for _ in 0..count {
        let length = cursor.u32()?;
        let query = cursor.take(length as usize)?;
        asked |= query == ALLOCATION || (!set && query == b"base:");
    }
    cursor.0.is_empty().then_some((name, asked))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn export() -> Export {
        Export {
            name: "arr".to_owned(),
            description: "a test".to_owned(),
            sectors: 2048,
            block_bytes: 512,
            preferred_bytes: 4096,
        }
    }

    fn opt(code: u32, data: &[u8]) -> Vec<u8> {
        [&OPTION_MAGIC[..], &code.to_be_bytes(), &length_of(data).to_be_bytes(), data].concat()
    }

    fn go(name: &[u8], wanted: &[u16]) -> Vec<u8> {
        let count = u16::try_from(wanted.len()).unwrap();
        let mut data = [&length_of(name).to_be_bytes()[..], name, &count.to_be_bytes()].concat();
        wanted.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
        data
    }

    fn queries(name: &[u8], texts: &[&[u8]]) -> Vec<u8> {
        let mut data = [&length_of(name).to_be_bytes()[..], name, &length_of_list(texts).to_be_bytes()].concat();
        for text in texts {
            data.extend_from_slice(&length_of(text).to_be_bytes());
            data.extend_from_slice(text);
        }
        data
    }

    fn length_of_list(texts: &[&[u8]]) -> u32 {
        u32::try_from(texts.len()).unwrap()
    }

    /// A handshake that has taken the usual client flags.
    fn open(flags: u32) -> Handshake {
        let mut handshake = Handshake::default();
        let step = handshake.handle(&export(), &flags.to_be_bytes(), &mut Vec::new());
        assert_eq!(step, Ok(Step::Next(4)));
        handshake
    }

    /// The kinds of the replies in an answer.
    fn kinds(mut answer: &[u8]) -> Vec<u32> {
        let mut kinds = Vec::new();
        while !answer.is_empty() {
            let mut cursor = Cursor(answer);
            assert_eq!(cursor.u64(), Some(REPLY_MAGIC));
            cursor.u32().unwrap();
            kinds.push(cursor.u32().unwrap());
            let length = cursor.u32().unwrap();
            cursor.take(length as usize).unwrap();
            answer = cursor.0;
        }
        kinds
    }

    /// What one option is answered by, and where it leads.
    fn ask(handshake: &mut Handshake, code: u32, data: &[u8]) -> (Result<Step, BadClient>, Vec<u32>) {
        let mut answer = Vec::new();
        let step = handshake.handle(&export(), &opt(code, data), &mut answer);
        (step, kinds(&answer))
    }

    #[test]
    fn a_modern_client_gets_structured_replies_and_allocation() {
        let mut handshake = open(3);
        assert_eq!(ask(&mut handshake, option::STRUCTURED_REPLY, b"").1, [reply::ACK]);
        let list = queries(b"", &[]);
        assert_eq!(ask(&mut handshake, option::LIST_META_CONTEXT, &list).1, [reply::META_CONTEXT, reply::ACK]);
        let set = queries(b"arr", &[b"qemu:dirty-bitmap", ALLOCATION]);
        assert_eq!(ask(&mut handshake, option::SET_META_CONTEXT, &set).1, [reply::META_CONTEXT, reply::ACK]);
        let all = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 77];
        let (step, kinds) = ask(&mut handshake, option::INFO, &go(b"arr", &all));
        assert!(matches!(step, Ok(Step::Next(_))));
        assert_eq!(kinds, [reply::INFO, reply::INFO, reply::INFO, reply::INFO, reply::ACK]);
        let (step, kinds) = ask(&mut handshake, option::GO, &go(b"arr", &[]));
        assert_eq!(kinds, [reply::INFO, reply::INFO, reply::ACK]);
        let Ok(Step::Begin(_, terms)) = step else { panic!("{step:?}") };
        assert_eq!(terms, Terms { structured: true, allocation: true });
        assert!(handshake.handle(&export(), &opt(option::LIST, b""), &mut Vec::new()).is_err());
    }

    #[test]
    fn an_old_client_uses_export_name() {
        for (flags, bytes) in [(0u32, 8 + 2 + EXPORT_NAME_ZEROES), (1, 8 + 2 + EXPORT_NAME_ZEROES), (3, 10), (2, 10)] {
            let mut answer = Vec::new();
            let step = open(flags).handle(&export(), &opt(option::EXPORT_NAME, b""), &mut answer);
            assert_eq!(step, Ok(Step::Begin(16, Terms::default())));
            assert_eq!(answer.len(), bytes, "{flags}");
            assert_eq!(answer[..8], export().bytes().to_be_bytes());
        }
        assert!(open(3).handle(&export(), &opt(option::EXPORT_NAME, b"other"), &mut Vec::new()).is_err());
        assert!(open(0).handle(&export(), &opt(option::LIST, b""), &mut Vec::new()).is_err());
    }

    #[test]
    fn refusals_leave_the_haggling_open() {
        let mut handshake = open(1);
        for (code, data, kind) in [
            (5, vec![], reply::ERR_UNSUP),
            (0, vec![1, 2, 3], reply::ERR_UNSUP),
            (u32::MAX, vec![], reply::ERR_UNSUP),
            (option::LIST, vec![0], reply::ERR_INVALID),
            (option::STRUCTURED_REPLY, vec![0], reply::ERR_INVALID),
            (option::GO, vec![], reply::ERR_INVALID),
            (option::GO, go(b"other", &[]), reply::ERR_UNKNOWN),
            (option::GO, [go(b"", &[]), vec![0]].concat(), reply::ERR_INVALID),
            (option::INFO, u32::MAX.to_be_bytes().to_vec(), reply::ERR_INVALID),
            (option::INFO, vec![0, 0, 0, 0, 0xff, 0xff], reply::ERR_INVALID),
            // Without structured replies there are no contexts.
            (option::SET_META_CONTEXT, queries(b"", &[ALLOCATION]), reply::ERR_INVALID),
        ] {
            let (step, kinds) = ask(&mut handshake, code, &data);
            assert!(matches!(step, Ok(Step::Next(_))));
            assert_eq!(kinds, [kind], "{code} {data:?}");
        }
        let _ = ask(&mut handshake, option::STRUCTURED_REPLY, b"");
        for (data, kind) in [
            (queries(b"other", &[]), reply::ERR_UNKNOWN),
            (vec![0; 7], reply::ERR_INVALID),
            ([[0; 4], [255; 4]].concat(), reply::ERR_INVALID),
        ] {
            assert_eq!(ask(&mut handshake, option::SET_META_CONTEXT, &data).1, [kind]);
        }
        assert_eq!(ask(&mut handshake, option::LIST, b"").1, [reply::SERVER, reply::ACK]);
        assert_eq!(ask(&mut handshake, option::ABORT, b""), (Ok(Step::End), vec![reply::ACK]));
    }

    #[test]
    fn a_context_holds_for_the_name_it_was_set_for() {
        let mut handshake = open(1);
        let _ = ask(&mut handshake, option::STRUCTURED_REPLY, b"");
        let _ = ask(&mut handshake, option::SET_META_CONTEXT, &queries(b"", &[ALLOCATION]));
        let (step, _) = ask(&mut handshake, option::GO, &go(b"arr", &[]));
        assert!(matches!(step, Ok(Step::Begin(_, Terms { structured: true, allocation: false }))));
    }

    #[test]
    fn lengths_and_magics_are_checked_before_anything_is_waited_for() {
        let mut long = opt(option::GO, b"");
        long[12..16].copy_from_slice(&(limits::NBD_OPTION_BYTES_MAX + 1).to_be_bytes());
        assert!(open(1).handle(&export(), &long, &mut Vec::new()).is_err());
        long[12..16].copy_from_slice(&limits::NBD_OPTION_BYTES_MAX.to_be_bytes());
        assert_eq!(open(1).handle(&export(), &long, &mut Vec::new()), Ok(Step::More));
        assert!(open(1).handle(&export(), b"IHAVEOPS", &mut Vec::new()).is_err());
        for flags in [4u32, 0x8000_0000, u32::MAX] {
            assert!(Handshake::default().handle(&export(), &flags.to_be_bytes(), &mut Vec::new()).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_step_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200), code in 0u32..12) {
            let mut handshake = open(3);
            let mut answer = Vec::new();
            let _ = handshake.handle(&export(), &bytes, &mut answer);
            let mut handshake = open(3);
            handshake.structured = true;
            let _ = handshake.handle(&export(), &opt(code, &bytes), &mut answer);
            prop_assert!(answer.len() <= 2 * limits::NBD_OPTION_BYTES_MAX as usize);
        }
    }
}
