//! The command line as it is typed. Every word that a person can type is here, with its help.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use dst::control::spec::{Alg, DataDigest, Frontend};
use dst::control::target::{ServerAddress, Target};
use dst::limits;
use dst::units::{NodeId, check_name, parse_duration, parse_size};

use crate::nodes::NodeVerb;
use crate::pages::GenerateArguments;
use crate::scrub::ScrubArguments;

/// Where dstd listens unless said otherwise.
pub(crate) const SOCKET: &str = "/run/dst/dstd.sock";

/// Builds block devices out of disks of several machines.
#[derive(Parser)]
#[command(
    name = "dst",
    version,
    max_term_width = 100,
    after_help = "Start here:\n  \
        dst volume create kano:20070/data0 --size 100G      space on a server (dstd server)\n  \
        dst create storage --alg striped kano/data0 via/data0\n  \
        dst start storage                                   prints /dev/ublkbN\n  \
        dst status storage\n\n\
        Sizes take K, M, G, T (powers of 1024). Exit codes: 0 done, 1 failed, 2 usage.\n\n\
        The command line of 2007 is understood, too, when it begins with one of its letters; 'dst -n x -h' explains it:\n  \
        dst -n storage_name -A algorithm -b backlog -f device_path\n      \
        -s start -S size -d local_disk -a addr -p port -r <remove>\n      \
        -R <start array> -D <del array> -h <help>"
)]
pub(crate) struct Arguments {
    /// The control socket of dstd
    #[arg(long, global = true, value_name = "PATH", env = "DST_SOCKET", default_value = SOCKET)]
    pub(crate) socket: PathBuf,
    /// Print JSON with the same data as the tables
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What is to be done.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Makes, shows and removes volumes on servers
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Makes an array out of volumes, files or block devices
    #[command(after_help = "Examples:\n  \
        dst create storage --alg striped --chunk 64K kano/data0 via/data0 tor/data0\n  \
        dst create big --alg linear kano:20070/a /dev/sdb\n  \
        dst create safe --alg striped --replicas 2 kano/a,via/a tor/a,kano/b\n\n\
        What the targets hold is neither read nor erased.")]
    Create(CreateArguments),
    /// Makes an array usable and prints its device
    #[command(after_help = "Examples:\n  \
        dst start storage                                   prints /dev/ublkbN; also /dev/dst/storage\n  \
        dst start storage --frontend nbd:/run/storage.sock  prints an NBD URI\n\n\
        A started array comes back when dstd starts again, until 'dst stop'.")]
    Start(StartArguments),
    /// Takes an array out of use
    #[command(
        after_help = "Refused while the device is mounted or open; --force takes it away, and what uses it gets I/O errors."
    )]
    Stop {
        /// The array
        #[arg(value_parser = name)]
        array: String,
        /// Even while the device is in use
        #[arg(long)]
        force: bool,
    },
    /// Frees the volumes of an array and forgets it; erases nothing
    #[command(
        after_help = "Refused while the array is started, and while a server does not answer. With --force the array is \
        forgotten all the same; a volume that could not be freed stays assigned until 'dst volume free'."
    )]
    Remove {
        /// The array
        #[arg(value_parser = name)]
        array: String,
        /// Even when a server does not answer
        #[arg(long)]
        force: bool,
    },
    /// Lets an array take up what its volumes have come to have, or gives a linear one a further node
    #[command(
        after_help = "First make the volumes larger: 'dst volume resize', truncate, or a larger disk. A linear array grows at its last node, or by a further one \
        (while it is stopped); a striped one when the volumes of all of its nodes have grown. A started block device grows at once where the kernel can do that (6.16 \
        and later) and the nodes that grow have one replica each; else it is said why, and it grows at its next 'dst start'. The filesystem is yours to \
        grow afterwards, as with resize2fs or xfs_growfs.\n\n\
        Examples:\n  dst volume resize kano:20070/data0 --size 200G && dst grow big\n  dst grow big tor:20070/data1 --size 100G"
    )]
    Grow {
        /// The array
        #[arg(value_parser = name)]
        array: String,
        /// A further node at the end of a linear array: HOST:PORT/VOLUME (port 20070 if left out), or an absolute path
        target: Option<Target>,
        /// How much of the target the further node uses [default: all of it]
        #[arg(long, value_parser = parse_size, requires = "target")]
        size: Option<u64>,
    },
    /// Brings an array to this machine out of what its volumes know of it
    #[command(
        after_help = "For an array whose machine is lost, or that shall be used here from now on. One of its volumes is enough: its label names \
        the others, each is checked. Nothing but the record on this machine is written; then 'dst start ARRAY --take-over' takes the array from \
        the other machine. The labels have the servers' addresses as that machine knew them: they must be the same seen from here.\n\n\
        Example:\n  dst import kano:20070/data0"
    )]
    Import {
        /// HOST:PORT/VOLUME, or the absolute path of a local target
        #[arg(value_name = "TARGET")]
        target: Target,
        /// Its name here [default: the one it has]
        #[arg(long, value_parser = name)]
        name: Option<String>,
        /// Even when a replica that the others call in sync is not there: it may know of more than they do
        #[arg(long)]
        force: bool,
    },
    /// Shows and changes the copies of a node's data
    #[command(subcommand)]
    Replica(ReplicaVerb),
    #[command(flatten)]
    Node(NodeVerb),
    /// Shows the block devices of arrays on this machine, and what to do with one that a dead daemon has left
    #[command(subcommand)]
    Device(DeviceVerb),
    /// Compares the replicas of nodes while the array is in use, and puts right what differs
    #[command(
        after_help = "Each region is compared by digests that are made where the data is, while no write of it is under way. Only --repair writes         anything. A scrub waits for a resync, a migration or a suspend of its node, and goes on afterwards. Its result is kept until the next         one. Ctrl-C detaches: the scrub goes on. Exit code 1: something differs, or not everything was compared.\n\n\
        Examples:\n  dst scrub storage\n  dst scrub storage n-800 --repair --from 1 --rate 50M\n  dst scrub storage --show"
    )]
    Scrub(ScrubArguments),
    /// Shows the control tree: every path with its value
    #[command(
        after_help = "The same strings as the files of 'dstd array --tree DIR'. Example:\n  dst tree devices/storage/n-800"
    )]
    Tree {
        /// Where to begin [default: all of it]
        #[arg(value_name = "PATH", value_parser = tree_path, default_value = "", hide_default_value = true)]
        path: String,
    },
    /// Prints the value at a path of the control tree
    Get {
        /// Such as devices/storage/n-800/type
        #[arg(value_name = "PATH", value_parser = tree_path)]
        path: String,
    },
    /// Writes a value to a path of the control tree, and waits until what it asks for is done
    Set {
        /// Such as devices/storage/remove_all_nodes
        #[arg(value_name = "PATH", value_parser = tree_path)]
        path: String,
        /// The value
        value: String,
    },
    /// Says what each request waits for that is older than a second, and what happens at its deadline
    #[command(after_help = "Example:\n  dst why storage")]
    Why {
        /// The array
        #[arg(value_parser = name)]
        array: String,
    },
    /// Lists arrays
    List,
    /// Shows arrays, their nodes and what they have done
    Status {
        /// The array; all of them if left out
        #[arg(value_parser = name)]
        array: Option<String>,
        /// Show it again every second
        #[arg(long)]
        watch: bool,
    },
    /// Has dstd go on as the program that is installed now, while block devices are in use
    #[command(
        after_help = "The process stays the same. Block devices wait for the new program, as after a crash: no request fails; how long they waited at most is printed. \
        Connections of NBD clients are cut. 'dst upgrade' without a new program is a restart.\n\n\
        Example:\n  dpkg -i dst_*.deb && dst upgrade"
    )]
    Upgrade {
        /// Even while NBD clients are connected: they lose their connections
        #[arg(long)]
        force: bool,
    },
    /// Writes the manual pages and the shell completions of dst
    #[command(hide = true)]
    Generate(GenerateArguments),
}

