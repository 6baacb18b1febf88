//! Peers that do not follow the protocol: they lose their connection, nobody else notices.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Instant;

use dst::limits;
use dst::units::{Epoch, Extent};
use dst::wire::frame::{HEADER_BYTES, Header, Op, flags, message_crc};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::client::{Client, attach, attached, connect, hello, is_closed, pattern, stat};

/// A header with some bytes replaced, and its checksum made right again.
fn forged(header: &Header, at: usize, value: &[u8]) -> [u8; HEADER_BYTES] {
    let mut bytes = header.encode();
    bytes[at..at + value.len()].copy_from_slice(value);
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Each field at its edges, and past them: (where, what).
fn edges() -> Vec<(usize, Vec<u8>)> {
    let mut edges = Vec::new();
    for byte in [4, 5, 48, 52, 59] {
        edges.extend([0u8, 1, 2, 8, 15, 23, 24, 127, 128, 255].map(|value| (byte, vec![value])));
    }
    for flag in (0..16).map(|bit| 1u16 << bit).chain([0, u16::MAX]) {
        edges.push((6, flag.to_le_bytes().to_vec()));
    }
    for lba in [
        0,
        1,
        limits::ARRAY_SECTORS_MAX - 8,
        limits::ARRAY_SECTORS_MAX - 1,
        limits::ARRAY_SECTORS_MAX,
        1 << 63,
        u64::MAX,
    ] {
        edges.push((16, lba.to_le_bytes().to_vec()));
    }
    let payload = limits::PAYLOAD_BYTES_MAX;
    for length in [
        0,
        1,
        511,
        512,
        payload,
        payload + 1,
        payload + 512,
        limits::ZERO_BYTES_MAX,
        limits::MESSAGE_BYTES_MAX + 1,
        1 << 31,
        u32::MAX,
    ] {
        edges.push((24, length.to_le_bytes().to_vec()));
        edges.push((28, length.to_le_bytes().to_vec()));
        edges.push((40, length.to_le_bytes().to_vec()));
        edges.push((44, length.to_le_bytes().to_vec()));
    }
    for epoch in [0, 1, u64::MAX] {
        edges.push((32, epoch.to_le_bytes().to_vec()));
    }
    edges
}

fn is_well(address: SocketAddr, witness: &mut Client) {
    assert_eq!(witness.read(0, 8).unwrap(), pattern(1, 4096));
    assert_eq!(stat(address, "v").name, "v");
}

#[test]
fn each_field_of_each_frame_at_its_edges() {
    let (_dir, _server, address, mut witness) = attached(false);
    witness.write(0, &pattern(1, 4096)).unwrap();
    for op in Op::ALL {
        let extent = if op.has_range() { Extent::new(16, 8) } else { Extent::default() };
        let mut header = Header::request(op, 1, 1, Epoch(1), extent);
        if op == Op::Write {
            header = header.with_body(4096, 1);
        }
        for (at, value) in edges() {
            let bytes = forged(&header, at, &value);
            // As the first frame, and after HELLO. The write end is closed behind it, so a frame that is well formed but
            // has no body cannot wait for it.
            let mut stream = connect(address);
            let _ = stream.write_all(&bytes);
            stream.shutdown(std::net::Shutdown::Write).ok();
            drain(&mut stream);
            if matches!(at, 4 | 5 | 6 | 24 | 28) {
                let mut client = attach(address, "v", (1, 1, 1));
                let _ = client.stream.write_all(&bytes);
                client.stream.shutdown(std::net::Shutdown::Write).ok();
                drain(&mut client.stream);
            }
        }
        is_well(address, &mut witness);
    }
}

/// Reads until the server closes.
fn drain(stream: &mut std::net::TcpStream) {
    let mut sink = Vec::new();
    match std::io::Read::read_to_end(stream, &mut sink) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "the server closes: {error}"),
    }
}

