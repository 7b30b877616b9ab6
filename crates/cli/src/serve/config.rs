//! Settings of `fathom serve`: as typed ([`ServeOptions`], the file), then as meant
//! ([`ServeConfig`]).
//!
//! Each setting is defined once and can be given as a flag, as an environment variable or in the
//! TOML file of `--config`; the first of these that gives it wins. Flags are called as operators
//! of V4 type them for vLLM where the meaning is the same. In the file, what concerns HTTP has the
//! tables of [`ServerConfig`], and what concerns the model is in `[engine]`.
//!
//! Not here: what depends on the model or the machine (`load`), what the model is called
//! (`names`).

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use fathom_core::Numerics;
use fathom_core::numerics::UnknownNumerics;
use fathom_engine::speculate::MAX_DRAFTS;
use fathom_engine::{DraftMethod, SpeculationConfig, TierConfig};
use fathom_server::config::{KeyConfig, ServerConfig};
use serde::Deserialize;

/// Settings as typed on the command line or found in the environment.
#[derive(Clone, Default, clap::Args)]
pub(crate) struct ServeOptions {
    /// TOML file with settings
    #[arg(long, value_name = "FILE", env = "FATHOM_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Address to listen on; 0.0.0.0 for all [default: 127.0.0.1]
    #[arg(long, env = "FATHOM_HOST")]
    pub(crate) host: Option<String>,
    /// Port to listen on; 0 for any free one [default: 8000]
    #[arg(long, env = "FATHOM_PORT")]
    pub(crate) port: Option<u16>,
    /// Longest context, prompt and answer together [default: what model and memory allow]
    #[arg(long, value_name = "TOKENS", env = "FATHOM_MAX_MODEL_LEN")]
    pub(crate) max_model_len: Option<u32>,
    /// Key that clients must send; repeatable [default: none, anyone may use the server]
    #[arg(long, value_name = "KEY", env = "FATHOM_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Vec<String>,
    #[command(flatten)]
    pub(crate) engine: EngineOptions,
}

/// What concerns the model; `[engine]` in the file. What is absent was not given.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EngineOptions {
    /// Checkpoint directory [default: the tiny embedded model]
    #[arg(long, value_name = "DIR", env = "FATHOM_MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// What clients call the model; repeatable, the first name is canonical
    #[arg(long, value_name = "NAME", value_delimiter = ',', env = "FATHOM_SERVED_MODEL_NAME")]
    pub(crate) served_model_name: Option<Vec<String>>,
    /// Sequences that run at once [default: 64]
    #[arg(long, value_name = "N", env = "FATHOM_MAX_NUM_SEQS")]
    pub(crate) max_num_seqs: Option<u32>,
    /// Tokens one step runs, prefill and decode together [default: 1024]
    #[arg(long, value_name = "TOKENS", env = "FATHOM_MAX_NUM_BATCHED_TOKENS")]
    pub(crate) max_num_batched_tokens: Option<u32>,
    /// Ranks that share each layer; on the CPU they are threads [default: 1]
    #[arg(long, value_name = "N", env = "FATHOM_TENSOR_PARALLEL_SIZE")]
    pub(crate) tensor_parallel_size: Option<NonZeroUsize>,
    /// How values are rounded: bf16 (the official semantics), f32qat or f32 [default: bf16]
    #[arg(long, value_name = "MODE", env = "FATHOM_NUMERICS")]
    pub(crate) numerics: Option<NumericsName>,
    /// Memory for the KV cache in bytes [default: a quarter of what is free, at most what
    /// max-num-seqs full contexts need]
    #[arg(long, value_name = "BYTES", env = "FATHOM_KV_CACHE_MEMORY_BYTES")]
    pub(crate) kv_cache_memory_bytes: Option<u64>,
    /// Directory in which cached prefixes survive restarts; one server at a time [default: none]
    #[arg(long, value_name = "DIR", env = "FATHOM_CACHE_DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// GiB that files in cache-dir may take [default: 32]
    #[arg(long, value_name = "GIB", env = "FATHOM_CACHE_DISK_GB")]
    pub(crate) cache_disk_gb: Option<u32>,
    /// GiB of host memory for prefixes that the KV cache evicts [default: 0]
    #[arg(long, value_name = "GIB", env = "FATHOM_CACHE_HOST_GB")]
    pub(crate) cache_host_gb: Option<u32>,
    /// Who guesses tokens ahead, to be verified together: ngram (the text so far), mtp (the model's
    /// own block) or off; never changes an answer [default: off]
    #[arg(long, value_name = "WHO", env = "FATHOM_SPECULATE")]
    pub(crate) speculate: Option<Speculate>,
    /// Tokens guessed ahead at most, 1 to 8; fewer where that is faster [default: 3]
    #[arg(long, value_name = "N", env = "FATHOM_NUM_SPECULATIVE_TOKENS")]
    pub(crate) num_speculative_tokens: Option<u32>,
    /// Threads that compute [default: all processors]
    #[arg(long, value_name = "N", env = "FATHOM_THREADS")]
    pub(crate) threads: Option<NonZeroUsize>,
}