/// What is to be done with volumes. These speak to the server itself, not to dstd's socket.
#[derive(Subcommand)]
pub(crate) enum VolumeVerb {
    /// Makes a volume; its space is taken at once
    #[command(after_help = "Example:\n  dst volume create kano:20070/data0 --size 100G")]
    Create {
        /// HOST:PORT/VOLUME (port 20070 if left out)
        #[arg(value_name = "HOST:PORT/VOLUME", value_parser = volume)]
        volume: VolumeTarget,
        /// Size, such as 10G; a multiple of 4K
        #[arg(long, value_parser = parse_size)]
        size: u64,
        /// Take space as it is written
        #[arg(long)]
        sparse: bool,
        /// Make every write durable before it is answered: slower, but nothing is lost with the machine's memory
        #[arg(long)]
        write_through: bool,
    },
    /// Lists the volumes of a server
    List {
        /// HOST:PORT (port 20070 if left out)
        #[arg(value_name = "HOST:PORT")]
        server: ServerAddress,
    },
    /// Shows a volume
    Stat {
        /// HOST:PORT/VOLUME
        #[arg(value_name = "HOST:PORT/VOLUME", value_parser = volume)]
        volume: VolumeTarget,
    },
    /// Changes the size of a volume
    Resize {
        /// HOST:PORT/VOLUME
        #[arg(value_name = "HOST:PORT/VOLUME", value_parser = volume)]
        volume: VolumeTarget,
        /// New size, such as 20G; a multiple of 4K
        #[arg(long, value_parser = parse_size)]
        size: u64,
        /// Even when it becomes smaller and loses what is beyond
        #[arg(long)]
        force: bool,
    },
    /// Removes a volume and its data
    Remove {
        /// HOST:PORT/VOLUME
        #[arg(value_name = "HOST:PORT/VOLUME", value_parser = volume)]
        volume: VolumeTarget,
        /// Even when it belongs to an array
        #[arg(long)]
        force: bool,
    },
    /// Takes an array's name out of a volume whose array is gone; the data stays
    #[command(
        after_help = "For volumes that 'dst remove --force' could not reach, or whose machine is lost. A path takes the \
        label off a local file or block device."
    )]
    Free {
        /// HOST:PORT/VOLUME, or the path of a local target
        #[arg(value_name = "TARGET")]
        target: Target,
        /// Even when it belongs to an array
        #[arg(long)]
        force: bool,
    },
}

