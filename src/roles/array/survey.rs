//! Asks the region logs of a node's targets before a replica is synced. Blocks.

use std::net::SocketAddr;

use crate::control::command::Refusal;
use crate::engine::survey::Marked;
use crate::errno::Errno;
use crate::roles::array::targets;
use crate::units::{Epoch, Id};
use crate::wire::volume::Regions;

/// A log, and who asks: the claim that holds the volume.
#[derive(Clone, Debug)]
pub struct LogAt {
    /// The server; `None`: a file of this machine, which has no log.
    pub server: Option<(SocketAddr, String)>,
    /// The array.
    pub array: Id,
    /// The epoch of its claim.
    pub epoch: Epoch,
    /// The owner of its claim.
    pub owner: Id,
}

/// What the logs have marked together, in regions of so many sectors. A log that is none marks everything; one that does not answer
/// is an error, because it may the next time.
pub fn survey(logs: &[LogAt], region_sectors: u64) -> Result<Marked, Refusal> {
    let mut marked = Marked::default();
    for log in logs {
        marked.join(&ask(log, region_sectors)?);
    }
    Ok(marked)
}

fn ask(log: &LogAt, region_sectors: u64) -> Result<Marked, Refusal> {
    let Some((address, volume)) = &log.server else { return Ok(Marked::all()) };
    let (name, array, epoch, owner) = (volume.clone(), log.array, log.epoch, log.owner);
    let mut ask = Regions { name, array, epoch, owner, after: None };
    let mut marked = Marked::default();
    loop {
        match targets::regions(*address, &ask) {
            Ok(page) => match marked.add_page(&page, region_sectors) {
                None => return Ok(marked),
                after => ask.after = after,
            },
            // It is too large for a log, or its server is too old.
            Err(why) if why.errno == Errno::EOPNOTSUPP => return Ok(Marked::all()),
            Err(why) => return Err(why),
        }
    }
}
