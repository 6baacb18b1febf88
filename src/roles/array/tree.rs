//! The control tree's files are made of what the owner of arrays publishes, and what is written to them is asked of it.

use crate::control::command::Command;
use crate::control::status::ArrayStatus;
use crate::io::fuse::{Done, Source};
use crate::io::http::Service;
use crate::roles::array::owner::Handle;

impl Source for Handle {
    fn arrays(&self) -> Vec<ArrayStatus> {
        self.list()
    }

    fn array(&self, name: &str) -> Option<ArrayStatus> {
        self.get(name)
    }

    fn submit(&self, command: Command, done: Done) {
        Service::submit(self, command, Box::new(move |result| done(result.map(drop))));
    }
}
