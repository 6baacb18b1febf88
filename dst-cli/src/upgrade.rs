//! `dst upgrade`: asks, waits until the next program serves what this one did, and says how long that took for whom.

use std::fmt::Write;
use std::time::{Duration, Instant};

use dst::control::command::Force;
use dst::control::status::State;
use dst::control::upgrade::{Upgrade, Upgraded};
use dst::limits;

use crate::client::Daemon;
use crate::render;

/// How often it is looked whether the next program is there.
const LOOK: Duration = Duration::from_millis(50);

/// Does it.
pub(crate) fn run(daemon: &Daemon, force: bool, json: bool) -> Result<(), String> {
    let before: Upgraded = daemon.ask("GET", "/v1/upgrade", &())?;
    let begun: Upgrade = daemon.ask("POST", "/v1/upgrade", &Force { force })?;
    let until = Instant::now() + limits::UPGRADE_MAX;
    let after = loop {
        std::thread::sleep(LOOK);
        // For a moment nobody answers.
        let now = daemon.ask::<Upgraded>("GET", "/v1/upgrade", &());
        let last = match now {
            Ok(now) if now.upgrades > before.upgrades => match waiting(&begun, &now) {
                None => break now,
                Some(why) => why,
            },
            Ok(_) => "the former program still runs".to_owned(),
            Err(why) => why,
        };
        if Instant::now() > until {
            return Err(format!("{} does not serve yet what was served: {last}: 'dst status'", begun.program));
        }
    };
    render::one(&after, json, table)
}

/// Which array is not back yet.
fn waiting(begun: &Upgrade, now: &Upgraded) -> Option<String> {
    let shall_be = now.arrays.iter().filter(|array| begun.arrays.contains(&array.array));
    let away = shall_be.filter(|array| array.state == State::Starting).min_by(|a, b| a.array.cmp(&b.array))?;
    let why = away.why.as_deref().unwrap_or("it is being started");
    Some(format!("{}: {why}", away.array))
}

fn table(after: &Upgraded) -> String {
    let mut text = format!("dstd {} goes on\n", after.version);
    for array in &after.arrays {
        let device = array.device.as_deref().unwrap_or("-");
        let end = match (array.state, array.waited_us) {
            (State::Started, Some(waited)) => format!("waited {:.3} s", Duration::from_micros(waited).as_secs_f64()),
            (State::Started, None) => "is served anew".to_owned(),
            (state, _) => format!("is {}: {}", state.word(), array.why.as_deref().unwrap_or("-")),
        };
        let _ = writeln!(text, "{}  {device}  {end}", array.array);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use dst::control::upgrade::ArrayAfter;

    fn array(name: &str, state: State, waited_us: Option<u64>) -> ArrayAfter {
        let device = waited_us.map(|_| "/dev/ublkb0".to_owned());
        ArrayAfter { array: name.to_owned(), state, device, waited_us, why: None }
    }

    #[test]
    fn it_is_over_when_what_was_started_is_so_again_or_cannot() {
        let begun = Upgrade { program: "/dstd".to_owned(), version: "2".to_owned(), arrays: vec!["b".to_owned()] };
        let after = |state| Upgraded {
            version: "2".to_owned(),
            upgrades: 1,
            arrays: vec![array("a", State::Starting, None), array("b", state, Some(412_345))],
        };
        assert!(waiting(&begun, &after(State::Starting)).unwrap().starts_with("b: "));
        assert_eq!(waiting(&begun, &after(State::Started)), None);
        assert_eq!(waiting(&begun, &after(State::Failed)), None);
        let text = table(&after(State::Started));
        assert_eq!(text, "dstd 2 goes on\na  -  is starting: -\nb  /dev/ublkb0  waited 0.412 s\n");
    }
}
