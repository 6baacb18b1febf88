//! A ublk device without an array behind it, for tests of `io/ublk.rs` in the guest and as the floor of measurements: whatever
//! an array costs on top of `ublk-target null` is ours.
//!
//! ```text
//! ublk-target null|broken|file PATH [--size 1G] [--queues 1] [--depth 64] [--chunk 0] [--block 512] [--buffer 128K] [--recover]
//! ublk-target check | leftovers [--delete]
//! ```
//! It prints `ready /dev/ublkbN` and then obeys lines on its standard input: `stop`, `force`, `info`, `fail` (workers return with
//! requests in their hands), `drop` (the device is dropped), `hang` (no request is
//! answered any more), `impatient` (`force`, with a limit of 3 s), `resize SIZE`, `quiesce`. The end of the input is `drop`. The workers of
//! `broken` fail at once. With `--recover` it serves on what a dead one has left, with that one's queues.

// In a test program a panic is the verdict.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io;
use std::io::BufRead;
use std::os::fd::AsRawFd;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dst::engine::request::Request;
use dst::engine::request::RequestOp;
use dst::engine::request::Tag;
use dst::errno::Errno;
use dst::io::ring::Completion;
use dst::io::ring::Frontend;
use dst::io::ring::Owner;
use dst::io::ring::Ring;
use dst::io::sysfs::BlockInfo;
use dst::io::ublk::Leftover;
use dst::io::ublk::QueueMain;
use dst::io::ublk::UblkConfig;
use dst::io::ublk::UblkDevice;
use dst::io::ublk::UblkEnd;
use dst::io::ublk::UblkQueue;
use dst::io::ublk::check;
use dst::io::ublk::delete_leftover;
use dst::io::ublk::leftovers;
use dst::io::ublk::usable_queues;
use dst::limits;
use dst::units::parse_size;
use io_uring::opcode;
use io_uring::types;

/// Marks the devices of this program.
const OWNER: u32 = 0x7465_7374;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some("check") => check().map_err(|error| error.to_string()),
        Some("leftovers") => list_leftovers(arguments.iter().any(|word| word == "--delete")),
        Some("null" | "broken") => serve(&arguments, None),
        Some("file") => serve(&arguments, Some(&arguments[1])),
        _ => Err("usage: ublk-target null|broken|file PATH|check|leftovers".to_owned()),
    };
    if let Err(text) = outcome {
        eprintln!("ublk-target: {text}");
        std::process::exit(1);
    }
}

