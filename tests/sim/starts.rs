//! Who begins to serve: the production owner of arrays decides, over simulated servers. It is asked to start the array that its machine has a record of, to take it over, or to
//! import it from what the volumes know.
//!
//! Contract: what it says is to be done takes time and is done by the servers of the world; its record is durable when it is told so.
//! Whoever is refused tries again, until somebody serves.

use std::collections::BTreeMap;

use dst::control::command::{Command, Import, Refusal, Terms};
use dst::control::spec::{ArraySpec, Phase, RunOptions};
use dst::engine::array::{Effect, Event as Told, JobId, Outcome, Owner, Ticket, Work};
use dst::errno::Errno;
use dst::units::{Id, Time};
use dst::wire::volume::Claim;

use crate::errands::{Answer, Ask, Asker};
use crate::hosts::host_id;
use crate::links::session;
use crate::world::{Event, MILLI, World};

/// A start that was refused so often takes what is in its way.
const PATIENCE: u32 = 20;

/// Nobody is refused so often in a world that comes to rest.
const REFUSALS_MAX: u32 = 3000;

/// Somebody who begins to serve.
pub(crate) struct Start {
    number: u32,
    pub(crate) machine: usize,
    /// From whoever has it.
    pub(crate) take: bool,
    /// It looks for what there is.
    pub(crate) importing: bool,
    /// Those who used the device on this machine may live.
    pub(crate) outlived: bool,
    /// Of its last claim.
    pub(crate) life: u32,
    /// Another machine has begun to claim since.
    pub(crate) is_taken: bool,
    owner: Owner,
    jobs: BTreeMap<u64, Job>,
    refusals: u32,
    imports_next: bool,
}

/// Work under way.
struct Job {
    kind: Kind,
    answers: Vec<Option<Answer>>,
}

enum Kind {
    Survey,
    Claim(Claim),
    Label,
    Save(Box<ArraySpec>),
}

impl World {
    /// The daemon of the machine that has served begins again.
    pub(crate) fn start_here(&mut self) {
        let machine = self.daemon.machine;
        if !self.hosts.served && self.hosts.records[machine].is_none() {
            self.keep_record();
        }
        if !self.hosts.starts.iter().any(|start| start.machine == machine) {
            self.begin_start(machine, false);
        }
    }

    pub(crate) fn begin_start(&mut self, machine: usize, take: bool) {
        let number = self.hosts.next_life();
        let (owner, jobs) = (Owner::default(), BTreeMap::new());
        let (importing, outlived, life) = (true, false, 0);
        let imports_next = take && self.rng.percent(60) || self.hosts.records[machine].is_none();
        let (refusals, start) = (0, number);
        self.hosts.starts.push(Start {
            number,
            machine,
            take,
            importing,
            outlived,
            life,
            is_taken: false,
            owner,
            jobs,
            refusals,
            imports_next,
        });
        self.boot_start(start);
        self.try_again(start);
    }

    fn start_mut(&mut self, number: u32) -> Option<&mut Start> {
        self.hosts.starts.iter_mut().find(|start| start.number == number)
    }

    fn boot_id(&self, machine: usize) -> Id {
        Id([self.hosts.boot(machine); 16])
    }

    /// Its owner knows what the machine has a record of.
    fn boot_start(&mut self, number: u32) {
        let Some(machine) = self.start_mut(number).map(|start| start.machine) else { return };
        // Whatever was begun there was given up: 'dst stop'.
        let stopped = |spec| ("a".to_owned(), Ok(ArraySpec { phase: Phase::Stopped, ..spec }));
        let records = self.hosts.records[machine].clone().map(stopped);
        let (host, boot, records) = (host_id(machine), self.boot_id(machine), records.into_iter().collect());
        if let Some(start) = self.start_mut(number) {
            start.owner = Owner::default();
        }
        self.tell_start(number, Told::Boot { host, boot, wall: 0, records });
    }