#[test]
fn what_is_not_the_protocol_is_closed_at_once() {
    let (_dir, _server, address, mut witness) = attached(false);
    witness.write(0, &pattern(1, 4096)).unwrap();
    let read = Header::request(Op::Read, 1, 1, Epoch(1), Extent::new(0, 8));
    for rubbish in [
        b"GET / HTTP/1.1\r\nHost: a-storage-server.example\r\nUser-Agent: somebody\r\n\r\n".to_vec(),
        vec![0; HEADER_BYTES],
        vec![0xff; 4096],
        // Data before HELLO, and answers that nobody asked for.
        read.encode().to_vec(),
        read.reply(Err(dst::errno::Errno::EIO)).encode().to_vec(),
        Header { flags: flags::REPLY, ..Header::request(Op::Hello, 0, 0, Epoch(0), Extent::default()) }
            .encode()
            .to_vec(),
    ] {
        let mut stream = connect(address);
        let _ = stream.write_all(&rubbish);
        assert!(is_closed(&mut stream), "{rubbish:?}");
        let mut client = attach(address, "v", (1, 1, 1));
        let rubbish =
            if rubbish.starts_with(&read.encode()) { hello("v", (1, 1, 1)).encode().to_vec() } else { rubbish };
        let _ = client.stream.write_all(&rubbish);
        assert!(client.is_closed(), "{rubbish:?}");
        is_well(address, &mut witness);
    }
}

#[test]
fn a_hello_with_wrong_content_is_closed() {
    let (_dir, _server, address, mut witness) = attached(false);
    witness.write(0, &pattern(1, 4096)).unwrap();
    let good = hello("v", (1, 1, 1)).encode();
    for at in 0..good.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut body = good;
            body[at] = value;
            // Ids may be anything, and channel 0 is the witness.
            if body == good || (16..64).contains(&at) || (at, value) == (4, 0) {
                continue;
            }
            let header =
                Header::request(Op::Hello, 1, 1, Epoch(1), Extent::default()).with_body(256, message_crc(&body));
            let mut stream = connect(address);
            stream.write_all(&[&header.encode()[..], &body[..]].concat()).unwrap();
            stream.shutdown(std::net::Shutdown::Write).ok();
            drain(&mut stream);
        }
    }
    is_well(address, &mut witness);
}

#[test]
fn any_bytes_leave_the_server_well() {
    let (_dir, _server, address, mut witness) = attached(false);
    witness.write(0, &pattern(1, 4096)).unwrap();
    let bytes = prop::collection::vec(any::<u8>(), 0..500);
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    let run = TestRunner::new(config).run(&(bytes, any::<u8>(), any::<bool>()), |(bytes, op, after_hello)| {
        // A frame that is well formed up to what its op makes of it, and then anything.
        let header = Header::request(Op::Keepalive, 1, 1, Epoch(1), Extent::default());
        let mut all = forged(&header, 5, &[op % 40]).to_vec();
        all.extend_from_slice(&bytes);
        let mut stream = if after_hello { attach(address, "v", (1, 1, 2)).stream } else { connect(address) };
        let _ = stream.write_all(&all);
        stream.shutdown(std::net::Shutdown::Write).ok();
        drain(&mut stream);
        Ok(())
    });
    run.unwrap();
    is_well(address, &mut witness);
}

#[test]
fn a_peer_that_never_reads_costs_only_its_budget() {
    let (_dir, _server, address, mut witness) = attached(false);
    witness.write(0, &pattern(1, 4096)).unwrap();
    let mut greedy = attach(address, "v", (1, 1, 1));
    greedy.stream.set_nonblocking(true).unwrap();
    // Reads of 1 MiB whose answers are never taken: sooner or later the server takes no more of them.
    let mut asked = 0u64;
    loop {
        let header = greedy.header(Op::Read, 0, 2048);
        match greedy.stream.write(&header.encode()) {
            Ok(HEADER_BYTES) => asked += 1,
            _ => break,
        }
        assert!(asked < 1 << 20, "the server takes requests without end");
    }
    is_well(address, &mut witness);
    // It is closed like any other.
    attach(address, "v", (1, 1, 1)).flush().unwrap();
}

#[test]
fn whoever_says_nothing_is_disconnected() {
    let (_dir, _server, address, mut witness) = attached(false);
    witness.write(0, &pattern(1, 4096)).unwrap();
    let begun = Instant::now();
    let whole = Header::request(Op::VolumeList, 1, 1, Epoch(0), Extent::default()).with_body(10, 1).encode();
    let mut silent: Vec<_> = [0, 1, HEADER_BYTES - 1, HEADER_BYTES]
        .into_iter()
        .map(|sent| {
            let mut stream = connect(address);
            stream.write_all(&whole[..sent]).unwrap();
            stream
        })
        .collect();
    silent.iter_mut().for_each(|stream| assert!(is_closed(stream)));
    let took = begun.elapsed();
    assert!(took >= limits::HANDSHAKE_TIMEOUT && took < limits::HANDSHAKE_TIMEOUT * 2, "{took:?}");
    is_well(address, &mut witness);
}
