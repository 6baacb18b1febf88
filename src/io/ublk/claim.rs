//! Whether a block device is in use, and by whom.
//!
//! The kernel's own answer is `O_EXCL`: a mounted filesystem, swap and device-mapper hold the device or one of its partitions
//! exclusively, and so does a [`Claim`], which therefore keeps them away while a device is stopped. A process that merely has the device
//! open is found in `/proc`, which is a look and no lock. Names of mounts are found for the message; the decision does not need them.

use std::fmt;
use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use crate::errno::Errno;
use crate::limits;

/// Who uses a block device or one of its partitions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockUse {
    /// The device.
    pub device: String,
    /// Where it is mounted.
    pub mounts: Vec<String>,
    /// Block devices on top of it.
    pub holders: Vec<String>,
    /// Processes that have it open: number and name.
    pub processes: Vec<(u32, String)>,
    /// Whether the kernel says that it is held exclusively.
    pub held: bool,
}

impl fmt::Display for BlockUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = &self.device;
        if !self.mounts.is_empty() {
            return write!(f, "{device} is mounted on {}; unmount it first", self.mounts.join(", "));
        }
        if !self.holders.is_empty() {
            return write!(f, "{device} is used by {}; remove that first", self.holders.join(", "));
        }
        if !self.processes.is_empty() {
            let names: Vec<_> = self.processes.iter().map(|(pid, name)| format!("{name} (pid {pid})")).collect();
            return write!(f, "{device} is open in {}; end it first", names.join(", "));
        }
        write!(
            f,
            "{device} is held by the kernel: swap, or a mount in another namespace (grep -l {device} /proc/*/mountinfo); release it first"
        )
    }
}

/// A block device held exclusively: nothing can mount it.
pub(super) struct Claim(#[expect(dead_code, reason = "the open file is the claim")] File);

/// Who uses `/dev/NAME`; `None` when nobody does or the device does not exist.
pub fn in_use(name: &str) -> io::Result<Option<BlockUse>> {
    claim(name).map(Result::err)
}

/// Holds `/dev/NAME` exclusively, or says who uses it. A device that does not exist is free. Openers are given a moment to go: udev
/// looks into a device whenever somebody has written to it.
pub(super) fn claim(name: &str) -> io::Result<Result<Option<Claim>, BlockUse>> {
    let path = format!("/dev/{name}");
    let file = match File::options().read(true).custom_flags(nix::libc::O_EXCL).open(&path) {
        Ok(file) => file,
        Err(error) => match Errno::from(&error) {
            Errno::ENOENT | Errno::ENXIO | Errno::ENODEV => return Ok(Ok(None)),
            Errno::EBUSY => return Ok(Err(look(name, true))),
            _ => return Err(error),
        },
    };
    for _ in 0..limits::UBLK_OPENER_LOOKS {
        let found = look(name, false);
        if found.processes.is_empty() {
            return Ok(Ok(Some(Claim(file))));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(Err(look(name, false)))
}

/// Collects the names of the users.
fn look(name: &str, held: bool) -> BlockUse {
    let parts = with_partitions(name);
    let numbers: Vec<_> = parts.iter().filter_map(|part| attribute(part, "dev")).collect();
    // The daemon is in a namespace of its own; who started it is not.
    let parent = format!("/proc/{}/mountinfo", std::os::unix::process::parent_id());
    let tables = ["/proc/1/mountinfo", parent.as_str(), "/proc/self/mountinfo"];
    let mut mounts: Vec<_> = tables
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| mounts_of(&table, &numbers, &parts))
        .collect();
    mounts.sort();
    mounts.dedup();
    let holders = parts.iter().flat_map(|part| names_in(&format!("/sys/class/block/{part}/holders"))).collect();
    BlockUse { device: format!("/dev/{name}"), mounts, holders, processes: processes_with(&parts), held }
}

/// The device's name and those of its partitions.
fn with_partitions(name: &str) -> Vec<String> {
    let mut parts: Vec<_> = names_in(&format!("/sys/class/block/{name}"))
        .into_iter()
        .filter(|part| part.strip_prefix(name).is_some_and(|rest| rest.starts_with('p')))
        .collect();
    parts.push(name.to_owned());
    parts
}

fn names_in(directory: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn attribute(name: &str, attribute: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/class/block/{name}/{attribute}")).ok()?;
    Some(text.trim().to_owned())
}

/// The mount points in a mountinfo table that belong to one of the device numbers (`259:0`) or, for filesystems with numbers of their own,
/// name one of the devices as their source.
fn mounts_of(table: &str, numbers: &[String], names: &[String]) -> Vec<String> {
    let is_ours = |line: &str| {
        let number = line.split(' ').nth(2)?;
        let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
        let named = source.strip_prefix("/dev/").is_some_and(|source| names.iter().any(|name| name == source));
        (named || numbers.iter().any(|ours| ours == number)).then_some(())
    };
    table
        .lines()
        .filter(|line| is_ours(line).is_some())
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\"))
        .collect()
}

/// The processes other than this one that have one of the devices open.
fn processes_with(names: &[String]) -> Vec<(u32, String)> {
    let own = std::process::id();
    let opens = |pid: u32| {
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        files.flatten().filter_map(|file| fs::read_link(file.path()).ok()).any(|target| {
            target.parent() == Some(Path::new("/dev"))
                && target.file_name().is_some_and(|file| names.iter().any(|name| name.as_str() == file))
        })
    };
    names_in("/proc")
        .iter()
        .filter_map(|pid| pid.parse().ok())
        .filter(|&pid| pid != own && opens(pid))
        .map(|pid| (pid, fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        let table = "\
22 28 0:21 / /proc rw,nosuid - proc proc rw
40 28 259:3 / /mnt/a\\040b rw,relatime shared:1 - ext4 /dev/root rw
41 28 0:44 / /mnt/btrfs rw - btrfs /dev/ublkb0p1 rw,space_cache
42 28 8:1 / /mnt/other rw - ext4 /dev/sda1 rw
";
        let numbers = ["259:3".to_owned()];
        let names = ["ublkb0".to_owned(), "ublkb0p1".to_owned()];
        assert_eq!(mounts_of(table, &numbers, &names), ["/mnt/a b", "/mnt/btrfs"]);
        assert_eq!(mounts_of(table, &[], &[]), Vec::<String>::new());
        assert_eq!(mounts_of("garbage", &numbers, &names), Vec::<String>::new());
    }

    #[test]
    fn a_device_that_is_not_there_is_free() {
        assert_eq!(in_use("no-such-device").unwrap(), None);
    }

    #[test]
    fn the_text_says_who_and_what_to_do() {
        let free = BlockUse { device: "/dev/ublkb0".to_owned(), held: true, ..BlockUse::default() };
        let mounted = BlockUse { mounts: vec!["/mnt".to_owned()], ..free.clone() };
        assert_eq!(mounted.to_string(), "/dev/ublkb0 is mounted on /mnt; unmount it first");
        let open = BlockUse { processes: vec![(7, "fio".to_owned())], ..free.clone() };
        assert_eq!(open.to_string(), "/dev/ublkb0 is open in fio (pid 7); end it first");
        assert!(free.to_string().contains("another namespace"));
    }
}
