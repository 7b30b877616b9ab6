//! The `fathom` binary as a user starts it.
#![expect(clippy::print_stdout, reason = "a skipped test says so")]
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod chat;
mod command_line;
mod device;
mod driver;
mod logits;
mod serve;
mod simulate;

use std::process::Command;

/// The binary, without settings from this machine's environment.
fn fathom() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fathom"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FATHOM_") {
            command.env_remove(name);
        }
    }
    command
}
