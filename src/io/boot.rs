//! Which boot of the machine this is: two processes that are told the same lived on one memory.

use std::io;

use crate::units::Id;

/// The kernel's random id of this boot.
pub fn boot_id() -> io::Result<Id> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let hex: String = text.trim().chars().filter(|one| *one != '-').collect();
    hex.parse().map_err(|_| io::Error::other("the kernel's boot id is not one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays() {
        let first = boot_id().unwrap();
        assert!(!first.is_nil());
        assert_eq!(boot_id().unwrap(), first);
    }
}
