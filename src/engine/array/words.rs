//! What the owner of arrays is told, and what it asks for.

use crate::control::command::{Answer, Command, Refusal};
use crate::control::spec::ArraySpec;
use crate::control::target::Target;
use crate::engine::losses::Losses;
use crate::engine::replicas::{Saved, Standing};
use crate::engine::steer::{News, Steer};
use crate::units::{Epoch, Id};
use crate::wire::volume::{Claim, Member};

/// Who asked, for the performer to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// A piece of work under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The daemon starts.
    Boot {
        /// The id of the state directory.
        host: Id,
        /// This boot of the machine.
        boot: Id,
        /// The time of day, seconds since 1970.
        wall: u64,
        /// The records that were found, or could not be read, and why.
        records: Vec<(String, Result<ArraySpec, String>)>,
    },
    /// Someone asks for something. `fresh` is a random id, the new array's where one is made.
    Command {
        /// Who asked.
        ticket: Ticket,
        /// What for.
        command: Command,
        /// Random.
        fresh: Id,
    },
    /// Work has ended.
    Done {
        /// Which.
        job: JobId,
        /// How.
        outcome: Outcome,
        /// Random.
        fresh: Id,
    },
    /// A data path ended by itself.
    Died {
        /// Its array.
        name: String,
        /// The epoch it ran under.
        epoch: Epoch,
        /// Why.
        why: String,
    },
    /// The replicas of a data path have changed: this is to be made durable. Answered by [`Effect::Regrouped`].
    Regroup {
        /// Its array.
        name: String,
        /// The epoch it runs under.
        epoch: Epoch,
        /// What each replica is, by the id of its volume.
        standings: Vec<(Id, Standing)>,
        /// What is known of their machines.
        losses: Vec<(Id, Losses)>,
        /// Random: the generation of the nodes that have changed.
        fresh: Id,
    },
    /// A data path tells how something ended that it was asked for ([`Effect::Steer`]).
    News {
        /// Its array.
        name: String,
        /// The epoch it runs under.
        epoch: Epoch,
        /// What.
        news: News,
    },
    /// Time has passed; see [`Owner::next_wake`].
    Tick,
    /// The daemon is to end: what runs is halted, its record stays `started`.
    Shutdown,
}

/// What the performer is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Answers a command.
    Reply(Ticket, Result<Answer, Refusal>),
    /// What has become durable of what an array's data path had asked to be made so.
    Regrouped(String, Saved),
    /// Asks something of an array's data path.
    Steer(String, Steer),
    /// Does something that takes time, and reports it with [`Event::Done`].
    Work(JobId, Work),
    /// Everything has ended after [`Event::Shutdown`].
    Exit,
}

/// Something that takes time.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Asks each target what it is. Answered by [`Outcome::Surveyed`].
    Survey(Vec<Target>),
    /// Stores a record durably. Answered by [`Outcome::Saved`].
    Save(Box<ArraySpec>),
    /// Removes a record durably; none there is fine. Answered by [`Outcome::Saved`].
    Forget(String),
    /// Writes the array's name into each volume. Answered by [`Outcome::Assigned`].
    Assign(Vec<(Target, Member)>),
    /// Takes the array's name out of each volume that has it; one that is gone or another's is fine, one that another host has
    /// claimed is refused. Answered by [`Outcome::Each`].
    Free(Id, Vec<Target>),
    /// Claims volumes for an array with this epoch and an owner of its own: HELLO on each, with these features. Answered by
    /// [`Outcome::Claimed`].
    Claim(Id, Epoch, Vec<(Target, u64)>),
    /// Stores a text with each volume, under the claim on it. Answered by [`Outcome::Each`].
    Label(Id, Claim, Vec<(Target, String)>),
    /// Makes a volume of so many bytes on a server. Answered by [`Outcome::Each`].
    Make(Target, u64),
    /// Claims volumes for an array with a claim that it has already: HELLO on each, with these features. Answered by
    /// [`Outcome::Each`].
    Join(Id, Claim, Vec<(Target, u64)>),
    /// As `Free`; those that are marked are then removed with what they hold. Answered by [`Outcome::Each`].
    Discard(Id, Vec<(Target, bool)>),
    /// Starts the data path and its frontend under a claim; these nodes are late. Answered by [`Outcome::Launched`].
    Launch(Box<ArraySpec>, Claim, Vec<usize>),
    /// Stores a record durably, then a text with each of some volumes, under the claim on them. Answered by [`Outcome::Regrouped`].
    Regroup(Box<ArraySpec>, Claim, Vec<(Target, String)>),
    /// Gives the device of an array in use so many sectors, all of which the data path serves already. `None`: only asks whether it could be
    /// given more than it has. Answered by [`Outcome::Each`].
    Resize(String, Option<u64>),
    /// Ends the data path of an array, or what a dead daemon has left of it. Answered by [`Outcome::Halted`].
    Halt {
        /// The array's name.
        name: String,
        /// Its id.
        array: Id,
        /// What becomes of a device that is in use.
        how: Halt,
    },
}

/// What becomes of a device that is in use when its array ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// The array does not end.
    Polite,
    /// Its requests end with EIO.
    Forced,
    /// The daemon ends: it waits for the next one.
    Leaving,
}

/// How work has ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// What each target is.
    Surveyed(Vec<Result<Found, Refusal>>),
    /// One result.
    Saved(Result<(), Refusal>),
    /// What each volume is now.
    Assigned(Vec<Result<Enlisted, Refusal>>),
    /// One result per target.
    Each(Vec<Result<(), Refusal>>),
    /// Of the record, and of each text; texts are not written where the record could not be.
    Regrouped(Result<(), Refusal>, Vec<Result<(), Refusal>>),
    /// The claim that was made, and on which volumes.
    Claimed(Claim, Vec<Result<(), Refusal>>),
    /// The device's path or URI.
    Launched(Result<String, Refusal>),
    /// Whether all replicas that are in sync are known to hold the same.
    Halted(Result<bool, Refusal>),
}

/// A volume that was assigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enlisted {
    /// Its id.
    pub volume: Id,
    /// Nothing was ever written to it, as far as is known: it reads as zeros.
    pub blank: bool,
}

/// What a target turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its size, sectors.
    pub sectors: u64,
    /// Tells volumes apart, however they are reached.
    pub identity: String,
    /// The id of the volume.
    pub volume: Id,
    /// The array it belongs to.
    pub member: Option<Member>,
    /// Who holds it.
    pub claim: Option<Claim>,
    /// What its array has stored with it.
    pub label: Option<String>,
    /// How often its machine has come back without what was not flushed.
    pub losses: u64,
}
