//! The owner's part that holds the requests of a node, and lets them go on.
//!
//! Suspend: the record, then the data path, then the answer, when nothing is in flight there. Resume: the data path, then the
//! record. What is in the record holds from the first request on after a restart; its end is a time of day there.

use super::live::After;
use super::{Array, Effect, Owner, Ticket};
use crate::control::command::Refusal;
use crate::control::node::{OnExpire, Suspend, Suspended};
use crate::engine::steer::Steer;
use crate::errno::Errno;
use crate::units::Time;

/// A node whose requests are held.
#[derive(Debug)]
pub(super) struct Hold {
    /// Nothing is in flight there any more.
    pub(super) frozen: bool,
    /// When it ends.
    pub(super) expires: Time,
    /// Who waits for it to be frozen.
    pub(super) waiting: Vec<Ticket>,
}

impl Owner {
    pub(super) fn suspend(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        node: usize,
        suspend: &Suspend,
        now: Time,
    ) -> Result<(), Refusal> {
        let wall = self.wall(now);
        let ttl = suspend.ttl.0;
        let spec = &mut array.spec.nodes[node];
        let former = spec.suspend.clone();
        if former.as_ref().is_some_and(|former| former.failing) {
            let (name, start) = (&array.spec.name, spec.start);
            let text = format!("node {start} is suspended, and its requests fail: 'dst resume {name} {start}' first");
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        spec.suspend = Some(Suspended {
            by: suspend.by(),
            since: former.as_ref().map_or(wall, |former| former.since),
            // The next whole second: a suspend lasts no shorter than was asked for.
            until: ttl.map(|ttl| wall.saturating_add(ttl.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX))),
            on_expire: suspend.on_expire,
            failing: false,
        });
        let expires = ttl.map_or(Time::NEVER, |ttl| now.after(ttl));
        let hold = array.live.holds.entry(node);
        let hold = hold.or_insert(Hold { frozen: false, expires, waiting: Vec::new() });
        hold.expires = expires;
        array.live.wanted.push(After::Held(node, ticket, former));
        Ok(())
    }

    /// A suspend is in the record, or could not be written.
    pub(super) fn held(
        &mut self,
        array: &mut Array,
        node: usize,
        ticket: Ticket,
        former: Option<Suspended>,
        record: &Result<(), Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let start = array.spec.nodes[node].start;
        let Some(hold) = array.live.holds.get_mut(&node) else {
            // It was resumed in the meantime.
            return effects.push(Effect::Reply(ticket, Err(resumed(start))));
        };
        if let Err(why) = record {
            if former.is_none() {
                array.live.holds.remove(&node);
            }
            array.spec.nodes[node].suspend = former;
            let text = format!("node {start} is not suspended: {why}");
            return effects.push(Effect::Reply(ticket, Err(Refusal::new(why.errno, text))));
        }
        if former.is_none() {
            effects.push(Effect::Steer(array.spec.name.clone(), Steer::Freeze { node }));
        }
        if !hold.frozen {
            return hold.waiting.push(ticket);
        }
        let by = former.map_or_else(String::new, |former| format!(" (by {})", former.by));
        let text = format!("node {start} was suspended already{by}: its time has begun anew");
        effects.push(Effect::Reply(ticket, Ok(array.answer_with(vec![text]))));
    }

    pub(super) fn thaw(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        node: usize,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        array.suspended(node, "resumed")?;
        array.open(node, effects);
        array.live.wanted.push(After::Thawed(node, ticket));
        Ok(())
    }

    pub(super) fn fail(ticket: Ticket, array: &mut Array, node: usize) -> Result<(), Refusal> {
        array.suspended(node, "failed")?;
        if let Some(suspend) = &mut array.spec.nodes[node].suspend {
            (suspend.failing, suspend.until) = (true, None);
        }
        array.live.wanted.push(After::Failing(node, ticket));
        Ok(())
    }

    /// That what waits at a node fails is in the record, or could not be written.
    pub(super) fn failing(
        &mut self,
        array: &mut Array,
        node: usize,
        ticket: Ticket,
        record: &Result<(), Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(hold) = array.live.holds.get_mut(&node) else {
            return effects.push(Effect::Reply(ticket, Err(resumed(array.spec.nodes[node].start))));
        };
        if let Err(why) = record {
            if let Some(suspend) = &mut array.spec.nodes[node].suspend {
                suspend.failing = false;
            }
            return effects.push(Effect::Reply(ticket, Err(why.clone())));
        }
        hold.expires = Time::NEVER;
        effects.push(Effect::Steer(array.spec.name.clone(), Steer::Fail { node }));
        effects.push(Effect::Reply(ticket, Ok(array.answer())));
    }

