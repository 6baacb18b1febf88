//! Machines that come back without what they had acknowledged: what a start makes of it, and who accepts it.

use super::*;
use crate::control::node::NodeAsk;
use crate::control::spec::NodeSpec;
use crate::engine::losses::Losses;
use crate::engine::replicas::Standing;
use crate::units::NodeId;

/// The machine of a volume loses its memory.
fn cut(world: &mut World, target: &str) {
    world.volumes.get_mut(target).unwrap().losses += 1;
}

/// The daemon dies, and the next one starts what was started.
fn next_life(world: &mut World) -> Daemon {
    world.running.clear();
    world.newest = None;
    let mut daemon = Daemon::boot(world);
    daemon.settle(world);
    daemon
}

fn accept(node: &NodeSpec) -> Command {
    Command::Node { name: "a".to_owned(), node: node.start, ask: NodeAsk::AcceptLoss }
}

fn first(world: &World) -> NodeSpec {
    world.spec().nodes[0].clone()
}

/// What the record has of each replica.
fn known(world: &World) -> Vec<Losses> {
    let spec = world.spec();
    spec.replicas().map(|(_, replica)| spec.memory.volumes[&replica.volume]).collect()
}

fn lost(world: &World) -> Vec<bool> {
    known(world).iter().map(|losses| losses.lost).collect()
}

fn served() -> (World, Daemon) {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    (world, daemon)
}

#[test]
fn what_a_server_tells_is_in_the_record_before_anything_is_served() {
    let (mut world, mut daemon) = pairs();
    cut(&mut world, "s2:1/v");
    daemon.run(&mut world, start()).unwrap();
    let told: Vec<u64> = known(&world).iter().map(|losses| losses.told).collect();
    assert_eq!((told, lost(&world)), (vec![0, 1, 0, 0], vec![false; 4]));
    assert_eq!(world.spec().memory.shown, Some(world.boot));
}

#[test]
fn one_that_lost_writes_while_no_daemon_ran_is_stale_and_its_sibling_is_not() {
    let (mut world, _) = served();
    cut(&mut world, "s1:1/v");
    let daemon = next_life(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Started));
    assert_eq!((states(&world), lost(&world)), (vec![OUT, IN, IN, IN], vec![false; 4]));
    // It is told once.
    next_life(&mut world);
    assert_eq!(states(&world), [OUT, IN, IN, IN]);
}

#[test]
fn a_node_that_has_lost_writes_serves_nothing_until_that_is_accepted() {
    let (mut world, _) = served();
    cut(&mut world, "s1:1/v");
    cut(&mut world, "s2:1/v");
    let mut daemon = next_life(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Started), "the other node is served");
    assert_eq!((states(&world), lost(&world)), (vec![IN; 4], vec![true, true, false, false]));
    // Neither another daemon nor a boot of this machine makes it whole.
    world.boot = Id([9; 16]);
    daemon = {
        drop(daemon);
        next_life(&mut world)
    };
    assert_eq!(lost(&world), [true, true, false, false]);
    let node = first(&world);
    let other = NodeSpec { start: world.spec().nodes[1].start, ..node.clone() };
    assert!(daemon.error(&mut world, accept(&other)).contains("has lost nothing"));
    assert!(
        daemon
            .error(&mut world, accept(&NodeSpec { start: NodeId(crate::units::Lba(7)), ..node.clone() }))
            .contains("no node")
    );
    daemon.run(&mut world, accept(&node)).unwrap();
    assert_eq!((lost(&world), daemon.steered.as_slice()), (vec![false; 4], &[Steer::AcceptLoss { node: 0 }][..]));
    // What its data path had said before comes too late to take that back.
    let volume = node.replicas[0].volume;
    let losses = vec![(volume, Losses { told: 1, lost: true })];
    let standings = vec![(volume, Standing::InSync)];
    let epoch = world.spec().epoch;
    daemon.event(Event::Regroup { name: "a".to_owned(), epoch, standings, losses, fresh: fresh() });
    daemon.settle(&mut world);
    assert_eq!(lost(&world), [false; 4]);
    next_life(&mut world);
    assert_eq!((states(&world), lost(&world)), (vec![IN; 4], vec![false; 4]));
}

