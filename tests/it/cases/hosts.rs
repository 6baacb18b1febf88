//! Those of two hosts that want one array.

use crate::bench::{SECTORS, VOLUME};
use dst::control::command::{Command, Import, Refusal, Terms};
use dst::control::replica::{Generation, ReplicaSpec, ReplicaState};
use dst::control::spec::{Alg, ArraySpec, NodeSpec, Phase, RunOptions};
use dst::control::target::Target;
use dst::engine::array as owners;
use dst::engine::replicas::Standing as ReplicaStanding;
use dst::errno::Errno;
use dst::store::session::Conn;
use dst::store::state::{Book, Part, State};
use dst::store::volume::{self, Slot, Volume};
use dst::units::{Epoch, Extent, Id, Lba, NodeId, Time};
use dst::wire::frame::{Header, Op};
use dst::wire::session::{Hello, features};
use dst::wire::volume::{Claim, Member};

pub(super) fn a_claim_waits_for_what_the_former_host_has_on_the_disk_and_ends_its_connections() {
    let (name, instance, boot) = ("v".to_owned(), Id([2; 16]), Id([6; 16]));
    let config = volume::Config { name, id: VOLUME, instance, boot, sparse: true, write_through: false };
    let mut volume = Volume::new(config, SECTORS, Book::new(VOLUME, (0, State::default())), None);
    let array = Id([10; 16]);
    let member = Member { id: array, name: "storage".to_owned(), node: "n-0".to_owned() };
    let tell = |volume: &mut Volume, event: volume::Event<'_>| {
        volume.handle(event);
        let mut effects = Vec::new();
        while let Some(effect) = volume.poll_effect() {
            match effect {
                volume::Effect::Save(_) => volume.handle(volume::Event::Saved { part: Part::State, result: Ok(()) }),
                other => effects.push(other),
            }
        }
        effects
    };
    let greet = |volume: &mut Volume, conn: u64, channel: u16, host: u8| {
        let (versions, features, name) = ((1, 1), features::DATA_CRC, "v".to_owned());
        let (session, host, epoch) = (Id([host; 16]), Id([host; 16]), Epoch(u64::from(host)));
        let hello = Hello { versions, features, array, session, host, channel, volume: name };
        tell(volume, volume::Event::Attach { conn: Conn(conn), hello: &hello, epoch, assigned: Some(&member) })
    };
    let welcomes = |effects: &[volume::Effect], of: u64| {
        effects.iter().any(|effect| matches!(effect, volume::Effect::Welcome { conn, .. } if *conn == Conn(of)))
    };
    assert!(welcomes(&greet(&mut volume, 1, 1, 1), 1));
    let header = Header::request(Op::Discard, 1, 0, Epoch(1), Extent::new(8, 8));
    let request = volume::Event::Request { conn: Conn(1), slot: Slot(0), header: &header, intact: true };
    let work = tell(&mut volume, request).into_iter().find_map(|effect| match effect {
        volume::Effect::Disk(work) => Some(work.job),
        _ => None,
    });
    // The next host's claim has another channel.
    let told = greet(&mut volume, 2, 0, 2);
    assert!(told.iter().any(|effect| matches!(effect, volume::Effect::Close { conn: Conn(1), .. })), "{told:?}");
    assert!(!welcomes(&told, 2), "something of the former one is on the disk");
    let told = tell(&mut volume, volume::Event::DiskDone { job: work.expect("it goes to the disk"), result: Ok(()) });
    assert!(welcomes(&told, 2), "{told:?}");
}

/// Two machines, and an array of one node with two replicas, as far as starts go.
struct Machines {
    volumes: [(Option<Claim>, Option<String>); 2],
    away: Option<usize>,
    owners: [owners::Owner; 2],
    records: [Option<ArraySpec>; 2],
    /// What the first machine's data path wants to be known before the second one claims anything.
    meanwhile: Option<Vec<(Id, ReplicaStanding)>>,
    launched: Option<ArraySpec>,
    claims: u8,
}

const PAIR: [Id; 2] = [VOLUME, Id([8; 16])];
const TAKE: Terms = Terms { take_over: true, force: false };

