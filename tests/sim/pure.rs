//! Pure rules as tables: inputs and what the production code makes of them, in `tests/data`. `UPDATE=1` writes them anew.

use std::fmt::Write as _;

use dst::geometry::map::Geometry;
use dst::store::flush::{Ask, Flushes, Point};
use dst::store::session::{Claim, Conn, Sessions, Standing};
use dst::units::{Epoch, Extent, Id, Lba};

/// A file of tables, and the function that makes its verdicts.
pub(crate) type Table = (&'static str, fn(&str) -> String);

/// Every file of tables.
pub(crate) const TABLES: [Table; 3] = [("geometry.txt", geometry), ("flush.txt", flush), ("sessions.txt", sessions)];

/// Runs a case line by line; what a line gives is written beside it.
fn lines(text: &str, mut step: impl FnMut(&[&str]) -> Option<String>) -> String {
    let mut out = String::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let result = step(&words).unwrap_or_else(|| "not understood".to_owned());
        let _ = writeln!(out, "{}", format!("{line:<24} {result}").trim_end());
    }
    out
}

fn extent(word: &str) -> Option<Extent> {
    let (start, sectors) = word.split_once('+')?;
    Some(Extent::new(start.parse().ok()?, sectors.parse().ok()?))
}

/// `linear SIZE...`, `striped CHUNK SIZE...` lay out an array; `piece`, `span NODE` take an extent of it, `unmap` a node's sector.
fn geometry(text: &str) -> String {
    let mut layout: Option<Geometry> = None;
    lines(text, |words| {
        let numbers = |words: &[&str]| words.iter().map(|word| word.parse().ok()).collect::<Option<Vec<u64>>>();
        if let "linear" | "striped" = *words.first()? {
            let numbers = numbers(&words[1..])?;
            let made = match words[0] {
                "linear" => Geometry::linear(&numbers),
                _ => Geometry::striped(*numbers.first()?, &numbers[1..]),
            };
            layout = made.clone().ok();
            return Some(made.map_or_else(|bad| bad.to_string(), |made| format!("{} sectors", made.sectors())));
        }
        let layout = layout.as_ref()?;
        Some(match (words[0], words[1..].to_vec().as_slice()) {
            ("pieces", [range]) => {
                let whole = extent(range)?;
                let mut at = whole.start.0;
                let mut found = Vec::new();
                while at < whole.end().0 {
                    let piece = layout.piece(Extent::new(at, whole.end().0 - at));
                    found.push(format!("{}:{}+{}", piece.node, piece.extent.start, piece.extent.sectors));
                    at += piece.extent.sectors;
                }
                found.join(" ")
            }
            ("spans", [range]) => {
                let whole = extent(range)?;
                let spans = (0..layout.nodes()).filter_map(|node| Some((node, layout.span(whole, node)?)));
                let spans = spans.map(|(node, span)| format!("{node}:{}+{}", span.start, span.sectors));
                spans.collect::<Vec<_>>().join(" ")
            }
            ("unmap", [node, sector]) => layout
                .unmap(node.parse().ok()?, Lba(sector.parse().ok()?))
                .map_or_else(|| "nothing".to_owned(), |sector| sector.to_string()),
            ("names", []) => {
                (0..layout.nodes()).map(|node| format!("n-{}", layout.node_start(node))).collect::<Vec<_>>().join(" ")
            }
            _ => return None,
        })
    })
}

/// `write` counts a write, `ask NAME` is a flush, `start NAME` a sync for it, `done`, `fail` end the sync, `covered NAME` asks.
fn flush(text: &str) -> String {
    let mut flushes = Flushes::new(false);
    let mut points: std::collections::BTreeMap<String, Point> = std::collections::BTreeMap::new();
    lines(text, |words| {
        let point = || words.get(1).and_then(|name| points.get(*name).copied());
        Some(match *words.first()? {
            "write" => {
                flushes.wrote();
                String::new()
            }
            "ask" => match flushes.ask() {
                Ask::Clean => "nothing to do".to_owned(),
                Ask::Failed => "fails for ever".to_owned(),
                Ask::Wait(point) => {
                    points.insert((*words.get(1)?).to_owned(), point);
                    "waits".to_owned()
                }
            },
            "start" => if flushes.start(point()?) { "a sync starts" } else { "none" }.to_owned(),
            "done" => {
                flushes.ended(Ok(()));
                String::new()
            }
            "fail" => {
                flushes.ended(Err(dst::errno::Errno::EIO));
                String::new()
            }
            "covered" => if flushes.covers(point()?) { "yes" } else { "no" }.to_owned(),
            _ => return None,
        })
    })
}

/// `hello CONN SESSION.EPOCH CHANNEL`, `job CONN`, `end CONN`, `gone CONN`: who is closed, refused, welcomed.
fn sessions(text: &str) -> String {
    let mut sessions = Sessions::default();
    lines(text, |words| {
        let conn = Conn(words.get(1)?.parse().ok()?);
        let mut said = Vec::new();
        match *words.first()? {
            "hello" => {
                let (session, epoch) = words.get(2)?.split_once('.')?;
                let session = Id([session.parse().ok()?; 16]);
                let (array, host) = (Id([1; 16]), Id([2; 16]));
                let claim = Claim { array, epoch: Epoch(epoch.parse().ok()?), session, host };
                let channel = words.get(3)?.parse().ok()?;
                let mut oust = |conn: Conn, why| said.push(format!("{why:?} {}", conn.0).to_lowercase());
                match sessions.stand(&claim) {
                    Standing::Fenced(claim) => said.push(format!("fenced by epoch {}", claim.epoch.0)),
                    standing => {
                        if standing == Standing::Takes {
                            sessions.take(Some(claim), &mut oust);
                        }
                        sessions.attach(conn, (channel, 1, 0), &mut oust);
                    }
                }
            }
            "job" if sessions.live(conn).is_some() => sessions.started(conn),
            "job" => said.push("dropped".to_owned()),
            "end" => said.push(if sessions.ended(conn) { "answered" } else { "told to nobody" }.to_owned()),
            "gone" => sessions.gone(conn),
            _ => return None,
        }
        while let Some(attached) = sessions.next_welcome() {
            said.push(format!("welcome {}", attached.conn.0));
        }
        Some(said.join(", "))
    })
}
