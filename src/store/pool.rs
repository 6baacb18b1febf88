//! What a server decides about its volumes as wholes: who may change, free or remove one. Pure.
//!
//! Every refusal says what, why, and what to do next.

use crate::errno::Errno;
use crate::limits;
use crate::store::record::{Record, check_size, check_volume_name};
use crate::store::region::Layout;
use crate::units::{Id, SECTOR_BYTES, format_size};
use crate::wire::volume::{Assign, Create, Member, Named, Resize};

/// A refusal: for branching, and for people.
pub type Refusal = (Errno, String);

/// The record of a new volume.
pub fn create(ask: &Create, id: Id) -> Result<Record, Refusal> {
    let invalid = |text| (Errno::EINVAL, text);
    check_volume_name(&ask.name).map_err(invalid)?;
    check_size(ask.size).map_err(invalid)?;
    Ok(Record { id, size: ask.size, sparse: ask.sparse, write_through: ask.write_through, array: None })
}

/// The record after a change of size.
pub fn resize(ask: &Resize, record: &Record, connections: u32) -> Result<Record, Refusal> {
    let name = &ask.name;
    check_size(ask.size).map_err(|text| (Errno::EINVAL, text))?;
    if layout(record.size).is_some() && layout(ask.size).is_none() {
        let text = format!(
            "volume '{name}' cannot grow to {}: it would be too large for its region log",
            format_size(ask.size)
        );
        return Err((Errno::EFBIG, text));
    }
    if ask.size < record.size {
        let from_to = format!("from {} to {}", format_size(record.size), format_size(ask.size));
        if connections > 0 {
            return Err((
                Errno::EBUSY,
                format!("volume '{name}' cannot shrink {from_to} while it is attached; stop its array first"),
            ));
        }
        if !ask.force {
            let whose = match &record.array {
                Some(member) => format!(", which array '{}' uses", member.name),
                None => String::new(),
            };
            return Err((
                Errno::EPERM,
                format!(
                    "shrinking volume '{name}' {from_to} drops its end{whose}; use --force if nothing there is needed"
                ),
            ));
        }
    }
    Ok(Record { size: ask.size, ..record.clone() })
}

/// The regions of a volume of this size; `None` when they are too many for a log.
pub fn layout(bytes: u64) -> Option<Layout> {
    Layout::new(bytes / SECTOR_BYTES, limits::REGION_BYTES / SECTOR_BYTES)
}

/// Whether the volume may be removed.
pub fn remove(ask: &Named, record: &Record, connections: u32) -> Result<(), Refusal> {
    let name = &ask.name;
    if connections > 0 {
        return Err((
            Errno::EBUSY,
            format!("volume '{name}' is attached by {connections} connections; stop its array first"),
        ));
    }
    match &record.array {
        Some(member) if !ask.force => Err((
            Errno::EBUSY,
            format!(
                "volume '{name}' belongs to node {} of array '{}'; remove the array first, or use --force",
                member.node, member.name
            ),
        )),
        _ => Ok(()),
    }
}

/// The record after an array has taken the volume.
pub fn assign(ask: &Assign, record: &Record) -> Result<Record, Refusal> {
    match &record.array {
        Some(member) if member.id != ask.array.id => Err((
            Errno::EBUSY,
            format!(
                "volume '{}' belongs to node {} of array '{}' ({}); choose another volume, or free this one first",
                ask.name, member.node, member.name, member.id
            ),
        )),
        Some(member) if member.node != ask.array.node => Err((
            Errno::EBUSY,
            format!("volume '{}' is node {} of this array already; choose another volume", ask.name, member.node),
        )),
        _ if ask.array.id.is_nil() || !is_word(&ask.array) => {
            Err((Errno::EINVAL, "the array that is to take the volume has no valid id, name or node".to_owned()))
        }
        _ => Ok(Record { array: Some(ask.array.clone()), ..record.clone() }),
    }
}

/// The record after its array has given the volume up.
pub fn free(ask: &Named, record: &Record, connections: u32) -> Result<Record, Refusal> {
    let name = &ask.name;
    let freed = Record { array: None, ..record.clone() };
    let Some(member) = &record.array else { return Ok(freed) };
    if connections > 0 {
        return Err((
            Errno::EBUSY,
            format!("volume '{name}' is attached by {connections} connections; stop array '{}' first", member.name),
        ));
    }
    if ask.force || ask.array == Some(member.id) {
        return Ok(freed);
    }
    Err((
        Errno::EBUSY,
        format!(
            "volume '{name}' belongs to node {} of array '{}' ({}); remove that array, or use --force",
            member.node, member.name, member.id
        ),
    ))
}

