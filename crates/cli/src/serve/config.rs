//! Settings of `fathom serve`: as typed ([`ServeOptions`], the file), then as meant
//! ([`ServeConfig`]).
//!
//! Each setting is a field of [`EngineOptions`] or of [`ServerConfig`], and can be given as a flag,
//! as an environment variable or in the TOML file of `--config`; the first of these that gives it
//! wins. Flags are called as operators of V4 type them for vLLM where the meaning is the same.
//!
//! Not here: how fields become flags (`crate::settings`), what depends on the model or the machine
//! (`load`), what the model is called (`names`).

use std::borrow::Cow;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use fathom_core::Numerics;
use fathom_core::numerics::UnknownNumerics;
use fathom_engine::speculate::MAX_DRAFTS;
use fathom_engine::{DraftMethod, SpeculationConfig, TierConfig};
use fathom_ops::{IndexKeyFormat, KvFormat, RowFormats};
use fathom_server::config::{KeyConfig, ServerConfig};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::gpu::DeviceChoice;
use crate::settings::{ENGINE, Overrides};

/// Settings as typed on the command line or found in the environment.
#[derive(Clone, Default, clap::Args)]
pub(crate) struct ServeOptions {
    /// TOML file with settings; `fathom config example` prints one with all of them
    #[arg(long, value_name = "FILE", env = "FATHOM_CONFIG")]
    config: Option<PathBuf>,
    /// Key that clients must send; repeatable [default: none, anyone may use the server]
    #[arg(long, value_name = "KEY", env = "FATHOM_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    #[command(flatten)]
    overrides: Overrides,
}

impl ServeOptions {
    /// A server for a client in this process: nothing but these, whatever files and variables say.
    pub(crate) fn local(model: Option<&Path>, api_key: Option<&str>) -> Self {
        let mut overrides = Overrides::default();
        overrides.set("server", "host", "127.0.0.1");
        overrides.set("server", "port", 0);
        if let Some(model) = model {
            overrides.set(ENGINE, "model", model.to_string_lossy().into_owned());
        }
        Self { config: None, api_key: api_key.map(str::to_owned).into_iter().collect(), overrides }
    }
}

/// The model, and the machine it runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EngineOptions {
    /// Checkpoint directory; unset: the tiny embedded model.
    #[schemars(extend("value_name" = "DIR"), example = "/models/DeepSeek-V4-Flash")]
    pub(crate) model: Option<PathBuf>,
    /// What clients call the model; repeatable, the first name is canonical. Unset: by its
    /// dimensions, else its directory's name.
    #[schemars(extend("value_name" = "NAME"))]
    pub(crate) served_model_name: Vec<String>,
    /// Sequences that run at once.
    pub(crate) max_num_seqs: u32,
    /// Tokens one step runs, prefill and decode together.
    #[schemars(extend("value_name" = "TOKENS"))]
    pub(crate) max_num_batched_tokens: u32,
    /// Ranks that share each layer; on the CPU they are threads.
    pub(crate) tensor_parallel_size: NonZeroUsize,
    /// How values are rounded; bf16 is the official semantics.
    #[schemars(extend("value_name" = "MODE"))]
    pub(crate) numerics: NumericsName,
    /// Memory for the KV cache in bytes; unset: a quarter of what is free, at most what max-num-seqs
    /// full contexts need.
    #[schemars(extend("value_name" = "BYTES"), example = 8_589_934_592_u64)]
    pub(crate) kv_cache_memory_bytes: Option<u64>,
    /// Directory in which cached prefixes survive restarts; one server at a time. Unset: they do
    /// not.
    #[schemars(extend("value_name" = "DIR"), example = "/var/cache/fathom")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// GiB that files in cache-dir may take; unset: 32.
    #[schemars(extend("value_name" = "GIB"), example = 32)]
    pub(crate) cache_disk_gb: Option<u32>,
    /// GiB of host memory for prefixes that the KV cache evicts.
    #[schemars(extend("value_name" = "GIB"))]
    pub(crate) cache_host_gb: u32,
    /// Who guesses tokens ahead, to be verified together: ngram (the text so far), mtp (the model's
    /// own block) or off; never changes an answer.
    #[schemars(extend("value_name" = "WHO"))]
    pub(crate) speculate: Speculate,
    /// Tokens guessed ahead at most, 1 to 8; fewer where that is faster. Unset: 3.
    #[schemars(extend("conditional" = true), example = 3)]
    pub(crate) num_speculative_tokens: Option<u32>,
    /// How KV rows are stored; no choice changes an answer. auto: the smallest that loses nothing.
    #[schemars(extend("value_name" = "FORMAT"))]
    pub(crate) kv_cache_dtype: KvCacheDtype,
    /// How the indexer's keys are stored; auto: the smallest that loses nothing.
    #[schemars(extend("value_name" = "FORMAT"))]
    pub(crate) index_key_dtype: IndexKeyDtype,
    /// Threads that compute; unset: all processors.
    #[schemars(example = 8)]
    pub(crate) threads: Option<NonZeroUsize>,
    /// What computes: cuda (a GPU), cpu, or auto (a GPU if there is a driver).
    #[schemars(extend("value_name" = "DEVICE"))]
    pub(crate) device: DeviceChoice,
    /// On a GPU, only kernels whose results depend neither on the batch nor on how a prompt is cut,
    /// even where others are faster; the CPU always computes so.
    pub(crate) deterministic: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            model: None,
            served_model_name: Vec::new(),
            max_num_seqs: 64,
            max_num_batched_tokens: 1024,
            tensor_parallel_size: NonZeroUsize::MIN,
            numerics: NumericsName(Numerics::default()),
            kv_cache_memory_bytes: None,
            cache_dir: None,
            cache_disk_gb: None,
            cache_host_gb: 0,
            speculate: Speculate::Off,
            num_speculative_tokens: None,
            kv_cache_dtype: KvCacheDtype::Auto,
            index_key_dtype: IndexKeyDtype::Auto,
            threads: None,
            device: DeviceChoice::default(),
            deterministic: false,
        }
    }
}

