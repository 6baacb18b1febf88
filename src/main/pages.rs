//! Manual pages and shell completions, made of a program's own command line, for who installs it: `generate DIR`. Both programs use this
//! file.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

/// Arguments of `generate`.
#[derive(Args)]
pub(crate) struct GenerateArguments {
    /// Where they are written; made if it is not there
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl GenerateArguments {
    /// Writes the pages of `command` and of each of its verbs for `section` of the manual, and completions for bash, zsh and fish.
    pub(crate) fn run(&self, command: Command, section: &str) -> Result<(), String> {
        let failed = |error: io::Error| format!("cannot write to {}: {error}", self.dir.display());
        std::fs::create_dir_all(&self.dir).map_err(failed)?;
        let name = command.get_name().to_owned();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut command.clone(), &name, &self.dir).map_err(failed)?;
        }
        let mut command = command.disable_help_subcommand(true);
        command.build();
        pages(command, section, &self.dir).map_err(failed)
    }
}

fn pages(command: Command, section: &str, dir: &Path) -> io::Result<()> {
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        pages(verb.clone(), section, dir)?;
    }
    Man::new(command).section(section).manual("dst").generate_to(dir).map(drop)
}
