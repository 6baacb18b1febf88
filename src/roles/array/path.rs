//! The data path of one started array: opens its targets, greets its servers, runs its I/O threads under a frontend.
//!
//! Starting and stopping block; the owner calls them from threads that may wait. Reading figures never does.

use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::control::spec::DataDigest;
use crate::engine::losses::Losses;
use crate::engine::replicas::{Replicas, Standing};
use crate::engine::request::ShardConfig;
use crate::engine::shard::Shard;
use crate::engine::shared::Shared;
use crate::engine::view::{View, is_logged};
use crate::errno::Errno;
use crate::geometry::map::Geometry;
use crate::io::greet::{self, Refusal};
use crate::io::link::{Link, LinkConfig};
use crate::io::local::{Local, LocalFile};
use crate::io::wakeup::{Postbox, mailbox};
use crate::limits;
use crate::roles::array::keeper::Note;
use crate::roles::array::survey::LogAt;
use crate::roles::array::worker::{Connection, Neighbours, Order, Seat};
use crate::units::{Epoch, Id};
use crate::wire::session::{Hello, VERSIONS, features};

/// Where a node's data is.
#[derive(Clone, Debug)]
pub enum Place {
    /// A volume on a server.
    Remote {
        /// The server.
        address: SocketAddr,
        /// The volume's name there.
        volume: String,
    },
    /// A file or block device of this machine.
    Local(PathBuf),
}

/// One replica of a node.
#[derive(Clone, Debug)]
pub struct NodeTarget {
    /// Where it is.
    pub place: Place,
    /// The volume's own id, as the record knows it.
    pub volume: Id,
    /// What the record says of it.
    pub standing: Standing,
    /// And of its machine.
    pub losses: Option<Losses>,
}

/// What is started.
#[derive(Clone, Debug)]
pub struct PathConfig {
    /// The array's name.
    pub name: String,
    /// The array's id.
    pub array: Id,
    /// A fresh random id.
    pub session: Id,
    /// The id of this machine's state directory.
    pub host: Id,
    /// The epoch, durable before this.
    pub epoch: Epoch,
    /// The layout.
    pub geometry: Geometry,
    /// The replicas of each node, in order; none of one that is late.
    pub nodes: Vec<Vec<NodeTarget>>,
    /// Nothing was in flight when the array was last served.
    pub clean: bool,
    /// Nodes that are suspended.
    pub frozen: Vec<bool>,
    /// Nodes whose move goes on where it was, when the volume comes that they go to.
    pub awaits: Vec<bool>,
    /// I/O threads.
    pub queues: usize,
    /// Requests in flight in each.
    pub depth: usize,
    /// After this a request fails.
    pub io_timeout: Duration,
    /// What data carries on its way.
    pub data_digest: DataDigest,
}

/// A node that cannot be attached.
#[derive(Clone, Debug)]
pub struct StartError {
    /// Index of the node.
    pub node: usize,
    /// Why.
    pub refusal: Refusal,
}

/// The targets of an array, attached: what its I/O threads are made of.
pub struct Path {
    /// Figures and verdicts, readable at any time.
    pub shared: Arc<Shared>,
    /// One for each I/O thread.
    pub orders: Vec<Postbox<Order>>,
    /// What the keeper of the replicas is made of.
    pub replicas: ReplicaParts,
}

/// What the keeper of replicas is made of.
pub struct ReplicaParts {
    /// The rules, with the view that the threads begin with.
    pub rules: Replicas,
    /// Where notes to the keeper go, and where they come from.
    pub sender: Sender<Note>,
    /// See there.
    pub notes: Receiver<Note>,
    /// Makes seats for sync engines.
    pub seats: SyncSeats,
}

impl PathConfig {
    /// All targets, in order, each with its node.
    fn targets(&self) -> impl Iterator<Item = (usize, &NodeTarget)> {
        self.nodes.iter().enumerate().flat_map(|(node, replicas)| replicas.iter().map(move |replica| (node, replica)))
    }
}

/// One target, ready to be connected to.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Where it is.
    pub place: Place,
    /// The volume's own id.
    pub volume: Id,
    /// The node whose data it has.
    pub node: usize,
    /// What is changed there is in its region log.
    pub logged: bool,
    /// Of a local one: the file.
    file: Option<LocalFile>,
}

impl Attachment {
    /// Where it is reached, for people: a server's address and port, or the numbers of a local device; of a file, those of the device
    /// that it lies on.
    pub fn address(&self) -> Option<String> {
        match &self.place {
            Place::Remote { address, .. } => Some(address.to_string()),
            Place::Local(path) => {
                let file = std::fs::metadata(path).ok()?;
                let device = if file.file_type().is_block_device() { file.rdev() } else { file.dev() };
                Some(format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device)))
            }
        }
    }

    /// Opens what is local; what is remote is connected to by each thread.
    pub fn open(place: Place, volume: Id, (node, sectors): (usize, u64), logged: bool) -> Result<Attachment, Refusal> {
        let file = match &place {
            Place::Local(path) => Some(open_local(path, sectors)?),
            Place::Remote { .. } => None,
        };
        Ok(Attachment { place, volume, node, logged, file })
    }
}