/// What is to be done with replicas.
#[derive(Subcommand)]
pub(crate) enum ReplicaVerb {
    /// Lists the replicas of an array, node by node
    List {
        /// The array
        #[arg(value_parser = name)]
        array: String,
    },
    /// Gives a node a further replica; it is never read before it has been filled
    Add {
        /// The array
        #[arg(value_parser = name)]
        array: String,
        /// The node, such as n-0
        node: NodeId,
        /// HOST:PORT/VOLUME (port 20070 if left out), or the absolute path of a file or block device
        target: Target,
    },
    /// Takes a replica from a node and frees its volume; erases nothing
    Remove {
        /// The array
        #[arg(value_parser = name)]
        array: String,
        /// The node, such as n-0
        node: NodeId,
        /// Which of its replicas: K of 'dst replica list'
        #[arg(value_name = "K")]
        replica: usize,
    },
}

/// What is to be done with block devices. A device whose daemon has died waits, with whatever uses it, until it is served on.
#[derive(Subcommand)]
pub(crate) enum DeviceVerb {
    /// Lists the block devices of arrays, and who serves them
    List,
    /// Starts the array of a device that a dead daemon has left: who uses it goes on
    Recover {
        /// N of /dev/ublkbN
        #[arg(value_name = "N", value_parser = device)]
        id: u32,
    },
    /// Removes a device that a dead daemon has left
    Delete {
        /// N of /dev/ublkbN
        #[arg(value_name = "N", value_parser = device)]
        id: u32,
        /// Even while it is in use: what uses it gets I/O errors
        #[arg(long)]
        force: bool,
    },
}

/// `3`, `ublkb3` or `/dev/ublkb3`.
fn device(text: &str) -> Result<u32, String> {
    let number = text.trim_start_matches("/dev/").trim_start_matches("ublkb");
    number.parse().map_err(|_| format!("'{text}' is no device: give its number, or /dev/ublkbN"))
}

/// A volume on a server.
#[derive(Clone, Debug)]
pub(crate) struct VolumeTarget {
    pub(crate) server: ServerAddress,
    pub(crate) volume: String,
}

/// Arguments of `create`.
#[derive(Args)]
pub(crate) struct CreateArguments {
    /// Name of the new array
    #[arg(value_parser = name)]
    pub(crate) array: String,
    /// linear: end to end; striped: chunks dealt out in turn
    #[arg(long)]
    pub(crate) alg: Alg,
    /// Chunk of a striped array, 4K to 1M [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) chunk: Option<u64>,
    /// Logical block in bytes: 512 or 4096
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    pub(crate) block: u32,
    /// Copies of each node's data, 1 to 3; the targets of a node are joined by commas
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) replicas: usize,
    /// HOST:PORT/VOLUME (port 20070 if left out), or the absolute path of a file or block device; in order
    #[arg(value_name = "TARGET", required = true)]
    pub(crate) targets: Vec<String>,
}

/// Arguments of `start`.
#[derive(Args)]
pub(crate) struct StartArguments {
    /// The array
    #[arg(value_parser = name)]
    pub(crate) array: String,
    /// How the array is shown: ublk, nbd:ADDRESS:PORT or nbd:/path.sock
    #[arg(long, default_value = "ublk", env = "DST_FRONTEND")]
    pub(crate) frontend: Frontend,
    /// I/O threads [default: one per CPU, at most 4]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) queues: usize,
    /// Requests in flight in each of them
    #[arg(long, value_name = "N", default_value_t = limits::DEPTH_DEFAULT)]
    pub(crate) depth: usize,
    /// A request that cannot be answered fails after this
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "60s")]
    pub(crate) io_timeout: Duration,
    /// What protects data between array and servers: crc32c, or none, which is faster and notices no damage on the way
    #[arg(long, value_name = "DIGEST", default_value = "crc32c")]
    pub(crate) data_digest: DataDigest,
    /// Let NBD listen beyond loopback although nothing is encrypted or authenticated: on a network that you trust
    #[arg(long)]
    pub(crate) danger_cleartext: bool,
    /// Take the array from another host that has claimed its volumes; what that host still sends is refused from then on
    #[arg(long)]
    pub(crate) take_over: bool,
    /// With --take-over, when that host is dead for good: replicas that cannot be reached need not accept
    #[arg(long, requires = "take_over")]
    pub(crate) force: bool,
}

