//! The configuration file of `dstd`, TOML. Flags win over it. An unknown key is an error, so that a misspelt one is noticed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where it is looked for unless said otherwise; none there is fine.
pub const DEFAULT: &str = "/etc/dst/dstd.toml";

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct ConfigFile {
    /// Which lines are logged: `error`, `warn`, `info`, `debug`, or a filter of tracing-subscriber.
    pub log: Option<String>,
    /// How long I/O threads look for completions before they sleep, as `busy-poll = '50us'`.
    pub busy_poll: Option<String>,
    /// For `dstd server`.
    pub server: ServerSection,
    /// For `dstd array`.
    pub array: ArraySection,
}

/// `[server]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct ServerSection {
    /// Addresses to listen on.
    pub listen: Vec<String>,
    /// The directory that volumes live in.
    pub pool: Option<PathBuf>,
    /// I/O threads.
    pub threads: Option<usize>,
    /// Listen beyond loopback although nothing is encrypted.
    pub danger_cleartext: bool,
}

/// `[array]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct ArraySection {
    /// Where the records of arrays are kept.
    pub state_dir: Option<PathBuf>,
    /// Where what lives as long as the daemon is kept.
    pub run_dir: Option<PathBuf>,
    /// The control socket.
    pub socket: Option<PathBuf>,
    /// Where the control tree is mounted.
    pub tree: Option<PathBuf>,
    /// Where figures for Prometheus are served.
    pub metrics: Option<SocketAddr>,
    /// Beyond loopback, too, although nothing is encrypted.
    pub danger_cleartext: bool,
}

impl ConfigFile {
    /// Reads `path`, or [`DEFAULT`] where it is `None`.
    pub fn read(path: Option<&Path>) -> Result<ConfigFile, String> {
        let place = path.unwrap_or(Path::new(DEFAULT));
        match std::fs::read_to_string(place) {
            Ok(text) => {
                toml::from_str(&text).map_err(|error| format!("{} is not understood: {error}", place.display()))
            }
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(ConfigFile::default()),
            Err(error) => Err(format!("cannot read {}: {error}", place.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_known_or_refused() {
        let text = "log = 'debug'\nbusy-poll = '0s'\n[server]\nlisten = ['[::1]:1']\ndanger-cleartext = true\n[array]\nstate-dir = '/s'\n";
        let config: ConfigFile = toml::from_str(text).unwrap();
        assert_eq!(config.array.state_dir.as_deref(), Some(Path::new("/s")));
        assert!(config.server.danger_cleartext);
        assert!(toml::from_str::<ConfigFile>("[server]\npol = '/x'\n").unwrap_err().to_string().contains("pol"));
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/dst-cli/dist/dstd.toml");
        assert_eq!(ConfigFile::read(Some(Path::new(shipped))).unwrap().server.pool.unwrap(), Path::new("/srv/dst"));
        assert!(ConfigFile::read(Some(Path::new("/nonexistent"))).unwrap_err().contains("cannot read /nonexistent"));
    }
}
