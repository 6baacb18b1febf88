//! The command line of 2007, as the diary of DST has it: one call for each node, sizes in sectors of 512 bytes, the last call with `-R`.
//!
//! It is meant when the first argument is one dash and one of its letters. Parsed by hand as getopt did; what it asks for is asked of the
//! same daemon in the same words as everything else.

use std::ffi::OsString;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use dst::control::command::{Answer, Arrays, Create, Force, NewNode, NewReplica, Start, Terms, block_default};
use dst::control::spec::{Alg, Frontend, RunOptions};
use dst::control::status::{ArrayStatus, NodeStatus, State};
use dst::control::target::{ServerAddress, Target};
use dst::units::{Lba, NodeId, SECTOR_BYTES, check_name};
use dst::wire::volume::Volume;

use crate::args::SOCKET;
use crate::client::Daemon;
use crate::commands::{list, warn};
use crate::render;

/// As it was printed then, but for the explanations.
pub(crate) const HELP: &str = "\
Usage: dst -n storage_name -A algorithm -b backlog -f device_path
           -s start -S size -d local_disk -a addr -p port -r <remove>
           -R <start array> -D <del array> -h <help>

  -n  the array              -A  alg_linear, or alg_mirror (each call adds a copy)
  -a  a server, or SERVER/VOLUME; -p its port. Without a volume its only free one is taken
  -d  a local disk           -s, -S  start and size of the node, sectors of 512 bytes
  -R  start the array        -r  remove this node (the last one) or copy
  -D  stop and remove the array
  -f  taken if it is dstd's socket, else ignored, as is -b

$DST_SOCKET is dstd's socket, $DST_FRONTEND how the array is shown (ublk, nbd:ADDRESS:PORT, nbd:/path.sock).

  dst -n storage -A alg_linear -f /dev/dst -a kano -p 1025
  dst -n storage -A alg_linear -f /dev/dst -a via -p 1025 -R
";

/// The letters; those with a value have a colon.
const LETTERS: &str = "n:A:b:f:s:S:d:a:p:rRDh";

/// Whether the command line is meant, by its first argument.
pub(crate) fn is_meant(first: Option<&OsString>) -> bool {
    let Some(bytes) = first.map(|first| first.as_encoded_bytes()) else { return false };
    matches!(bytes, [b'-', letter, ..] if b"nAbfsSdaprRD".contains(letter))
}

/// How an array is laid out, in the words of then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Linear,
    Mirror,
}

/// Where a node or a copy lives.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// On a server; without a name the server's only free volume is meant.
    Server(ServerAddress, Option<String>),
    /// A file or block device.
    Disk(Target),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    /// Add what is named; then start the array, if that is asked for.
    Add { run: bool },
    /// Start the array as it is.
    Start,
    /// Remove what is named.
    Remove,
    /// Remove the array.
    Delete,
    /// Print the help.
    Help,
}

/// What was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    deed: Deed,
    array: String,
    algorithm: Option<Algorithm>,
    control: Option<PathBuf>,
    place: Option<Place>,
    start: Option<u64>,
    size: Option<u64>,
}

/// The letters and values as they were typed.
#[derive(Default)]
struct Typed {
    values: Vec<(char, String)>,
}

impl Typed {
    fn of(words: &[OsString]) -> Result<Typed, String> {
        let mut typed = Typed::default();
        let mut words = words.iter().map(|word| word.to_str().ok_or("the arguments are not text"));
        while let Some(word) = words.next().transpose()? {
            let Some(mut letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
                return Err(format!("'{}' stands alone: a value follows its letter", word.escape_default()));
            };
            // As getopt: letters without a value may be joined, and a value may follow its letter without a blank.
            while let Some(letter) = letters.chars().next() {
                letters = &letters[letter.len_utf8()..];
                let known = LETTERS.find(letter).filter(|_| letter != ':');
                let Some(at) = known else { return Err(format!("-{} is not known", letter.escape_default())) };
                if typed.has(letter) {
                    return Err(format!("-{letter} is given twice"));
                }
                let mut value = String::new();
                if LETTERS[at + 1..].starts_with(':') {
                    value = std::mem::take(&mut letters).to_owned();
                    if value.is_empty() {
                        value = words.next().transpose()?.ok_or(format!("-{letter} needs a value"))?.to_owned();
                    }
                }
                typed.values.push((letter, value));
            }
        }
        Ok(typed)
    }

