//! The data path of one started array: opens its targets, greets its servers, runs its I/O threads under a frontend.
//!
//! Starting and stopping block; the owner calls them from threads that may wait. Reading figures never does.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::request::ShardConfig;
use crate::engine::shard::Shard;
use crate::engine::shared::Shared;
use crate::engine::view::View;
use crate::errno::Errno;
use crate::geometry::map::Geometry;
use crate::io::greet::{self, Refusal};
use crate::io::link::{Link, LinkConfig};
use crate::io::local::{Local, LocalFile};
use crate::io::wakeup::{Postbox, mailbox};
use crate::limits;
use crate::roles::array::worker::{Connection, Order, Seat};
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

/// One node's target.
#[derive(Clone, Debug)]
pub struct NodeTarget {
    /// Where it is.
    pub place: Place,
    /// The volume's own id, as the record knows it.
    pub volume: Id,
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
    /// One target for each node, in order.
    pub nodes: Vec<NodeTarget>,
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
}

/// Attaches every target, and makes the seats of the I/O threads.
pub fn attach(config: &PathConfig) -> Result<(Path, Vec<Seat>), StartError> {
    let files = open_local(config)?;
    greet_remote(config)?;
    let shared = Arc::new(Shared::new(config.nodes.len(), config.queues));
    let volumes: Vec<Vec<Id>> = config.nodes.iter().map(|node| vec![node.volume]).collect();
    let view = Arc::new(View::new(config.geometry.clone(), &volumes, config.epoch));
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
        seats.push(Seat { shard, connections, wakeup });
    }
    Ok((Path { shared, orders }, seats))
}

fn connections(config: &PathConfig, index: usize, shard: &Shard, files: &[Option<LocalFile>]) -> Vec<Connection> {
    let channel = u16::try_from(index).unwrap_or(u16::MAX);
    let connect = |(target, (node, file)): (usize, (&NodeTarget, &Option<LocalFile>))| match (&node.place, file) {
        (Place::Remote { address, volume }, _) => Connection::Remote(Box::new(Link::new(LinkConfig {
            target,
            address: *address,
            hello: hello(config, channel, volume),
            epoch: config.epoch,
        }))),
        (Place::Local(_), Some(file)) => {
            Connection::Local(Box::new(Local::new(target, file.clone(), node.volume, shard.parts())))
        }
        (Place::Local(path), None) => unreachable!("{} was opened by open_local", path.display()),
    };
    config.nodes.iter().zip(files).enumerate().map(connect).collect()
}

fn hello(config: &PathConfig, channel: u16, volume: &str) -> Hello {
    Hello {
        versions: (*VERSIONS.start(), *VERSIONS.end()),
        features: features::DATA_CRC,
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
    config.nodes.iter().enumerate().map(open).collect()
}

/// Says HELLO to each server once, so that a refusal has its words before anything is started.
fn greet_remote(config: &PathConfig) -> Result<(), StartError> {
    for (node, target) in config.nodes.iter().enumerate() {
        let Place::Remote { address, volume } = &target.place else { continue };
        let refuse = |refusal| StartError { node, refusal };
        let welcome = greet::greet(*address, &hello(config, 0, volume), config.epoch).map_err(refuse)?;
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
