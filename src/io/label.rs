//! Local targets before an array runs on them: what they are, and whose. Blocks on the disk; never touches an array's data.
//!
//! A block device that something else holds (a mount, a RAID, an LVM) is refused. Labels are durable when this returns.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::libc;

use crate::control::command::Refusal;
use crate::control::label::{Label, SLOT_BYTES, beside, slots, usable};
use crate::errno::Errno;
use crate::units::{Id, SECTOR_BYTES};
use crate::wire::volume::{Claim, Member};

/// What a local target is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalTarget {
    /// What an array may use of it, sectors.
    pub sectors: u64,
    /// Tells files and devices apart, however they are named.
    pub identity: String,
    /// What it says of itself.
    pub label: Option<Label>,
}

/// Where a target's label is kept.
enum Home {
    Beside(String),
    Slots(File, [u64; 2]),
}

/// Looks at the file or block device at `path`.
pub fn look(path: &str) -> Result<LocalTarget, Refusal> {
    let (target, _) = open(path)?;
    Ok(target)
}

/// Writes the array's name into the label of `path`, and returns the target's id: `fresh` where it had none. Refused when it
/// belongs to another array.
pub fn assign(path: &str, member: &Member, fresh: Id) -> Result<Id, Refusal> {
    let (target, home) = open(path)?;
    let mut label = target.label.unwrap_or_else(|| Label::free(fresh));
    if let Some(other) = &label.array
        && (other.id != member.id || other.node != member.node)
    {
        let text = format!("it belongs to node {} of array '{}'", other.node, other.name);
        return Err(Refusal::new(Errno::EBUSY, text));
    }
    if label.array.is_none() {
        label.text = None;
    }
    label.array = Some(member.clone());
    store(path, &home, &label)?;
    Ok(label.id)
}

/// Takes the array's name out of the label of `path`. A target that is gone, or another's, is fine.
pub fn free(path: &str, array: Id) -> Result<(), Refusal> {
    match open(path) {
        Err(why) if why.errno == Errno::ENOENT => Ok(()),
        Err(why) => Err(why),
        Ok((LocalTarget { label: Some(label), .. }, home)) if is_of(&label, array) => {
            // The text stays: it may say where the data has gone.
            store(path, &home, &Label { array: None, claim: None, ..label })
        }
        Ok(_) => Ok(()),
    }
}

/// Claims `path` for an array that it belongs to, by the rules of a server: a greater epoch, or the very same claim.
pub fn claim(path: &str, array: Id, claim: &Claim) -> Result<(), Refusal> {
    let (label, home) = ours(path, array)?;
    match &label.claim {
        Some(held) if (held.epoch, held.owner) == (claim.epoch, claim.owner) => Ok(()),
        Some(held) if held.epoch >= claim.epoch => Err(Refusal::new(
            Errno::EBADE,
            format!(
                "it is claimed with epoch {} by host {}, and {} is not greater",
                held.epoch.0, held.host, claim.epoch.0
            ),
        )),
        _ => store(path, &home, &Label { claim: Some(*claim), ..label }),
    }
}

/// Stores a text with the label of `path`, for whoever holds its claim.
pub fn put(path: &str, array: Id, claim: &Claim, text: &str) -> Result<(), Refusal> {
    let (label, home) = ours(path, array)?;
    if label.claim.is_none_or(|held| (held.epoch, held.owner) != (claim.epoch, claim.owner)) {
        return Err(Refusal::new(Errno::EBADE, "another owner has claimed it meanwhile"));
    }
    store(path, &home, &Label { text: Some(text.to_owned()), ..label })
}

fn is_of(label: &Label, array: Id) -> bool {
    label.array.as_ref().is_some_and(|member| member.id == array)
}

fn ours(path: &str, array: Id) -> Result<(Label, Home), Refusal> {
    match open(path)? {
        (LocalTarget { label: Some(label), .. }, home) if is_of(&label, array) => Ok((label, home)),
        _ => Err(Refusal::new(Errno::EBUSY, "it is not assigned to this array any more")),
    }
}

fn refuse(error: &io::Error) -> Refusal {
    let errno = Errno::from(error);
    let next = match errno {
        Errno::ENOENT => "no such file or device: create it first, for example with 'truncate -s 10G'".to_owned(),
        Errno::EACCES | Errno::EPERM => format!("{}: dstd must be able to read and write it", errno.text()),
        Errno::EBUSY => "busy: it is mounted, or part of another device".to_owned(),
        _ => errno.text().to_owned(),
    };
    Refusal::new(errno, next)
}

fn open(path: &str) -> Result<(LocalTarget, Home), Refusal> {
    let kind = fs::metadata(path).map_err(|error| refuse(&error))?;
    let device = kind.file_type().is_block_device();
    if !device && !kind.is_file() {
        return Err(Refusal::new(Errno::EINVAL, "it is neither a file nor a block device"));
    }
    // On a block device O_EXCL asks whether anything else holds it.
    let flags = if device { libc::O_EXCL } else { 0 };
    let opened = File::options().read(true).write(true).custom_flags(flags).open(path);
    let mut file = opened.map_err(|error| refuse(&error))?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(|error| refuse(&error))?;
    let (identity, usable_bytes) = if device {
        (format!("device {}", kind.rdev()), usable(bytes))
    } else {
        (format!("file {}:{}", kind.dev(), kind.ino()), bytes)
    };
    let home = match slots(bytes) {
        _ if !device => Home::Beside(beside(path)),
        Some(slots) => Home::Slots(file, slots),
        None => return Err(Refusal::new(Errno::EINVAL, "too small: the last 8M of a block device are the label's")),
    };
    let label = read(path, &home)?;
    Ok((LocalTarget { sectors: usable_bytes / SECTOR_BYTES, identity, label }, home))
}