    fn has(&self, letter: char) -> bool {
        self.get(letter).is_some()
    }

    fn get(&self, letter: char) -> Option<&str> {
        self.values.iter().find(|(other, _)| *other == letter).map(|(_, value)| value.as_str())
    }

    fn number(&self, letter: char) -> Result<Option<u64>, String> {
        let number = |text: &str| {
            text.parse::<u64>().map_err(|_| format!("-{letter} {}: this is not a number", text.escape_default()))
        };
        self.get(letter).map(number).transpose()
    }
}

/// Understands what was typed, without the program's name.
pub(crate) fn parse(words: &[OsString]) -> Result<Call, String> {
    let typed = Typed::of(words)?;
    typed.number('b')?;
    let algorithm = match typed.get('A') {
        None => None,
        Some("alg_linear") => Some(Algorithm::Linear),
        Some("alg_mirror") => Some(Algorithm::Mirror),
        Some(other) => {
            let other = other.escape_default();
            return Err(format!(
                "-A {other}: it is alg_linear or alg_mirror; 'dst create --alg striped' makes a striped array"
            ));
        }
    };
    let place = place(&typed)?;
    let deed = match (typed.has('h'), typed.has('r'), typed.has('R'), typed.has('D')) {
        (true, ..) => Deed::Help,
        (_, false, false, true) if place.is_none() => Deed::Delete,
        (_, false, false, true) => return Err("-D removes the whole array: -r removes one node".to_owned()),
        (_, true, false, false) => Deed::Remove,
        (_, false, run, false) if place.is_some() => Deed::Add { run },
        (_, false, true, false) => Deed::Start,
        (_, false, false, false) => {
            return Err("nothing is to be done: name a node with -a or -d, or give -R, -r or -D".to_owned());
        }
        _ => return Err("-r, -R and -D exclude each other".to_owned()),
    };
    let array = typed.get('n').unwrap_or_default().to_owned();
    if deed != Deed::Help {
        check_name(&array).map_err(|why| if array.is_empty() { "-n names the array".to_owned() } else { why })?;
    }
    if deed == (Deed::Remove) && place.is_none() && !typed.has('s') {
        return Err("-r removes what -a and -p, -d or -s name".to_owned());
    }
    let control = typed.get('f').map(PathBuf::from);
    Ok(Call { deed, array, algorithm, control, place, start: typed.number('s')?, size: typed.number('S')? })
}

fn place(typed: &Typed) -> Result<Option<Place>, String> {
    match (typed.get('a'), typed.get('d'), typed.get('p')) {
        (Some(_), Some(_), _) => Err("-a and -d name different places".to_owned()),
        (None, Some(_), Some(_)) | (None, None, Some(_)) => Err("-p is the port of -a".to_owned()),
        (None, None, None) => Ok(None),
        (None, Some(disk), None) => match disk.parse()? {
            target @ Target::Local(_) => Ok(Some(Place::Disk(target))),
            Target::Remote { .. } => Err(format!("-d {disk}: a local disk is an absolute path")),
        },
        (Some(address), None, port) => {
            let (host, volume) = address.split_once('/').map_or((address, None), |(host, volume)| (host, Some(volume)));
            let mut server: ServerAddress = host.parse()?;
            if let Some(port) = port {
                let bad = || format!("-p {}: the port is a number from 1 to 65535", port.escape_default());
                server.port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
            }
            volume.map_or(Ok(()), check_name)?;
            Ok(Some(Place::Server(server, volume.map(str::to_owned))))
        }
    }
}

/// What the environment says: the old words have no letter for it.
fn environment() -> Result<(PathBuf, Frontend), String> {
    let socket = std::env::var_os("DST_SOCKET").map_or_else(|| PathBuf::from(SOCKET), PathBuf::from);
    let frontend = std::env::var("DST_FRONTEND").ok().map(|text| text.parse()).transpose()?;
    Ok((socket, frontend.unwrap_or_default()))
}

