//! What is persisted of an array: one record, enough to bring it back on this machine. Versioned, checksummed, pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::migration::MigrationStatus;
use crate::control::node::Suspended;
use crate::control::record;
use crate::control::record::BadRecord;
use crate::control::replica;
use crate::control::replica::{Generation, ReplicaSpec, ReplicaState};
use crate::control::scrub::ScrubStatus;
use crate::control::target::Target;
use crate::control::transfer::{Debt, Stage, Transfer};
use crate::engine::losses::Memory;
use crate::limits;
use crate::units::{Epoch, Id, NodeId, check_name, format_duration, parse_duration};
use crate::wire::nbd::address::NbdAddress;

/// The version of [`ArraySpec`] that is written. Version 1 had one target a node, version 2 neither suspends nor transfers, version 3
/// knew nothing of losses and scrubs, version 4 neither how far a transfer is nor of data without digests; all are still read.
pub const VERSION: u32 = 5;
/// The kind of an array's record.
const KIND: &str = "array";

/// How an array is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Alg {
    /// Nodes end to end.
    Linear,
    /// Chunks dealt out in turn.
    Striped,
}

impl fmt::Display for Alg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Alg::Linear => "linear",
            Alg::Striped => "striped",
        })
    }
}

impl FromStr for Alg {
    type Err = String;

    fn from_str(text: &str) -> Result<Alg, String> {
        match text {
            "linear" => Ok(Alg::Linear),
            "striped" => Ok(Alg::Striped),
            _ => Err(format!("'{}' is not an algorithm: use linear or striped", text.escape_default())),
        }
    }
}

/// How an array is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Frontend {
    /// A block device of this machine.
    #[default]
    Ublk,
    /// NBD, on a TCP address or a unix socket.
    Nbd(NbdAddress),
}

impl FromStr for Frontend {
    type Err = String;

    fn from_str(text: &str) -> Result<Frontend, String> {
        match text.split_once(':') {
            None if text == "ublk" => Ok(Frontend::Ublk),
            Some(("nbd", address)) => address.parse().map(Frontend::Nbd),
            _ => Err(format!(
                "'{}' is not a frontend: use ublk, nbd:ADDRESS:PORT or nbd:/path.sock",
                text.escape_default()
            )),
        }
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Frontend::Ublk => f.write_str("ublk"),
            Frontend::Nbd(address) => write!(f, "nbd:{address}"),
        }
    }
}

impl Serialize for Frontend {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Frontend {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Frontend, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What protects data on its way between array and server. Headers always have a checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataDigest {
    /// A CRC32C of each piece, bound to its place: damage is noticed, and the piece asked for or sent again.
    #[default]
    Crc32c,
    /// Nothing but TCP's own checksum.
    None,
}

impl DataDigest {
    fn is_default(&self) -> bool {
        *self == DataDigest::default()
    }
}

impl fmt::Display for DataDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DataDigest::Crc32c => "crc32c",
            DataDigest::None => "none",
        })
    }
}

impl FromStr for DataDigest {
    type Err = String;

    fn from_str(text: &str) -> Result<DataDigest, String> {
        match text {
            "crc32c" => Ok(DataDigest::Crc32c),
            "none" => Ok(DataDigest::None),
            _ => Err(format!("'{}' is not a digest: use crc32c or none", text.escape_default())),
        }
    }
}

/// A duration written as people write it: `"60s"`.
pub mod duration_text {
    use super::*;

    /// As `format_duration`.
    pub fn serialize<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_duration(*duration))
    }

    /// As `parse_duration`.
    pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_duration(&text).map_err(serde::de::Error::custom)
    }
}

/// How a started array runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunOptions {
    /// How the array is shown.
    pub frontend: Frontend,
    /// I/O threads; 0: one per CPU, at most `limits::QUEUES_DEFAULT_MAX`.
    pub queues: usize,
    /// Requests in flight in each.
    pub depth: usize,
    /// A request that cannot be answered fails with ETIMEDOUT after this.
    #[serde(with = "duration_text")]
    pub io_timeout: Duration,
    /// What protects data on its way.
    #[serde(skip_serializing_if = "DataDigest::is_default")]
    pub data_digest: DataDigest,
    /// Whether NBD may listen beyond loopback although nothing is encrypted or authenticated.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub danger_cleartext: bool,
}

