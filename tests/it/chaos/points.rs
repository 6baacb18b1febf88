//! Death at each system call of everything that makes something durable. Afterwards it was done or not: whole, nothing else is lost,
//! and the next start works, and the one after it.

mod array;
mod server;

use std::time::Duration;

/// More calls than any operation makes; the loops of idle threads end here.
const MOST: u32 = 150;

/// Long enough for a process that is to die.
const DEATH: Duration = Duration::from_secs(10);

/// How often the death came before what was done had taken effect, and how often after.
#[derive(Default)]
struct Tally {
    undone: u32,
    done: u32,
}

impl Tally {
    fn count(&mut self, done: bool) {
        *if done { &mut self.done } else { &mut self.undone } += 1;
    }
}

impl Tally {
    fn report(&self, what: &str) {
        let Tally { undone, done } = *self;
        println!("{what}: {} deaths; {undone} times it had not happened, {done} times it had", undone + done);
        assert!(undone > 0 && done > 0, "{what}: the deaths are all on one side");
    }
}