#[test]
fn what_is_accepted_is_durable_first() {
    let (mut world, _) = served();
    cut(&mut world, "s1:1/v");
    cut(&mut world, "s2:1/v");
    let mut daemon = next_life(&mut world);
    world.broken.insert("save");
    let node = first(&world);
    assert!(daemon.error(&mut world, accept(&node)).contains("it broke"));
    assert!(daemon.steered.is_empty());
    world.broken.clear();
    daemon.run(&mut world, accept(&node)).unwrap();
    assert_eq!(daemon.steered.len(), 1);
}

#[test]
fn a_power_cut_of_the_whole_site_stops_nothing() {
    let (mut world, _) = served();
    FOUR.iter().for_each(|target| cut(&mut world, target));
    world.boot = Id([9; 16]);
    let daemon = next_life(&mut world);
    assert_eq!(daemon.state("a"), Some(State::Started));
    assert_eq!((states(&world), lost(&world)), (vec![IN; 4], vec![false; 4]));
    assert!(known(&world).iter().all(|losses| losses.told == 1));
}

#[test]
fn after_an_orderly_stop_there_is_nobody_to_miss_anything() {
    let (mut world, mut daemon) = served();
    daemon.run(&mut world, stop(false)).unwrap();
    assert_eq!(world.spec().memory.shown, None);
    FOUR.iter().for_each(|target| cut(&mut world, target));
    // A start that comes to nothing shows nothing.
    world.broken.insert("launch");
    daemon.error(&mut world, start());
    world.broken.clear();
    FOUR.iter().for_each(|target| cut(&mut world, target));
    daemon.run(&mut world, start()).unwrap();
    assert_eq!((states(&world), lost(&world)), (vec![IN; 4], vec![false; 4]));
    // One that was not in order is another matter.
    daemon.run(&mut world, stop(true)).unwrap();
    FOUR.iter().for_each(|target| cut(&mut world, target));
    daemon.run(&mut world, start()).unwrap();
    assert_eq!(lost(&world), [true; 4]);
}

#[test]
fn one_that_is_away_and_may_have_everything_is_waited_for() {
    let (mut world, _) = served();
    cut(&mut world, "s1:1/v");
    world.reach("s2:1/v", false);
    let mut daemon = next_life(&mut world);
    for _ in 0..limits::PATIENT_TRIES + 1 {
        daemon.pass(&mut world);
    }
    let why = daemon.why("a");
    for word in ["node n-0", "s2:1/v may have", "dst accept-loss a n-0"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    // The other node is served meanwhile.
    assert_eq!((daemon.state("a"), states(&world)), (Some(State::Started), vec![IN; 4]));
    assert_eq!(world.late, BTreeSet::from([0]));
    let mut other = world.clone();
    other.reach("s2:1/v", true);
    next_life(&mut other);
    assert_eq!((states(&other), lost(&other)), (vec![OUT, IN, IN, IN], vec![false; 4]));
    // Or the operator has given it up.
    let node = first(&world);
    daemon.run(&mut world, accept(&node)).unwrap();
    daemon.pass(&mut world);
    assert!(matches!(daemon.steered.last(), Some(Steer::Arrive { node: 0, .. })), "{:?}", daemon.steered);
    assert_eq!((states(&world), world.spec().memory.has_lost(node.replicas[0].volume)), (vec![IN, OUT, IN, IN], false));
}

#[test]
fn what_is_told_while_it_is_served_is_kept() {
    let (mut world, mut daemon) = served();
    let spec = world.spec();
    let volume = spec.nodes[0].replicas[1].volume;
    let standings: Vec<(Id, Standing)> =
        spec.replicas().map(|(_, replica)| (replica.volume, Standing::InSync)).collect();
    let losses = vec![(volume, Losses { told: 1, lost: false }), (Id([66; 16]), Losses::default())];
    daemon.event(Event::Regroup { name: "a".to_owned(), epoch: Epoch(1), standings, losses, fresh: fresh() });
    daemon.settle(&mut world);
    cut(&mut world, "s2:1/v");
    assert_eq!(world.spec().memory.volumes.len(), 4, "what is not the array's is forgotten");
    next_life(&mut world);
    assert_eq!((states(&world), lost(&world)), (vec![IN; 4], vec![false; 4]), "that one is known");
}