    /// It is asked once more.
    pub(crate) fn try_again(&mut self, number: u32) {
        let target = self.rng.index(self.nodes.len());
        let (Some(target), fresh) = (self.place_of(target), self.hosts.fresh()) else { return };
        let Some((machine, take, importing)) =
            self.start_mut(number).map(|start| (start.machine, start.take, start.imports_next))
        else {
            return;
        };
        let boot = self.boot_id(machine);
        let outlived = self.hosts.records[machine].as_ref().is_some_and(|spec| spec.memory.has_outlived(boot));
        let Some(start) = self.start_mut(number) else { return };
        (start.importing, start.outlived) = (importing, outlived);
        let command = match importing {
            true => Command::Import(Import { target: target.to_string(), name: None, force: false }),
            false => {
                let terms = Terms { take_over: take, force: false };
                Command::Start { name: "a".to_owned(), run: RunOptions::default(), terms }
            }
        };
        self.tell_start(number, Told::Command { ticket: Ticket(1), command, fresh });
    }

    fn tell_start(&mut self, number: u32, told: Told) {
        let now = Time(self.now);
        let effects = self.start_mut(number).map(|start| start.owner.handle(told, now)).unwrap_or_default();
        for effect in effects {
            match effect {
                Effect::Reply(_, Ok(_)) => {
                    if let Some(start) = self.start_mut(number) {
                        start.imports_next = false;
                    }
                    self.try_again(number);
                }
                Effect::Reply(_, Err(why)) => self.start_refused(number, &why),
                Effect::Work(job, work) => self.start_works(number, job, work),
                Effect::Regrouped(..) | Effect::Steer(..) | Effect::Exit => {}
            }
        }
    }

    fn start_works(&mut self, number: u32, job: JobId, work: Work) {
        let Some(start) = self.start_mut(number) else { return };
        let machine = start.machine;
        let (kind, asks): (Kind, Vec<_>) = match work {
            Work::Survey(targets) => (Kind::Survey, targets.into_iter().map(|at| (at, Ask::Look)).collect()),
            Work::Claim(_, epoch, targets) => {
                let life = self.hosts.next_life();
                let claim = Claim { epoch, owner: session(life), host: host_id(machine) };
                self.claims_begin(number, life, machine);
                (Kind::Claim(claim), targets.into_iter().map(|(at, of)| (at, Ask::Claim(claim, of))).collect())
            }
            Work::Label(_, claim, labels) => {
                (Kind::Label, labels.into_iter().map(|(at, text)| (at, Ask::Label(claim, text))).collect())
            }
            Work::Save(spec) => {
                let longest = if self.rng.one_in(4) { 100 * MILLI } else { 10 * MILLI };
                let at = self.now + self.rng.below(longest);
                self.queue.push(at, Event::Written { start: number, job: job.0 });
                (Kind::Save(spec), Vec::new())
            }
            Work::Launch(spec, claim, _) => {
                let at = self.hosts.starts.iter().position(|start| start.number == number);
                let Some(start) = at.map(|at| self.hosts.starts.remove(at)) else { return };
                return self.launch(&start, &spec, claim);
            }
            other => return self.fail("hosts", format!("a start wants {other:?}")),
        };
        let answers = asks.iter().map(|_| None).collect();
        let nothing = asks.is_empty() && !matches!(kind, Kind::Save(_));
        if let Some(start) = self.start_mut(number) {
            start.jobs.insert(job.0, Job { kind, answers });
        }
        for (at, (place, ask)) in asks.into_iter().enumerate() {
            match self.target_at(&place) {
                Some(target) => {
                    self.begin_errand(Asker::Start { start: number, job: job.0, at }, machine, target, ask);
                }
                None => self.fail("hosts", format!("nobody knows {place}")),
            }
        }
        if nothing {
            self.job_done(number, job.0);
        }
    }

