//! Two machines that both know an array, or come to: starts, take-overs, imports, stops, deaths, lost replicas, in any order, each step of each at
//! any moment. The world looks at every launch: nothing is served that has missed a write, under no epoch twice.

use super::*;
use crate::control::command::Import;

const HOSTS: [Id; 2] = [HOST, OTHER];

/// A small generator (xorshift64*).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % bound
    }
}

fn turn(world: &mut World, host: Id) {
    if world.host != host {
        world.go_to(host);
    }
}

fn import(target: &str) -> Command {
    Command::Import(Import { target: target.to_owned(), name: None, force: false })
}

/// A data path of this machine leaves a replica, if it serves: acknowledged writes miss it as soon as that is durable.
fn leave_one(world: &World, daemon: &mut Daemon, chance: &mut Chance) {
    // It asks for one change at a time, and knows what the one before has made durable.
    if daemon.state("a") != Some(State::Started) || !daemon.todo.is_empty() {
        return;
    }
    let spec = world.spec();
    let at = chance.below(2);
    if world.late.contains(&at) {
        return;
    }
    let node = &spec.nodes[at];
    let in_sync: Vec<Id> =
        node.replicas.iter().filter(|replica| replica.state.is_in_sync()).map(|replica| replica.volume).collect();
    let gone = in_sync[chance.below(in_sync.len())];
    let standing = |volume, state: ReplicaState| match state.is_in_sync() && (volume != gone || in_sync.len() == 1) {
        true => (volume, Standing::InSync),
        false => (volume, Standing::Stale),
    };
    let standings = spec.replicas().map(|(_, replica)| standing(replica.volume, replica.state)).collect();
    let (name, epoch, losses) = ("a".to_owned(), spec.epoch, Vec::new());
    daemon.event(Event::Regroup { name, epoch, standings, losses, fresh: fresh() });
}

/// The machine's daemon dies, and its data path with it.
fn dies(world: &mut World, daemon: &mut Daemon) {
    if world.runs_on.get("a") == Some(&world.host) {
        world.running.clear();
        world.runs_on.clear();
    }
    *daemon = Daemon::boot(world);
}

/// What a data path hears from servers that another machine has claimed.
fn is_fenced(world: &World, daemon: &mut Daemon) {
    let taken = |volume: &&Volume| volume.claim.is_some_and(|claim| claim.host != world.host);
    if daemon.state("a") == Some(State::Started)
        && let Some(volume) = world.volumes.values().find(taken).map(|volume| volume.id)
    {
        suspend::news(daemon, world, News::Fenced { volume });
    }
}

fn walk(seed: u64) -> usize {
    let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    turn(&mut world, OTHER);
    let mut daemons = [daemon, Daemon::boot(&world)];
    world.unsteady = true;
    for _ in 0..120 {
        let which = chance.below(2);
        let daemon = &mut daemons[which];
        turn(&mut world, HOSTS[which]);
        let target = FOUR[chance.below(4)];
        match chance.below(24) {
            0 => drop(daemon.ask(start())),
            1 | 2 => drop(daemon.ask(start_on(TAKE))),
            3 => drop(daemon.ask(stop(false))),
            4 => drop(daemon.ask(import(target))),
            5 => world.reach(target, chance.below(3) != 0),
            6 => dies(&mut world, daemon),
            7 | 8 => leave_one(&world, daemon, &mut chance),
            9 => is_fenced(&world, daemon),
            10 if daemon.owner.next_wake() != Time::NEVER => {
                daemon.now = daemon.now.max(daemon.owner.next_wake());
                daemon.event(Event::Tick);
            }
            _ => drop(daemon.step(&mut world)),
        }
    }
    // When all is well again a third machine can have it.
    for target in FOUR {
        world.reach(target, true);
    }
    for (host, daemon) in HOSTS.into_iter().zip(&mut daemons) {
        turn(&mut world, host);
        daemon.settle(&mut world);
    }
    turn(&mut world, Id([202; 16]));
    let mut third = Daemon::boot(&world);
    let found = FOUR.into_iter().any(|target| third.run(&mut world, import(target)).is_ok());
    assert!(found, "nobody can import it");
    third.run(&mut world, start_on(TAKE)).unwrap();
    world.epochs.len()
}

