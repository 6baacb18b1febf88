//! The owner's part that starts and stops arrays.

use super::{Array, Effect, Life, Outcome, Owner, Ticket, Work};
use crate::control::command::Refusal;
use crate::control::spec::{Phase, RunOptions};
use crate::engine::array::plan;
use crate::errno::Errno;
use crate::units::{Epoch, Time};

impl Owner {
    pub(super) fn start(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        run: RunOptions,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        run.check().map_err(|why| Refusal::new(Errno::EINVAL, why))?;
        match &array.life {
            Life::Stopped | Life::Failed(_) => {
                array.tries = 0;
                let survey = Work::Survey(array.targets());
                self.work(array, Life::Checking(Some(ticket), run), survey, effects);
                Ok(())
            }
            Life::Started(device) => {
                Err(Refusal::new(Errno::EBUSY, format!("array '{}' is started already, as {device}", array.spec.name)))
            }
            _ => Err(array.busy()),
        }
    }

    pub(super) fn stop(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        force: bool,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        match &array.life {
            Life::Stopped => Err(Refusal::new(Errno::EINVAL, format!("array '{}' is not started", array.spec.name))),
            Life::Started(device) => {
                let life = Life::Halting(Some(ticket), device.clone());
                let halt = Work::Halt { name: array.spec.name.clone(), force };
                self.work(array, life, halt, effects);
                Ok(())
            }
            Life::Failed(_) | Life::Waiting(..) => {
                self.save(array, Phase::Stopped, Life::Parking(ticket, None), effects);
                Ok(())
            }
            Life::Checking(None, _) => {
                // A survey changes nothing: what it reports does not matter any more.
                self.give_up_job(array);
                self.save(array, Phase::Stopped, Life::Parking(ticket, None), effects);
                Ok(())
            }
            Life::Claiming(_) | Life::Launching(_) if array.stop.is_none() => {
                array.stop = Some(ticket);
                Ok(())
            }
            _ => Err(array.busy()),
        }
    }

    /// A data path has ended by itself. Whatever of it is left must not stay in the way of the next one.
    pub(super) fn bury(&mut self, name: &str, epoch: Epoch, why: String, effects: &mut Vec<Effect>) {
        let Some(mut array) = self.arrays.remove(name) else { return };
        if array.spec.epoch == epoch && matches!(array.life, Life::Started(_)) {
            let halt = Work::Halt { name: name.to_owned(), force: true };
            self.work(&mut array, Life::Reaping(why), halt, effects);
        }
        self.arrays.insert(name.to_owned(), array);
    }

    /// The part of [`Owner::advance`] that starts and stops.
    pub(super) fn advance_run(&mut self, array: &mut Array, outcome: Outcome, now: Time, effects: &mut Vec<Effect>) {
        match (array.life.clone(), outcome) {
            (Life::Checking(asker, run), Outcome::Surveyed(found)) => match plan::check_start(&array.spec, &found) {
                Ok(()) if self.closing => array.abandon(asker, effects),
                Ok(()) => {
                    array.spec.run = run;
                    array.spec.epoch = Epoch(array.spec.epoch.0 + 1);
                    self.save(array, Phase::Started, Life::Claiming(asker), effects);
                }
                Err(refusal) => match asker {
                    None => array.wait(&refusal, now),
                    Some(ticket) => {
                        array.life = array.idle(&refusal.text);
                        effects.push(Effect::Reply(ticket, Err(refusal)));
                    }
                },
            },
            (Life::Claiming(asker), Outcome::Saved(Ok(()))) => {
                if array.stop.is_some() || self.closing {
                    self.not_started(array, asker, plan::given_up(&array.spec.name), now, effects);
                } else {
                    let launch = Work::Launch(Box::new(array.spec.clone()));
                    self.work(array, Life::Launching(asker), launch, effects);
                }
            }
            (Life::Claiming(asker), Outcome::Saved(Err(why))) => self.not_started(array, asker, why, now, effects),
            (Life::Launching(asker), Outcome::Launched(Ok(device))) => {
                (array.tries, array.trouble) = (0, None);
                array.life = Life::Started(device.clone());
                effects.extend(asker.map(|ticket| Effect::Reply(ticket, Ok(array.answer()))));
                let stop = array.stop.take();
                if stop.is_some() || self.closing {
                    let halt = Work::Halt { name: array.spec.name.clone(), force: self.closing };
                    self.work(array, Life::Halting(stop, device), halt, effects);
                }
            }
            (Life::Launching(asker), Outcome::Launched(Err(why))) => {
                self.not_started(array, asker, why, now, effects);
            }
            (Life::Halting(asker, _), Outcome::Saved(Ok(()))) => match asker {
                Some(ticket) => self.save(array, Phase::Stopped, Life::Parking(ticket, None), effects),
                None => array.life = Life::Stopped,
            },
            (Life::Halting(asker, device), Outcome::Saved(Err(why))) => {
                array.life = Life::Started(device);
                effects.extend(asker.map(|ticket| Effect::Reply(ticket, Err(why))));
            }
            (Life::Reaping(why), Outcome::Saved(_)) => array.life = Life::Failed(why),
            (Life::Parking(ticket, failed), Outcome::Saved(Ok(()))) => {
                array.life = Life::Stopped;
                let answer = failed.map_or_else(|| Ok(array.answer()), Err);
                effects.push(Effect::Reply(ticket, answer));
            }
            (Life::Parking(ticket, failed), Outcome::Saved(Err(trouble))) => {
                array.spec.phase = Phase::Started;
                let refusal = plan::not_parked(&array.spec.name, failed, &trouble);
                array.life = Life::Failed(refusal.text.clone());
                effects.push(Effect::Reply(ticket, Err(refusal)));
            }
            (life, outcome) => {
                // A report that does not fit its work would be a bug of the performer: the array stays where it is.
                debug_assert!(false, "{life:?} does not expect {outcome:?}");
            }
        }
    }

    /// A start came to nothing: in the background it is tried again, else the record says `stopped` again.
    fn not_started(
        &mut self,
        array: &mut Array,
        asker: Option<Ticket>,
        why: Refusal,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(stop) = array.stop.take() {
            effects.extend(asker.map(|ticket| Effect::Reply(ticket, Err(why))));
            return self.save(array, Phase::Stopped, Life::Parking(stop, None), effects);
        }
        match asker {
            Some(ticket) => self.save(array, Phase::Stopped, Life::Parking(ticket, Some(why)), effects),
            None => array.wait(&why, now),
        }
    }
}

impl Array {
    /// What an array is after a start that changed nothing.
    fn idle(&self, why: &str) -> Life {
        match self.spec.phase {
            Phase::Started => Life::Failed(why.to_owned()),
            _ => Life::Stopped,
        }
    }

    /// The daemon ends: a start goes no further.
    fn abandon(&mut self, asker: Option<Ticket>, effects: &mut Vec<Effect>) {
        let text = format!("dstd is ending: array '{}' was not started", self.spec.name);
        self.life = self.idle(&text);
        let refusal = Refusal::new(Errno::ESHUTDOWN, text);
        effects.extend(asker.map(|ticket| Effect::Reply(ticket, Err(refusal))));
    }

    fn wait(&mut self, why: &Refusal, now: Time) {
        self.trouble = Some(why.text.clone());
        self.life = Life::Waiting(self.back_off(now), why.text.clone());
    }
}