/// Makes the connections of an array's threads.
#[derive(Debug)]
pub struct Connector {
    config: PathConfig,
}

impl Connector {
    /// The connection of thread `index`, whose shard has so many parts, to one of its targets; `logged`: what it changes there is
    /// in the region log.
    pub fn connection(&self, index: usize, parts: usize, target: usize, at: &Attachment, logged: bool) -> Connection {
        let channel = u16::try_from(index).unwrap_or(u16::MAX);
        match (&at.place, &at.file) {
            (Place::Remote { address, volume }, _) => Connection::Remote(Box::new(Link::new(LinkConfig {
                target,
                address: *address,
                hello: hello(&self.config, channel, volume, logged),
                epoch: self.config.epoch,
            }))),
            (Place::Local(_), Some(file)) => {
                Connection::Local(Box::new(Local::new(target, file.clone(), at.volume, parts)))
            }
            (Place::Local(path), None) => unreachable!("{} was opened before", path.display()),
        }
    }
}

/// Attaches every target, and makes the seats of the I/O threads.
pub fn attach(config: &PathConfig) -> Result<(Path, Vec<Seat>), StartError> {
    let mut places = open_all(config)?;
    greet_remote(config)?;
    let ids = |replicas: &Vec<NodeTarget>| replicas.iter().map(|replica| replica.volume).collect();
    let volumes: Vec<Vec<Id>> = config.nodes.iter().map(ids).collect();
    let standings: Vec<Standing> = config.targets().map(|(_, target)| target.standing).collect();
    let first = View::new(config.geometry.clone(), &volumes, config.epoch).with_spares(limits::TARGETS_PER_NODE_MAX);
    places.resize(first.targets.len(), None);
    let shared = Arc::new(Shared::with_sync(first.targets.len(), config.queues, 1));
    let losses: Vec<Option<Losses>> = config.targets().map(|(_, target)| target.losses).collect();
    let mut rules = Replicas::new(first, &standings, config.clean).with_losses(&losses, &shared);
    for (node, _) in config.frozen.iter().enumerate().filter(|(_, frozen)| **frozen) {
        rules.begin_frozen(node);
    }
    for (node, _) in config.awaits.iter().enumerate().filter(|(_, awaits)| **awaits) {
        rules.await_move(node);
    }
    let view = Arc::clone(rules.view());
    let connector = Arc::new(Connector { config: config.clone() });
    let (keeper, notes) = channel();
    let mut orders = Vec::with_capacity(config.queues);
    let mut seats = Vec::with_capacity(config.queues);
    for index in 0..config.queues {
        let shard_config = ShardConfig { index, depth: config.depth, io_timeout: config.io_timeout };
        let shard = Shard::new(shard_config, Arc::clone(&view), Arc::clone(&shared));
        let (postbox, wakeup) = mailbox(limits::ORDERS_MAX).map_err(|error| StartError {
            node: 0,
            refusal: Refusal { errno: Errno::from(&error), text: format!("cannot make a mailbox: {error}") },
        })?;
        let connections = connections(&connector, index, &shard, &places, |at| at.logged);
        orders.push(postbox);
        let (connector, shared) = (Arc::clone(&connector), Arc::clone(&shared));
        seats.push(Seat { shard, connections, connector, wakeup, neighbours: None, shared, index });
    }
    for seat in &mut seats {
        seat.neighbours = Some(Neighbours { keeper: keeper.clone(), threads: orders.clone() });
    }
    let sync_seats = SyncSeats { connector, places, shared: Arc::clone(&shared) };
    let replicas = ReplicaParts { rules, sender: keeper, notes, seats: sync_seats };
    Ok((Path { shared, orders, replicas }, seats))
}

/// Makes the seats of sync engines: each has connections of its own, on the channel after those of the I/O threads.
pub struct SyncSeats {
    connector: Arc<Connector>,
    places: Vec<Option<Arc<Attachment>>>,
    shared: Arc<Shared>,
}

impl SyncSeats {
    /// A seat that is attached to these targets of a view alone, with what it changes there in the region log if `logged`. Sequences up
    /// to `sequence` were used before; what is asked is given up after `patience`.
    pub fn seat(
        &self,
        view: &View,
        (targets, logged): (&[usize], bool),
        sequence: u32,
        patience: Duration,
    ) -> std::io::Result<(Seat, Postbox<Order>)> {
        let view = view.for_copying(targets);
        let index = self.connector.config.queues;
        let config = ShardConfig { index, depth: limits::SYNC_WINDOWS, io_timeout: patience };
        let shard = Shard::after(config, Arc::new(view), Arc::clone(&self.shared), sequence);
        let (postbox, wakeup) = mailbox(limits::ORDERS_MAX)?;
        let connections = connections(&self.connector, index, &shard, &self.places, |_| logged);
        let (connector, shared) = (Arc::clone(&self.connector), Arc::clone(&self.shared));
        Ok((Seat { shard, connections, connector, wakeup, neighbours: None, shared, index }, postbox))
    }

