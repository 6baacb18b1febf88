//! What a panic on an owner thread means: the process ends.
//!
//! The runtime would catch the panic of one task and go on, with a volume whose rules are half way through a decision. A server
//! that has died is started again and told of by every client; one that hangs is not.

/// Held by a task for as long as it runs.
pub(crate) struct FailStop;

impl Drop for FailStop {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The panic's own message has been printed by now.
            std::process::abort();
        }
    }
}