    /// From now on other daemons may find that their volumes are another's.
    fn claims_begin(&mut self, number: u32, life: u32, machine: usize) {
        for start in &mut self.hosts.starts {
            start.is_taken |= start.machine != machine;
            if start.number == number {
                (start.life, start.is_taken) = (life, false);
            }
        }
        for other in self.lives_elsewhere(machine) {
            self.judge.taken(self.now, other);
        }
    }

    /// An answer to what was asked.
    pub(crate) fn job_answered(&mut self, (number, job, at): (u32, u64, usize), answer: Answer) {
        let Some(of) = self.start_mut(number).and_then(|start| start.jobs.get_mut(&job)) else { return };
        of.answers[at] = Some(answer);
        if of.answers.iter().all(Option::is_some) {
            self.job_done(number, job);
        }
    }

    /// A record is durable.
    pub(crate) fn written(&mut self, number: u32, job: u64) {
        self.job_done(number, job);
    }

    fn job_done(&mut self, number: u32, job: u64) {
        let fresh = self.hosts.fresh();
        let Some(start) = self.start_mut(number) else { return };
        let machine = start.machine;
        let Some(Job { kind, answers }) = start.jobs.remove(&job) else { return };
        let answers = answers.into_iter().flatten();
        let outcome = match kind {
            Kind::Survey => {
                let missing = || Refusal::new(Errno::EIO, "nothing was found");
                let found = |answer: Answer| answer.and_then(|found| found.map(|found| *found).ok_or_else(missing));
                Outcome::Surveyed(answers.map(found).collect())
            }
            Kind::Claim(claim) => Outcome::Claimed(claim, answers.map(|answer| answer.map(drop)).collect()),
            Kind::Label => Outcome::Each(answers.map(|answer| answer.map(drop)).collect()),
            Kind::Save(spec) => {
                self.hosts.records[machine] = Some(*spec);
                Outcome::Saved(Ok(()))
            }
        };
        self.tell_start(number, Told::Done { job: JobId(job), outcome, fresh });
    }

    /// It is tried again, as the text of the refusal says, or as somebody does who does not read it.
    fn start_refused(&mut self, number: u32, why: &Refusal) {
        self.trace.note(self.now, 262, u64::from(number));
        self.trace.say(self.now, || format!("!! a start is refused: {}", why.text));
        let served_elsewhere = |machine: usize| self.daemon.is_up() && self.daemon.machine != machine;
        let Some(at) = self.hosts.starts.iter().position(|start| start.number == number) else { return };
        let (machine, take, importing) = {
            let start = &self.hosts.starts[at];
            (start.machine, start.take, start.importing)
        };
        if !take && served_elsewhere(machine) {
            drop(self.hosts.starts.remove(at));
            return;
        }
        if take && !importing {
            self.stats.retaken += 1;
            self.stats.outrun += u64::from(why.text.contains("gone on with the array while"));
        }
        let others_take = self.hosts.starts.iter().any(|start| start.take);
        let start = &mut self.hosts.starts[at];
        start.refusals += 1;
        if start.refusals > REFUSALS_MAX {
            return self.fail("liveness", format!("nobody can start the array: {}", why.text));
        }
        if why.text.contains("another host") && start.refusals > PATIENCE && !others_take {
            start.take = true;
        }
        // The record here is in the way of what the volumes know.
        let unlike = importing && why.errno == Errno::EEXIST;
        let forget = unlike && (why.text.contains("split brain") || self.rng.percent(50));
        let imports = (take && self.rng.one_in(4)) || why.text.contains("dst import") || (importing && !unlike);
        if let Some(start) = self.start_mut(number) {
            start.imports_next = imports || forget;
        }
        if forget {
            self.hosts.records[machine] = None;
            self.boot_start(number);
        }
        let longest = self.rng.pick(&[5, 50, 200]) * MILLI;
        let at = self.now + MILLI + self.rng.below(longest);
        self.queue.push(at, Event::TryAgain { start: number });
    }
}