/// How KV rows are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KvCacheDtype {
    /// The smallest that loses nothing.
    Auto,
    /// 584 bytes.
    Fp8,
    /// 1,024 bytes.
    Bf16,
    /// 2,048 bytes.
    F32,
}

impl From<KvCacheDtype> for Option<KvFormat> {
    fn from(dtype: KvCacheDtype) -> Self {
        match dtype {
            KvCacheDtype::Auto => None,
            KvCacheDtype::Fp8 => Some(KvFormat::Fp8),
            KvCacheDtype::Bf16 => Some(KvFormat::Bf16),
            KvCacheDtype::F32 => Some(KvFormat::F32),
        }
    }
}

/// How the indexer's keys are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum IndexKeyDtype {
    /// The smallest that loses nothing.
    Auto,
    /// 68 bytes.
    Mxfp4,
    /// 132 bytes.
    Fp8,
    /// 256 bytes.
    Bf16,
    /// 512 bytes.
    F32,
}

impl From<IndexKeyDtype> for Option<IndexKeyFormat> {
    fn from(dtype: IndexKeyDtype) -> Self {
        match dtype {
            IndexKeyDtype::Auto => None,
            IndexKeyDtype::Mxfp4 => Some(IndexKeyFormat::Mxfp4),
            IndexKeyDtype::Fp8 => Some(IndexKeyFormat::Fp8),
            IndexKeyDtype::Bf16 => Some(IndexKeyFormat::Bf16),
            IndexKeyDtype::F32 => Some(IndexKeyFormat::F32),
        }
    }
}

/// Who guesses tokens ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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

/// A numeric mode by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct NumericsName(pub(crate) Numerics);

impl From<NumericsName> for String {
    fn from(name: NumericsName) -> Self {
        name.0.name().to_owned()
    }
}

impl TryFrom<String> for NumericsName {
    type Error = UnknownNumerics;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        Numerics::from_str(&name).map(Self)
    }
}

impl JsonSchema for NumericsName {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "NumericsName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let modes = [Numerics::Bf16, Numerics::F32Qat, Numerics::F32];
        json_schema!({"type": "string", "enum": modes.map(Numerics::name)})
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
    /// How cache rows are stored.
    pub(crate) formats: RowFormats,
    /// Bytes for the KV cache, if the operator fixed them.
    pub(crate) kv_cache_memory_bytes: Option<u64>,
    /// Lower tiers of the prefix cache.
    pub(crate) tiers: TierConfig,
    /// Tokens guessed ahead.
    pub(crate) speculation: SpeculationConfig,
    /// Threads that compute; `None` for all processors.
    pub(crate) threads: Option<NonZeroUsize>,
    /// What computes.
    pub(crate) device: DeviceChoice,
    /// Whether a GPU must use batch-invariant kernels only.
    pub(crate) deterministic: bool,
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

    /// Whether a file alone makes sense.
    ///
    /// # Errors
    /// Where the file or a setting is wrong, naming it.
    pub(crate) fn check_file(file: &str) -> Result<()> {
        Self::merged(file, ServeOptions::default()).map(drop)
    }

