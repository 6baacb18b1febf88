//! What each request does to the data.

use std::net::SocketAddr;

use dst::errno::Errno;
use dst::limits;
use dst::units::Lba;
use dst::wire::digest::{Digest, Hasher};
use dst::wire::frame::{Op, data_crc, flags, message_crc};
use dst::wire::session::{Hello, features};
use dst::wire::volume::{Create, Resize, Volume};

use super::client::{
    Client, Dir, ask, assign, attach, attached, attached_in, connect, create, hello, pattern, read_welcome, refusal,
    send_hello, start, stat,
};

#[test]
fn write_read_flush_at_every_size() {
    for sparse in [false, true] {
        let (_dir, _server, _, mut client) = attached(sparse);
        assert_eq!(client.welcome.sectors, (4 << 20) / 512);
        assert_eq!(client.welcome.features, features::DATA_CRC);
        for (seed, sectors) in [1u64, 7, 8, 9, 127, 128, 300, 2047, 2048].into_iter().enumerate() {
            let data = pattern(u8::try_from(seed).unwrap(), usize::try_from(sectors * 512).unwrap());
            client.write(3, &data).unwrap();
            assert_eq!(client.read(3, sectors).unwrap(), data, "{sectors} sectors");
        }
        client.flush().unwrap();
        client.flush().unwrap();
        let header = client.send_write(0, &pattern(9, 4096), true);
        client.answer(&header).unwrap();
        assert_eq!(client.read(0, 8).unwrap(), pattern(9, 4096));
        assert_eq!(client.read((4 << 20) / 512 - 1, 1).unwrap(), vec![0; 512]);
        assert_eq!(client.call(Op::Keepalive, 0, 0), Ok(vec![]));
    }
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let (_dir, _server, _, mut client) = attached(false);
    let mut open = std::collections::HashMap::new();
    for at in 0..200u64 {
        let header = client.send_write(at * 8, &pattern(u8::try_from(at).unwrap(), 4096), at % 50 == 0);
        open.insert(header.tag, at);
    }
    while !open.is_empty() {
        let (reply, _) = client.receive();
        reply.result().unwrap();
        open.remove(&reply.tag).expect("each tag is answered once");
    }
    for at in 0..200u64 {
        let header = client.header(Op::Read, at * 8, 8);
        client.send(&header, &[]);
        open.insert(header.tag, at);
    }
    while !open.is_empty() {
        let (reply, body) = client.receive();
        let at = open.remove(&reply.tag).expect("each tag is answered once");
        assert_eq!(body, pattern(u8::try_from(at).unwrap(), 4096));
    }
}

#[test]
fn more_than_the_budget_waits_in_the_socket() {
    let (_dir, _server, _, client) = attached(false);
    let mut writer = Client { stream: client.stream.try_clone().unwrap(), ..client };
    // Twice what was promised, both in requests and in bytes; nothing is read meanwhile.
    let reads = limits::LINK_REQUESTS_MAX * 2;
    let mut headers: Vec<_> = (0..reads).map(|at| writer.header(Op::Read, (at as u64 % 100) * 8, 8)).collect();
    headers.extend((0..8).map(|_| writer.header(Op::Read, 0, 2048)));
    let bytes: Vec<u8> = headers.iter().flat_map(|header| header.encode()).collect();
    let mut sender = writer.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || std::io::Write::write_all(&mut sender, &bytes).unwrap());
    let mut open: std::collections::HashSet<u32> = headers.iter().map(|header| header.tag).collect();
    while !open.is_empty() {
        let (reply, _) = writer.receive();
        reply.result().unwrap();
        assert!(open.remove(&reply.tag));
    }
    sending.join().unwrap();
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros() {
    for sparse in [false, true] {
        let (_dir, _server, address, client) = attached(sparse);
        let (full, left) = zero_and_check(address, client);
        if sparse {
            assert!(left < full, "a discard frees: {left} of {full}");
        } else {
            assert!(left >= full, "a preallocated volume keeps its space: {left} of {full}");
        }
    }
}

#[test]
fn a_filesystem_that_cannot_zero_is_helped() {
    // One in memory can punch, but not zero; and it has no O_DIRECT.
    let memory = std::path::Path::new("/dev/shm");
    if !memory.is_dir() {
        return eprintln!("skipped: no /dev/shm");
    }
    for sparse in [false, true] {
        let (_dir, _server, address, client) = attached_in(Dir::below(memory), sparse);
        zero_and_check(address, client);
    }
}

