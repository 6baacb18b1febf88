//! What is asked of servers beside the connections of an array: what a volume is, a claim on it, a label for it.
//!
//! Contract: each question takes its own time on its way, and so does the answer. Who waits too long gives up; what was asked may be done all the
//! same, and later. Claims go through HELLO, labels through the rules of the volume, as in production; of one volume they arrive in
//! the order in which they were sent, but for what stands in a connection.

use dst::control::command::Refusal;
use dst::engine::array::Found;
use dst::errno::Errno;
use dst::store::volume::{Ask as Asked, Event as Told};
use dst::units::Extent;
use dst::wire::frame::{Header, Op, message_crc};
use dst::wire::session::{HELLO_BYTES, Hello};
use dst::wire::volume::{Claim, LabelPut, Member};

use crate::array::ARRAY;
use crate::net::{Body, Pipe};
use crate::server::{Accepted, id_of};
use crate::world::{Conn, Event, MILLI, World};

/// An answer is waited for this long.
const PATIENCE: u64 = 1200 * MILLI;

/// What is asked.
pub(crate) enum Ask {
    /// What the volume is.
    Look,
    /// A claim, with these features.
    Claim(Claim, u64),
    /// A label, under a claim.
    Label(Claim, String),
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Asker {
    /// Somebody who starts the array: a piece of his work.
    Start { start: u32, job: u64, at: usize },
    /// The owner of a data path.
    Owner { life: u32 },
}

/// The answer; of a look what was found.
pub(crate) type Answer = Result<Option<Box<Found>>, Refusal>;

pub(crate) struct Errand {
    asker: Asker,
    machine: usize,
    target: usize,
    ask: Ask,
    conn: Option<usize>,
    answer: Option<Answer>,
    /// Nobody waits for it any more.
    over: bool,
}

fn refused(errno: Errno, text: &str) -> Refusal {
    Refusal::new(errno, text)
}

impl World {
    /// Asks the server of a target for something.
    pub(crate) fn begin_errand(&mut self, asker: Asker, machine: usize, target: usize, ask: Ask) {
        let errand = self.hosts.errands.len();
        self.hosts.errands.push(Errand { asker, machine, target, ask, conn: None, answer: None, over: false });
        let longest = if self.rng.one_in(8) { 60 * MILLI } else { 2 * MILLI };
        let at = self.now + self.plan.latency + self.rng.below(longest);
        // In the order in which they were sent.
        let at = at.max(self.hosts.last_errand[target]);
        self.hosts.last_errand[target] = at;
        self.queue.push(at, Event::Errand { errand });
        self.queue.push(self.now + PATIENCE, Event::GivenUp { errand });
    }

    /// It has come to the server, if it does.
    pub(crate) fn run_errand(&mut self, errand: usize) {
        let Errand { machine, target, over, .. } = self.hosts.errands[errand];
        let number = self.nodes[target].server;
        let server = &self.servers[number];
        if !server.up || server.is_ending() {
            return self.answer_errand(errand, Err(refused(Errno::ECONNREFUSED, "the server is not there")));
        }
        if server.deaf > 0 || self.hosts.is_blind(machine, number, self.now) {
            return;
        }
        if server.paused > 0 {
            return self.queue.push(self.now + 20 * MILLI, Event::Errand { errand });
        }
        let dumb = server.dumb > 0;
        match &self.hosts.errands[errand].ask {
            Ask::Look if dumb || over => {}
            Ask::Look => {
                let found = self.found(target).map(|found| Some(Box::new(found)));
                self.answer_errand(errand, found.ok_or_else(|| refused(Errno::ECONNRESET, "the server has died")));
            }
            Ask::Claim(claim, features) => {
                let (claim, features) = (*claim, *features);
                if !over {
                    self.knock(errand, target, claim, features);
                }
            }
            Ask::Label(claim, text) => {
                let (name, epoch, owner, label) = (format!("v{target}"), claim.epoch, claim.owner, text.clone());
                let put = LabelPut { name, array: ARRAY, epoch, owner, label };
                let number = errand as u64 + 1;
                self.trace.say(self.now, || format!("  server v{target} is given a label, epoch {}", epoch.0));
                self.tell_rules(target, Told::Ask { number, ask: Asked::Label(&put) });
            }
        }
    }