    /// Where each target is reached, for people.
    pub fn addresses(&self) -> Vec<Option<String>> {
        self.places.iter().map(|at| at.as_ref().and_then(|at| at.address())).collect()
    }

    /// A spare target has a volume from now on.
    pub fn attach(&mut self, target: usize, at: &Arc<Attachment>) {
        self.places[target] = Some(Arc::clone(at));
    }
}

impl SyncSeats {
    /// Where the region log of a target is.
    pub fn log(&self, target: usize) -> LogAt {
        let place = self.places.get(target).and_then(Option::as_ref).map(|at| &at.place);
        let server = match place {
            Some(Place::Remote { address, volume }) => Some((*address, volume.clone())),
            Some(Place::Local(_)) | None => None,
        };
        let PathConfig { array, epoch, session: owner, .. } = self.connector.config;
        LogAt { server, array, epoch, owner }
    }
}

fn connections(
    connector: &Connector,
    index: usize,
    shard: &Shard,
    places: &[Option<Arc<Attachment>>],
    logged: impl Fn(&Attachment) -> bool,
) -> Vec<Option<Connection>> {
    let parts = shard.parts();
    let connect = |(target, at): (usize, &Option<Arc<Attachment>>)| {
        at.as_ref().map(|at| connector.connection(index, parts, target, at, logged(at)))
    };
    places.iter().enumerate().map(connect).collect()
}

fn hello(config: &PathConfig, channel: u16, volume: &str, logged: bool) -> Hello {
    let log = if logged { features::REGION_LOG } else { 0 };
    // What a sync engine copies is read by nobody for a while: it always has a checksum.
    let copies = usize::from(channel) >= config.queues;
    let digest = if copies || config.data_digest == DataDigest::Crc32c { features::DATA_CRC } else { 0 };
    Hello {
        versions: (*VERSIONS.start(), *VERSIONS.end()),
        features: log | digest,
        array: config.array,
        session: config.session,
        host: config.host,
        channel,
        volume: volume.to_owned(),
    }
}

fn open_all(config: &PathConfig) -> Result<Vec<Option<Arc<Attachment>>>, StartError> {
    let open = |(node, target): (usize, &NodeTarget)| {
        let sectors = config.geometry.node_sectors(node);
        let logged = is_logged(config.nodes[node].len(), config.awaits.get(node).copied().unwrap_or(false));
        let opened = Attachment::open(target.place.clone(), target.volume, (node, sectors), logged);
        opened.map(|at| Some(Arc::new(at))).map_err(|refusal| StartError { node, refusal })
    };
    config.targets().map(open).collect()
}

fn open_local(path: &std::path::Path, sectors: u64) -> Result<LocalFile, Refusal> {
    let refuse = |errno: Errno, why: String| Refusal { errno, text: format!("cannot use {}: {why}", path.display()) };
    let file = LocalFile::open(path).map_err(|error| {
        let errno = Errno::from(&error);
        refuse(errno, errno.text().to_owned())
    })?;
    if file.sectors < sectors {
        let why = format!("it has {} sectors, and the array uses {sectors} of it", file.sectors);
        return Err(refuse(Errno::ENOSPC, why));
    }
    Ok(file)
}

/// Says HELLO to each server once, so that a refusal has its words before anything is started.
fn greet_remote(config: &PathConfig) -> Result<(), StartError> {
    // Of several replicas some may be away; the volumes of all that are there have accepted the claim already.
    for (node, target) in config.targets().filter(|(node, _)| config.nodes[*node].len() == 1) {
        let Place::Remote { address, volume } = &target.place else { continue };
        let refuse = |refusal| StartError { node, refusal };
        let welcome = greet::greet(*address, &hello(config, 0, volume, true), config.epoch).map_err(refuse)?;
        let wanted = config.geometry.node_sectors(node);
        let why = if welcome.volume != target.volume {
            format!(
                "the volume '{volume}' at {address} is another one than when the array was made (id {}, not {}): \
                 it was removed and made again, and has none of the array's data",
                welcome.volume, target.volume
            )
        } else if welcome.sectors < wanted {
            format!(
                "the volume '{volume}' at {address} has shrunk to {} sectors, and the array uses {wanted} of it: \
                 grow it again with `dst volume resize`",
                welcome.sectors
            )
        } else {
            continue;
        };
        return Err(refuse(Refusal { errno: Errno::EINVAL, text: why }));
    }
    Ok(())
}
