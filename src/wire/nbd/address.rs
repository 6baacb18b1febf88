//! Where an NBD frontend listens, as people type it and as clients are told.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A path of a unix socket, or `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NbdAddress {
    /// A unix socket, by its absolute path.
    Unix(PathBuf),
    /// A TCP address. Port 0 lets the system choose.
    Tcp {
        /// Name or number of a host; an IPv6 number without its brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

/// Longest path of a unix socket, bytes: `sun_path` has 108 with the zero at its end.
const PATH_BYTES_MAX: usize = 107;

impl FromStr for NbdAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<NbdAddress, String> {
        if text.starts_with('/') {
            if text.len() > PATH_BYTES_MAX || text.contains('\0') {
                return Err(format!(
                    "'{}' is too long for a unix socket: at most {PATH_BYTES_MAX} bytes",
                    text.escape_default()
                ));
            }
            return Ok(NbdAddress::Unix(PathBuf::from(text)));
        }
        let bad = || {
            format!(
                "'{}' is not an address for NBD: use HOST:PORT, such as 127.0.0.1:10809, or the absolute path of a unix socket",
                text.escape_default()
            )
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = port.parse().map_err(|_| bad())?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let named = |host: &str| host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
        let valid = match bare {
            Some(number) => number.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && named(host),
        };
        if !valid {
            return Err(bad());
        }
        Ok(NbdAddress::Tcp { host: bare.unwrap_or(host).to_owned(), port })
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdAddress::Unix(path) => path.display().fmt(f),
            NbdAddress::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            NbdAddress::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl TryFrom<String> for NbdAddress {
    type Error = String;

    fn try_from(text: String) -> Result<NbdAddress, String> {
        text.parse()
    }
}

impl From<NbdAddress> for String {
    fn from(address: NbdAddress) -> String {
        address.to_string()
    }
}

impl NbdAddress {
    /// The NBD URI of an export here, as `nbdinfo`, `qemu-img` and `fio` take it.
    pub fn uri(&self, export: &str) -> String {
        match self {
            NbdAddress::Unix(path) => {
                format!("nbd+unix:///{}?socket={}", escaped(export), escaped(&path.to_string_lossy()))
            }
            NbdAddress::Tcp { .. } => format!("nbd://{self}/{}", escaped(export)),
        }
    }
}

/// `text` with every byte that has a meaning in a URI escaped.
fn escaped(text: &str) -> String {
    use fmt::Write;
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
            out.push(char::from(byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip_and_have_a_uri() {
        for (text, uri) in [
            ("/run/dst/a.sock", "nbd+unix:///arr?socket=/run/dst/a.sock"),
            ("/run/a b&c", "nbd+unix:///arr?socket=/run/a%20b%26c"),
            ("127.0.0.1:10809", "nbd://127.0.0.1:10809/arr"),
            ("localhost:0", "nbd://localhost:0/arr"),
            ("[::1]:10809", "nbd://[::1]:10809/arr"),
        ] {
            let address: NbdAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            assert_eq!(address.uri("arr"), uri);
            let json = serde_json::to_string(&address).unwrap();
            assert_eq!(serde_json::from_str::<NbdAddress>(&json).unwrap(), address);
        }
    }

    #[test]
    fn other_texts_are_refused() {
        let long = format!("/{}", "x".repeat(PATH_BYTES_MAX));
        for text in ["", ":1", "host", "host:", "host:65536", "::1:10", "[::1", "a b:1", "run/x.sock", &long] {
            assert!(text.parse::<NbdAddress>().is_err(), "{text}");
        }
    }
}