impl Default for RunOptions {
    fn default() -> RunOptions {
        RunOptions {
            frontend: Frontend::Ublk,
            queues: 0,
            depth: limits::DEPTH_DEFAULT,
            io_timeout: limits::IO_TIMEOUT_DEFAULT,
            data_digest: DataDigest::Crc32c,
            danger_cleartext: false,
        }
    }
}

impl RunOptions {
    /// Says what is out of bounds.
    pub fn check(&self) -> Result<(), String> {
        if self.queues > limits::QUEUES_MAX {
            return Err(format!("{} queues: at most {} are possible", self.queues, limits::QUEUES_MAX));
        }
        if self.depth == 0 || self.depth > limits::DEPTH_MAX {
            return Err(format!("a depth of {}: it is a number from 1 to {}", self.depth, limits::DEPTH_MAX));
        }
        if !(limits::IO_TIMEOUT_MIN..=limits::IO_TIMEOUT_MAX).contains(&self.io_timeout) {
            return Err(format!(
                "an I/O timeout of {}: it is a time from {} to {}",
                format_duration(self.io_timeout),
                format_duration(limits::IO_TIMEOUT_MIN),
                format_duration(limits::IO_TIMEOUT_MAX)
            ));
        }
        Ok(())
    }
}

/// How far an array has come, durably. What a daemon finds in the record decides what it does at its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Volumes are being assigned: rolled back at the next start.
    Creating,
    /// Complete and not in use.
    Stopped,
    /// In use, or to be in use as soon as its volumes are there.
    Started,
    /// Volumes are being freed: rolled forward at the next start.
    Removing,
}

/// One node of an array.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSpec {
    /// Its lowest array sector when it was added, which names it.
    pub start: NodeId,
    /// Sectors of each of its volumes that the array uses.
    pub sectors: u64,
    /// The copies of its data, 1 to `limits::REPLICAS_MAX`; at least one is in sync.
    pub replicas: Vec<ReplicaSpec>,
    /// The name of its set of in-sync replicas.
    pub generation: Generation,
    /// Its requests are held, and restored so before the array is served again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<Suspended>,
    /// It moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// The scrub under way, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubStatus>,
}

/// A node of a record of version 1.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeSpec1 {
    start: NodeId,
    sectors: u64,
    target: Target,
    volume: Id,
}

/// The record of an array; `N` is what a version has for a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArraySpec<N = NodeSpec> {
    /// Its name.
    pub name: String,
    /// Its id, for ever.
    pub id: Id,
    /// How far it has come.
    pub phase: Phase,
    /// How it is laid out.
    pub alg: Alg,
    /// Chunk of a striped array, bytes; 0 for linear.
    pub chunk: u64,
    /// Logical block, bytes: 512 or 4096.
    pub block: u32,
    /// The greatest epoch that was ever used.
    pub epoch: Epoch,
    /// Its nodes, in order.
    pub nodes: Vec<N>,
    /// Replicas that are in sync are known to hold the same, durably: nothing was in flight when the array was last served, or it
    /// is new.
    #[serde(default)]
    pub clean: bool,
    /// What is known of machines that lose what they had acknowledged.
    #[serde(default)]
    pub memory: Memory,
    /// Volumes that are still to be let go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub debts: Vec<Debt>,
    /// Migrations that are over, the last `limits::MIGRATIONS_KEPT`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub migrations: Vec<MigrationStatus>,
    /// How many migrations there have been.
    #[serde(default)]
    pub migrated: u64,
    /// When it is started the next time its nodes take up what their volumes have then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub grow: bool,
    /// How it runs, or ran last.
    pub run: RunOptions,
}

impl NodeSpec {
    /// Whether a volume is to come, to which it moves, that lacks below a sector what the region logs have marked.
    pub fn awaits(&self) -> bool {
        self.transfer.as_ref().is_some_and(|transfer| transfer.goes_on_from().is_some())
    }
}

