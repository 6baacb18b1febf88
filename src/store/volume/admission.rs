//! HELLO: who is taken, who waits, who is refused.
//!
//! Contract: HELLOs are decided in the order in which they came. One that brings a new claim waits until the claim is durable, and
//! those behind it wait with it; the former owner is served until then and closed at that moment. A claim that cannot be made
//! durable is refused, and nothing else has changed.

use crate::bugs::{Bug, planted};
use crate::control::member::MemberLabel;
use crate::control::target::Target;
use crate::errno::Errno;
use crate::limits;
use crate::store::session::{Claim, Conn, Ousted, Standing};
use crate::store::state::State;
use crate::store::volume::keep::Then;
use crate::store::volume::{BYTES_MAX, Effect, REQUESTS_MAX, Volume};
use crate::units::{Epoch, Id};
use crate::wire::session::{Hello, Welcome};
use crate::wire::volume::Member;

/// A HELLO that is not decided.
#[derive(Debug)]
pub(super) struct Knock {
    pub(super) conn: Conn,
    claim: Claim,
    channel: u16,
    version: u16,
    features: u64,
    /// The array's name, for messages.
    array: String,
}

impl Volume {
    pub(super) fn knock(&mut self, conn: Conn, hello: &Hello, epoch: Epoch, assigned: Option<&Member>) {
        let (version, member) = match self.admit(hello, assigned) {
            Ok(admitted) => admitted,
            Err((errno, text)) => return self.effects.push_back(Effect::Refuse { conn, errno, text }),
        };
        self.knocks.push_back(Knock {
            conn,
            claim: Claim { array: hello.array, epoch, session: hello.session, host: hello.host },
            channel: hello.channel,
            version,
            features: hello.features & self.served(),
            array: member.name.clone(),
        });
        self.decide();
    }