impl Machines {
    fn new() -> Machines {
        let target = |at: usize| -> Target { format!("s{at}:1/v").parse().unwrap() };
        let replica = |at: usize| ReplicaSpec { target: target(at), volume: PAIR[at], state: ReplicaState::InSync };
        let node = NodeSpec {
            start: NodeId(Lba(0)),
            sectors: 64,
            replicas: vec![replica(0), replica(1)],
            generation: Generation::first(Id([10; 16])),
            suspend: None,
            transfer: None,
            scrub: None,
        };
        let spec = ArraySpec {
            name: "a".to_owned(),
            id: Id([10; 16]),
            phase: Phase::Stopped,
            alg: Alg::Linear,
            chunk: 0,
            block: 512,
            epoch: Epoch(0),
            nodes: vec![node],
            clean: true,
            memory: dst::engine::losses::Memory::default(),
            debts: Vec::new(),
            migrations: Vec::new(),
            migrated: 0,
            grow: false,
            run: RunOptions::default(),
        };
        let mut machines = Machines {
            volumes: Default::default(),
            away: None,
            owners: Default::default(),
            records: [Some(spec), None],
            meanwhile: None,
            launched: None,
            claims: 0,
        };
        (0..2).for_each(|machine| machines.boot(machine));
        machines.start(0, Terms::default()).unwrap();
        machines
    }

    fn host(machine: usize) -> Id {
        Id([50 + u8::try_from(machine).unwrap(); 16])
    }

    fn boot(&mut self, machine: usize) {
        let stopped = |spec: ArraySpec| ("a".to_owned(), Ok(ArraySpec { phase: Phase::Stopped, ..spec }));
        let records = self.records[machine].clone().map(stopped).into_iter().collect();
        self.owners[machine] = owners::Owner::default();
        let (host, boot) = (Machines::host(machine), Id([7; 16]));
        self.tell(machine, owners::Event::Boot { host, boot, wall: 0, records }).unwrap();
    }

    fn start(&mut self, machine: usize, terms: Terms) -> Result<(), Refusal> {
        self.ask(machine, Command::Start { name: "a".to_owned(), run: RunOptions::default(), terms })
    }

    fn import(&mut self, machine: usize) {
        let import = Import { target: "s0:1/v".to_owned(), name: None, force: false };
        self.ask(machine, Command::Import(import)).unwrap();
    }

    fn ask(&mut self, machine: usize, command: Command) -> Result<(), Refusal> {
        let (ticket, fresh) = (owners::Ticket(1), self.fresh());
        self.tell(machine, owners::Event::Command { ticket, command, fresh })
    }

    /// The first machine's data path wants this to be durable.
    fn regroup(&mut self, standings: [ReplicaStanding; 2]) {
        let (name, epoch, fresh) = ("a".to_owned(), Epoch(1), self.fresh());
        let standings = PAIR.into_iter().zip(standings).collect();
        self.tell(0, owners::Event::Regroup { name, epoch, standings, losses: Vec::new(), fresh }).unwrap();
    }

    fn fresh(&mut self) -> Id {
        self.claims += 1;
        Id([100 + self.claims; 16])
    }

