//! What the rules of replicas do with the region logs of the servers: what is durably known of a target beside them, what is still
//! to be copied to one that lacks something, and when a log may be cleaned.

use std::sync::Arc;

use super::{Replicas, Step};
use crate::bugs::{Bug, planted};
use crate::engine::region::SyncMap;
use crate::engine::view::{Role, View};
use crate::units::Lba;

/// What is durably known of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It has everything that was acknowledged.
    InSync,
    /// It lacks something: what the region logs have marked.
    Stale,
    /// It is being filled to take another one's place, or was in sync until another one took its own. Never in sync by itself. Of one
    /// that is being filled: below this sector it lacks what the logs have marked, and nothing else.
    Candidate {
        /// The first sector of the node that it may never have got.
        from: Lba,
    },
    /// It is being filled: it lacks whatever lies from here on, and below what the logs have marked.
    Filling {
        /// The first sector of the node that was never copied to it.
        from: Lba,
    },
    /// It is none.
    Absent,
}

impl Standing {
    /// Whether it is one that is to be in sync and is not.
    pub(super) fn is_synced(self) -> bool {
        matches!(self, Standing::Stale | Standing::Filling { .. })
    }

    /// Whether it is to take another one's place, or has left its own to another one.
    pub fn is_candidate(self) -> bool {
        matches!(self, Standing::Candidate { .. })
    }

    /// Up to where it has everything but what is marked, if that is noted of it.
    fn noted(&mut self) -> Option<&mut Lba> {
        match self {
            Standing::Filling { from } | Standing::Candidate { from } => Some(from),
            Standing::InSync | Standing::Stale | Standing::Absent => None,
        }
    }
}

impl Replicas {
    /// Servers may clean their logs while every shard works from a view in which all targets of a node are in sync, and no other volume has
    /// part of its data, of which they know alone what it lacks.
    pub(super) fn permit_points(&self) {
        for (node, state) in self.view.nodes.iter().zip(&self.nodes) {
            let whole = |target: &usize| matches!(self.targets[*target].role, Role::InSync | Role::Absent);
            if let Some(overlap) = &node.overlap {
                let awaits = state.awaits && !planted(Bug::LogCleanedUnderOpenMove);
                let steady = state.step == Step::Steady && !state.late && !awaits;
                overlap.points.permit(steady && node.targets.iter().all(whole));
            }
        }
    }

    /// A move of a node goes on where it was, when the volume comes that it goes to. Until then, or until that is said not to be, the region
    /// logs keep what that volume lacks. Before any shard begins.
    pub fn await_move(&mut self, node: usize) {
        self.set_awaits(node, true);
    }

    /// Whether a volume is waited for that lacks what the region logs have marked.
    pub(super) fn set_awaits(&mut self, node: usize, awaits: bool) {
        let Some(state) = self.nodes.get_mut(node).filter(|state| state.awaits != awaits) else { return };
        state.awaits = awaits;
        let mut view = View::clone(&self.view);
        view.nodes[node].awaits = awaits;
        self.view = Arc::new(view);
        self.permit_points();
    }

    /// How far the filling of a target is, durably there: what it is known to have, so that it is never filled from zero again.
    pub(super) fn note_progress(&mut self, node: usize) {
        let Some(target) = self.nodes[node].syncing else { return };
        let Some(map) = self.view.nodes[node].sync.as_ref().filter(|map| !map.needs_survey()) else { return };
        let kept = Lba(map.kept());
        if let Some(from) = self.targets[target].standing.noted()
            && *from < kept
        {
            *from = kept;
            self.dirty = true;
        }
    }

