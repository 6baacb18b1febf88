//! Error numbers, and the three maps between the worlds that speak them (the contract, section 8.4).
//!
//! An [`Errno`] is the Linux number. The wire carries the same numbers, but only those of [`WIRE`]: a disk's error is mapped
//! to one of them before it is sent, and anything else that arrives is EIO. Each map is a table with a test of every row.

use std::fmt;

use crate::bugs::{Bug, planted};

/// A Linux error number; never zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(u16);

macro_rules! errnos {
    ($($name:ident $number:literal $text:literal)*) => {
        impl Errno {
            $(#[doc = $text] pub const $name: Errno = Errno($number);)*

            /// The symbol, such as `EIO`; `None` for a number that this program has no word for.
            pub fn name(self) -> Option<&'static str> {
                match self.0 { $($number => Some(stringify!($name)),)* _ => None }
            }

            /// What the number means, for people.
            pub fn text(self) -> &'static str {
                match self.0 { $($number => $text,)* _ => "unknown error" }
            }
        }
    };
}

errnos! {
    EPERM 1 "operation not permitted"
    ENOENT 2 "no such file or volume"
    EINTR 4 "interrupted"
    EIO 5 "input/output error"
    ENXIO 6 "no such device or address"
    EAGAIN 11 "try again"
    ENOMEM 12 "out of memory"
    EACCES 13 "permission denied"
    EBUSY 16 "busy"
    EEXIST 17 "already exists"
    ENODEV 19 "no such device"
    ENOTDIR 20 "not a directory"
    EINVAL 22 "invalid argument"
    EFBIG 27 "file too large"
    ENOSPC 28 "no space left"
    EROFS 30 "read-only"
    EPIPE 32 "broken pipe"
    ERANGE 34 "out of range"
    ENOSYS 38 "not implemented"
    EBADE 52 "fenced: another owner has claimed the volume"
    EBADMSG 74 "not a valid message"
    EPROTO 71 "protocol error"
    EOVERFLOW 75 "value too large"
    EILSEQ 84 "checksum mismatch"
    EOPNOTSUPP 95 "not supported"
    EPROTONOSUPPORT 93 "protocol version not supported"
    EADDRINUSE 98 "address already in use"
    ENETUNREACH 101 "network unreachable"
    ECONNABORTED 103 "connection aborted"
    ECONNRESET 104 "connection reset"
    ENOTCONN 107 "not connected"
    ESHUTDOWN 108 "shutting down"
    ETIMEDOUT 110 "timed out"
    ECONNREFUSED 111 "connection refused"
    EHOSTUNREACH 113 "host unreachable"
    ECANCELED 125 "canceled"
    EDQUOT 122 "quota exceeded"
}

impl Errno {
    /// The positive number of an operating system error; zero and numbers out of range become EIO.
    pub fn from_raw(number: i32) -> Errno {
        match u16::try_from(number) {
            Ok(number @ 1..=4095) => Errno(number),
            _ => Errno::EIO,
        }
    }

    /// The positive number.
    pub const fn raw(self) -> i32 {
        self.0 as i32
    }
}