/// Zeros parts of a volume in every way; tells the space it took before and after.
fn zero_and_check(address: SocketAddr, mut client: Client) -> (u64, u64) {
    let data = pattern(1, 1 << 20);
    client.write(0, &data).unwrap();
    client.flush().unwrap();
    let full = stat(address, "v").allocated;
    for (op, fua, lba, sectors) in [
        (Op::Discard, false, 3u64, 130u64),
        (Op::WriteZeroes, false, 501, 11),
        (Op::Discard, true, 777, 1),
        (Op::WriteZeroes, true, 1024, 256),
    ] {
        let mut header = client.header(op, lba, sectors);
        header.flags |= if fua { flags::FUA } else { 0 };
        client.send(&header, &[]);
        client.answer(&header).unwrap();
        assert!(client.read(lba, sectors).unwrap().iter().all(|byte| *byte == 0), "{op:?}");
        let before = usize::try_from((lba - 1) * 512).unwrap();
        assert_eq!(client.read(lba - 1, 1).unwrap(), data[before..before + 512]);
        let after = usize::try_from((lba + sectors) * 512).unwrap();
        assert_eq!(client.read(lba + sectors, 1).unwrap(), data[after..after + 512]);
    }
    (full, stat(address, "v").allocated)
}

#[test]
fn what_cannot_be_done_is_said_and_the_connection_goes_on() {
    let (_dir, _server, _, mut client) = attached(false);
    let sectors = client.welcome.sectors;
    assert_eq!(client.read(sectors, 1), Err(Errno::EINVAL));
    assert_eq!(client.read(sectors - 1, 2), Err(Errno::EINVAL));
    assert_eq!(client.write(sectors - 1, &[1; 1024]), Err(Errno::EINVAL));
    assert_eq!(client.call(Op::Discard, sectors, 8), Err(Errno::EINVAL));
    assert_eq!(client.call(Op::WriteZeroes, limits::ARRAY_SECTORS_MAX - 8, 8), Err(Errno::EINVAL));
    assert_eq!(client.read(sectors - 1, 1).unwrap(), vec![0; 512]);
    // A body that was changed on the way, and one that belongs elsewhere.
    client.write(8, &[1; 4096]).unwrap();
    let header = client.header(Op::Write, 8, 8);
    for crc in [7, data_crc(&[2; 4096], Lba(16))] {
        let header = header.with_body(4096, crc);
        client.send(&header, &[2; 4096]);
        assert_eq!(client.answer(&header), Err(Errno::EILSEQ));
    }
    let bare = dst::wire::frame::Header { body_bytes: 4096, ..header };
    client.send(&bare, &[2; 4096]);
    assert_eq!(client.answer(&bare), Err(Errno::EILSEQ), "this session has checksums");
    assert_eq!(client.read(8, 8).unwrap(), vec![1; 4096]);
    // Another epoch than the session's.
    let stale = dst::wire::frame::Header { epoch: dst::units::Epoch(0), ..client.header(Op::Read, 0, 8) };
    client.send(&stale, &[]);
    assert_eq!(client.answer(&stale), Err(Errno::EBADE));
    client.flush().unwrap();
}