    /// What can be said about a HELLO without looking at who is attached.
    fn admit<'a>(&self, hello: &Hello, assigned: Option<&'a Member>) -> Result<(u16, &'a Member), (Errno, String)> {
        let name = &self.config.name;
        let Some(version) = hello.common_version() else {
            let (oldest, newest) = hello.versions;
            let text = format!("this server speaks version 1 of the dst protocol, the asker {oldest} to {newest}");
            return Err((Errno::EPROTONOSUPPORT, text));
        };
        if self.sessions.count() + self.knocks.len() >= limits::VOLUME_CONNECTIONS_MAX {
            let text = format!(
                "volume '{name}' has {} connections and takes no more until some have closed; try again later",
                limits::VOLUME_CONNECTIONS_MAX
            );
            return Err((Errno::EBUSY, text));
        }
        match assigned {
            Some(member) if member.id == hello.array => Ok((version, member)),
            Some(member) => Err((
                Errno::EBUSY,
                format!(
                    "volume '{name}' belongs to node {} of array '{}' ({}), not to array {}; choose another volume, or free this one first",
                    member.node, member.name, member.id, hello.array
                ),
            )),
            None => Err((
                Errno::EPERM,
                match self.forward(hello.array) {
                    Some(to) => format!("volume '{name}' is left: its array's data has moved to {to}"),
                    None => {
                        format!("volume '{name}' belongs to no array; it must be assigned to one before it is attached")
                    }
                },
            )),
        }
    }

    /// Where the data of this array's volume has gone.
    fn forward(&self, array: Id) -> Option<Target> {
        let label = MemberLabel::decode(self.book.durable().label.as_deref()?).ok()?;
        label.forward().filter(|_| label.array == array).map(|forward| forward.to.clone())
    }

    /// Decides about the HELLOs that wait, up to one whose claim must be made durable first.
    pub(super) fn decide(&mut self) {
        if self.lost {
            return self.count_loss();
        }
        while !self.claiming {
            let Some(knock) = self.knocks.front() else { break };
            match self.sessions.stand(&knock.claim) {
                Standing::Holds => self.enter(),
                Standing::Fenced(held) => {
                    let text = self.fenced(&knock.array, held.epoch);
                    self.refuse_first(Errno::EBADE, text);
                }
                Standing::Takes => {
                    let claim = knock.claim;
                    self.claiming = true;
                    let change = |state: &mut State| {
                        // A label is its array's, and that of a volume which was freed is nobody's any more.
                        if state.claim.is_none_or(|held| held.array != claim.array) {
                            state.label = None;
                        }
                        state.claim = Some(claim);
                    };
                    self.keep(change, Then::Claim(claim));
                    if planted(Bug::ClaimNotAwaited) {
                        self.claimed(claim, Ok(()));
                    }
                }
            }
        }
        self.welcome_ready();
    }

    /// Acknowledged writes of another boot may be lost: whoever attaches is told, from a number that is durable.
    fn count_loss(&mut self) {
        let counting = self.saves.iter().any(|(_, then)| *then == Then::Lost);
        if !counting && !self.knocks.is_empty() {
            let losses = self.book.durable().losses + 1;
            self.keep(|state| (state.losses, state.dirty) = (losses, false), Then::Lost);
        }
    }

    /// The loss is counted, or cannot be.
    pub(super) fn counted(&mut self, result: Result<(), Errno>) {
        self.lost = result.is_err();
        while let Err(errno) = result
            && !self.knocks.is_empty()
        {
            let text = self.unwritten(errno);
            self.refuse_first(Errno::EIO, text);
        }
        self.decide();
    }

    fn unwritten(&self, errno: Errno) -> String {
        format!(
            "volume '{}' cannot be taken: its state file cannot be written ({errno}); look at the server's pool and the kernel's log",
            self.config.name
        )
    }

    /// A claim is durable, or cannot be.
    pub(super) fn claimed(&mut self, claim: Claim, result: Result<(), Errno>) {
        if !std::mem::take(&mut self.claiming) {
            return;
        }
        match result {
            Ok(()) => {
                self.kept.clear();
                if let Some(log) = &mut self.log {
                    log.claimed(self.flushes.ticks());
                }
                let mut gone = Vec::new();
                self.sessions.take(Some(claim), |conn, why| gone.push((conn, why)));
                let array = self.knocks.front().map(|knock| knock.array.clone()).unwrap_or_default();
                gone.into_iter().for_each(|(conn, why)| self.oust(conn, why, &array));
            }
            Err(errno) => {
                self.book.revert(|state, durable| {
                    state.claim = durable.claim;
                    state.label.clone_from(&durable.label);
                });
                // Whose claim it was may have gone.
                if self.knocks.front().is_some_and(|knock| knock.claim == claim) {
                    let text = self.unwritten(errno);
                    self.refuse_first(Errno::EIO, text);
                }
            }
        }
        self.decide();
    }

    /// The first HELLO is one of the present claim.
    fn enter(&mut self) {
        let Some(knock) = self.knocks.pop_front() else { return };
        let mut gone = Vec::new();
        let terms = (knock.channel, knock.version, knock.features);
        self.sessions.attach(knock.conn, terms, |conn, why| gone.push((conn, why)));
        gone.into_iter().for_each(|(conn, why)| self.oust(conn, why, &knock.array));
    }

    fn oust(&mut self, conn: Conn, why: Ousted, array: &str) {
        self.forget(conn);
        let effect = match why {
            Ousted::Replaced => Effect::Close { conn, why: "its channel was opened again" },
            Ousted::Superseded => Effect::Close { conn, why: "a newer claim took the volume" },
            Ousted::Refused => {
                let epoch = self.sessions.claim().map_or(Epoch(0), |claim| claim.epoch);
                Effect::Refuse { conn, errno: Errno::EBADE, text: self.fenced(array, epoch) }
            }
        };
        self.effects.push_back(effect);
    }

    fn refuse_first(&mut self, errno: Errno, text: String) {
        if let Some(Knock { conn, .. }) = self.knocks.pop_front() {
            self.effects.push_back(Effect::Refuse { conn, errno, text });
        }
    }

    pub(super) fn welcome_ready(&mut self) {
        while let Some(attached) = self.sessions.next_welcome() {
            let welcome = Welcome {
                version: attached.version,
                features: attached.features,
                instance: self.config.instance,
                volume: self.config.id,
                sectors: self.sectors,
                requests_max: REQUESTS_MAX,
                bytes_max: BYTES_MAX,
                losses: self.book.durable().losses,
            };
            self.effects.push_back(Effect::Welcome { conn: attached.conn, welcome });
        }
    }

    fn fenced(&self, array: &str, epoch: Epoch) -> String {
        format!(
            "volume '{}' is held by epoch {} of array '{array}', from another life of its daemon; is the array started on another host?",
            self.config.name, epoch.0
        )
    }
}
