//! What became of requests whose answer may have been lost with its connection (CONTRACT 3.1).
//!
//! Contract: a change that was carried out is not carried out again when the client, after it has resumed the channel, sends it
//! again: it is answered with the status that is kept here, until its tag is used for something else. Tables are per channel of
//! one session, and bounded: a tag beyond them is a stranger's, whose resends are carried out again.

use crate::bugs::{Bug, planted};
use crate::errno::Errno;
use crate::limits;
use crate::wire::frame::{Header, Op};

/// A change that has ended.
#[derive(Clone, Copy, Debug)]
struct Done {
    request: Request,
    result: Result<(), Errno>,
}

/// What makes a request the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    op: Op,
    sequence: u32,
    lba: u64,
    length: u32,
}

impl Request {
    fn of(header: &Header) -> Request {
        Request { op: header.op, sequence: header.sequence, lba: header.lba.0, length: header.length }
    }
}

/// The statuses of one session.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// By channel, then by tag.
    channels: Vec<Vec<Option<Done>>>,
}

impl Kept {
    /// How the request ended when it was carried out before; `None` if it was not.
    pub(super) fn find(&self, channel: u16, header: &Header) -> Option<Result<(), Errno>> {
        let done = (*self.channels.get(usize::from(channel))?.get(header.tag as usize)?)?;
        (done.request == Request::of(header) && !planted(Bug::ForgetStatus)).then_some(done.result)
    }

    /// The request has ended: the tag's former use is forgotten.
    pub(super) fn keep(&mut self, channel: u16, header: &Header, result: Result<(), Errno>) {
        let (channel, tag) = (usize::from(channel), header.tag as usize);
        if channel >= limits::SHARDS_MAX || tag >= limits::KEPT_TAGS_MAX {
            return;
        }
        if self.channels.len() <= channel {
            self.channels.resize_with(channel + 1, Vec::new);
        }
        let tags = &mut self.channels[channel];
        if tags.len() <= tag {
            tags.resize(tag + 1, None);
        }
        tags[tag] = Some(Done { request: Request::of(header), result });
    }

    /// Another session begins.
    pub(super) fn clear(&mut self) {
        self.channels.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Epoch, Extent};

    fn write(tag: u32, sequence: u32) -> Header {
        Header::request(Op::Write, tag, sequence, Epoch(1), Extent::new(8, 8))
    }

    #[test]
    fn a_status_is_kept_until_the_tag_is_used_again() {
        let mut kept = Kept::default();
        assert_eq!(kept.find(1, &write(3, 7)), None);
        kept.keep(1, &write(3, 7), Err(Errno::ENOSPC));
        assert_eq!(kept.find(1, &write(3, 7)), Some(Err(Errno::ENOSPC)));
        assert_eq!(kept.find(0, &write(3, 7)), None, "another channel");
        assert_eq!(kept.find(1, &write(3, 8)), None, "another use of the tag");
        let elsewhere = Header::request(Op::Write, 3, 7, Epoch(1), Extent::new(16, 8));
        assert_eq!(kept.find(1, &elsewhere), None);
        kept.keep(1, &write(3, 8), Ok(()));
        assert_eq!(kept.find(1, &write(3, 7)), None);
        assert_eq!(kept.find(1, &write(3, 8)), Some(Ok(())));
        kept.clear();
        assert_eq!(kept.find(1, &write(3, 8)), None);
    }

    #[test]
    fn strange_tags_cost_nothing() {
        let mut kept = Kept::default();
        kept.keep(0, &write(u32::MAX, 1), Ok(()));
        kept.keep(u16::MAX, &write(1, 1), Ok(()));
        assert!(kept.channels.is_empty());
        assert_eq!(kept.find(0, &write(u32::MAX, 1)), None);
    }
}