/// What a peer says of an array ends up in a record and in messages: it must be short and printable.
fn is_word(member: &Member) -> bool {
    let plain = |text: &str| (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    plain(&member.name) && plain(&member.node)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u8, node: &str) -> Member {
        Member { id: Id([id; 16]), name: "storage".to_owned(), node: node.to_owned() }
    }

    fn record(array: Option<Member>) -> Record {
        Record { id: Id([1; 16]), size: 1 << 20, sparse: false, write_through: false, array }
    }

    fn named(array: Option<u8>, force: bool) -> Named {
        Named { name: "v".to_owned(), array: array.map(|id| Id([id; 16])), force }
    }

    fn errno<T: std::fmt::Debug>(result: Result<T, Refusal>) -> Errno {
        result.unwrap_err().0
    }

    #[test]
    fn removing_needs_nobody_there() {
        let ours = record(Some(member(2, "n-0")));
        assert_eq!(errno(remove(&named(None, true), &ours, 1)), Errno::EBUSY);
        assert_eq!(errno(remove(&named(None, false), &ours, 0)), Errno::EBUSY);
        assert!(remove(&named(None, true), &ours, 0).is_ok());
        assert!(remove(&named(None, false), &record(None), 0).is_ok());
        assert_eq!(errno(remove(&named(None, true), &record(None), 1)), Errno::EBUSY);
    }

    #[test]
    fn one_array_at_a_time() {
        let ask = |id, node| Assign { name: "v".to_owned(), array: member(id, node) };
        let ours = assign(&ask(2, "n-0"), &record(None)).unwrap();
        assert_eq!(assign(&ask(2, "n-0"), &ours), Ok(ours.clone()));
        assert_eq!(errno(assign(&ask(3, "n-0"), &ours)), Errno::EBUSY);
        assert_eq!(errno(assign(&ask(2, "n-8"), &ours)), Errno::EBUSY);
        assert_eq!(errno(assign(&ask(0, "n-8"), &record(None))), Errno::EINVAL);
        assert_eq!(errno(assign(&ask(2, "n 8\n"), &record(None))), Errno::EINVAL);
        assert_eq!(errno(free(&named(Some(3), false), &ours, 0)), Errno::EBUSY);
        assert_eq!(errno(free(&named(Some(2), true), &ours, 1)), Errno::EBUSY);
        assert_eq!(free(&named(Some(2), false), &ours, 0), Ok(record(None)));
        assert_eq!(free(&named(None, true), &ours, 0), Ok(record(None)));
        assert_eq!(free(&named(None, false), &record(None), 0), Ok(record(None)));
    }

    #[test]
    fn shrinking_is_deliberate() {
        let ask = |size, force| Resize { name: "v".to_owned(), size, force };
        assert_eq!(resize(&ask(2 << 20, false), &record(None), 3).unwrap().size, 2 << 20);
        assert_eq!(errno(resize(&ask(4096, false), &record(None), 0)), Errno::EPERM);
        assert_eq!(errno(resize(&ask(4096, true), &record(None), 1)), Errno::EBUSY);
        assert_eq!(resize(&ask(4096, true), &record(None), 0).unwrap().size, 4096);
        assert_eq!(errno(resize(&ask(1, true), &record(None), 0)), Errno::EINVAL);
        let most = limits::REGIONS_MAX * limits::REGION_BYTES;
        assert!(resize(&ask(most, false), &record(None), 0).is_ok());
        assert_eq!(errno(resize(&ask(most + 4096, false), &record(None), 0)), Errno::EFBIG);
        assert!(resize(&ask(most * 2, false), &Record { size: most + 4096, ..record(None) }, 0).is_ok());
    }

    #[test]
    fn creating_checks_name_and_size() {
        let ask = |name: &str, size| Create { name: name.to_owned(), size, sparse: false, write_through: false };
        assert!(create(&ask("v", 4096), Id([1; 16])).is_ok());
        assert_eq!(errno(create(&ask("v/", 4096), Id([1; 16]))), Errno::EINVAL);
        assert_eq!(errno(create(&ask("v", 1), Id([1; 16]))), Errno::EINVAL);
    }
}