impl From<&std::io::Error> for Errno {
    fn from(error: &std::io::Error) -> Errno {
        error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{} ({name})", self.text()),
            None => write!(f, "error number {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl std::error::Error for Errno {}

/// The numbers that may stand in a reply's status.
pub const WIRE: [Errno; 17] = [
    Errno::EPERM,
    Errno::ENOENT,
    Errno::EIO,
    Errno::ENOMEM,
    Errno::EACCES,
    Errno::EBUSY,
    Errno::EEXIST,
    Errno::EINVAL,
    Errno::ENOSPC,
    Errno::EROFS,
    Errno::EBADE,
    Errno::EPROTO,
    Errno::EILSEQ,
    Errno::EOPNOTSUPP,
    Errno::EPROTONOSUPPORT,
    Errno::ESHUTDOWN,
    Errno::ETIMEDOUT,
];

/// What a server answers when its disk said `error`: quota and file size limits are "no space", the unknown is EIO.
pub fn disk_to_wire(error: Errno) -> Errno {
    match error {
        Errno::ENOSPC if planted(Bug::EnospcIsEio) => Errno::EIO,
        Errno::EDQUOT | Errno::EFBIG => Errno::ENOSPC,
        known if WIRE.contains(&known) => known,
        _ => Errno::EIO,
    }
}

/// A status as it arrived: `None` is success.
pub fn from_wire(status: u32) -> Option<Errno> {
    if status == 0 {
        return None;
    }
    let error = u16::try_from(status).map_or(Errno::EIO, Errno);
    Some(if WIRE.contains(&error) { error } else { Errno::EIO })
}

/// The status to send.
pub fn to_wire(result: Result<(), Errno>) -> u32 {
    match result {
        Ok(()) => 0,
        Err(error) => u32::from(disk_to_wire(error).0),
    }
}

/// What the block layer is told. Only numbers with a meaning of their own there pass; EAGAIN, EBUSY and ENOMEM would be
/// taken for "try again", which the driver does not do.
pub fn to_ublk(error: Errno) -> Errno {
    match error {
        Errno::ENOSPC
        | Errno::ETIMEDOUT
        | Errno::EOPNOTSUPP
        | Errno::EBADE
        | Errno::EILSEQ
        | Errno::EINVAL
        | Errno::ENODEV => error,
        _ => Errno::EIO,
    }
}

/// What an NBD client is told: the protocol knows few numbers. (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, "Error values")
pub fn to_nbd(error: Errno) -> u32 {
    match error {
        Errno::EPERM | Errno::EROFS => 1,
        Errno::ENOMEM => 12,
        Errno::EINVAL => 22,
        Errno::ENOSPC => 28,
        Errno::EOVERFLOW => 75,
        Errno::EOPNOTSUPP => 95,
        Errno::ESHUTDOWN => 108,
        _ => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_disk_map() {
        for (disk, wire) in [
            (Errno::EDQUOT, Errno::ENOSPC),
            (Errno::EFBIG, Errno::ENOSPC),
            (Errno::EPIPE, Errno::EIO),
            (Errno::EAGAIN, Errno::EIO),
            (Errno::from_raw(3000), Errno::EIO),
            (Errno::from_raw(0), Errno::EIO),
            (Errno::from_raw(-5), Errno::EIO),
        ] {
            assert_eq!(disk_to_wire(disk), wire);
        }
        for known in WIRE {
            assert_eq!(disk_to_wire(known), known);
            assert_eq!(from_wire(to_wire(Err(known))), Some(known));
        }
        assert_eq!(from_wire(to_wire(Ok(()))), None);
        assert_eq!(from_wire(11), Some(Errno::EIO));
        assert_eq!(from_wire(u32::MAX), Some(Errno::EIO));
    }

    #[test]
    fn every_row_of_the_block_layer_map() {
        for error in WIRE {
            let told = to_ublk(error);
            assert!(![Errno::EAGAIN, Errno::EBUSY, Errno::ENOMEM].contains(&told));
        }
        for kept in [Errno::ENOSPC, Errno::ETIMEDOUT, Errno::EOPNOTSUPP, Errno::EBADE, Errno::EILSEQ, Errno::EINVAL] {
            assert_eq!(to_ublk(kept), kept);
        }
        for other in [Errno::EBUSY, Errno::ENOMEM, Errno::EAGAIN, Errno::EROFS, Errno::ECONNRESET] {
            assert_eq!(to_ublk(other), Errno::EIO);
        }
    }

    #[test]
    fn every_row_of_the_nbd_map() {
        for (error, nbd) in [
            (Errno::EPERM, 1),
            (Errno::EROFS, 1),
            (Errno::ENOMEM, 12),
            (Errno::EINVAL, 22),
            (Errno::ENOSPC, 28),
            (Errno::EOVERFLOW, 75),
            (Errno::EOPNOTSUPP, 95),
            (Errno::ESHUTDOWN, 108),
            (Errno::EIO, 5),
            (Errno::ETIMEDOUT, 5),
            (Errno::EBADE, 5),
        ] {
            assert_eq!(to_nbd(error), nbd);
        }
    }
}