/// Who guesses tokens ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Speculate {
    /// Nobody.
    Off,
    /// What followed the last tokens when they occurred before.
    Ngram,
    /// The model's MTP block, which is then loaded.
    Mtp,
}

impl From<Speculate> for DraftMethod {
    fn from(who: Speculate) -> Self {
        match who {
            Speculate::Off => Self::Off,
            Speculate::Ngram => Self::Ngram,
            Speculate::Mtp => Self::Mtp,
        }
    }
}

/// A numeric mode by its name, on the command line and in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct NumericsName(pub(crate) Numerics);

impl FromStr for NumericsName {
    type Err = UnknownNumerics;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        name.parse().map(Self)
    }
}

impl TryFrom<String> for NumericsName {
    type Error = UnknownNumerics;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl EngineOptions {
    /// These options, and those of `file` where these give nothing.
    fn or(self, file: Self) -> Self {
        Self {
            model: self.model.or(file.model),
            served_model_name: self.served_model_name.or(file.served_model_name),
            max_num_seqs: self.max_num_seqs.or(file.max_num_seqs),
            max_num_batched_tokens: self.max_num_batched_tokens.or(file.max_num_batched_tokens),
            tensor_parallel_size: self.tensor_parallel_size.or(file.tensor_parallel_size),
            numerics: self.numerics.or(file.numerics),
            kv_cache_memory_bytes: self.kv_cache_memory_bytes.or(file.kv_cache_memory_bytes),
            cache_dir: self.cache_dir.or(file.cache_dir),
            cache_disk_gb: self.cache_disk_gb.or(file.cache_disk_gb),
            cache_host_gb: self.cache_host_gb.or(file.cache_host_gb),
            speculate: self.speculate.or(file.speculate),
            num_speculative_tokens: self.num_speculative_tokens.or(file.num_speculative_tokens),
            threads: self.threads.or(file.threads),
        }
    }
}

/// Settings as meant: file and command line together, defaults filled in.
#[derive(Debug, Clone)]
pub(crate) struct ServeConfig {
    /// What concerns HTTP.
    pub(crate) server: ServerConfig,
    /// Checkpoint directory; `None` for the embedded model.
    pub(crate) model: Option<PathBuf>,
    /// Names given by the operator, each once, the canonical one first; may be empty.
    pub(crate) served_model_names: Vec<String>,
    /// Sequences that run at once.
    pub(crate) max_num_seqs: u32,
    /// Tokens of one step.
    pub(crate) max_num_batched_tokens: u32,
    /// Ranks that share each layer.
    pub(crate) tensor_parallel_size: usize,
    /// Numeric mode.
    pub(crate) numerics: Numerics,
    /// Bytes for the KV cache, if the operator fixed them.
    pub(crate) kv_cache_memory_bytes: Option<u64>,
    /// Lower tiers of the prefix cache.
    pub(crate) tiers: TierConfig,
    /// Tokens guessed ahead.
    pub(crate) speculation: SpeculationConfig,
    /// Threads that compute; `None` for all processors.
    pub(crate) threads: Option<NonZeroUsize>,
}

impl ServeConfig {
    /// Reads the file that `options` name, if any, and lays `options` over it.
    ///
    /// # Errors
    /// Where the file or a setting is wrong, naming it.
    pub(crate) fn new(options: ServeOptions) -> Result<Self> {
        let Some(path) = options.config.clone() else { return Self::merged("", options) };
        let file = std::fs::read_to_string(&path)
            .with_context(|| format!("reading the configuration {}", path.display()))?;
        Self::merged(&file, options)
            .with_context(|| format!("in the configuration {}", path.display()))
    }

