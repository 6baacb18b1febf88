//! A mount namespace of the daemon's own, with nothing mounted in it.
//!
//! Whoever is in a mount namespace keeps what is mounted there, and the last one to leave it writes to what is unmounted with it. A daemon
//! whose own device is mounted there would have to serve these writes while it ends, and waits for ever. So it is in a namespace that holds
//! no mount of anybody.
//!
//! Paths mean what they mean to everybody else, now and later: the daemon's root directory stays the host's, only its namespace is
//! another one. What it unmounts it unmounts from a thread that goes back for it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chroot, fchdir};

/// The namespace that a process was in before: device and inode of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Former {
    device: u64,
    inode: u64,
}

/// Moves the calling thread, and those that it starts, to a namespace of their own. Call it before any thread is started. What shall be
/// mounted for others must be mounted before. After an error nothing of anybody's is unmounted; it may be in a copy of the host's namespace.
pub fn leave() -> io::Result<Former> {
    let open = |path: &str| File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path);
    let (root, here) = (open("/")?, open(".")?);
    let former = of("self")?;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Else what is detached here would be unmounted on the host.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    for place in places(&table).filter(|place| place != Path::new("/")) {
        // Each takes with it what is mounted below; that is not found any more.
        let _ = umount2(&place, MntFlags::MNT_DETACH);
    }
    fchdir(&root)?;
    chroot(".")?;
    fchdir(&here)?;
    Ok(former)
}

/// Takes the calling thread back, if somebody is still there: before the process goes on as another program.
pub fn go_back(former: Former) -> io::Result<()> {
    let (host, here) = (find(former)?, std::env::current_dir()?);
    // A namespace is entered only by who shares its directories with nobody.
    unshare(CloneFlags::CLONE_FS)?;
    setns(host.as_fd(), CloneFlags::CLONE_NEWNS)?;
    std::env::set_current_dir(here)
}

/// Unmounts `path` in the former namespace, if somebody is still in it; lazily where it is in use, which is then told as `false`.
pub fn unmount(former: Former, path: &Path) -> io::Result<bool> {
    let path = path.to_owned();
    let act = move || {
        go_back(former)?;
        detach(&path)
    };
    // A thread of its own: the others stay.
    std::thread::spawn(act).join().unwrap_or_else(|_| Err(io::Error::other("the thread that unmounts has failed")))
}

/// Unmounts `path` in this namespace; lazily where it is in use, which is then told as `false`.
pub fn detach(path: &Path) -> io::Result<bool> {
    match umount2(path, MntFlags::empty()) {
        Ok(()) => Ok(true),
        Err(_) => Ok(umount2(path, MntFlags::MNT_DETACH).map(|()| false)?),
    }
}

/// The namespace of a process, by its number or `self`.
fn of(process: &str) -> io::Result<Former> {
    let file = fs::metadata(format!("/proc/{process}/ns/mnt"))?;
    Ok(Former { device: file.dev(), inode: file.ino() })
}

/// Its file, by any process that is in it. It is not kept open meanwhile: that would keep the namespace, too.
fn find(former: Former) -> io::Result<File> {
    let all = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let numbers = all.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    let found = std::iter::once("1".to_owned()).chain(numbers).find(|process| of(process).is_ok_and(|is| is == former));
    let process = found.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    File::open(format!("/proc/{process}/ns/mnt"))
}

/// The mount points of a mountinfo table, in its order.
fn places(table: &str) -> impl Iterator<Item = PathBuf> + '_ {
    let plain = |path: &str| {
        PathBuf::from(path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\"))
    };
    table.lines().filter_map(move |line| line.split(' ').nth(4).map(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read() {
        let table =
            "22 28 0:21 / / rw - ext4 /dev/root rw\n40 28 259:3 / /mnt/a\\040b rw shared:1 - ext4 /dev/ublkb0 rw\n";
        let found: Vec<_> = places(table).collect();
        assert_eq!(found, [Path::new("/"), Path::new("/mnt/a b")]);
    }

    #[test]
    fn a_namespace_is_found_by_who_is_in_it() {
        let own = of("self").unwrap();
        let file = find(own).unwrap().metadata().unwrap();
        assert_eq!((file.dev(), file.ino()), (own.device, own.inode));
        assert_eq!(find(Former { inode: 1, ..own }).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
