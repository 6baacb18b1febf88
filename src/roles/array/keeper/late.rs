//! The keeper's part for nodes that are late: where their volumes are is found out by somebody who may wait, and before the rules hear
//! of it, so that a node comes as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use tracing::info;

use super::{Note, Told, Work};
use crate::control::target::Target;
use crate::engine::replicas::Event;
use crate::engine::steer::{Arrival, News, Steer};
use crate::errno::Errno;
use crate::limits;
use crate::roles::array::path::{Attachment, Place};
use crate::roles::array::targets;
use crate::units::Id;

/// What is attached, by its volume.
pub(super) type Opened = BTreeMap<Id, Arc<Attachment>>;

impl Work {
    /// A late node may come.
    pub(super) fn expect(&self, node: usize, replicas: Vec<Arrival>) {
        let (sender, sectors) = (self.config.sender.clone(), self.config.rules.view().geometry.node_sectors(node));
        let look = move || {
            let logged = replicas.len() > 1;
            let one = |of: &Arrival| Ok((of.volume, open(&of.target, of.volume, (node, sectors), logged)?));
            let opened = replicas.iter().map(one).collect::<Result<Opened, (Errno, String)>>();
            // Without a keeper the array is ending.
            let _ = sender.send(Note::Opened { node, replicas, opened: opened.map_err(|(_, why)| why) });
        };
        let thread = std::thread::Builder::new().name(format!("late-{}-{node}", self.config.name));
        if let Err(error) = thread.stack_size(limits::THREAD_STACK_BYTES).spawn(look) {
            let why = format!("there is no thread for it: {error}");
            (self.config.tell)(Told::News(News::Arrived { node, result: Err(why) }));
        }
    }

    /// It comes, or cannot yet.
    pub(super) fn arrive(&mut self, node: usize, replicas: Vec<Arrival>, opened: Result<Opened, String>) {
        match opened {
            Ok(opened) => {
                info!(array = self.config.name, node, ?replicas, "a late node has come");
                self.opened = opened;
                self.handle(Event::Steer(Steer::Arrive { node, replicas }));
                self.opened.clear();
            }
            Err(why) => (self.config.tell)(Told::News(News::Arrived { node, result: Err(why) })),
        }
    }
}

/// Finds out where a volume is, and opens what is local.
pub(super) fn open(
    at: &Target,
    volume: Id,
    (node, sectors): (usize, u64),
    logged: bool,
) -> Result<Arc<Attachment>, (Errno, String)> {
    let place = match at {
        Target::Remote { server, volume } => {
            let address = targets::resolve(server).map_err(|refusal| (refusal.errno, refusal.text))?[0];
            Place::Remote { address, volume: volume.clone() }
        }
        Target::Local(path) => Place::Local(path.into()),
    };
    let opened = Attachment::open(place, volume, (node, sectors), logged);
    opened.map(Arc::new).map_err(|refusal| (refusal.errno, refusal.text))
}