    fn merged(file: &str, options: ServeOptions) -> Result<Self> {
        let mut tables: toml::Table = file.parse()?;
        let engine = match tables.remove("engine") {
            Some(engine) => engine.try_into().context("in [engine]")?,
            None => EngineOptions::default(),
        };
        let mut server: ServerConfig = tables.try_into()?;
        server.server.host = options.host.unwrap_or(server.server.host);
        server.server.port = options.port.unwrap_or(server.server.port);
        server.limits.max_model_len = options.max_model_len.or(server.limits.max_model_len);
        if !options.api_key.is_empty() {
            let key = |key| KeyConfig { key, ..KeyConfig::default() };
            server.keys = options.api_key.into_iter().map(key).collect();
        }
        server.check()?;

        let engine = options.engine.or(engine);
        let served_model_names = engine.served_model_name.unwrap_or_default();
        for (index, name) in served_model_names.iter().enumerate() {
            ensure!(!name.is_empty(), "a served-model-name is empty");
            let before = &served_model_names[..index];
            ensure!(!before.contains(name), "served-model-name gives `{name}` more than once");
        }
        ensure!(
            engine.cache_disk_gb.is_none() || engine.cache_dir.is_some(),
            "cache-disk-gb limits a directory, but cache-dir names none"
        );
        let bytes = |gib: u32| u64::from(gib) << 30;
        let defaults = TierConfig::default();
        let tiers = TierConfig {
            host_bytes: engine.cache_host_gb.map_or(defaults.host_bytes, bytes),
            directory: engine.cache_dir,
            disk_bytes: engine.cache_disk_gb.map_or(defaults.disk_bytes, bytes),
        };
        let speculation = SpeculationConfig::default();
        let speculation = SpeculationConfig {
            method: engine.speculate.map_or(speculation.method, Into::into),
            max_drafts: engine.num_speculative_tokens.unwrap_or(speculation.max_drafts),
            ..speculation
        };
        let most = MAX_DRAFTS as u32;
        ensure!(
            (1..=most).contains(&speculation.max_drafts),
            "num-speculative-tokens is {}, but must be 1 to {most}; to guess none, leave speculate off",
            speculation.max_drafts
        );
        ensure!(
            engine.num_speculative_tokens.is_none() || speculation.method != DraftMethod::Off,
            "num-speculative-tokens limits guesses, but speculate is off: choose ngram or mtp"
        );
        Ok(Self {
            server,
            tiers,
            speculation,
            model: engine.model,
            served_model_names,
            max_num_seqs: engine.max_num_seqs.unwrap_or(64),
            max_num_batched_tokens: engine.max_num_batched_tokens.unwrap_or(1024),
            tensor_parallel_size: engine.tensor_parallel_size.map_or(1, NonZeroUsize::get),
            numerics: engine.numerics.map_or(Numerics::default(), |name| name.0),
            kv_cache_memory_bytes: engine.kv_cache_memory_bytes,
            threads: engine.threads,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_file(text: &str) -> Result<ServeConfig> {
        ServeConfig::merged(text, ServeOptions::default())
    }

    fn refusal(text: &str) -> String {
        format!("{:#}", from_file(text).unwrap_err())
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file = "[server]\nport = 7000\n[engine]\nmax_num_seqs = 3\nnumerics = 'f32'\n\
                    [[keys]]\nkey = 'file'";
        let engine = EngineOptions { max_num_seqs: Some(5), ..EngineOptions::default() };
        let options = ServeOptions { port: Some(9000), engine, ..ServeOptions::default() };
        let config = ServeConfig::merged(file, options).unwrap();
        assert_eq!((config.server.server.port, config.max_num_seqs), (9000, 5));
        assert_eq!((config.numerics, config.max_num_batched_tokens), (Numerics::F32, 1024));
        assert_eq!(config.server.keys[0].key, "file");

        let options = ServeOptions { api_key: vec!["flag".to_owned()], ..ServeOptions::default() };
        let keys = ServeConfig::merged(file, options).unwrap().server.keys;
        assert_eq!(keys.iter().map(|key| key.key.as_str()).collect::<Vec<_>>(), ["flag"]);
    }

    #[test]
    fn every_engine_option_survives_the_merge_from_either_side() {
        let text = "model = '/models/x'\nserved_model_name = ['a', 'b']\nmax_num_seqs = 3\n\
                    max_num_batched_tokens = 4\ntensor_parallel_size = 5\nnumerics = 'f32qat'\n\
                    kv_cache_memory_bytes = 6\nthreads = 7\ncache_dir = '/cache'\n\
                    cache_disk_gb = 8\ncache_host_gb = 9\nspeculate = 'ngram'\n\
                    num_speculative_tokens = 5";
        let options: EngineOptions = toml::from_str(text).unwrap();
        assert_eq!(options.clone().or(EngineOptions::default()), options);
        assert_eq!(EngineOptions::default().or(options.clone()), options);
    }

    #[test]
    fn misspelt_and_impossible_settings_are_named() {
        assert!(refusal("[server]\nprot = 1").contains("prot"));
        assert!(refusal("[engine]\nmodle = 'x'").contains("modle"));
        assert!(refusal("[engine]\nnumerics = 'fp64'").contains("fp64"));
        assert!(refusal("[[keys]]\nkey = ''").contains("key number 0"));
        assert!(refusal("[engine]\ncache_disk_gb = 1").contains("cache-dir names none"));
        assert!(refusal("[engine]\nspeculate = 'oracle'").contains("oracle"));
        let none = refusal("[engine]\nspeculate = 'mtp'\nnum_speculative_tokens = 0");
        assert!(none.contains("is 0, but must be 1 to 8"), "{none}");
        assert!(refusal("[engine]\nnum_speculative_tokens = 2").contains("speculate is off"));
        assert!(refusal("[engine]\nserved_model_name = ['a', 'a']").contains("`a` more than once"));
    }
}
