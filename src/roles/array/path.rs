//! The data path of one started array: opens its targets, greets its servers, runs its I/O threads under a frontend.
//!
//! Starting and stopping block; the owner calls them from threads that may wait. Reading figures never does.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::engine::replicas::{Replicas, Standing};
use crate::engine::request::ShardConfig;
use crate::engine::shard::Shard;
use crate::engine::shared::Shared;
use crate::engine::view::{Role, View};
use crate::errno::Errno;
use crate::geometry::map::Geometry;
use crate::io::greet::{self, Refusal};
use crate::io::link::{Link, LinkConfig};
use crate::io::local::{Local, LocalFile};
use crate::io::wakeup::{Postbox, mailbox};
use crate::limits;
use crate::roles::array::keeper::Note;
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
    /// The replicas of each node, in order.
    pub nodes: Vec<Vec<NodeTarget>>,
    /// Nothing was in flight when the array was last served.
    pub clean: bool,
    /// I/O threads.
    pub queues: usize,
    /// Requests in flight in each.
    pub depth: usize,
    /// After this a request fails.
    pub io_timeout: Duration,
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
    /// Where a node has several replicas: what their keeper is made of.
    pub replicas: Option<ReplicaParts>,
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

/// Attaches every target, and makes the seats of the I/O threads.
pub fn attach(config: &PathConfig) -> Result<(Path, Vec<Seat>), StartError> {
    let files = open_local(config)?;
    greet_remote(config)?;
    let ids = |replicas: &Vec<NodeTarget>| replicas.iter().map(|replica| replica.volume).collect();
    let volumes: Vec<Vec<Id>> = config.nodes.iter().map(ids).collect();
    let standings: Vec<Standing> = config.targets().map(|(_, target)| target.standing).collect();
    let shared = Arc::new(Shared::with_sync(standings.len(), config.queues, 1));
    let first = View::new(config.geometry.clone(), &volumes, config.epoch);
    let rules = Replicas::new(first, &standings, config.clean);
    let view = Arc::clone(rules.view());
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
        let connections = connections(config, index, &shard, &files);
        orders.push(postbox);
        let shared = Arc::clone(&shared);
        seats.push(Seat { shard, connections, wakeup, neighbours: None, shared, index });
    }
    let replicas = (view.width() > 1).then(|| {
        for seat in &mut seats {
            seat.neighbours = Some(Neighbours { keeper: keeper.clone(), threads: orders.clone() });
        }
        let seats = SyncSeats { config: config.clone(), files, shared: Arc::clone(&shared) };
        ReplicaParts { rules, sender: keeper, notes, seats }
    });
    Ok((Path { shared, orders, replicas }, seats))
}

/// Makes the seats of sync engines: each has connections of its own, on the channel after those of the I/O threads.
pub struct SyncSeats {
    config: PathConfig,
    files: Vec<Option<LocalFile>>,
    shared: Arc<Shared>,
}

impl SyncSeats {
    /// A seat that is attached to two targets of a view alone. Sequences up to `sequence` were used before.
    pub fn seat(
        &self,
        view: &View,
        source: usize,
        target: usize,
        sequence: u32,
    ) -> std::io::Result<(Seat, Postbox<Order>)> {
        let mut view = view.clone();
        for (index, of) in view.targets.iter_mut().enumerate() {
            of.role = if index == source || index == target { Role::InSync } else { Role::Absent };
        }
        let index = self.config.queues;
        let config = ShardConfig { index, depth: limits::SYNC_WINDOWS, io_timeout: limits::TARGET_TIMEOUT };
        let shard = Shard::after(config, Arc::new(view), Arc::clone(&self.shared), sequence);
        let (postbox, wakeup) = mailbox(limits::ORDERS_MAX)?;
        let connections = connections(&self.config, index, &shard, &self.files);
        let shared = Arc::clone(&self.shared);
        Ok((Seat { shard, connections, wakeup, neighbours: None, shared, index }, postbox))
    }
}

fn connections(config: &PathConfig, index: usize, shard: &Shard, files: &[Option<LocalFile>]) -> Vec<Connection> {
    let channel = u16::try_from(index).unwrap_or(u16::MAX);
    let connect =
        |(target, ((node, at), file)): (usize, ((usize, &NodeTarget), &Option<LocalFile>))| match (&at.place, file) {
            (Place::Remote { address, volume }, _) => Connection::Remote(Box::new(Link::new(LinkConfig {
                target,
                address: *address,
                hello: hello(config, channel, volume, node),
                epoch: config.epoch,
            }))),
            (Place::Local(_), Some(file)) => {
                Connection::Local(Box::new(Local::new(target, file.clone(), at.volume, shard.parts())))
            }
            (Place::Local(path), None) => unreachable!("{} was opened by open_local", path.display()),
        };
    config.targets().zip(files).enumerate().map(connect).collect()
}

fn hello(config: &PathConfig, channel: u16, volume: &str, node: usize) -> Hello {
    Hello {
        versions: (*VERSIONS.start(), *VERSIONS.end()),
        features: features::of_node(config.nodes[node].len()),
        array: config.array,
        session: config.session,
        host: config.host,
        channel,
        volume: volume.to_owned(),
    }
}

fn open_local(config: &PathConfig) -> Result<Vec<Option<LocalFile>>, StartError> {
    let open = |(node, target): (usize, &NodeTarget)| {
        let Place::Local(path) = &target.place else { return Ok(None) };
        let refuse = |errno: Errno, why: String| StartError {
            node,
            refusal: Refusal { errno, text: format!("cannot use {}: {why}", path.display()) },
        };
        let file = LocalFile::open(path).map_err(|error| {
            let errno = Errno::from(&error);
            refuse(errno, errno.text().to_owned())
        })?;
        let wanted = config.geometry.node_sectors(node);
        if file.sectors < wanted {
            let why = format!("it has {} sectors, and the array uses {wanted} of it", file.sectors);
            return Err(refuse(Errno::ENOSPC, why));
        }
        Ok(Some(file))
    };
    config.targets().map(open).collect()
}

/// Says HELLO to each server once, so that a refusal has its words before anything is started.
fn greet_remote(config: &PathConfig) -> Result<(), StartError> {
    // Of several replicas some may be away; the volumes of all that are there have accepted the claim already.
    for (node, target) in config.targets().filter(|(node, _)| config.nodes[*node].len() == 1) {
        let Place::Remote { address, volume } = &target.place else { continue };
        let refuse = |refusal| StartError { node, refusal };
        let welcome = greet::greet(*address, &hello(config, 0, volume, node), config.epoch).map_err(refuse)?;
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