    fn merged(file: &str, options: ServeOptions) -> Result<Self> {
        let mut tables: toml::Table = file.parse()?;
        options.overrides.lay_over(&mut tables)?;
        let engine = match tables.remove(ENGINE) {
            Some(engine) => engine.try_into().context("in [engine]")?,
            None => EngineOptions::default(),
        };
        let mut server: ServerConfig = tables.try_into()?;
        if !options.api_key.is_empty() {
            server.keys = options.api_key.into_iter().map(KeyConfig::plain).collect();
        }
        server.check()?;
        Self::new_checked(server, engine)
    }

    fn new_checked(mut server: ServerConfig, engine: EngineOptions) -> Result<Self> {
        server.cache.directory.clone_from(&engine.cache_dir);
        let names = &engine.served_model_name;
        for (index, name) in names.iter().enumerate() {
            ensure!(!name.is_empty(), "a served-model-name is empty");
            ensure!(
                !names[..index].contains(name),
                "served-model-name gives `{name}` more than once"
            );
        }
        ensure!(
            engine.cache_disk_gb.is_none() || engine.cache_dir.is_some(),
            "cache-disk-gb limits a directory, but cache-dir names none"
        );
        let numerics = engine.numerics.0;
        let (kv, index_keys) = (engine.kv_cache_dtype.into(), engine.index_key_dtype.into());
        let formats = RowFormats::choose(numerics, kv, index_keys)
            .context("in kv-cache-dtype or index-key-dtype")?;
        let bytes = |gib: u32| u64::from(gib) << 30;
        let tiers = TierConfig {
            host_bytes: bytes(engine.cache_host_gb),
            directory: engine.cache_dir,
            disk_bytes: engine.cache_disk_gb.map_or(TierConfig::default().disk_bytes, bytes),
        };
        let speculation = SpeculationConfig::default();
        let speculation = SpeculationConfig {
            method: engine.speculate.into(),
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
            served_model_names: engine.served_model_name,
            max_num_seqs: engine.max_num_seqs,
            max_num_batched_tokens: engine.max_num_batched_tokens,
            tensor_parallel_size: engine.tensor_parallel_size.get(),
            numerics,
            formats,
            kv_cache_memory_bytes: engine.kv_cache_memory_bytes,
            threads: engine.threads,
            device: engine.device,
            deterministic: engine.deterministic,
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
        let mut options = ServeOptions::default();
        options.overrides.set("server", "port", 9000);
        options.overrides.set(ENGINE, "max_num_seqs", 5);
        let config = ServeConfig::merged(file, options).unwrap();
        assert_eq!((config.server.server.port, config.max_num_seqs), (9000, 5));
        assert_eq!((config.numerics, config.max_num_batched_tokens), (Numerics::F32, 1024));
        assert_eq!(config.server.keys[0].key, "file");

        let options = ServeOptions { api_key: vec!["flag".to_owned()], ..ServeOptions::default() };
        let keys = ServeConfig::merged(file, options).unwrap().server.keys;
        assert_eq!(keys.iter().map(|key| key.key.as_str()).collect::<Vec<_>>(), ["flag"]);
    }

    #[test]
    fn a_local_server_is_reachable_from_this_machine_only() {
        let options = ServeOptions::local(Some(Path::new("/models/x")), Some("k"));
        let config = ServeConfig::merged("", options).unwrap();
        assert_eq!(
            (config.server.server.host.as_str(), config.server.server.port),
            ("127.0.0.1", 0)
        );
        assert_eq!(config.model.as_deref(), Some(Path::new("/models/x")));
        assert_eq!(config.server.keys[0].key, "k");
    }

    #[test]
    fn misspelt_and_impossible_settings_are_named() {
        assert!(refusal("[server]\nprot = 1").contains("prot"));
        assert!(refusal("[engine]\nmodle = 'x'").contains("modle"));
        assert!(refusal("[engine]\nnumerics = 'fp64'").contains("fp64"));
        assert!(refusal("[engine]\nkv_cache_dtype = 'fp4'").contains("fp4"));
        let lossy = refusal("[engine]\nnumerics = 'f32'\nkv_cache_dtype = 'fp8'");
        assert!(lossy.contains("KV rows in fp8 would round what numerics f32"), "{lossy}");
        assert!(refusal("[[keys]]\nkey = ''").contains("key number 0"));
        assert!(refusal("[engine]\ncache_disk_gb = 1").contains("cache-dir names none"));
        assert!(refusal("[engine]\nspeculate = 'oracle'").contains("oracle"));
        let none = refusal("[engine]\nspeculate = 'mtp'\nnum_speculative_tokens = 0");
        assert!(none.contains("is 0, but must be 1 to 8"), "{none}");
        assert!(refusal("[engine]\nnum_speculative_tokens = 2").contains("speculate is off"));
        assert!(refusal("[engine]\nserved_model_name = ['a', 'a']").contains("`a` more than once"));
    }
}
