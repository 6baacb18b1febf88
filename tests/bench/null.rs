//! An NBD server that does nothing: reads are whatever is there, writes are forgotten. What a client reaches with it is the most
//! that it can reach with any server.

use std::io::{IoSlice, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;

use dst::wire::nbd::export::{Export, Terms};
use dst::wire::nbd::handshake::{Handshake, Step};
use dst::wire::nbd::transmission::{Command, REQUEST_BYTES, Reply, Work};

/// Serves clients on both, each in a thread, until it is killed.
pub(crate) fn serve(address: &str, socket: &Path, bytes: u64) -> ! {
    let export = Export {
        name: String::new(),
        description: String::new(),
        sectors: bytes / 512,
        block_bytes: 512,
        preferred_bytes: 4096,
    };
    let tcp = TcpListener::bind(address).unwrap();
    let unix = UnixListener::bind(socket).unwrap();
    let other = export.clone();
    std::thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            let _ = stream.set_nodelay(true);
            let export = other.clone();
            std::thread::spawn(move || client(&mut stream, &export));
        }
    });
    loop {
        let Ok((mut stream, _)) = unix.accept() else { continue };
        let export = export.clone();
        std::thread::spawn(move || client(&mut stream, &export));
    }
}

/// `None`: it has gone, or speaks something else.
fn client(stream: &mut (impl Read + Write), export: &Export) -> Option<()> {
    let mut input = vec![0; 4 << 20];
    let (mut start, mut end) = (0, 0);
    let data = vec![0u8; 2 << 20];
    let mut handshake = Handshake::default();
    let mut answer = Handshake::greeting().to_vec();
    let terms = loop {
        stream.write_all(&answer).ok()?;
        answer.clear();
        match handshake.handle(export, &input[start..end], &mut answer).ok()? {
            Step::More => end += some(stream, &mut input[end..])?,
            Step::Next(used) => start += used,
            Step::Begin(used, terms) => {
                start += used;
                stream.write_all(&answer).ok()?;
                break terms;
            }
            Step::End => return None,
        }
    };
    let mut replies: Vec<Reply> = Vec::new();
    loop {
        replies.clear();
        while replies.len() < 256
            && let Some(used) = take(&input[start..end], export, terms, &mut replies)?
        {
            start += used;
        }
        if replies.is_empty() {
            input.copy_within(start..end, 0);
            (start, end) = (0, end - start);
            end += some(stream, &mut input[end..])?;
        } else {
            send(stream, &replies, &data)?;
        }
    }
}

fn some(stream: &mut impl Read, to: &mut [u8]) -> Option<usize> {
    stream.read(to).ok().filter(|bytes| *bytes > 0)
}

/// Takes one whole request; how long it was. `Some(None)`: there is none.
fn take(input: &[u8], export: &Export, terms: Terms, replies: &mut Vec<Reply>) -> Option<Option<usize>> {
    let Some(bytes) = input.first_chunk::<REQUEST_BYTES>() else { return Some(None) };
    let verdict = Command::decode(bytes).ok()?.judge(export, terms).ok()?;
    let whole = REQUEST_BYTES + verdict.payload as usize;
    match verdict.work {
        Work::Disconnect => return None,
        _ if input.len() < whole => return Some(None),
        Work::Engine(_) => replies.push(Reply::new(&verdict.pending, Ok(()), terms)),
        Work::Answer(result) => replies.push(Reply::new(&verdict.pending, result, terms)),
    }
    Some(Some(whole))
}

fn send(stream: &mut impl Write, replies: &[Reply], data: &[u8]) -> Option<()> {
    let mut parts: Vec<IoSlice<'_>> = Vec::with_capacity(replies.len() * 2);
    for reply in replies {
        parts.push(IoSlice::new(reply.head()));
        if reply.data_bytes > 0 {
            parts.push(IoSlice::new(&data[..reply.data_bytes]));
        }
    }
    let mut rest = &mut parts[..];
    while !rest.is_empty() {
        let sent = stream.write_vectored(rest).ok().filter(|bytes| *bytes > 0)?;
        IoSlice::advance_slices(&mut rest, sent);
    }
    Some(())
}