/// Does it.
pub(crate) fn run(call: &Call) -> Result<(), String> {
    let (socket, frontend) = environment()?;
    let is_socket = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let socket = call.control.clone().filter(|path| is_socket(path)).unwrap_or(socket);
    let daemon = Daemon { socket: &socket };
    let name = &call.array;
    match call.deed {
        Deed::Help => render::text(HELP),
        Deed::Start => start(&daemon, name, frontend),
        Deed::Add { run } => {
            add(&daemon, call, find(&daemon, name)?)?;
            if run { start(&daemon, name, frontend) } else { Ok(()) }
        }
        Deed::Remove => remove(&daemon, call, &there(&daemon, name)?),
        Deed::Delete => {
            if there(&daemon, name)?.state == State::Started {
                let _: ArrayStatus = daemon.ask("POST", &format!("/v1/arrays/{name}/stop"), &Force { force: false })?;
            }
            let answer: Answer = daemon.ask("DELETE", &format!("/v1/arrays/{name}"), &())?;
            warn(answer.warnings());
            render::text(&format!("removed {name}\n"))
        }
    }
}

fn find(daemon: &Daemon, name: &str) -> Result<Option<ArrayStatus>, String> {
    let arrays: Arrays = daemon.ask("GET", "/v1/arrays", &())?;
    Ok(arrays.arrays.into_iter().find(|array| array.name == *name))
}

fn there(daemon: &Daemon, name: &str) -> Result<ArrayStatus, String> {
    find(daemon, name)?.ok_or_else(|| format!("there is no array '{name}': 'dst list' shows those there are"))
}

fn start(daemon: &Daemon, name: &str, frontend: Frontend) -> Result<(), String> {
    let start = Start { run: RunOptions { frontend, ..RunOptions::default() }, terms: Terms::default() };
    let started: ArrayStatus = daemon.ask("POST", &format!("/v1/arrays/{name}/start"), &start)?;
    render::text(&format!("{}\n", started.device.unwrap_or_default()))
}

/// The first call makes the array, the others go on with it.
fn add(daemon: &Daemon, call: &Call, array: Option<ArrayStatus>) -> Result<(), String> {
    let name = &call.array;
    let needed = || format!("-A says how '{name}' is laid out: alg_linear, or alg_mirror");
    let (algorithm, place) = (call.algorithm.ok_or_else(needed)?, call.place.as_ref().ok_or("no node is named")?);
    let end = array.as_ref().and_then(|array| array.spec.as_ref()).map_or(0, |spec| spec.size / SECTOR_BYTES);
    let begin = if algorithm == Algorithm::Mirror { 0 } else { end };
    if let Some(start) = call.start.filter(|start| *start != begin) {
        return Err(format!("-s {start}: this node begins at sector {begin}"));
    }
    let target = target(place)?.to_string();
    let size = call.size.map(|sectors| sectors.saturating_mul(SECTOR_BYTES));
    let (path, changed): (_, ArrayStatus) = match (&array, algorithm) {
        (None, _) => {
            let (alg, targets) = (Alg::Linear, vec![target.clone()]);
            let create =
                Create { name: name.clone(), alg, chunk: None, block: block_default(), replicas: 1, targets, size };
            (NodeId(Lba(0)), daemon.ask("POST", "/v1/arrays", &create)?)
        }
        (Some(_), Algorithm::Linear) => {
            let new = NewNode { target: target.clone(), size };
            (NodeId(Lba(end)), daemon.ask("POST", &format!("/v1/arrays/{name}/nodes"), &new)?)
        }
        (Some(array), Algorithm::Mirror) => {
            let [node] = array.nodes.as_slice() else {
                return Err(format!("'{name}' has {} nodes, so it is no alg_mirror", array.nodes.len()));
            };
            if size.is_some_and(|size| size != node.size) {
                return Err(format!("-S: every copy of '{name}' has {} sectors", node.size / SECTOR_BYTES));
            }
            let path = format!("/v1/arrays/{name}/nodes/{}/replicas", node.name);
            (node.start, daemon.ask("POST", &path, &NewReplica { target: target.clone() })?)
        }
    };
    warn(&changed.warnings);
    render::text(&format!("{name}: {path} on {target}\n"))
}

/// The place with a volume.
fn target(place: &Place) -> Result<Target, String> {
    let server = match place {
        Place::Disk(target) => return Ok(target.clone()),
        Place::Server(server, Some(volume)) => {
            return Ok(Target::Remote { server: server.clone(), volume: volume.clone() });
        }
        Place::Server(server, None) => server,
    };
    let volume = only_free(server, &list(server)?)?;
    Ok(Target::Remote { server: server.clone(), volume })
}