#[test]
fn whoever_takes_it_from_whom_nothing_stale_is_served() {
    let mut launched = 0;
    for seed in 1..4000 {
        let walked = std::panic::catch_unwind(|| walk(seed));
        launched += walked.unwrap_or_else(|_| panic!("seed {seed}"));
    }
    assert!(launched > 4000 * 3, "{launched}: it hardly ever comes to a start");
}

#[test]
fn what_the_former_host_leaves_while_it_is_taken_over_is_noticed() {
    for steps in 0..6 {
        let (mut world, mut daemon) = pairs();
        daemon.run(&mut world, start()).unwrap();
        let mut other = copied(&mut world);
        other.settle(&mut world);
        other.run(&mut world, stop(false)).unwrap();
        let ticket = other.ask(start_on(TAKE));
        for _ in 0..steps {
            other.step(&mut world);
        }
        // Somebody waits for a write that only one of the two gets.
        turn(&mut world, HOST);
        let volumes: Vec<Id> = world.spec().replicas().map(|(_, replica)| replica.volume).collect();
        let states = [Standing::InSync, Standing::Stale, Standing::InSync, Standing::InSync];
        daemon.event(regrouped(volumes.into_iter().zip(states).collect()));
        daemon.settle(&mut world);
        let left = daemon.regrouped == [Saved::All];
        turn(&mut world, OTHER);
        other.settle(&mut world);
        match other.replies.remove(&ticket).unwrap() {
            Ok(_) => assert!(!left, "it could not be made durable, so nothing was acknowledged: {steps}"),
            Err(why) => assert!(left, "{steps}: {why}"),
        }
    }
}

#[test]
fn what_a_record_says_of_a_stop_is_not_so_after_another_host() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    daemon.run(&mut world, stop(false)).unwrap();
    daemon.run(&mut world, start()).unwrap();
    assert!(world.clean, "nobody else has had it");
    daemon.run(&mut world, stop(false)).unwrap();
    turn(&mut world, OTHER);
    let mut other = Daemon::boot(&world);
    other.run(&mut world, import(FOUR[0])).unwrap();
    other.run(&mut world, start_on(TAKE)).unwrap();
    dies(&mut world, &mut other);
    turn(&mut world, HOST);
    daemon.run(&mut world, start_on(TAKE)).unwrap();
    assert!(!world.clean, "what the other one had in flight may be on some of them");
}

#[test]
fn a_change_that_only_the_record_knows_is_not_gone_on_with() {
    let (mut world, mut daemon) = pairs();
    daemon.run(&mut world, start()).unwrap();
    let volumes: Vec<Id> = world.spec().replicas().map(|(_, replica)| replica.volume).collect();
    let states =
        |first| volumes.iter().copied().zip([first, Standing::InSync, Standing::InSync, Standing::InSync]).collect();
    daemon.event(regrouped(states(Standing::Stale)));
    daemon.settle(&mut world);
    turn(&mut world, OTHER);
    let mut other = Daemon::boot(&world);
    other.run(&mut world, import(FOUR[0])).unwrap();
    other.run(&mut world, start_on(TAKE)).unwrap();
    // The former host has copied what its first replica lacked, and cannot say so any more.
    turn(&mut world, HOST);
    daemon.event(regrouped(states(Standing::InSync)));
    daemon.settle(&mut world);
    assert!(daemon.regrouped.last().is_some_and(|saved| *saved != Saved::All));
    assert_eq!(world.spec().nodes[0].replicas[0].state, IN, "its record is written first");
    // The other one has served meanwhile, and dies.
    turn(&mut world, OTHER);
    dies(&mut world, &mut other);
    turn(&mut world, HOST);
    daemon = Daemon::boot(&world);
    let _ = daemon.run(&mut world, stop(true));
    let why = daemon.error(&mut world, start_on(TAKE));
    assert!(why.contains("was never completed") && why.contains("dst import"), "{why}");
    daemon.run(&mut world, import(FOUR[0])).unwrap();
    daemon.run(&mut world, start_on(TAKE)).unwrap();
    assert!(!world.spec().nodes[0].replicas[0].state.is_in_sync());
}
