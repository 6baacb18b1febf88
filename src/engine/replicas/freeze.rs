//! The suspend of a node (the contract, 9):
//!
//! ```text
//! Open --freeze--> Wanted --nothing else is under way--> Draining{view} --adopted--> Freezing{view} --adopted--> Flushing
//!      --flushed, or cannot be--> Frozen --thaw--> Open
//! Frozen --fail--> Failed --thaw--> Open
//! ```
//!
//! It is flushed when nothing can be sent any more: a connection that comes back in the meantime would bring more to flush.

use super::{Job, NodeState, Replicas, Step};
use crate::bugs::{Bug, planted};
use crate::engine::steer::News;
use crate::engine::view::{Gate, Role};
use crate::limits;
use crate::units::Time;

/// See the diagram at the top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Freeze {
    Open,
    /// `shut`: it was suspended when the array was last served, and nothing goes on until it is again.
    Wanted {
        shut: bool,
    },
    Draining {
        version: u64,
    },
    Freezing {
        version: u64,
    },
    Flushing {
        tickets: Vec<u64>,
        durable: bool,
        until: Time,
    },
    Frozen {
        durable: bool,
    },
    Failed,
}

/// The same, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FreezeState {
    /// Requests go on.
    #[default]
    Open,
    /// What has begun is being finished.
    Draining,
    /// Requests wait.
    Frozen,
    /// Requests are refused.
    Failed,
}

impl Freeze {
    /// Whether nothing is to be done about it.
    pub(super) fn is_at_rest(&self) -> bool {
        matches!(self, Freeze::Open | Freeze::Frozen { .. } | Freeze::Failed)
    }

    pub(super) fn next_timeout(&self) -> Time {
        match self {
            Freeze::Flushing { until, .. } => *until,
            _ => Time::NEVER,
        }
    }
}

impl NodeState {
    /// The gate of the node.
    pub(super) fn gate(&self) -> Gate {
        match self.freeze {
            Freeze::Wanted { shut: true } => Gate::Frozen,
            Freeze::Open | Freeze::Wanted { .. } => match &self.moving {
                Some(moving) if moving.shuts_gate() => Gate::Closing,
                _ if self.late => Gate::Late,
                _ if self.undecided => Gate::Undecided,
                _ => Gate::Open,
            },
            Freeze::Draining { .. } => Gate::Draining,
            Freeze::Freezing { .. } | Freeze::Flushing { .. } | Freeze::Frozen { .. } => Gate::Frozen,
            Freeze::Failed => Gate::Failed,
        }
    }
}

impl Replicas {
    /// Whether a node is suspended.
    pub fn freeze_state(&self, node: usize) -> FreezeState {
        match self.nodes[node].freeze {
            Freeze::Open => FreezeState::Open,
            Freeze::Frozen { .. } => FreezeState::Frozen,
            Freeze::Failed => FreezeState::Failed,
            _ => FreezeState::Draining,
        }
    }

    /// The gate of a node was shut when the array was last served: it is so from the first request on.
    pub fn begin_frozen(&mut self, node: usize) {
        self.nodes[node].freeze = Freeze::Wanted { shut: true };
        let mut view = crate::engine::view::View::clone(&self.view);
        // Not `Draining`, which comes next: a view that changes nothing is acknowledged by nobody.
        view.nodes[node].gate = Gate::Frozen;
        self.view = std::sync::Arc::new(view);
    }

    pub(super) fn freeze(&mut self, node: usize) {
        let Some(state) = self.nodes.get_mut(node) else { return };
        match state.freeze {
            Freeze::Open => state.freeze = Freeze::Wanted { shut: false },
            Freeze::Frozen { durable } => self.tell(News::Frozen { node, flushed: durable }),
            Freeze::Failed => self.tell(News::Frozen { node, flushed: false }),
            _ => {}
        }
    }

    pub(super) fn thaw(&mut self, node: usize) {
        if self.nodes.get(node).is_some_and(|state| state.freeze != Freeze::Open) {
            self.nodes[node].freeze = Freeze::Open;
            if planted(Bug::ResumeForgetsStale) {
                for target in self.of(node, |target| target.role == Role::Stale) {
                    self.targets[target].role = Role::InSync;
                }
            }
            self.publish();
        }
    }

    pub(super) fn fail(&mut self, node: usize) {
        if self.nodes.get(node).is_some_and(|state| state.freeze != Freeze::Open) {
            self.nodes[node].freeze = Freeze::Failed;
            self.publish();
        }
    }

    /// Begins to drain a node as soon as nothing else is under way there.
    pub(super) fn freeze_on(&mut self, node: usize, now: Time) {
        let state = &self.nodes[node];
        match &state.freeze {
            Freeze::Wanted { .. } => {
                let busy = state.moving.as_ref().is_some_and(super::moves::Moving::shuts_gate);
                if state.step == Step::Steady && state.job == Job::None && !busy {
                    self.publish_as(node, |version| Freeze::Draining { version });
                }
            }
            Freeze::Flushing { tickets, until, .. } if tickets.is_empty() || *until <= now => self.frozen(node),
            _ => {}
        }
    }

    /// Shuts the gate of a node further, in a view whose version is awaited.
    fn publish_as(&mut self, node: usize, freeze: impl Fn(u64) -> Freeze) {
        self.nodes[node].freeze = freeze(u64::MAX);
        let version = self.publish();
        self.nodes[node].freeze = freeze(version);
    }

    pub(super) fn freeze_adopted(&mut self, node: usize, version: u64, now: Time) {
        match self.nodes[node].freeze {
            Freeze::Draining { version: awaited } if awaited <= version => {
                self.publish_as(node, |version| Freeze::Freezing { version });
            }
            Freeze::Freezing { version: awaited } if awaited <= version => {
                let written = self.of(node, |target| target.role.is_written());
                let reached: Vec<usize> =
                    written.iter().copied().filter(|target| self.targets[*target].reachable).collect();
                let durable = reached.len() == written.len();
                let tickets = match planted(Bug::SuspendWithoutFlush) {
                    true => Vec::new(),
                    false => reached.into_iter().map(|target| self.flush(target)).collect(),
                };
                self.nodes[node].freeze =
                    Freeze::Flushing { tickets, durable, until: now.after(limits::FLUSH_TIMEOUT) };
            }
            _ => {}
        }
    }

    pub(super) fn freeze_flushed(&mut self, node: usize, ticket: u64, flushed: bool, now: Time) {
        if let Freeze::Flushing { tickets, durable, .. } = &mut self.nodes[node].freeze
            && tickets.contains(&ticket)
        {
            tickets.retain(|open| *open != ticket);
            *durable &= flushed;
            self.freeze_on(node, now);
        }
    }

    fn frozen(&mut self, node: usize) {
        let Freeze::Flushing { tickets, durable, .. } = &self.nodes[node].freeze else { return };
        let durable = *durable && tickets.is_empty();
        self.nodes[node].freeze = Freeze::Frozen { durable };
        self.tell(News::Frozen { node, flushed: durable });
    }
}