#[test]
fn a_full_disk_reaches_the_answer_as_enospc() {
    let small = match Tmpfs::mount("1m") {
        Ok(small) => small,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let (_server, address) = start(small.0.path());
    // A volume that does not fit is not made, and one that cannot grow stays as it was.
    let full = Create { name: "full".to_owned(), size: 64 << 20, sparse: false, write_through: false };
    let (errno, text) = refusal(ask::<_, Volume>(address, Op::VolumeCreate, &full));
    assert!(errno == Errno::ENOSPC && text.contains("--sparse"), "{text}");
    assert_eq!(std::fs::read_dir(small.0.path()).unwrap().count(), 1, "only the lock is left");
    let fits = create(address, "fits", 256 << 10, false);
    let grow = Resize { name: "fits".to_owned(), size: 64 << 20, force: false };
    assert_eq!(refusal(ask::<_, Volume>(address, Op::VolumeResize, &grow)).0, Errno::ENOSPC);
    assert_eq!(stat(address, "fits"), fits);
    create(address, "v", 64 << 20, true);
    assign(address, "v");
    let mut client = attach(address, "v", (1, 1, 0));
    let mut results = (0..32).map(|at| client.write(at * 128, &pattern(3, 64 << 10)));
    assert!(results.any(|result| result == Err(Errno::ENOSPC)));
    // What was there is still there, and room can be made.
    assert_eq!(client.read(0, 128).unwrap(), pattern(3, 64 << 10));
    client.call(Op::Discard, 0, 4096).unwrap();
    client.write(0, &pattern(4, 64 << 10)).unwrap();
    client.flush().unwrap();
    assert_eq!(client.read(0, 128).unwrap(), pattern(4, 64 << 10));
}

/// A small filesystem in memory.
struct Tmpfs(Dir);

impl Tmpfs {
    fn mount(size: &str) -> Result<Tmpfs, String> {
        let dir = Dir::new();
        let done = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(dir.path())
            .status();
        match done {
            Ok(status) if status.success() => Ok(Tmpfs(dir)),
            other => Err(format!("no tmpfs can be mounted: {other:?}")),
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn data_has_a_checksum_in_both_directions_or_in_none() {
    let (_dir, _server, address, mut client) = attached(false);
    let data = pattern(5, 8192);
    // Who asked for checksums has to send them.
    let header = client.header(Op::Write, 8, 16);
    let bare = header.with_bare_body(header.length);
    client.send(&bare, &data);
    assert_eq!(client.answer(&bare), Err(Errno::EILSEQ));
    assert_eq!(client.read(8, 16).unwrap(), vec![0; 8192]);
    drop(client);

    let mut stream = connect(address);
    send_hello(&mut stream, &Hello { features: 0, ..hello("v", (1, 1, 0)) }, 1);
    let mut client = read_welcome(stream, 1).unwrap();
    assert_eq!(client.welcome.features, 0);
    let header = client.header(Op::Write, 8, 16);
    let bare = header.with_bare_body(header.length);
    client.send(&bare, &data);
    assert_eq!(client.receive().0.result(), Ok(()));
    let asked = client.header(Op::Read, 8, 16);
    client.send(&asked, &[]);
    let (reply, body) = client.receive();
    assert_eq!((reply.result(), reply.is_sealed(), reply.body_crc, body == data), (Ok(()), false, 0, true));
    // What has one all the same is checked, and a digest, which is a message, always has one.
    let sealed = client.header(Op::Write, 8, 16);
    let sealed = sealed.with_body(sealed.length, data_crc(&data, Lba(9)));
    client.send(&sealed, &data);
    assert_eq!(client.receive().0.result(), Err(Errno::EILSEQ));
    let asked = client.header(Op::Digest, 8, 16);
    client.send(&asked, &[]);
    let (reply, body) = client.receive();
    assert_eq!((reply.result(), reply.is_sealed(), reply.body_crc), (Ok(()), true, message_crc(&body)));
}

#[test]
fn a_digest_is_made_where_the_data_is() {
    let (_dir, _server, address, mut client) = attached(true);
    let hash = |data: &[u8]| {
        let mut hasher = Hasher::default();
        hasher.update(data);
        hasher.finish(0).hash
    };
    let mut whole = vec![0; 4 << 20];
    whole[1 << 20..(1 << 20) + 8192].copy_from_slice(&pattern(3, 8192));
    client.write((1 << 20) / 512, &pattern(3, 8192)).unwrap();
    client.flush().unwrap();
    let mut digest = |lba: u64, sectors: u64| {
        let asked = client.header(Op::Digest, lba, sectors);
        client.send(&asked, &[]);
        let (reply, body) = client.receive();
        assert_eq!((reply.result(), reply.extent()), (Ok(()), asked.extent()));
        assert_eq!(reply.body_crc, message_crc(&body));
        Digest::decode(&body).unwrap()
    };
    for (lba, sectors) in [(0, 8192), (0, 1), (2047, 3), (2048, 16), (2049, 6000), (8191, 1)] {
        let found = digest(lba, sectors);
        let (from, bytes) = (usize::try_from(lba * 512).unwrap(), usize::try_from(sectors * 512).unwrap());
        assert_eq!(found.hash, hash(&whole[from..from + bytes]), "{lba}+{sectors}");
        assert!(found.allocated <= sectors * 512);
    }
    let holes = digest(4096, 1024).allocated;
    assert!(digest(2048, 16).allocated == 8192 && (holes == 0 || holes == 1024 * 512), "{holes}");
    let outside = client.header(Op::Digest, 8192, 1);
    client.send(&outside, &[]);
    assert_eq!(client.answer(&outside), Err(Errno::EINVAL));
    // As many as may be outstanding, of the largest that a volume of this size has.
    let asked: Vec<_> = (0..40).map(|_| client.header(Op::Digest, 0, 8192)).collect();
    asked.iter().for_each(|header| client.send(header, &[]));
    for _ in &asked {
        let (reply, body) = client.receive();
        assert!(asked.iter().any(|header| header.tag == reply.tag));
        assert_eq!(Digest::decode(&body).unwrap().hash, hash(&whole));
    }
    assert_eq!(stat(address, "v").connections, 1);
}