impl ArraySpec<NodeSpec1> {
    /// One target is one replica, and it is in sync: there was no other.
    fn upgrade(self) -> ArraySpec {
        let node = |node: NodeSpec1| NodeSpec {
            start: node.start,
            sectors: node.sectors,
            replicas: vec![ReplicaSpec { target: node.target, volume: node.volume, state: ReplicaState::InSync }],
            generation: Generation::first(self.id),
            suspend: None,
            transfer: None,
            scrub: None,
        };
        ArraySpec {
            nodes: self.nodes.into_iter().map(node).collect(),
            name: self.name,
            id: self.id,
            phase: self.phase,
            alg: self.alg,
            chunk: self.chunk,
            block: self.block,
            epoch: self.epoch,
            clean: false,
            memory: Memory::default(),
            debts: Vec::new(),
            migrations: Vec::new(),
            migrated: 0,
            grow: false,
            run: self.run,
        }
    }
}

impl ArraySpec {
    /// All replicas with their nodes, node by node: the order in which everything is asked and answered.
    pub fn replicas(&self) -> impl Iterator<Item = (&NodeSpec, &ReplicaSpec)> {
        self.nodes.iter().flat_map(|node| node.replicas.iter().map(move |replica| (node, replica)))
    }

    /// Every volume that is or may be assigned to the array, with the node that it is or was of: the replicas in their order, then
    /// targets of transfers, then what is still to be let go.
    pub fn held(&self) -> impl Iterator<Item = (String, &Target)> {
        let replicas = self.replicas().map(|(node, replica)| (format!("node {}", node.start), &replica.target));
        let moving = self.nodes.iter().filter_map(|node| Some((node, node.transfer.as_ref()?)));
        let moving = moving.map(|(node, transfer)| {
            let target = match transfer.stage {
                Stage::Open => &transfer.status.to,
                Stage::Committed => &transfer.status.from,
            };
            (format!("migration {} of node {}", transfer.status.number, node.start), target)
        });
        let debts = self.debts.iter().map(|debt| (format!("a former volume of node {}", debt.node), &debt.target));
        replicas.chain(moving).chain(debts)
    }

    /// The bytes to store.
    pub fn encode(&self) -> Result<Vec<u8>, BadRecord> {
        record::encode(KIND, VERSION, self)
    }