    /// Ends what has lasted as long as it may.
    pub(super) fn expire(&mut self, array: &mut Array, now: Time, effects: &mut Vec<Effect>) {
        let due = array.live.holds.iter().filter(|(_, hold)| hold.expires <= now).map(|(node, _)| *node);
        for node in due.collect::<Vec<usize>>() {
            match array.spec.nodes[node].suspend.as_mut() {
                Some(suspend) if suspend.on_expire == OnExpire::Fail => {
                    (suspend.failing, suspend.until) = (true, None);
                    if let Some(hold) = array.live.holds.get_mut(&node) {
                        hold.expires = Time::NEVER;
                    }
                    effects.push(Effect::Steer(array.spec.name.clone(), Steer::Fail { node }));
                }
                _ => array.open(node, effects),
            }
            array.live.wanted.push(After::Quiet);
        }
    }

    /// Takes suspends out of the record that have ended while nothing ran, before the array is served.
    pub(super) fn lapse(&self, array: &mut Array, now: Time) {
        let wall = self.wall(now);
        for node in &mut array.spec.nodes {
            let Some(suspend) = &mut node.suspend else { continue };
            if suspend.until.is_none_or(|until| until > wall) {
                continue;
            }
            match suspend.on_expire {
                OnExpire::Resume => node.suspend = None,
                OnExpire::Fail => (suspend.failing, suspend.until) = (true, None),
            }
        }
    }

    /// The data path has begun with what the record says.
    pub(super) fn restore_holds(&mut self, array: &mut Array, now: Time, effects: &mut Vec<Effect>) {
        let wall = self.wall(now);
        for (node, spec) in array.spec.nodes.iter().enumerate() {
            let Some(suspend) = &spec.suspend else { continue };
            let left = |until: u64| std::time::Duration::from_secs(until.saturating_sub(wall));
            let expires = suspend.until.map_or(Time::NEVER, |until| now.after(left(until)));
            array.live.holds.insert(node, Hold { frozen: true, expires, waiting: Vec::new() });
            if suspend.failing {
                effects.push(Effect::Steer(array.spec.name.clone(), Steer::Fail { node }));
            }
        }
    }
}

fn resumed(start: crate::units::NodeId) -> Refusal {
    Refusal::new(Errno::ECANCELED, format!("node {start} was resumed before it was frozen"))
}

impl Array {
    /// Refuses what makes no sense for a node that is not suspended.
    pub(super) fn suspended(&self, node: usize, what: &str) -> Result<&Suspended, Refusal> {
        let (name, spec) = (&self.spec.name, &self.spec.nodes[node]);
        spec.suspend.as_ref().ok_or_else(|| {
            let start = spec.start;
            let text =
                format!("node {start} is not suspended, so it is not {what}: 'dst suspend {name} {start}' does that");
            Refusal::new(Errno::EINVAL, text)
        })
    }

    /// Lets the requests of a node go on.
    fn open(&mut self, node: usize, effects: &mut Vec<Effect>) {
        let spec = &mut self.spec.nodes[node];
        spec.suspend = None;
        if let Some(hold) = self.live.holds.remove(&node) {
            let refuse = |ticket| Effect::Reply(ticket, Err(resumed(spec.start)));
            effects.extend(hold.waiting.into_iter().map(refuse));
        }
        effects.push(Effect::Steer(self.spec.name.clone(), Steer::Thaw { node }));
    }

    /// Nothing is in flight on a node any more.
    pub(super) fn frozen(&mut self, node: usize, flushed: bool, effects: &mut Vec<Effect>) {
        let Some(hold) = self.live.holds.get_mut(&node) else { return };
        hold.frozen = true;
        let waiting = std::mem::take(&mut hold.waiting);
        let warn = || {
            let start = self.spec.nodes[node].start;
            format!(
                "node {start} cannot be reached: what it has acknowledged may not be durable there, and a flush (fsync) waits until it is back"
            )
        };
        let warnings: Vec<String> = if flushed { Vec::new() } else { vec![warn()] };
        let reply = |ticket| Effect::Reply(ticket, Ok(self.answer_with(warnings.clone())));
        effects.extend(waiting.into_iter().map(reply));
    }
}
