//! Where a replica lives, as people write it: `HOST:PORT/VOLUME` or an absolute `/path`. Parsing is pure; nothing is looked up.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::units::check_name;

/// A server's address as people write it. The host is a name or an address and is looked up when it is used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerAddress {
    /// Name, IPv4 address or IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// Where a replica lives.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A volume on a server.
    Remote {
        /// The server.
        server: ServerAddress,
        /// The volume's name there.
        volume: String,
    },
    /// A file or block device of this machine: an absolute path.
    Local(String),
}

impl FromStr for ServerAddress {
    type Err = String;

    /// `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`.
    fn from_str(text: &str) -> Result<ServerAddress, String> {
        let bad = |why: &str| Err(format!("'{}' is not a server address (HOST:PORT): {why}", text.escape_default()));
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => match rest.split_once(']') {
                Some((host, "")) => (host, None),
                Some((host, after)) => match after.strip_prefix(':') {
                    Some(port) => (host, Some(port)),
                    None => return bad("after ']' comes ':PORT'"),
                },
                None => return bad("']' is missing"),
            },
            None => match text.split_once(':') {
                Some((_, port)) if port.contains(':') => {
                    return bad("write an IPv6 address in brackets, such as [::1]");
                }
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let port = match port.map(str::parse::<u16>) {
            None => limits::PORT_DEFAULT,
            Some(Ok(port)) if port != 0 => port,
            Some(_) => return bad("the port is a number from 1 to 65535"),
        };
        if text.starts_with('[') && host.parse::<std::net::Ipv6Addr>().is_err() {
            return bad("what stands in brackets is not an IPv6 address");
        }
        let sound = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':');
        if host.is_empty() || host.len() > limits::HOST_BYTES_MAX || !host.bytes().all(sound) {
            return bad("the host is a name or an address");
        }
        Ok(ServerAddress { host: host.to_owned(), port })
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        if text.starts_with('/') {
            let plain = text.len() <= limits::PATH_BYTES_MAX && !text.bytes().any(|byte| byte.is_ascii_control());
            if !plain || text.ends_with('/') || text.split('/').any(|part| part == "..") {
                return Err(format!(
                    "'{}' is not a target: a path names a file or block device, without '..', in at most {} bytes",
                    text.escape_default(),
                    limits::PATH_BYTES_MAX
                ));
            }
            return Ok(Target::Local(text.to_owned()));
        }
        let Some((server, volume)) = text.split_once('/') else {
            return Err(format!(
                "'{}' is not a target: write HOST:PORT/VOLUME, or an absolute /path/to/file/or/device",
                text.escape_default()
            ));
        };
        check_name(volume)?;
        Ok(Target::Remote { server: server.parse()?, volume: volume.to_owned() })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Remote { server, volume } => write!(f, "{server}/{volume}"),
            Target::Local(path) => f.write_str(path),
        }
    }
}

impl Serialize for Target {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Target, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_comes_back_whole() {
        for (text, shown) in [
            ("10.0.0.1:20070/a", "10.0.0.1:20070/a"),
            ("store-1/a", "store-1:20070/a"),
            ("[::1]:99/vol", "[::1]:99/vol"),
            ("[fe80::1]/vol", "[fe80::1]:20070/vol"),
            ("/dev/sdb", "/dev/sdb"),
            ("/srv/a file", "/srv/a file"),
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), shown);
            assert_eq!(shown.parse::<Target>().unwrap(), target);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, why) in [
            ("", "HOST:PORT/VOLUME"),
            ("host:20070", "HOST:PORT/VOLUME"),
            ("relative/pa/th", "not a name"),
            ("host:0/a", "1 to 65535"),
            ("host:70000/a", "1 to 65535"),
            ("host:/a", "1 to 65535"),
            (":1/a", "name or an address"),
            ("::1/a", "brackets"),
            ("[::1/a", "']' is missing"),
            ("[::1]x/a", "after ']'"),
            ("[host]:1/a", "not an IPv6"),
            ("host:1/", "not a name"),
            ("host:1/a b", "not a name"),
            ("ho st:1/a", "name or an address"),
            ("/", "not a target"),
            ("/dev/", "not a target"),
            ("/srv/../etc/passwd", "not a target"),
        ] {
            let error = text.parse::<Target>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_prints_the_same(text in "[a-c:/\\[\\].0-9]{0,16}") {
            if let Ok(target) = text.parse::<Target>() {
                prop_assert_eq!(target.to_string().parse::<Target>(), Ok(target));
            }
        }
    }
}