    /// Checks and decodes the record of the array called `name`.
    pub fn decode(name: &str, bytes: &[u8]) -> Result<ArraySpec, BadRecord> {
        let spec: ArraySpec = match record::version(KIND, bytes) {
            Some(1) => record::decode::<ArraySpec<NodeSpec1>>(KIND, 1, bytes)?.upgrade(),
            // What versions 2 to 4 did not have is not there.
            Some(older @ 2..VERSION) => record::decode(KIND, older, bytes)?,
            _ => record::decode(KIND, VERSION, bytes)?,
        };
        let wrong = |why: String| Err(BadRecord::Content(why));
        if spec.name != name {
            return wrong(format!("it is the record of array '{}'", spec.name.escape_default()));
        }
        if let Err(why) = check_name(&spec.name).and_then(|()| spec.run.check()) {
            return wrong(why);
        }
        if !matches!(spec.block, 512 | 4096) {
            return wrong(format!("a logical block of {} bytes", spec.block));
        }
        if spec.nodes.is_empty() || spec.nodes.len() > limits::NODES_MAX {
            return wrong(format!("{} nodes", spec.nodes.len()));
        }
        for node in &spec.nodes {
            if let Err(why) = replica::check(&node.replicas, &node.generation) {
                return wrong(format!("{}: {why}", node.start));
            }
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::migration::MigrationState;
    use crate::control::node::OnExpire;
    use crate::control::scrub::{Fault, Found, ScrubState};
    use crate::control::transfer::Kept;
    use crate::engine::losses::Losses;
    use crate::units::Lba;

    fn replica(target: &str, volume: u8, state: ReplicaState) -> ReplicaSpec {
        ReplicaSpec { target: target.parse().unwrap(), volume: Id([volume; 16]), state }
    }

    fn transfer() -> Transfer {
        let (from, to) = ("h:1/v".parse().unwrap(), "k:1/v".parse().unwrap());
        let status = MigrationStatus {
            state: MigrationState::Copying,
            paused: true,
            rate: 7,
            epoch: Epoch(3),
            begun: 6,
            size: 4096,
            ..MigrationStatus::new(3, Id([9; 16]), NodeId(Lba(0)), from, to)
        };
        let keep = Some(Duration::from_secs(60));
        let kept = Some(Kept { below: Lba(2), epoch: Epoch(2) });
        Transfer { status, from: Id([1; 16]), to: Id([3; 16]), made: true, keep, stage: Stage::Open, kept }
    }

    fn scrub() -> ScrubStatus {
        let at_fault = vec![Id([2; 16])];
        ScrubStatus {
            state: ScrubState::Aborted,
            repair: true,
            from: Some("h:1/v".parse().unwrap()),
            rate: 7,
            begun: 1,
            ended: Some(2),
            size: 4096,
            compared: 512,
            different: 1,
            unreadable: 0,
            repaired: 1,
            found: vec![Found { start: 0, sectors: 8, fault: Fault::Different, at_fault, repaired: true }],
            more: true,
            why: Some("it was".to_owned()),
        }
    }

    fn spec() -> ArraySpec {
        ArraySpec {
            name: "a".to_owned(),
            id: Id([7; 16]),
            phase: Phase::Started,
            alg: Alg::Striped,
            chunk: 65536,
            block: 4096,
            epoch: Epoch(3),
            nodes: vec![NodeSpec {
                start: NodeId(Lba(0)),
                sectors: 8,
                replicas: vec![
                    replica("h:1/v", 1, ReplicaState::InSync),
                    replica("i:1/v", 2, ReplicaState::Syncing { from: Lba(4) }),
                ],
                generation: Generation::first(Id([7; 16])).next(Id([8; 16])),
                suspend: Some(Suspended {
                    by: "me".to_owned(),
                    since: 7,
                    until: Some(8),
                    on_expire: OnExpire::Fail,
                    failing: false,
                }),
                transfer: Some(transfer()),
                scrub: Some(scrub()),
            }],
            debts: vec![Debt {
                node: NodeId(Lba(0)),
                target: "h:1/x".parse().unwrap(),
                volume: Id::NIL,
                remove: true,
                moved: None,
            }],
            migrations: vec![transfer().status],
            migrated: 3,
            grow: true,
            clean: true,
            memory: Memory {
                shown: Some(Id([6; 16])),
                volumes: [(Id([1; 16]), Losses { told: 2, lost: true })].into(),
            },
            run: RunOptions { frontend: "nbd:/run/a.sock".parse().unwrap(), queues: 2, ..RunOptions::default() },
        }
    }

    #[test]
    fn a_record_round_trips() {
        let bytes = spec().encode().unwrap();
        assert!(bytes.starts_with(b"dst array 5 "));
        assert_eq!(ArraySpec::decode("a", &bytes), Ok(spec()));
        let held: Vec<String> = spec().held().map(|(what, target)| format!("{what}: {target}")).collect();
        assert_eq!(
            held,
            [
                "node n-0: h:1/v",
                "node n-0: i:1/v",
                "migration 3 of node n-0: k:1/v",
                "a former volume of node n-0: h:1/x"
            ]
        );
    }

    #[test]
    fn a_record_of_version_2_holds_nothing_and_moves_nothing() {
        let mut old = serde_json::to_value(spec()).unwrap();
        for gone in ["debts", "migrations", "migrated", "memory"] {
            old.as_object_mut().unwrap().remove(gone);
        }
        for gone in ["suspend", "transfer", "scrub"] {
            old["nodes"][0].as_object_mut().unwrap().remove(gone);
        }
        let bytes = record::encode(KIND, 2, &old).unwrap();
        let mut expected = spec();
        (expected.debts, expected.migrations, expected.migrated) = (Vec::new(), Vec::new(), 0);
        expected.memory = Memory::default();
        (expected.nodes[0].suspend, expected.nodes[0].transfer, expected.nodes[0].scrub) = (None, None, None);
        assert_eq!(ArraySpec::decode("a", &bytes), Ok(expected.clone()));
        let bytes = record::encode(KIND, 3, &expected).unwrap();
        assert_eq!(ArraySpec::decode("a", &bytes), Ok(expected));
    }

    #[test]
    fn a_record_of_version_3_knows_of_no_losses() {
        let mut old = serde_json::to_value(spec()).unwrap();
        old.as_object_mut().unwrap().remove("memory");
        let bytes = record::encode(KIND, 3, &old).unwrap();
        assert_eq!(ArraySpec::decode("a", &bytes), Ok(ArraySpec { memory: Memory::default(), ..spec() }));
    }

    #[test]
    fn a_transfer_of_a_record_of_version_4_has_copied_nothing() {
        let mut old = serde_json::to_value(spec()).unwrap();
        old["nodes"][0]["transfer"].as_object_mut().unwrap().remove("kept");
        let mut expected = spec();
        expected.nodes[0].transfer.as_mut().unwrap().kept = None;
        let bytes = record::encode(KIND, 4, &old).unwrap();
        assert_eq!(ArraySpec::decode("a", &bytes), Ok(expected));
    }

    #[test]
    fn a_record_of_version_1_has_one_replica_a_node() {
        let old = r#"{
            "name": "a", "id": "07070707070707070707070707070707", "phase": "started", "alg": "striped", "chunk": 65536,
            "block": 4096, "epoch": 3,
            "nodes": [{"start": 0, "sectors": 8, "target": "h:1/v", "volume": "01010101010101010101010101010101"}],
            "run": {"frontend": "nbd:/run/a.sock", "queues": 2, "depth": 128, "io_timeout": "1m"}
        }"#;
        let old: serde_json::Value = serde_json::from_str(old).unwrap();
        let bytes = record::encode(KIND, 1, &old).unwrap();
        let mut expected = spec();
        expected.nodes[0].replicas.truncate(1);
        (expected.debts, expected.migrations, expected.migrated) = (Vec::new(), Vec::new(), 0);
        (expected.memory, expected.grow) = (Memory::default(), false);
        (expected.nodes[0].suspend, expected.nodes[0].transfer, expected.nodes[0].scrub) = (None, None, None);
        expected.clean = false;
        expected.nodes[0].generation = Generation::first(Id([7; 16]));
        assert_eq!(ArraySpec::decode("a", &bytes), Ok(expected));
        let mixed = record::encode(KIND, 1, &spec()).unwrap();
        assert!(ArraySpec::decode("a", &mixed).is_err(), "a version is what it says");
    }

    #[test]
    fn a_record_that_makes_no_sense_is_refused() {
        let refused = |change: &dyn Fn(&mut ArraySpec), why: &str| {
            let mut bad = spec();
            change(&mut bad);
            let error = ArraySpec::decode("a", &bad.encode().unwrap()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(&|spec| spec.name = "b".to_owned(), "record of array 'b'");
        refused(&|spec| spec.block = 1024, "block of 1024");
        refused(&|spec| spec.nodes.clear(), "0 nodes");
        refused(&|spec| spec.nodes[0].replicas.remove(0).volume = Id::NIL, "n-0: a node without a replica");
        refused(&|spec| spec.run.depth = 0, "depth of 0");
        let mut value = serde_json::to_value(spec()).unwrap();
        value["colour"] = "red".into();
        let bytes = record::encode(KIND, VERSION, &value).unwrap();
        assert!(ArraySpec::decode("a", &bytes).unwrap_err().to_string().contains("colour"));
    }

    #[test]
    fn frontends_parse() {
        for text in ["ublk", "nbd:127.0.0.1:10809", "nbd:[::1]:10809", "nbd:/run/a.sock"] {
            assert_eq!(text.parse::<Frontend>().unwrap().to_string(), text);
        }
        for bad in ["", "nbd", "nbd:", "nbd:host", "nbd:[::1]", "fuse", "ublk:1", "nbd:h:99999"] {
            assert!(bad.parse::<Frontend>().is_err(), "{bad}");
        }
    }

    #[test]
    fn options_are_bounded() {
        assert!(RunOptions::default().check().is_ok());
        assert!(RunOptions { queues: 17, ..RunOptions::default() }.check().is_err());
        assert!(RunOptions { depth: 1025, ..RunOptions::default() }.check().is_err());
        assert!(RunOptions { io_timeout: Duration::from_millis(99), ..RunOptions::default() }.check().is_err());
    }
}