    /// A connection for a claim.
    fn knock(&mut self, errand: usize, target: usize, claim: Claim, features: u64) {
        let hello = Hello {
            versions: (1, 1),
            features,
            array: ARRAY,
            session: claim.owner,
            host: claim.host,
            channel: 0,
            volume: format!("v{target}"),
        };
        let conn = self.conns.len();
        self.trace.say(self.now, || format!("  v{target} is claimed on c{conn}, epoch {}", claim.epoch.0));
        let (up, down, accepted) = (Pipe::default(), Pipe::default(), Some(Accepted::new()));
        let (shard, life) = (usize::MAX, u32::MAX);
        self.conns.push(Conn { node: target, shard, life, up, down, accepted, silent: false, logged: false });
        self.hosts.errands[errand].conn = Some(conn);
        self.hosts.claiming.insert(conn, errand);
        let body = hello.encode();
        let header = Header::request(Op::Hello, 0, 0, claim.epoch, Extent::default());
        let header = header.with_body(u32::try_from(HELLO_BYTES).unwrap_or(0), message_crc(&body));
        self.send_up(conn, &header, Body::Message(body.to_vec()));
    }

    /// Something has come down a connection that was made for a claim.
    pub(crate) fn claim_answered(&mut self, conn: usize) {
        let target = self.conns[conn].node;
        let Some(errand) = self.hosts.claiming.get(&conn).copied() else { return };
        if self.servers[self.nodes[target].server].dumb > 0 {
            return;
        }
        let Some(frame) = self.conns[conn].down.take(self.now) else { return };
        let result = match frame.body {
            Body::Message(_) => {
                Header::decode(&frame.header).map_err(|bad| bad.errno()).and_then(|reply| reply.result())
            }
            Body::End(error) => Err(error),
            _ => Err(Errno::EPROTO),
        };
        self.end_claim(conn);
        self.answer_errand(errand, result.map(|()| None).map_err(|errno| refused(errno, "the claim was refused")));
    }

    fn end_claim(&mut self, conn: usize) {
        if self.hosts.claiming.remove(&conn).is_some() {
            self.hang_up_client(conn, true);
        }
    }

    /// The rules of a volume have answered.
    pub(crate) fn label_answered(&mut self, number: u64, result: Result<(), (Errno, String)>) {
        let errand = usize::try_from(number - 1).unwrap_or(usize::MAX);
        let target = self.hosts.errands[errand].target;
        if self.servers[self.nodes[target].server].dumb == 0 {
            let result = result.map(|()| None).map_err(|(errno, text)| refused(errno, &text));
            self.answer_errand(errand, result);
        }
    }

    /// A server has died: whoever waits for it to write a label hears of that.
    pub(crate) fn labels_lost(&mut self, server: usize) {
        for errand in self.hosts.open_errands() {
            let Errand { target, ask, .. } = &self.hosts.errands[errand];
            if self.nodes[*target].server == server && matches!(ask, Ask::Label(..)) {
                self.answer_errand(errand, Err(refused(Errno::ECONNRESET, "the server has died")));
            }
        }
    }

    fn answer_errand(&mut self, errand: usize, answer: Answer) {
        let of = &mut self.hosts.errands[errand];
        if of.over || of.answer.is_some() {
            return;
        }
        of.answer = Some(answer);
        let longest = if self.rng.one_in(8) { 60 * MILLI } else { 2 * MILLI };
        self.queue.push(self.now + self.rng.below(longest), Event::Answered { errand });
    }

    /// Too long.
    pub(crate) fn errand_given_up(&mut self, errand: usize) {
        let of = &mut self.hosts.errands[errand];
        if of.over || of.answer.is_some() {
            return;
        }
        of.answer = Some(Err(refused(Errno::ETIMEDOUT, "the server does not answer")));
        if let Some(conn) = of.conn {
            self.end_claim(conn);
        }
        self.errand_answered(errand);
    }

    /// Whoever asked is told.
    pub(crate) fn errand_answered(&mut self, errand: usize) {
        let of = &mut self.hosts.errands[errand];
        let Some(answer) = of.answer.take().filter(|_| !of.over) else { return };
        of.over = true;
        let (asker, volume) = (of.asker, of.target);
        match asker {
            Asker::Start { start, job, at } => self.job_answered((start, job, at), answer),
            Asker::Owner { life } => self.queue.push(self.now, Event::Labelled { life, volume, done: answer.is_ok() }),
        }
    }

    /// What a volume tells of itself.
    fn found(&self, target: usize) -> Option<Found> {
        let state = self.nodes[target].rules.as_ref()?.state();
        let node = self.start_of(self.plan.node_of(target)).to_string();
        Some(Found {
            sectors: self.nodes[target].sectors,
            identity: format!("volume {target}"),
            volume: id_of(target),
            member: Some(Member { id: ARRAY, name: "a".to_owned(), node }),
            claim: state.claim.map(|claim| Claim { epoch: claim.epoch, owner: claim.session, host: claim.host }),
            label: state.label.clone(),
            losses: self.nodes[target].kept.losses_told(self.plan.write_through),
        })
    }
}

impl Errand {
    /// Whether somebody waits for it.
    pub(crate) fn is_open(&self) -> bool {
        !self.over && self.answer.is_none()
    }
}
