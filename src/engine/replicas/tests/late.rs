//! Nodes that are late.

use super::*;
use crate::engine::steer::Arrival;

/// Two nodes, of which the second is late.
fn half_late() -> Bench {
    let view = View::new(Geometry::linear(&[SECTORS; 2]).unwrap(), &[vec![volume(0)], vec![]], Epoch(1));
    let view = view.with_spares(limits::TARGETS_PER_NODE_MAX);
    Bench { rules: Replicas::new(view, &[Standing::InSync], false), now: Time(1_000_000_000) }
}

fn arrival(number: usize, standing: Standing) -> Arrival {
    let losses = Some(Losses { told: 3, lost: false });
    Arrival { target: Target::Local(format!("/{number}")), volume: volume(number), standing, losses }
}

#[test]
fn a_late_node_has_no_targets_and_begins_as_at_a_start_when_it_comes() {
    for (standings, gate, logged) in [
        (vec![Standing::InSync], Gate::Open, false),
        (vec![Standing::Stale, Standing::InSync], Gate::Open, true),
        (vec![Standing::InSync, Standing::InSync], Gate::Undecided, true),
    ] {
        let mut bench = half_late();
        let gates = |bench: &Bench| bench.rules.view().nodes.iter().map(|node| node.gate).collect::<Vec<_>>();
        assert_eq!((gates(&bench), bench.rules.is_late(1)), (vec![Gate::Open, Gate::Late], true));
        assert!(saved(&bench.tick(&[])).is_none(), "the record keeps what it has of it");
        let shared = Shared::new(bench.rules.view().targets.len(), 1);
        shared.targets().iter().for_each(|target| target.flushed(&target.acknowledged()));
        assert!(!bench.rules.is_clean(&shared), "nobody knows what its replicas have");
        let replicas = standings.iter().zip(1..).map(|(standing, number)| arrival(number, *standing)).collect();
        let effects = bench.tell(Event::Steer(Steer::Arrive { node: 1, replicas }));
        let attached = |effect: &Effect| match effect {
            Effect::Attach { volume, known, logged, .. } => Some((*volume, known.map(|known| known.told), *logged)),
            _ => None,
        };
        let wanted: Vec<_> = (1..=standings.len()).map(|number| (volume(number), Some(3), logged)).collect();
        assert_eq!(effects.iter().filter_map(attached).collect::<Vec<_>>(), wanted);
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Tell(News::Arrived { node: 1, result: Ok(()) }))));
        assert_eq!(gates(&bench), [Gate::Open, gate]);
        if gate == Gate::Undecided {
            let standings = saved(&effects).unwrap();
            assert_eq!(standings[1..], [(volume(1), Standing::InSync), (volume(2), Standing::Stale)]);
            bench.tell(Event::Saved(Saved::All));
            assert_eq!(gates(&bench), [Gate::Open, Gate::Open]);
        }
        let single = bench.rules.view().is_single(1);
        assert_eq!((bench.rules.is_late(1), single), (false, standings.len() == 1));
    }
}

#[test]
fn a_late_node_that_is_suspended_is_so_when_it_comes() {
    let mut bench = half_late();
    bench.rules.begin_frozen(1);
    let frozen = |bench: &mut Bench| {
        let mut news = Vec::new();
        for _ in 0..6 {
            bench.tick(&[]);
            let version = bench.rules.view().version;
            for effect in bench.tell(Event::Adopted { node: 1, version }) {
                match effect {
                    Effect::Flush { ticket, .. } => drop(bench.tell(Event::Flushed { ticket, durable: true })),
                    Effect::Tell(News::Frozen { flushed, .. }) => news.push(flushed),
                    _ => {}
                }
            }
            assert!(!matches!(bench.rules.view().nodes[1].gate, Gate::Open | Gate::Late));
        }
        bench.rules.freeze_state(1)
    };
    assert_eq!(frozen(&mut bench), FreezeState::Frozen);
    bench.tell(Event::Steer(Steer::Arrive { node: 1, replicas: vec![arrival(1, Standing::InSync)] }));
    assert_eq!(frozen(&mut bench), FreezeState::Frozen);
    bench.tell(Event::Steer(Steer::Thaw { node: 1 }));
    assert_eq!(bench.rules.view().nodes[1].gate, Gate::Open);
    // And resumed before it comes: its requests have deadlines again.
    let mut bench = half_late();
    bench.rules.begin_frozen(1);
    frozen(&mut bench);
    bench.tell(Event::Steer(Steer::Thaw { node: 1 }));
    assert_eq!(bench.rules.view().nodes[1].gate, Gate::Late);
}
