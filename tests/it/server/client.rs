//! A small client of the dst protocol, and servers to talk to.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dst::errno::Errno;
use dst::roles::server::{Config, Server};
use dst::units::{Epoch, Extent, Id, Lba};
use dst::wire::frame::{HEADER_BYTES, Header, Op, data_crc, flags, message_crc};
use dst::wire::session::{Hello, Welcome, features};
use dst::wire::volume::{Assign, CallError, Create, Explained, Member, Named, Volume, call, decode_message};

/// A directory that goes with the test.
pub(crate) struct Dir(PathBuf);

impl Dir {
    pub(crate) fn new() -> Dir {
        Dir::below(&std::env::temp_dir())
    }

    pub(crate) fn below(parent: &Path) -> Dir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let path = parent.join(format!("dst-server-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir_all(&path).unwrap();
        Dir(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn config(pool: &Path) -> Config {
    Config { listen: vec!["127.0.0.1:0".parse().unwrap()], pool: pool.to_owned(), threads: 2, danger_cleartext: false }
}

pub(crate) fn start(pool: &Path) -> (Server, SocketAddr) {
    // A process that another test starts at this moment has the former server's lock until it becomes its program.
    let until = Instant::now() + Duration::from_secs(5);
    let server = loop {
        match Server::start(config(pool)) {
            Err(why) if why.errno == Errno::EBUSY && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            started => break started.unwrap(),
        }
    };
    let address = server.addresses()[0];
    (server, address)
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

pub(crate) fn ask<Q: serde::Serialize, A: serde::de::DeserializeOwned>(
    address: SocketAddr,
    op: Op,
    question: &Q,
) -> Result<A, CallError> {
    call(&mut connect(address), op, question)
}

/// The number and the words of a refusal.
pub(crate) fn refusal<A: std::fmt::Debug>(result: Result<A, CallError>) -> (Errno, String) {
    match result {
        Err(CallError::Refused { errno, text }) => (errno, text),
        other => panic!("not refused: {other:?}"),
    }
}

pub(crate) fn create(address: SocketAddr, name: &str, size: u64, sparse: bool) -> Volume {
    ask(address, Op::VolumeCreate, &Create { name: name.to_owned(), size, sparse, write_through: false }).unwrap()
}

pub(crate) fn named(name: &str, force: bool) -> Named {
    Named { name: name.to_owned(), array: None, force }
}

pub(crate) fn stat(address: SocketAddr, name: &str) -> Volume {
    ask(address, Op::VolumeStat, &named(name, false)).unwrap()
}

pub(crate) fn array() -> Member {
    Member { id: Id([0xa; 16]), name: "storage".to_owned(), node: "n-0".to_owned() }
}

pub(crate) fn assign(address: SocketAddr, name: &str) -> Volume {
    ask(address, Op::VolumeAssign, &Assign { name: name.to_owned(), array: array() }).unwrap()
}

/// Who attaches: the session's id byte, its epoch, the channel.
pub(crate) type Who = (u8, u64, u16);

pub(crate) fn hello(volume: &str, (session, _, channel): Who) -> Hello {
    Hello {
        versions: (1, 1),
        features: features::DATA_CRC,
        array: array().id,
        session: Id([session; 16]),
        host: Id([0xb; 16]),
        channel,
        volume: volume.to_owned(),
    }
}

/// An attached connection.
pub(crate) struct Client {
    pub(crate) stream: TcpStream,
    pub(crate) welcome: Welcome,
    pub(crate) epoch: Epoch,
    pub(super) next: u32,
}

pub(crate) fn send_hello(stream: &mut TcpStream, hello: &Hello, epoch: u64) {
    let body = hello.encode();
    let header = Header::request(Op::Hello, 7, 9, Epoch(epoch), Extent::default())
        .with_body(u32::try_from(body.len()).unwrap(), message_crc(&body));
    stream.write_all(&[&header.encode()[..], &body[..]].concat()).unwrap();
}

pub(crate) fn read_frame(stream: &mut TcpStream) -> std::io::Result<(Header, Vec<u8>)> {
    let mut head = [0; HEADER_BYTES];
    stream.read_exact(&mut head)?;
    let header = Header::decode(&head).unwrap();
    let mut body = vec![0; header.body_bytes as usize];
    stream.read_exact(&mut body)?;
    Ok((header, body))
}

/// Reads the answer to a HELLO.
pub(crate) fn read_welcome(mut stream: TcpStream, epoch: u64) -> Result<Client, (Errno, String)> {
    let (reply, body) = read_frame(&mut stream).unwrap();
    assert!(reply.is_reply() && reply.op == Op::Hello && reply.tag == 7 && reply.sequence == 9);
    match reply.result() {
        Ok(()) => {
            let welcome = Welcome::decode(&body).unwrap();
            Ok(Client { stream, welcome, epoch: Epoch(epoch), next: 0 })
        }
        Err(errno) => Err((errno, decode_message::<Explained>(&reply, &body).unwrap().error)),
    }
}

pub(crate) fn try_attach(address: SocketAddr, volume: &str, who: Who) -> Result<Client, (Errno, String)> {
    let mut stream = connect(address);
    send_hello(&mut stream, &hello(volume, who), who.1);
    read_welcome(stream, who.1)
}

pub(crate) fn attach(address: SocketAddr, volume: &str, who: Who) -> Client {
    try_attach(address, volume, who).unwrap()
}

/// A server with one assigned volume of 4 MiB, and a client of it.
pub(crate) fn attached(sparse: bool) -> (Dir, Server, SocketAddr, Client) {
    attached_in(Dir::new(), sparse)
}

pub(crate) fn attached_in(dir: Dir, sparse: bool) -> (Dir, Server, SocketAddr, Client) {
    let (server, address) = start(dir.path());
    create(address, "v", 4 << 20, sparse);
    assign(address, "v");
    let client = attach(address, "v", (1, 1, 0));
    (dir, server, address, client)
}

impl Client {
    pub(crate) fn header(&mut self, op: Op, lba: u64, sectors: u64) -> Header {
        // Never the same twice in a session, whichever connection asks: it would be taken for a request sent again.
        static SEQUENCE: AtomicU32 = AtomicU32::new(0);
        self.next += 1;
        let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        Header::request(op, self.next, sequence, self.epoch, Extent::new(lba, sectors))
    }

    pub(crate) fn send(&mut self, header: &Header, body: &[u8]) {
        self.stream.write_all(&header.encode()).unwrap();
        self.stream.write_all(body).unwrap();
    }

    pub(crate) fn send_write(&mut self, lba: u64, data: &[u8], fua: bool) -> Header {
        let mut header = self.header(Op::Write, lba, data.len() as u64 / 512);
        header = header.with_body(header.length, data_crc(data, Lba(lba)));
        header.flags |= if fua { flags::FUA } else { 0 };
        self.send(&header, data);
        header
    }

    pub(crate) fn receive(&mut self) -> (Header, Vec<u8>) {
        read_frame(&mut self.stream).unwrap()
    }

    /// Waits for the one answer to this request.
    pub(crate) fn answer(&mut self, asked: &Header) -> Result<Vec<u8>, Errno> {
        let (reply, body) = self.receive();
        assert!(reply.is_reply());
        assert_eq!(
            (reply.op, reply.tag, reply.sequence, reply.extent()),
            (asked.op, asked.tag, asked.sequence, asked.extent())
        );
        if !body.is_empty() {
            assert_eq!(reply.body_crc, data_crc(&body, reply.lba));
        }
        reply.result().map(|()| body)
    }

    pub(crate) fn call(&mut self, op: Op, lba: u64, sectors: u64) -> Result<Vec<u8>, Errno> {
        let header = self.header(op, lba, sectors);
        self.send(&header, &[]);
        self.answer(&header)
    }

    pub(crate) fn write(&mut self, lba: u64, data: &[u8]) -> Result<(), Errno> {
        let header = self.send_write(lba, data, false);
        self.answer(&header).map(drop)
    }

    pub(crate) fn read(&mut self, lba: u64, sectors: u64) -> Result<Vec<u8>, Errno> {
        self.call(Op::Read, lba, sectors)
    }

    pub(crate) fn flush(&mut self) -> Result<(), Errno> {
        self.call(Op::Flush, 0, 0).map(drop)
    }

    /// A flush that says what is flushed everywhere; the server's point of it.
    pub(crate) fn flush_up_to(&mut self, point: u64) -> Result<u64, Errno> {
        let header = self.header(Op::Flush, 0, 0).with_point(point);
        self.send(&header, &[]);
        let (reply, _) = self.receive();
        assert_eq!((reply.op, reply.tag, reply.sequence), (Op::Flush, header.tag, header.sequence));
        reply.result().map(|()| reply.point())
    }

    /// Whether the server has closed the connection; waits for it.
    pub(crate) fn is_closed(&mut self) -> bool {
        is_closed(&mut self.stream)
    }
}

pub(crate) fn is_closed(stream: &mut TcpStream) -> bool {
    let mut byte = [0; 1];
    loop {
        match stream.read(&mut byte) {
            Ok(count) => return count == 0,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return true,
            // A socket with a time limit is interrupted by whatever stops and resumes the process.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => panic!("neither closed nor answered: {error}"),
        }
    }
}

/// Bytes that differ by place and by seed.
pub(crate) fn pattern(seed: u8, bytes: usize) -> Vec<u8> {
    let low = |number: usize| number.to_le_bytes()[0];
    (0..bytes).map(|at| low(at / 512) ^ low(at).wrapping_mul(31) ^ seed).collect()
}
