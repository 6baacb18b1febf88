//! The numbers by which the kernel knows paths, for as long as it does.

use std::collections::BTreeMap;

/// The number of the root.
pub(super) const ROOT: u64 = 1;

/// Paths and their numbers. One that the kernel has forgotten is never used again for another path.
pub(super) struct Names {
    /// Path, and how often the kernel was told of it.
    paths: BTreeMap<u64, (String, u64)>,
    numbers: BTreeMap<String, u64>,
    next: u64,
}

impl Names {
    pub(super) fn new() -> Names {
        Names { paths: BTreeMap::new(), numbers: BTreeMap::new(), next: ROOT + 1 }
    }

    /// The path with a number; `None`: the kernel should not know it any more.
    pub(super) fn path(&self, number: u64) -> Option<String> {
        if number == ROOT {
            return Some(String::new());
        }
        self.paths.get(&number).map(|(path, _)| path.clone())
    }

    /// The number of a path that the kernel is told of now.
    pub(super) fn tell(&mut self, path: &str) -> u64 {
        let number = *self.numbers.entry(path.to_owned()).or_insert(self.next);
        if number == self.next {
            self.next += 1;
        }
        self.paths.entry(number).or_insert_with(|| (path.to_owned(), 0)).1 += 1;
        number
    }

    /// The kernel takes back `times` of what it was told of.
    pub(super) fn forget(&mut self, number: u64, times: u64) {
        let Some((path, told)) = self.paths.get_mut(&number) else { return };
        *told = told.saturating_sub(times);
        if *told == 0 {
            self.numbers.remove(path);
            self.paths.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_lasts_as_long_as_the_kernel_knows_it() {
        let mut names = Names::new();
        assert_eq!(names.path(ROOT).as_deref(), Some(""));
        let (a, b) = (names.tell("devices"), names.tell("devices/a"));
        assert_eq!((names.tell("devices"), names.path(b).as_deref()), (a, Some("devices/a")));
        names.forget(a, 1);
        assert_eq!(names.path(a).as_deref(), Some("devices"), "it was told of twice");
        names.forget(a, 1);
        names.forget(99, 1);
        assert_eq!(names.path(a), None);
        assert!(![a, b, ROOT].contains(&names.tell("devices")), "a number names one path for ever");
        assert_eq!((names.paths.len(), names.numbers.len()), (2, 2));
    }
}