fn read(path: &str, home: &Home) -> Result<Option<Label>, Refusal> {
    match home {
        Home::Beside(beside) => match fs::read(beside) {
            Ok(bytes) => Label::decode(&bytes).map(Some).map_err(|bad| {
                let text =
                    format!("its label {beside} is {bad}; if {path} is not in use by any array, remove that file");
                Refusal::new(Errno::EIO, text)
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(Refusal::new(Errno::from(&error), format!("its label {beside} cannot be read: {}", refuse(&error))))
            }
        },
        Home::Slots(file, slots) => {
            let mut found = None;
            for slot in slots {
                let mut bytes = vec![0; SLOT_BYTES];
                file.read_exact_at(&mut bytes, *slot).map_err(|error| refuse(&error))?;
                // What else lies there is no label: the device may never have had one.
                found = found.or_else(|| Label::decode(&bytes).ok());
            }
            Ok(found)
        }
    }
}

fn store(path: &str, home: &Home, label: &Label) -> Result<(), Refusal> {
    let bad = |bad| Refusal::new(Errno::EINVAL, format!("its label cannot be written: it is {bad}"));
    match home {
        Home::Beside(beside) => {
            let bytes = label.encode().map_err(bad)?;
            let stored = replace(Path::new(beside), &bytes);
            stored.map_err(|error| {
                Refusal::new(Errno::from(&error), format!("cannot write {beside}: {}", refuse(&error)))
            })
        }
        Home::Slots(file, slots) => {
            let bytes = label.encode_slot().map_err(bad)?;
            let store = |slot: &u64| file.write_all_at(&bytes, *slot).and_then(|()| file.sync_all());
            let stored = slots.iter().try_for_each(store);
            stored
                .map_err(|error| Refusal::new(Errno::from(&error), format!("cannot label {path}: {}", refuse(&error))))
        }
    }
}

/// Replaces a small file whole: the old or the new content after a crash, the new one when this returns.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Epoch;

    #[test]
    fn a_file_is_assigned_and_freed() {
        let folder = std::env::temp_dir().join(format!("dst-label-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("disk");
        let path = path.to_str().unwrap();
        assert_eq!(look(path).unwrap_err().errno, Errno::ENOENT);
        File::create(path).unwrap().set_len(1 << 20).unwrap();
        let target = look(path).unwrap();
        assert_eq!((target.sectors, target.label), (2048, None));
        let member = |array, node: &str| Member { id: Id([array; 16]), name: "a".to_owned(), node: node.to_owned() };
        assert_eq!(assign(path, &member(1, "n-0"), Id([9; 16])), Ok(Id([9; 16])));
        assert_eq!(assign(path, &member(1, "n-0"), Id([8; 16])), Ok(Id([9; 16])), "it keeps its id");
        assert!(assign(path, &member(2, "n-0"), Id([8; 16])).unwrap_err().text.contains("node n-0 of array 'a'"));
        assert!(assign(path, &member(1, "n-8"), Id([8; 16])).is_err());
        let by = |epoch, owner| Claim { epoch: Epoch(epoch), owner: Id([owner; 16]), host: Id([7; 16]) };
        assert!(put(path, Id([1; 16]), &by(3, 1), "text").unwrap_err().errno == Errno::EBADE, "nobody holds it");
        assert!(claim(path, Id([2; 16]), &by(3, 1)).unwrap_err().text.contains("not assigned"));
        for (epoch, owner, taken) in
            [(3, 1, true), (3, 1, true), (3, 2, false), (2, 1, false), (4, 2, true), (3, 1, false)]
        {
            assert_eq!(claim(path, Id([1; 16]), &by(epoch, owner)).is_ok(), taken, "{epoch} {owner}");
        }
        assert_eq!(put(path, Id([1; 16]), &by(3, 1), "late").unwrap_err().errno, Errno::EBADE);
        put(path, Id([1; 16]), &by(4, 2), "text").unwrap();
        assert_eq!(assign(path, &member(1, "n-0"), Id([8; 16])), Ok(Id([9; 16])));
        let label = look(path).unwrap().label.unwrap();
        assert_eq!(
            (label.claim, label.text.as_deref()),
            (Some(by(4, 2)), Some("text")),
            "assigned again it keeps both"
        );
        free(path, Id([2; 16])).unwrap();
        assert!(look(path).unwrap().label.unwrap().array.is_some());
        free(path, Id([1; 16])).unwrap();
        let freed = Label { text: Some("text".to_owned()), ..Label::free(Id([9; 16])) };
        assert_eq!(look(path).unwrap().label, Some(freed));
        assign(path, &member(3, "n-0"), Id([8; 16])).unwrap();
        assert_eq!(look(path).unwrap().label.unwrap().text, None, "it was another array's");
        free(path, Id([3; 16])).unwrap();
        fs::write(beside(path), "rubbish").unwrap();
        assert!(look(path).unwrap_err().text.contains("damaged"));
        assert!(look(folder.to_str().unwrap()).unwrap_err().text.contains("neither"));
        fs::remove_file(path).unwrap();
        free(path, Id([1; 16])).unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }
}
