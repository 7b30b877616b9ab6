//! `fathom config`: the settings of `fathom serve`, explained and checked.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::serve::ServeConfig;
use crate::settings;

/// Arguments of `fathom config`.
#[derive(clap::Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(clap::Subcommand)]
enum ConfigCommand {
    /// Print a file with every setting, its description and its default
    Example,
    /// Print the JSON Schema of the file, for editors
    Schema,
    /// Say whether a file can be used
    Check {
        /// The TOML file
        file: PathBuf,
    },
}

pub(crate) fn run(args: ConfigArgs) -> Result<()> {
    match args.command {
        ConfigCommand::Example => print!("{}", settings::example()),
        ConfigCommand::Schema => {
            println!("{}", serde_json::to_string_pretty(&settings::file_schema())?);
        }
        ConfigCommand::Check { file } => {
            let text = std::fs::read_to_string(&file)
                .with_context(|| format!("reading the configuration {}", file.display()))?;
            ServeConfig::check_file(&text)
                .with_context(|| format!("in the configuration {}", file.display()))?;
            println!("{} can be used", file.display());
        }
    }
    Ok(())
}
