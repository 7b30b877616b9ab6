//! The `fathom` binary: one module per subcommand.
//!
//! Errors are shown as a chain of causes and, where we know one, a hint ([`hint`]).
#![expect(clippy::print_stdout, reason = "a command line program prints")]

mod bench;
mod bytes;
mod chat;
mod config;
mod device_check;
mod doctor;
mod embedded;
mod gpu;
mod hint;
mod inspect;
mod logits;
mod serve;
mod settings;
mod threads;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use fathom_weights::Checkpoint;
use mimalloc::MiMalloc;
use tracing_subscriber::EnvFilter;

/// Keeps what a step gives back for the next one.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Serves DeepSeek-V4.
#[derive(Parser)]
#[command(name = "fathom", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a checkpoint over HTTP
    Serve(Box<serve::ServeOptions>),
    /// Show and check the settings of `serve`
    Config(config::ConfigArgs),
    /// Talk to a model in the terminal
    Chat(chat::ChatArgs),
    /// Show what a checkpoint holds, and whether it can be served
    Inspect(inspect::InspectArgs),
    /// Look for what a server needs on this machine, and say what to do about what is missing
    Doctor(doctor::DoctorArgs),
    /// Write logits for given tokens, to compare with other implementations
    Logits(logits::LogitsArgs),
    #[command(hide = true)]
    Bench(bench::BenchArgs),
    /// Compare every kernel of a GPU with the CPU operators
    #[command(hide = true)]
    DeviceCheck(device_check::DeviceCheckArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // In a conversation every log line would stand between question and answer.
    let level = if matches!(cli.command, Command::Chat(_)) { "warn" } else { "info" };
    let filter = EnvFilter::try_from_env("FATHOM_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let result = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Config(args) => config::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Logits(args) => logits::run(args),
        Command::Bench(args) => bench::run(args),
        Command::DeviceCheck(args) => device_check::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn report(error: &anyhow::Error) {
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  caused by: {cause}");
    }
    if let Some(hint) = hint::of(error) {
        eprintln!("hint: {hint}");
    }
}

/// Opens the checkpoint in `directory`, or the embedded one.
fn open_checkpoint(directory: Option<&Path>) -> Result<Checkpoint> {
    match directory {
        None => embedded::checkpoint(),
        Some(directory) => Checkpoint::open(directory)
            .with_context(|| format!("opening the checkpoint {}", directory.display())),
    }
}
