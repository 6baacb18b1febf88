//! An NBD client that keeps many requests in flight and takes answers as they come.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longer than the array's own patience with its servers.
const PATIENCE: Duration = Duration::from_secs(90);

/// Kinds of requests.
pub(crate) mod code {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const WRITE_ZEROES: u16 = 6;
}

/// The flag of a request that is to be durable when it is answered.
pub(crate) const FUA: u16 = 1;

/// A connection that is ready for requests.
pub(crate) struct Client(UnixStream);

impl Client {
    /// Connects to the only export behind the socket.
    pub(crate) fn connect(path: &Path) -> io::Result<Client> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut client = Client(stream);
        client.take(18)?;
        client.0.write_all(&3u32.to_be_bytes())?;
        client.0.write_all(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0")?;
        loop {
            // Option replies: magic, option, kind, length, data. The kind 1 is the last one.
            let head = client.take(20)?;
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            client.take(word(16) as usize)?;
            match word(12) {
                1 => return Ok(client),
                3 => {}
                other => return Err(io::Error::other(format!("the handshake ended with {other:#x}"))),
            }
        }
    }

    /// Sends one request.
    pub(crate) fn ask(&mut self, code: u16, flags: u16, cookie: u64, range: (u64, u32), data: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend_from_slice(&0x2560_9513u32.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&code.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&range.0.to_be_bytes());
        bytes.extend_from_slice(&range.1.to_be_bytes());
        bytes.extend_from_slice(data);
        self.0.write_all(&bytes)
    }

    /// The next answer: its cookie and its error number.
    pub(crate) fn answer(&mut self) -> io::Result<(u64, u32)> {
        let head = self.take(16)?;
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), 0x6744_6698, "a simple reply");
        Ok((u64::from_be_bytes(head[8..16].try_into().unwrap()), word(4)))
    }

    /// Reads a range, with nothing else in flight.
    pub(crate) fn read(&mut self, offset: u64, bytes: u32) -> io::Result<Vec<u8>> {
        self.ask(code::READ, 0, offset, (offset, bytes), &[])?;
        let (cookie, error) = self.answer()?;
        assert_eq!((cookie, error), (offset, 0), "a read of {bytes} bytes at {offset}");
        self.take(bytes as usize)
    }

    fn take(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