fn only_free(server: &ServerAddress, volumes: &[Volume]) -> Result<String, String> {
    let free = volumes.iter().filter(|volume| volume.array.is_none() && volume.problem.is_none());
    let names: Vec<&str> = free.map(|volume| volume.name.as_str()).collect();
    match names.as_slice() {
        [name] => Ok((*name).to_owned()),
        [] => Err(format!("{server} has no free volume: make one with 'dst volume create {server}/NAME --size SIZE'")),
        names => Err(format!(
            "{server} has {} free volumes: say which with -a {}/NAME: {}",
            names.len(),
            server.host,
            names.join(", ")
        )),
    }
}

fn remove(daemon: &Daemon, call: &Call, array: &ArrayStatus) -> Result<(), String> {
    let name = &array.name;
    let is_meant = |node: &NodeStatus, target: &Target| {
        let here = match (&call.place, target) {
            (None, _) => true,
            (Some(Place::Disk(disk)), target) => disk == target,
            (Some(Place::Server(asked, volume)), Target::Remote { server, volume: own }) => {
                asked == server && volume.as_ref().is_none_or(|volume| volume == own)
            }
            (Some(Place::Server(..)), Target::Local(_)) => false,
        };
        here && call.start.is_none_or(|start| start == node.start.0.0)
    };
    let all = array
        .nodes
        .iter()
        .flat_map(|node| node.replicas.iter().enumerate().map(move |(at, replica)| (node, at, replica)));
    let meant: Vec<_> = all.filter(|(node, _, replica)| is_meant(node, &replica.target)).collect();
    let (node, at, replica) = match meant.as_slice() {
        [one] => *one,
        [] => return Err(format!("'{name}' has no such node: 'dst status {name}' shows those it has")),
        [(node, ..), rest @ ..] if rest.iter().all(|(other, ..)| other.name == node.name) && call.place.is_none() => {
            return Err(format!("node {} has {} copies: name one with -a and -p, or -d", node.name, rest.len() + 1));
        }
        _ => return Err(format!("'{name}' has {} such nodes: name one with -s", meant.len())),
    };
    let mut path = format!("/v1/arrays/{name}/nodes/{}", node.name);
    if node.replicas.len() > 1 {
        path = format!("{path}/replicas/{at}");
    }
    let changed: ArrayStatus = daemon.ask("DELETE", &path, &())?;
    warn(&changed.warnings);
    render::text(&format!("{name}: {} on {} is removed\n", node.name, replica.target))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').filter(|word| !word.is_empty()).map(OsString::from).collect()
    }

    fn server(text: &str, volume: Option<&str>) -> Option<Place> {
        Some(Place::Server(text.parse().unwrap(), volume.map(str::to_owned)))
    }

    #[test]
    fn it_is_told_from_the_command_line_of_today() {
        for first in ["-n", "-A", "-b", "-f", "-s", "-S", "-d", "-a", "-p", "-r", "-R", "-D", "-nstorage"] {
            assert!(is_meant(Some(&first.into())), "{first}");
        }
        for first in ["-h", "-V", "--json", "--name", "-", "--", "-x", "status", ""] {
            assert!(!is_meant(Some(&first.into())), "{first}");
        }
        assert!(!is_meant(None));
    }

    #[test]
    fn what_is_typed_is_understood() {
        let storage = Call {
            deed: Deed::Add { run: false },
            array: "storage".to_owned(),
            algorithm: Some(Algorithm::Linear),
            control: Some("/dev/dst".into()),
            place: server("kano:1025", None),
            start: None,
            size: None,
        };
        let bare = Call { algorithm: None, control: None, place: None, ..storage.clone() };
        for (line, call) in [
            ("-n storage -A alg_linear -f /dev/dst -a kano -p 1025", storage.clone()),
            (
                "-n storage -A alg_linear -f /dev/dst -a via -p 1025 -R",
                Call { deed: Deed::Add { run: true }, place: server("via:1025", None), ..storage.clone() },
            ),
            ("-nstorage -Aalg_linear -f/dev/dst -akano -p1025", storage.clone()),
            ("-n storage -A alg_linear -f /dev/dst -D", Call { deed: Deed::Delete, place: None, ..storage.clone() }),
            ("-D -n storage", Call { deed: Deed::Delete, ..bare.clone() }),
            ("-R -n storage", Call { deed: Deed::Start, ..bare.clone() }),
            ("-Rnstorage", Call { deed: Deed::Start, ..bare.clone() }),
            (
                "-n storage -A alg_mirror -a kano/data -s 0 -S 800 -b 16",
                Call {
                    algorithm: Some(Algorithm::Mirror),
                    place: server("kano", Some("data")),
                    start: Some(0),
                    size: Some(800),
                    ..bare.clone()
                },
            ),
            (
                "-n storage -A alg_linear -d /dev/sdb",
                Call {
                    algorithm: Some(Algorithm::Linear),
                    place: Some(Place::Disk(Target::Local("/dev/sdb".to_owned()))),
                    ..bare.clone()
                },
            ),
            (
                "-n storage -r -a via -p 1025",
                Call { deed: Deed::Remove, place: server("via:1025", None), ..bare.clone() },
            ),
            ("-n storage -r -s 800", Call { deed: Deed::Remove, start: Some(800), ..bare.clone() }),
            ("-n storage -a [::1] -p 9", Call { place: server("[::1]:9", None), ..bare.clone() }),
            (
                "-f /dev/dst -h",
                Call { deed: Deed::Help, array: String::new(), control: storage.control.clone(), ..bare.clone() },
            ),
        ] {
            assert_eq!(parse(&words(line)).unwrap_or_else(|why| panic!("{line}: {why}")), call, "{line}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_said() {
        for (line, why) in [
            ("-n", "-n needs a value"),
            ("-n storage", "nothing is to be done"),
            ("-n storage more -R", "stands alone"),
            ("-n storage -x", "-x is not known"),
            ("-n storage --json", "-- is not known"),
            ("-n storage -: 1", "-: is not known"),
            ("-n a -n b -R", "-n is given twice"),
            ("-R", "-n names the array"),
            ("-n a/b -R", "'a/b' is not a name"),
            ("-n a -A alg_raid5 -a h", "alg_linear or alg_mirror"),
            ("-n a -A alg_striped -a h", "dst create --alg striped"),
            ("-n a -p 1025 -R", "-p is the port of -a"),
            ("-n a -a h -d /dev/sdb", "different places"),
            ("-n a -d sdb", "not a target"),
            ("-n a -d h/v", "an absolute path"),
            ("-n a -a h -p 70000", "1 to 65535"),
            ("-n a -a h/a/b", "not a name"),
            ("-n a -a h -s x", "-s x: this is not a number"),
            ("-n a -a h -S -1", "-S -1: this is not a number"),
            ("-n a -a h -b many", "-b many: this is not a number"),
            ("-n a -r", "-r removes what"),
            ("-n a -R -D", "exclude each other"),
            ("-n a -r -R -a h", "exclude each other"),
            ("-n a -D -a h", "removes the whole array"),
        ] {
            let error = parse(&words(line)).expect_err(line);
            assert!(error.contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn the_only_free_volume_is_taken() {
        let volume = |name: &str, problem: Option<&str>| -> Volume {
            let mut json = serde_json::json!({"name": name, "id": "07070707070707070707070707070707", "size": 4096,
                "sparse": false, "allocated": 0, "array": null, "connections": 0});
            if let Some(problem) = problem {
                json["problem"] = problem.into();
            }
            serde_json::from_value(json).unwrap()
        };
        let mut used = volume("used", None);
        used.array = serde_json::from_value(serde_json::json!(
            {"id": "07070707070707070707070707070707", "name": "a", "node": "n-0"}
        ))
        .unwrap();
        let server: ServerAddress = "kano:1025".parse().unwrap();
        let bad = volume("bad", Some("its file is gone"));
        assert_eq!(only_free(&server, &[used.clone(), volume("free", None), bad.clone()]), Ok("free".to_owned()));
        let none = only_free(&server, &[used, bad]).unwrap_err();
        assert!(
            none.contains("kano:1025 has no free volume") && none.contains("dst volume create kano:1025/NAME"),
            "{none}"
        );
        let two = only_free(&server, &[volume("x", None), volume("y", None)]).unwrap_err();
        assert!(two.contains("-a kano/NAME: x, y"), "{two}");
    }
}