    /// What is to be copied to a target, as far as that is known without the logs: what was in sync is written everywhere from now on;
    /// then they tell what it lacks.
    pub(super) fn first_map(&self, target: usize, sectors: u64) -> SyncMap {
        let copied = match self.targets[target].standing {
            _ if planted(Bug::FillingIsStale) => sectors,
            Standing::Filling { from } | Standing::Candidate { from } => from.0,
            Standing::InSync | Standing::Stale | Standing::Absent => sectors,
        };
        SyncMap::copied_below(copied, sectors, self.view.region_sectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::copy::CopyError;
    use crate::engine::region::RegionState;
    use crate::engine::replicas::{Effect, Event, Saved};
    use crate::engine::survey::Marked;
    use crate::errno::Errno;
    use crate::geometry::map::Geometry;
    use crate::units::{Epoch, Id, Time};

    /// A node of ten regions and two targets, the second of which lacks something.
    struct Keeper {
        rules: Replicas,
        seconds: u64,
        saved: Option<Standing>,
        sync: Option<Arc<SyncMap>>,
    }

    impl Keeper {
        fn new(standing: Standing) -> Keeper {
            let geometry = Geometry::linear(&[80]).unwrap();
            let mut view = View::new(geometry, &[vec![Id([1; 16]), Id([2; 16])]], Epoch(1));
            view.region_sectors = 8;
            let rules = Replicas::new(view, &[Standing::InSync, standing], true);
            Keeper { rules, seconds: 0, saved: None, sync: None }
        }

        /// Everything that is to be done is done at once.
        fn tell(&mut self, event: Event) {
            let mut events = vec![event];
            while let Some(event) = events.pop() {
                self.seconds += 20;
                self.rules.handle(event, Time(self.seconds * 1_000_000_000));
                while let Some(effect) = self.rules.poll() {
                    match effect {
                        Effect::Publish(view) => events.push(Event::Adopted { node: 0, version: view.version }),
                        Effect::Save(standings) => {
                            self.saved = Some(standings[1].1);
                            events.push(Event::Saved(Saved::All));
                        }
                        Effect::Sync { map, .. } => self.sync = Some(map),
                        Effect::StopSync { .. } => {
                            let result = Err(CopyError::Stopped);
                            events.push(Event::Synced { node: 0, result });
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        }

        fn tick(&mut self) {
            self.tell(Event::Tick(vec![true; 2]));
        }

        /// The map of the sync engine that has begun.
        fn begun(&mut self) -> (Arc<SyncMap>, Vec<usize>) {
            self.tick();
            let map = self.sync.take().expect("a sync engine begins");
            let todo = (0..map.regions()).filter(|region| map.state(*region) == RegionState::Todo).collect();
            (map, todo)
        }
    }

    #[test]
    fn what_was_filled_durably_is_not_filled_again() {
        let mut keeper = Keeper::new(Standing::Filling { from: Lba(0) });
        let (map, todo) = keeper.begun();
        assert_eq!((todo.len(), map.needs_survey()), (10, false));
        (0..5).for_each(|region| map.set(region, RegionState::Done));
        keeper.tick();
        assert_eq!(keeper.saved, None, "it is not flushed");
        map.keep(3);
        keeper.tick();
        assert_eq!(keeper.saved, Some(Standing::Filling { from: Lba(24) }));
        map.keep(4);
        keeper.tell(Event::Synced { node: 0, result: Err(CopyError::Target(Errno::EIO)) });
        assert_eq!(keeper.saved, Some(Standing::Filling { from: Lba(32) }));
        let (again, todo) = keeper.begun();
        assert_eq!((todo, again.needs_survey()), ((4..10).collect(), true));
        // The next daemon, with what was marked since.
        let mut keeper = Keeper::new(Standing::Filling { from: Lba(32) });
        let (map, _) = keeper.begun();
        let mut marked = Marked::default();
        marked.add(&[(1, 1)]);
        map.mark(&marked);
        assert_eq!((map.state(1), map.state(3), map.left()), (RegionState::Todo, RegionState::Done, 7));
    }

    #[test]
    fn one_that_was_in_sync_gets_what_is_marked() {
        let mut keeper = Keeper::new(Standing::Stale);
        let (map, todo) = keeper.begun();
        assert!(todo.is_empty() && map.needs_survey());
        map.keep(9);
        keeper.tick();
        assert_eq!(keeper.saved, None, "it has no cursor");
        keeper.tell(Event::Synced { node: 0, result: Err(CopyError::Target(Errno::EIO)) });
        assert_eq!(keeper.saved, Some(Standing::Stale));
        assert!(keeper.begun().0.needs_survey(), "there may be more by now");
    }
}
