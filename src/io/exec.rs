//! Going on as another program in the same process: what is installed now in the place of what runs.
//!
//! The process keeps its id, its environment and its arguments. Everything else ends as if it had been killed: threads, rings, sockets, locks,
//! and files, which are all close-on-exec. What the next program must know of this one is in one variable.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::limits;
use crate::units::Time;

/// "COUNT MOMENT", of the former program.
const LIFE: &str = "DST_UPGRADED";

/// What the process was before this program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Life {
    /// How often it has gone on as another program.
    pub upgrades: u32,
    /// Since when nobody has served: when the former one ended, or began to; `None`: there was none.
    pub left_at: Option<Time>,
}

impl Life {
    /// This process's.
    pub fn own() -> Life {
        std::env::var(LIFE).ok().and_then(|text| Life::parse(&text)).unwrap_or_default()
    }

    fn parse(text: &str) -> Option<Life> {
        let (count, moment) = text.split_once(' ')?;
        Some(Life { upgrades: count.parse().ok()?, left_at: Some(Time(moment.parse().ok()?)) })
    }
}

/// The file that this program was started from, or what is there in its place now.
pub fn installed() -> io::Result<PathBuf> {
    let link = std::fs::read_link("/proc/self/exe")?;
    let text = link.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map_or(link.clone(), PathBuf::from))
}

/// What that program says its version is: so one that cannot run is noticed while another one still does. Waits for it, within a bound.
pub fn version(program: &PathBuf) -> io::Result<String> {
    let mut child = Command::new(program).arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let until = Instant::now() + limits::VERSION_MAX;
    while child.try_wait()?.is_none() {
        if Instant::now() > until {
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match text.strip_prefix("dstd ") {
        Some(version) if output.status.success() => Ok(version.to_owned()),
        _ => Err(io::Error::other(format!("it is no dstd: '--version' ends with {} and says '{text}'", output.status))),
    }
}

/// Goes on as `program`, which is told since when nobody serves. Returns only when that is impossible.
pub fn go_on(program: &PathBuf, left_at: Time) -> io::Error {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| program.into());
    let life = format!("{} {}", Life::own().upgrades.saturating_add(1), left_at.0);
    Command::new(program).arg0(name).args(arguments).env(LIFE, life).exec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_former_life_is_understood_or_none() {
        assert_eq!(Life::parse("3 17"), Some(Life { upgrades: 3, left_at: Some(Time(17)) }));
        for bad in ["", "3", "3 ", "x 1", "-1 1", "3 17 1"] {
            assert_eq!(Life::parse(bad), None, "{bad}");
        }
        assert_eq!(Life::own(), Life::default());
    }

    #[test]
    fn what_is_no_dstd_is_not_gone_on_as() {
        assert!(version(&"/bin/true".into()).unwrap_err().to_string().contains("no dstd"));
        assert!(version(&"/bin/false".into()).is_err());
        assert_eq!(version(&"/nonexistent".into()).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(installed().unwrap(), std::env::current_exe().unwrap());
    }
}
