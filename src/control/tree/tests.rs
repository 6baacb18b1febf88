//! Every path with every kind of array, by data; and what any path may be.

use super::*;

/// Each case of `tests/data/tree.txt`: arrays as JSON, the text of the tree, and what comes of reading and writing.
#[test]
fn the_tree_of_each_example_is_as_written() {
    let data = include_str!("../../../tests/data/tree.txt");
    let mut cases = 0;
    for case in data.split("\n== ").skip(1) {
        let (title, case) = case.split_once('\n').unwrap();
        let mut parts = case.split("\n----\n");
        let (arrays, tree, asked) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap_or(""));
        let arrays: Vec<ArrayStatus> = arrays
            .lines()
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{title}: {error}: {line}")))
            .collect();
        assert_eq!(entries(&arrays, "").unwrap().text().trim_end(), tree.trim_end(), "{title}");
        for line in asked.lines().filter(|line| !line.is_empty()) {
            let (question, expected) = line.split_once(" => ").unwrap_or_else(|| panic!("{title}: {line}"));
            assert_eq!(answer(&arrays, question.trim_end()), expected, "{title}: {question}");
        }
        cases += 1;
    }
    assert!(cases > 3, "only {cases} cases");
}

fn answer(arrays: &[ArrayStatus], question: &str) -> String {
    let refused = |refusal: Refusal| format!("{:?} {}", refusal.errno, refusal.text);
    let mut words = question.splitn(3, ' ');
    match (words.next().unwrap(), words.next().unwrap(), words.next()) {
        ("get", path, None) => show(arrays, path).unwrap_or_else(refused),
        ("set", path, value) => store(arrays, path, &value.unwrap_or("").replace("\\n", "\n"))
            .map_or_else(refused, |command| format!("{command:?}")),
        ("list", path, None) => list(arrays, path).map_or_else(refused, |names| {
            names.iter().map(|(name, kind)| format!("{name} {kind:?}")).collect::<Vec<String>>().join(", ")
        }),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_row_is_in_the_directory_that_it_names() {
    for Attribute { path, show, store } in ATTRIBUTES {
        let below = path.strip_prefix("n-*/").map(|rest| rest.strip_prefix("replicas/*/"));
        let fits = match show {
            Show::Never | Show::Array(_) => below.is_none(),
            Show::Node(_) => below == Some(None),
            Show::Replica(_) => matches!(below, Some(Some(_))),
        };
        assert!(fits, "{path}");
        assert!(!matches!((show, store), (Show::Never, Store::Never)), "{path} is of no use");
        assert!(!path.starts_with("n-") || path.starts_with("n-*/"), "{path} looks like a node");
        assert_eq!(ATTRIBUTES.iter().filter(|other| other.path == *path).count(), 1, "{path} is there twice");
    }
}

#[test]
fn a_path_says_whose_it_is() {
    for (path, array) in
        [("devices/a/alg", Some("a")), ("/devices/a", Some("a")), ("devices", None), ("", None), ("a/devices", None)]
    {
        assert_eq!(array_of(path), array, "{path}");
    }
}

proptest::proptest! {
    #[test]
    fn whatever_is_listed_can_be_found(path in "[/a-z0-9-]{0,20}", value in ".{0,20}") {
        let line = include_str!("../../../tests/data/tree.txt").lines().find(|line| line.starts_with('{')).unwrap();
        let arrays = [serde_json::from_str(line).unwrap()];
        let _ = (show(&arrays, &path), store(&arrays, &path, &value), find(&arrays, &path));
        for Entry { path, value, .. } in entries(&arrays, "").unwrap().tree {
            assert_ne!(find(&arrays, &path).unwrap(), Kind::Directory);
            assert_eq!(show(&arrays, &path).ok(), value);
        }
    }
}