    /// Everything is done at once. What was answered, if anything.
    fn tell(&mut self, machine: usize, event: owners::Event) -> Result<(), Refusal> {
        let mut answer = Ok(());
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for effect in self.owners[machine].handle(event, Time(0)) {
                match effect {
                    owners::Effect::Reply(_, result) => answer = result.map(drop),
                    owners::Effect::Work(job, work) => {
                        let outcome = self.perform(machine, work);
                        events.push(owners::Event::Done { job, outcome, fresh: self.fresh() });
                    }
                    _ => {}
                }
            }
        }
        answer
    }

    fn perform(&mut self, machine: usize, work: owners::Work) -> owners::Outcome {
        let at = |target: &Target| usize::from(target.to_string().starts_with("s1"));
        let away = self.away;
        let silent = |at: usize| match away == Some(at) {
            true => Err(Refusal::new(Errno::ETIMEDOUT, "silent")),
            false => Ok(()),
        };
        let fenced = || Refusal::new(Errno::EBADE, "fenced");
        match work {
            owners::Work::Survey(targets) => {
                let look = |target: &Target| {
                    let at = at(target);
                    silent(at)?;
                    let member = Member { id: Id([10; 16]), name: "a".to_owned(), node: "n-0".to_owned() };
                    let (claim, label) = self.volumes[at].clone();
                    let (volume, identity, member) = (PAIR[at], at.to_string(), Some(member));
                    Ok(owners::Found { sectors: 64, identity, volume, member, claim, label, losses: 0 })
                };
                owners::Outcome::Surveyed(targets.iter().map(look).collect())
            }
            owners::Work::Save(spec) => {
                self.records[machine] = Some(*spec);
                owners::Outcome::Saved(Ok(()))
            }
            owners::Work::Claim(_, epoch, targets) => {
                if let Some(standings) = self.meanwhile.take() {
                    self.regroup([standings[0].1, standings[1].1]);
                }
                let claim = Claim { epoch, owner: self.fresh(), host: Machines::host(machine) };
                let mut take = |target: &Target| {
                    let at = at(target);
                    silent(at)?;
                    if self.volumes[at].0.is_some_and(|held| held.epoch >= epoch) {
                        return Err(fenced());
                    }
                    self.volumes[at].0 = Some(claim);
                    Ok(())
                };
                owners::Outcome::Claimed(claim, targets.iter().map(|(target, _)| take(target)).collect())
            }
            owners::Work::Label(_, claim, labels) => owners::Outcome::Each(self.label(claim, labels, at)),
            owners::Work::Regroup(spec, claim, labels) => {
                self.records[machine] = Some(*spec);
                owners::Outcome::Regrouped(Ok(()), self.label(claim, labels, at))
            }
            owners::Work::Launch(spec, ..) => {
                self.launched = Some(*spec);
                owners::Outcome::Launched(Ok("/dev/a".to_owned()))
            }
            owners::Work::Halt { .. } => owners::Outcome::Halted(Ok(true)),
            other => panic!("{other:?}"),
        }
    }

    fn label(
        &mut self,
        claim: Claim,
        labels: Vec<(Target, String)>,
        at: impl Fn(&Target) -> usize,
    ) -> Vec<Result<(), Refusal>> {
        let put = |(target, text): (Target, String)| {
            let volume = &mut self.volumes[at(&target)];
            if volume.0 != Some(claim) {
                return Err(Refusal::new(Errno::EBADE, "fenced"));
            }
            volume.1 = Some(text);
            Ok(())
        };
        labels.into_iter().map(put).collect()
    }
}

pub(super) fn a_take_over_serves_nothing_before_every_replica_has_accepted_it() {
    let mut machines = Machines::new();
    machines.import(1);
    machines.away = Some(1);
    machines.start(1, TAKE).unwrap_err();
    machines.away = None;
    machines.start(1, TAKE).unwrap();
}

pub(super) fn what_the_former_host_leaves_before_it_is_claimed_is_noticed() {
    let mut machines = Machines::new();
    machines.import(1);
    let standings = [ReplicaStanding::Stale, ReplicaStanding::InSync];
    machines.meanwhile = Some(PAIR.into_iter().zip(standings).collect());
    machines.start(1, TAKE).unwrap_err();
    machines.import(1);
    machines.start(1, TAKE).unwrap();
    let states = machines.launched.unwrap().nodes[0].replicas.iter().map(|of| of.state).collect::<Vec<_>>();
    assert_eq!(states, [ReplicaState::Stale, ReplicaState::InSync]);
}

pub(super) fn a_change_that_only_the_record_knows_is_not_taken_over_with() {
    let mut machines = Machines::new();
    machines.regroup([ReplicaStanding::Stale, ReplicaStanding::InSync]);
    machines.import(1);
    machines.start(1, TAKE).unwrap();
    // Its labels are refused.
    machines.regroup([ReplicaStanding::InSync; 2]);
    machines.boot(0);
    machines.start(0, TAKE).unwrap_err();
    machines.import(0);
    machines.start(0, TAKE).unwrap();
    assert_eq!(machines.launched.unwrap().nodes[0].replicas[0].state, ReplicaState::Stale);
}

pub(super) fn an_array_was_not_stopped_in_order_if_another_host_has_had_it_since() {
    let mut machines = Machines::new();
    machines.ask(0, Command::Stop { name: "a".to_owned(), force: false }).unwrap();
    machines.import(1);
    machines.start(1, TAKE).unwrap();
    machines.start(0, TAKE).unwrap();
    assert!(!machines.launched.unwrap().clean);
}
