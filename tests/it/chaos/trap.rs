//! Death at a certain system call: a tracer kills a running process when it is about to make its Nth call of some kinds, whichever of
//! its threads makes it. (strace counts thread by thread, and what is to be killed here does each step in a thread of its own.)
//!
//! The tracer is a process of its own, this test program again: whoever traces must wait for every child of its process.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Everything by which files, records and what is said about them change.
pub(crate) const CALLS: [(&str, i64); 17] = [
    ("openat", libc::SYS_openat),
    ("mkdir", libc::SYS_mkdir),
    ("write", libc::SYS_write),
    ("writev", libc::SYS_writev),
    ("pwrite64", libc::SYS_pwrite64),
    ("fsync", libc::SYS_fsync),
    ("fdatasync", libc::SYS_fdatasync),
    ("rename", libc::SYS_rename),
    ("renameat2", libc::SYS_renameat2),
    ("fallocate", libc::SYS_fallocate),
    ("ftruncate", libc::SYS_ftruncate),
    ("unlink", libc::SYS_unlink),
    ("symlink", libc::SYS_symlink),
    ("sendto", libc::SYS_sendto),
    ("sendmsg", libc::SYS_sendmsg),
    ("connect", libc::SYS_connect),
    ("io_uring_enter", libc::SYS_io_uring_enter),
];

const ORDER: &str = "DST_TEST_TRAP";

/// A process that is watched.
pub(crate) struct Trap {
    tracer: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Trap {
    /// From the return of this on, calls are counted; before the `nth` one (from 1 on) the process is killed.
    pub(crate) fn set(process: u32, nth: u32) -> Trap {
        let mut tracer = Command::new(std::env::current_exe().unwrap())
            .args(["chaos::trap::a_tracer", "--exact", "--nocapture", "--test-threads=1"])
            .env(ORDER, format!("{process} {nth}"))
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(tracer.stdout.take().unwrap());
        let ready = std::iter::from_fn(|| line(&mut said)).any(|line| line.ends_with(READY));
        assert!(ready, "process {process} cannot be traced");
        Trap { tracer, said }
    }

    /// Before which call it was killed, if it was. Lets go of it otherwise.
    pub(crate) fn release(mut self) -> Option<String> {
        let _ = self.tracer.kill();
        let _ = self.tracer.wait();
        std::iter::from_fn(|| line(&mut self.said)).find_map(|line| line.strip_prefix(KILLED).map(str::to_owned))
    }
}

const READY: &str = "traced";
const KILLED: &str = "killed before ";

fn line(from: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    (from.read_line(&mut line).unwrap() > 0).then(|| line.trim_end().to_owned())
}

#[test]
fn a_tracer() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let (process, nth) = order.split_once(' ').unwrap();
    trace(Pid::from_raw(process.parse().unwrap()), nth.parse().unwrap());
}

fn say(text: &str) {
    println!("\n{text}");
    std::io::stdout().flush().unwrap();
}

/// Takes hold of every thread. Those that it starts from now on are traced from their beginning.
fn seize(process: Pid) -> BTreeSet<Pid> {
    let mut held = BTreeSet::new();
    loop {
        let before = held.len();
        for thread in std::fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten() {
            let thread = Pid::from_raw(thread.file_name().to_str().unwrap().parse().unwrap());
            let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
            if !held.contains(&thread) && ptrace::seize(thread, options).is_ok() {
                // From its first stop on it stops at calls.
                ptrace::interrupt(thread).unwrap();
                held.insert(thread);
            }
        }
        if held.len() == before {
            return held;
        }
    }
}

fn trace(process: Pid, nth: u32) {
    let mut to_stop = seize(process);
    let mut count = 0;
    loop {
        let Ok(status) = waitpid(None, Some(WaitPidFlag::__WALL)) else { return };
        let Some(thread) = status.pid() else { continue };
        let mut signal = None;
        match status {
            WaitStatus::PtraceSyscall(_) => {
                if let Some(call) = entered(thread).filter(|_| to_stop.is_empty()) {
                    count += 1;
                    if count == nth {
                        kill(process, Signal::SIGKILL).unwrap();
                        return say(&format!("{KILLED}{call}"));
                    }
                }
            }
            WaitStatus::Stopped(_, told) => signal = Some(told),
            _ => {}
        }
        // Whoever was killed meanwhile is gone.
        let _ = ptrace::syscall(thread, signal);
        if to_stop.remove(&thread) && to_stop.is_empty() {
            say(READY);
        }
    }
}

/// The call that a stopped thread is about to make, if it is one that counts.
fn entered(thread: Pid) -> Option<&'static str> {
    const ENTRY: u8 = 1;
    if ptrace::syscall_info(thread).ok()?.op != ENTRY {
        return None;
    }
    let number = ptrace::getregs(thread).ok()?.orig_rax.cast_signed();
    CALLS.iter().find(|(_, call)| *call == number).map(|(name, _)| *name)
}
