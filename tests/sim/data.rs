//! Data-driven tests: `tests/data/NAME.txt` holds cases, input and expected text side by side; `UPDATE=1` rewrites the latter.
//!
//! A case is `== title`, the input, a line `----`, and what the function under test makes of the input.

use std::fmt::Write as _;
use std::path::PathBuf;

/// Where the data files are.
pub(crate) fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

struct Case<'a> {
    title: &'a str,
    input: String,
    expected: String,
}

fn parse(text: &str) -> (String, Vec<Case<'_>>) {
    let mut intro = String::new();
    let mut cases: Vec<Case<'_>> = Vec::new();
    let mut in_expected = false;
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("== ") {
            cases.push(Case { title, input: String::new(), expected: String::new() });
            in_expected = false;
            continue;
        }
        let to = match cases.last_mut() {
            None => &mut intro,
            Some(_) if line == "----" => {
                in_expected = true;
                continue;
            }
            Some(case) if in_expected => &mut case.expected,
            Some(case) => &mut case.input,
        };
        to.push_str(line);
        to.push('\n');
    }
    (intro, cases)
}

/// Runs every case of a file. The number of cases, or what differs.
pub(crate) fn check(name: &str, function: impl Fn(&str) -> String) -> Result<usize, String> {
    let path = directory().join(name);
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let (intro, cases) = parse(&text);
    let mut rewritten = intro;
    let mut different = String::new();
    for case in &cases {
        let actual = function(&case.input);
        let (wanted, got) = (case.expected.trim_end(), actual.trim_end());
        if wanted != got {
            let _ = write!(different, "{name}: {}:\n  expected:\n{wanted}\n  got:\n{got}\n", case.title);
        }
        let _ = write!(rewritten, "== {}\n{}----\n{got}\n\n", case.title, case.input);
    }
    if std::env::var_os("UPDATE").is_some_and(|value| value == "1") {
        std::fs::write(&path, rewritten.trim_end().to_owned() + "\n").map_err(|error| format!("{name}: {error}"))?;
        return Ok(cases.len());
    }
    if different.is_empty() { Ok(cases.len()) } else { Err(different + "(UPDATE=1 rewrites the expected texts)\n") }
}
