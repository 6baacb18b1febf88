//! Histories written as text, and what the judge says about them: the judge's own tests (`tests/data/judge.txt`).
//!
//! One event per line, one millisecond apart. `w write 0+2` invokes an operation named `w`; `w ok`, `w error 5` end it;
//! `r = w 0 w@1` ends a read with values: what `w` wrote there, zeros, what `w` wrote to its sector number 1. The other words
//! are those of [`step`].

use std::collections::BTreeMap;

use crate::judge::{Judge, OpId, Rules, Verdict, What, ZERO};

const MILLI: u64 = 1_000_000;

/// A value that nobody wrote.
const JUNK: u64 = u64::MAX;

struct Story {
    judge: Judge,
    now: u64,
    ops: BTreeMap<String, (OpId, u64)>,
}

/// Tells the story to a judge; its verdict as text.
pub(crate) fn run(text: &str) -> String {
    let mut lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).peekable();
    let mut words = Vec::new();
    if let Some(line) = lines.peek().filter(|line| line.starts_with("rules")) {
        words = line.split_whitespace().skip(1).collect();
        lines.next();
    }
    let mut story = Story { judge: Judge::new(rules(&words)), now: 0, ops: BTreeMap::new() };
    for line in lines {
        story.now += MILLI;
        let words: Vec<&str> = line.split_whitespace().collect();
        match step(&mut story, &words) {
            Some(Ok(())) => {}
            Some(Err(violation)) => return format!("{line}\n{violation}\n"),
            None => return format!("not understood: {line}\n"),
        }
    }
    "allowed\n".to_owned()
}

fn rules(words: &[&str]) -> Rules {
    let number = |name: &str, default: u64| {
        let found = words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        found.and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let devices = number("devices", 1);
    let per_device = number("sectors", 4);
    let device_of = (0..devices * per_device).map(|sector| u16::try_from(sector / per_device).unwrap_or(0)).collect();
    Rules {
        device_of,
        devices: usize::try_from(devices).unwrap_or(1),
        replicated: words.contains(&"replicated"),
        plural: words.contains(&"replicated"),
        mortal: !words.contains(&"immortal"),
        io_timeout: number("timeout", 1000) * MILLI,
        slack: 100 * MILLI,
    }
}

fn extent(text: &str) -> Option<(u64, u64)> {
    let (start, sectors) = text.split_once('+')?;
    Some((start.parse().ok()?, sectors.parse().ok()?))
}

fn step(story: &mut Story, words: &[&str]) -> Option<Verdict> {
    let now = story.now;
    let judge = &mut story.judge;
    let device = || words.get(1)?.parse::<u16>().ok();
    match *words.first()? {
        "wait" => story.now += words.get(1)?.parse::<u64>().ok()? * MILLI,
        "death" => judge.device_died(device()?),
        "forgiven" => judge.device_had_died(device()?),
        "restart" => judge.restarted(device()?),
        "daemon-death" => judge.daemon_died(now, judge.by),
        // From here on another daemon is asked, and answers.
        "host" => judge.by = words.get(1)?.parse().ok()?,
        "taken" => judge.taken(now, words.get(1)?.parse().ok()?),
        "replaced" => judge.replaced(now, &[words.get(1)?.parse().ok()?]),
        "resumed" => judge.resumed(now),
        "trouble" => judge.excuses.trouble(now, device()?),
        "relief" => judge.excuses.relief(now, device()?),
        "aborted" => judge.excuses.aborted(now),
        "fenced" => judge.excuses.fenced(now, device()?),
        "flush-failed" => judge.excuses.flush_failed(now, device()?),
        "gave" => {
            let (start, sectors) = extent(words.get(3)?)?;
            judge.excuses.gave(now, device()?, words.get(2)?.parse().ok()?, (start, start + sectors - 1));
        }
        "finish" => return Some(judge.finish()),
        name => return operation(story, name, &words[1..]),
    }
    Some(Ok(()))
}

fn operation(story: &mut Story, name: &str, words: &[&str]) -> Option<Verdict> {
    let now = story.now;
    let known = story.ops.get(name).copied();
    let what = match *words.first()? {
        "ok" => return Some(story.judge.acked(now, known?.0)),
        "error" => return Some(story.judge.failed(now, known?.0, words.get(1)?.parse().ok()?)),
        "=" => {
            let (id, start) = known?;
            let values: Option<Vec<u64>> =
                (start..).zip(&words[1..]).map(|(sector, word)| value(story, sector, word)).collect();
            return Some(story.judge.read(now, id, &values?));
        }
        "read" => What::Read,
        "write" => What::Write { fua: false },
        "fua" => What::Write { fua: true },
        "zero" => What::Zero { fua: false },
        "zero-fua" => What::Zero { fua: true },
        "flush" => What::Flush,
        _ => return None,
    };
    let (start, sectors) = if what == What::Flush { (0, 0) } else { extent(words.get(1)?)? };
    let id = story.judge.invoke(now, what, start, sectors);
    story.ops.insert(name.to_owned(), (id, start));
    Some(Ok(()))
}

fn value(story: &Story, sector: u64, word: &str) -> Option<u64> {
    match word {
        "0" => return Some(ZERO),
        "junk" => return Some(JUNK),
        _ => {}
    }
    let (name, place) = match word.split_once('@') {
        Some((name, place)) => (name, Some(place.parse().ok()?)),
        None => (word, None),
    };
    let (id, start) = story.ops.get(name).copied()?;
    Some(id.value(place.unwrap_or_else(|| sector.wrapping_sub(start))))
}