/// The name of an array.
pub(crate) fn name(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned())
}

/// Paths are sent as they are: nothing in them needs to be escaped.
fn tree_path(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'/');
    match text.bytes().all(plain) {
        true => Ok(text.trim_matches('/').to_owned()),
        false => Err("a path is such as devices/storage/alg: 'dst tree' shows them all".to_owned()),
    }
}

fn volume(text: &str) -> Result<VolumeTarget, String> {
    match text.parse()? {
        Target::Remote { server, volume } => Ok(VolumeTarget { server, volume }),
        Target::Local(path) => Err(format!("'{path}' is a local path: a volume is named HOST:PORT/VOLUME")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    /// Every command that the documents show, in lines of code that begin with it.
    #[test]
    fn what_the_documents_show_parses() {
        let mut seen = 0;
        for text in [include_str!("../../docs/OPERATING.md"), include_str!("../../README.md")] {
            let blocks = text.split("```").skip(1).step_by(2);
            for line in blocks.flat_map(str::lines).filter(|line| line.starts_with("dst ")) {
                let words = line.split(['#', '|', '&', ';']).next().unwrap_or_default().split_whitespace();
                if words.clone().any(|word| word.len() == 2 && word.starts_with('-')) {
                    continue;
                }
                Arguments::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
                seen += 1;
            }
        }
        assert!(seen > 20, "only {seen} commands");
    }

    #[test]
    fn what_is_documented_parses() {
        for line in [
            "dst volume create h:1/v --size 10G --sparse --write-through",
            "dst volume list h:1",
            "dst volume stat h/v",
            "dst volume resize h/v --size 20G --force",
            "dst volume remove h/v",
            "dst volume free /dev/sdb --force",
            "dst create a --alg striped --chunk 64K --block 4096 h:1/v /dev/sdb",
            "dst start a --frontend nbd:127.0.0.1:10809 --queues 2 --depth 64 --io-timeout 5s",
            "dst create a --alg linear --replicas 2 h:1/v,i:1/v /dev/sdb,h:1/w",
            "dst replica list a",
            "dst replica add a n-800 h:1/v",
            "dst replica remove a n-800 1",
            "dst import h:1/v --name b --force",
            "dst suspend a n-800 --ttl 60s --on-expire fail",
            "dst suspend a n-800 --ttl none",
            "dst accept-loss a n-800",
            "dst resume a n-800",
            "dst fail a n-800",
            "dst replace a n-800 --to h:1/w --replica 0 --force",
            "dst migrate a n-800 --to h/ --rate 200M --max-freeze 5ms --no-verify --keep-source --detach",
            "dst migrate a n-800 --to /dev/sdb --keep-source 2h",
            "dst scrub a",
            "dst scrub a n-800 --repair --from 1 --rate 50M --detach",
            "dst scrub a --repair",
            "dst scrub a --show --json",
            "dst scrub a n-800 --abort",
            "dst migration list a",
            "dst migration show a n-800 --id 3",
            "dst migration release a n-800",
            "dst start a --take-over --force",
            "dst stop a --force",
            "dst remove a --force --json",
            "dst list --socket /x.sock",
            "dst status a --watch",
            "dst why a --json",
            "dst upgrade --force",
            "dst tree",
            "dst tree devices/a --json",
            "dst get /devices/a/n-800/type",
            "dst set devices/a/remove_all_nodes 1",
        ] {
            Arguments::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
        for line in [
            "dst",
            "dst create a h/v",
            "dst create a --alg mirror h/v",
            "dst create a --alg linear",
            "dst volume stat /dev/sdb",
            "dst start a --frontend fuse",
            "dst start a/b",
            "dst start a --force",
            "dst replica add a 800 h:1/v",
            "dst replica remove a n-800",
            "dst import v",
            "dst suspend a",
            "dst suspend a n-0 --ttl never",
            "dst suspend a n-0 --on-expire explode",
            "dst migrate a n-0",
            "dst migrate a n-0 --to v",
            "dst migration explode a n-0",
            "dst scrub",
            "dst scrub a --from 1",
            "dst scrub a --show --repair",
            "dst scrub a --show --abort",
            "dst get",
            "dst get a?b",
            "dst set devices/a/remove_all_nodes",
            "dst volume create h/v --size ten",
        ] {
            assert_eq!(Arguments::try_parse_from(line.split(' ')).err().unwrap().exit_code(), 2, "{line}");
        }
    }
}