fn list_leftovers(delete: bool) -> Result<(), String> {
    for leftover in leftovers().map_err(|error| error.to_string())? {
        println!("leftover {} owner {:#x} live {}", leftover.id, leftover.owner, leftover.live);
        if delete {
            delete_leftover(leftover).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

fn serve(arguments: &[String], path: Option<&String>) -> Result<(), String> {
    let option = |name: &str, otherwise: u64| {
        let at = arguments.iter().position(|word| word == name);
        at.map_or(Ok(otherwise), |at| parse_size(arguments.get(at + 1).map_or("", String::as_str)))
    };
    let size = option("--size", 1 << 30)?;
    let chunk = option("--chunk", 0)?;
    let config = UblkConfig {
        name: "target".to_owned(),
        owner: OWNER,
        id: None,
        depth: u16::try_from(option("--depth", 64)?).unwrap(),
        buffer_bytes: u32::try_from(option("--buffer", u64::from(limits::UBLK_BUFFER_BYTES))?).unwrap(),
        sectors: size / 512,
        block_bytes: u32::try_from(option("--block", 512)?).unwrap(),
        minimum_bytes: chunk,
        optimal_bytes: chunk * 2,
        max_discard_sectors: limits::ZERO_BYTES_MAX / 512,
        max_write_zeroes_sectors: limits::ZERO_BYTES_MAX / 512,
    };
    let file = path.map(|path| {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        grow(&file, size);
        Arc::new(file)
    });
    let left = if arguments.iter().any(|word| word == "--recover") { Some(left_behind()?) } else { None };
    let queues = match left {
        Some(left) => left.queues,
        None => usable_queues(u16::try_from(option("--queues", 1)?).unwrap()),
    };
    let hang = Arc::new(AtomicBool::new(false));
    let fail = Arc::new(AtomicBool::new(arguments[0] == "broken"));
    let workers = (0..queues).map(|_| {
        let (file, fail, hang) = (file.clone(), fail.clone(), hang.clone());
        Box::new(move |queue: &mut UblkQueue<'_>| match &file {
            None if fail.load(Ordering::Relaxed) => Err(io::Error::other("broken from the start")),
            None => run_null(queue),
            Some(file) => run_file(queue, file.as_raw_fd(), &fail, &hang),
        }) as QueueMain
    });
    let tell_end = |end: UblkEnd| println!("ended {}", end.unasked.as_deref().unwrap_or("as asked"));
    let device = match left {
        Some(left) => {
            UblkDevice::recover(left, UblkConfig { depth: left.depth, ..config }, workers.collect(), tell_end)
        }
        None => UblkDevice::create(config, workers.collect(), tell_end),
    };
    let device = device.map_err(|error| error.to_string())?;
    println!("ready {}", device.path());
    obey(device, file.as_deref(), &fail, &hang)
}

fn left_behind() -> Result<Leftover, String> {
    let left = leftovers().map_err(|error| error.to_string())?;
    left.into_iter().find(|left| left.owner == OWNER && left.live).ok_or("there is nothing to recover".to_owned())
}

/// Never cut: another life may have made it larger.
fn grow(file: &File, size: u64) {
    let size = size.max(file.metadata().unwrap().len());
    file.set_len(size).unwrap();
}

fn resize(device: &UblkDevice, file: Option<&File>, size: &str) -> Result<(), String> {
    let size = parse_size(size)?;
    if let Some(file) = file {
        grow(file, size);
    }
    device.resize(size / 512, limits::UBLK_RESIZE).map_err(|error| error.to_string())
}

/// Does what standard input says.
fn obey(device: UblkDevice, file: Option<&File>, fail: &AtomicBool, hang: &AtomicBool) -> Result<(), String> {
    for line in io::stdin().lock().lines() {
        let line = line.unwrap();
        if let Some(size) = line.strip_prefix("resize ") {
            match resize(&device, file, size) {
                Ok(()) => println!("resized"),
                Err(error) => println!("refused {error}"),
            }
            continue;
        }
        match line.as_str() {
            "quiesce" => match device.quiesce(limits::UBLK_QUIESCE) {
                Ok(()) => println!("quiesced"),
                Err(error) => println!("refused {error}"),
            },
            "info" => match BlockInfo::read(&device.name()) {
                Ok(info) => println!("{}", serde_json::to_string(&info).unwrap()),
                Err(error) => println!("no info: {error}"),
            },
            "fail" => fail.store(true, Ordering::Relaxed),
            "hang" => hang.store(true, Ordering::Relaxed),
            "drop" => break,
            order @ ("stop" | "force" | "impatient") => match device.stop(order != "stop", limit_of(order)) {
                Ok(()) => {
                    println!("stopped");
                    return Ok(());
                }
                Err(error) => println!("refused {error}"),
            },
            other => println!("what is '{other}'?"),
        }
    }
    drop(device);
    println!("dropped");
    Ok(())
}

fn limit_of(order: &str) -> Duration {
    if order == "impatient" { Duration::from_secs(3) } else { limits::UBLK_STOP }
}

/// Answers everything at once.
fn run_null(queue: &mut UblkQueue<'_>) -> io::Result<()> {
    let mut completions = Vec::new();
    while queue.is_up() {
        queue.turn(true, &mut completions)?;
        while let Some((tag, _)) = queue.next_request() {
            queue.complete(tag, Ok(()));
        }
    }
    Ok(())
}

/// Serves from a file, through the same ring: what a worker with disks and sockets does.
fn run_file(queue: &mut UblkQueue<'_>, file: RawFd, fail: &AtomicBool, hang: &AtomicBool) -> io::Result<()> {
    let tick = types::Timespec::new().nsec(200_000_000);
    let mut requests: Vec<Option<Request>> = vec![None; usize::from(queue.depth())];
    let mut completions: Vec<Completion> = Vec::new();
    let mut active = 0;
    let mut ticking = false;
    while queue.is_up() || active != 0 || ticking {
        if !ticking && queue.is_up() {
            queue.push(opcode::Timeout::new(&raw const tick).build().user_data(Owner::Worker.user_data(0)));
            ticking = true;
        }
        queue.turn(true, &mut completions)?;
        for completion in completions.drain(..) {
            let Some((Owner::Disk, tag)) = Owner::of(completion.user_data) else {
                ticking = false;
                continue;
            };
            if hang.load(Ordering::Relaxed) {
                continue;
            }
            let tag = Tag(u16::try_from(tag).unwrap());
            let request = requests[usize::from(tag.0)].take().unwrap();
            active -= 1;
            queue.complete(tag, judge(&request, completion.result));
        }
        while let Some((tag, request)) = queue.next_request() {
            requests[usize::from(tag.0)] = Some(request);
            active += 1;
            push(queue, file, tag, &request);
        }
        if active != 0 && fail.load(Ordering::Relaxed) {
            return Err(io::Error::other("told to fail"));
        }
    }
    Ok(())
}

fn push(queue: &mut UblkQueue<'_>, file: RawFd, tag: Tag, request: &Request) {
    const DSYNC: i32 = 2;
    const PUNCH_AND_KEEP_SIZE: i32 = 2 | 1;
    let file = types::Fd(file);
    let (offset, bytes) = (request.extent.start.bytes(), request.extent.bytes());
    let length = u32::try_from(bytes).unwrap_or(0);
    let sqe = match request.op {
        RequestOp::Read => opcode::Read::new(file, queue.buffer(tag), length).offset(offset).build(),
        RequestOp::Write { fua } => opcode::Write::new(file, queue.buffer(tag), length)
            .offset(offset)
            .rw_flags(if fua { DSYNC } else { 0 })
            .build(),
        RequestOp::Flush => opcode::Fsync::new(file).build(),
        RequestOp::Digest => unreachable!("no frontend asks for digests"),
        // tmpfs can punch and not zero; here both are the same.
        RequestOp::Discard | RequestOp::WriteZeroes { .. } => {
            opcode::Fallocate::new(file, bytes).offset(offset).mode(PUNCH_AND_KEEP_SIZE).build()
        }
    };
    queue.push(sqe.user_data(Owner::Disk.user_data(u64::from(tag.0))));
}

fn judge(request: &Request, result: i32) -> Result<(), Errno> {
    let whole = match request.op {
        RequestOp::Read | RequestOp::Write { .. } => request.extent.bytes(),
        _ => 0,
    };
    match u64::try_from(result) {
        Ok(done) if done == whole => Ok(()),
        Ok(_) => Err(Errno::EIO),
        Err(_) => Err(Errno::from_raw(-result)),
    }
}
