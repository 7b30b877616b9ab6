//! The tiny demo model inside the binary: the checkpoint of `models/nano`, 12 MB of random weights.
//!
//! It answers noise, but through every part of the system, so that a newcomer sees all of it work
//! within seconds of the build.

use anyhow::{Context, Result};
use fathom_weights::Checkpoint;

/// Canonical name of the embedded model.
pub(crate) const NAME: &str = "nano";

/// Name of the released model whose client examples the embedded one answers too.
pub(crate) const STANDS_IN_FOR: &str = "deepseek-v4-flash";

macro_rules! files {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../../models/nano/", $name)))),+]
    };
}

const FILES: &[(&str, &[u8])] = files![
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
];

/// Opens the embedded checkpoint.
pub(crate) fn checkpoint() -> Result<Checkpoint> {
    Checkpoint::from_embedded(FILES).context("opening the embedded model")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_model_passes_every_check_of_a_checkpoint() {
        let checkpoint = checkpoint().unwrap();
        checkpoint.verify().unwrap();
        assert_eq!(checkpoint.config().num_hidden_layers, 4);
        checkpoint.tokenizer_json().unwrap();
    }
}
