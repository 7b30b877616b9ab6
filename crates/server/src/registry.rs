//! The served models, and the names that lead to them.
//!
//! A [`Registry`] exists before its models do: the server listens while weights load, and answers
//! `model_loading` until [`Registry::install`]. Clones share one list.
//!
//! Not here: loading weights and starting engines (`cli`).

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use fathom_chat::grammar::GrammarCompiler;
use fathom_chat::{EffortProfile, Tokenizer};
use fathom_engine::EngineHandle;
use fathom_protocol::{ApiError, ErrorCode, quoted};

use crate::config::ModelsConfig;

/// Grammars that are remembered per model: schemas and tool sets that requests repeat.
const GRAMMARS_PER_MODEL: usize = 128;

/// A loaded model and what the HTTP side needs to know about it.
#[derive(Clone)]
pub struct ModelEntry {
    /// Names that clients may use; the first is canonical. At least one.
    pub ids: Vec<String>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Tokens in, tokens out.
    pub engine: EngineHandle,
    /// Which effort prompts the checkpoint was trained with.
    pub effort_profile: EffortProfile,
    /// `fp_` and at least 8 hexadecimal digits over weights and configuration.
    pub fingerprint: String,
    /// Unix time of loading, in seconds.
    pub created: u64,
    /// Shown by the metric `fathom_build_info`.
    pub build: BuildInfo,
}

/// What a model's numbers depend on, as labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildInfo {
    /// Which weights.
    pub weights: String,
    /// How numbers are computed.
    pub dtype: String,
    /// How the model is spread, as `tp1ep1`.
    pub parallel: String,
}

impl ModelEntry {
    /// The id under which metrics and logs know the model.
    #[must_use]
    pub fn canonical_id(&self) -> &str {
        self.ids.first().map_or("unnamed", String::as_str)
    }

    pub(crate) fn vocab_size(&self) -> u32 {
        self.engine.limits().vocab_size
    }
}

/// How far the models are.
#[derive(Clone)]
pub(crate) enum Models {
    Loading { progress: f32 },
    Loaded(Arc<[Arc<ModelEntry>]>),
    Failed { reason: String },
}

/// The served models; see the module.
#[derive(Clone)]
pub struct Registry {
    models: Arc<RwLock<Models>>,
    /// Of the loaded models, by their canonical ids.
    grammars: Arc<RwLock<BTreeMap<String, Arc<GrammarCompiler>>>>,
}

impl Default for Registry {
    fn default() -> Self {
        let models = Arc::new(RwLock::new(Models::Loading { progress: 0.0 }));
        Self { models, grammars: Arc::default() }
    }
}

/// A model and what the name that led to it says about thinking.
#[derive(Clone)]
pub(crate) struct Resolved {
    pub(crate) model: Arc<ModelEntry>,
    pub(crate) thinks: Option<bool>,
    /// Makes the grammars of constrained answers.
    pub(crate) grammars: Arc<GrammarCompiler>,
}

/// The contract's aliases: name, target, default thinking.
const ALIASES: [(&str, &str); 6] = [
    ("deepseek/deepseek-v4-flash", "deepseek-v4-flash"),
    ("deepseek-ai/deepseek-v4-flash", "deepseek-v4-flash"),
    ("deepseek-ai/DeepSeek-V4-Flash", "deepseek-v4-flash"),
    ("deepseek/deepseek-v4-pro", "deepseek-v4-pro"),
    ("deepseek-ai/deepseek-v4-pro", "deepseek-v4-pro"),
    ("deepseek-ai/DeepSeek-V4-Pro", "deepseek-v4-pro"),
];
const LEGACY: [(&str, bool); 2] = [("deepseek-chat", false), ("deepseek-reasoner", true)];
const LEGACY_TARGET: &str = "deepseek-v4-flash";

impl Registry {
    /// Says how much is loaded, from 0 to 1.
    pub fn set_progress(&self, progress: f32) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        if let Models::Loading { progress: shown } = &mut *models {
            *shown = progress.clamp(0.0, 1.0);
        }
    }

    /// Begins to serve these models.
    pub fn install(&self, entries: Vec<ModelEntry>) {
        let compiler = |entry: &ModelEntry| {
            let compiler = GrammarCompiler::new(entry.tokenizer.clone(), GRAMMARS_PER_MODEL);
            (entry.canonical_id().to_owned(), Arc::new(compiler))
        };
        let compilers: BTreeMap<_, _> = entries.iter().map(compiler).collect();
        compilers.values().for_each(warm);
        *self.grammars.write().unwrap_or_else(PoisonError::into_inner) = compilers;
        self.set(Models::Loaded(entries.into_iter().map(Arc::new).collect()));
    }

    /// Says that loading failed; `reason` is for the operator.
    pub fn fail(&self, reason: impl Into<String>) {
        self.set(Models::Failed { reason: reason.into() });
    }

    fn set(&self, models: Models) {
        *self.models.write().unwrap_or_else(PoisonError::into_inner) = models;
    }

    pub(crate) fn state(&self) -> Models {
        self.models.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The loaded models; none while loading.
    pub(crate) fn loaded(&self) -> Arc<[Arc<ModelEntry>]> {
        match self.state() {
            Models::Loaded(entries) => entries,
            Models::Loading { .. } | Models::Failed { .. } => Arc::new([]),
        }
    }

    /// The model that a client means by `name`.
    pub(crate) fn resolve(&self, name: &str, config: &ModelsConfig) -> Result<Resolved, ApiError> {
        let entries = match self.state() {
            Models::Loaded(entries) => entries,
            Models::Loading { .. } => {
                let message = "The model is still loading: try again later.";
                return Err(ApiError::new(ErrorCode::ModelLoading, message));
            }
            Models::Failed { .. } => {
                let message = "The model could not be loaded: the server's log says why.";
                return Err(ApiError::new(ErrorCode::InternalError, message));
            }
        };
        let target = config.aliases.get(name).map_or(name, String::as_str);
        let thinks = legacy(name, config).or_else(|| legacy(target, config));
        let model = find(&entries, target)
            .or_else(|| {
                let alias = ALIASES.iter().find(|(alias, _)| *alias == target);
                alias.and_then(|(_, id)| find(&entries, id))
            })
            .or_else(|| {
                legacy(target, config)?;
                let sole = (entries.len() == 1).then(|| Arc::clone(&entries[0]));
                find(&entries, LEGACY_TARGET).or(sole)
            });
        let resolved = model.and_then(|model| {
            let grammars = self.grammars.read().unwrap_or_else(PoisonError::into_inner);
            let grammars = Arc::clone(grammars.get(model.canonical_id())?);
            Some(Resolved { model, thinks, grammars })
        });
        resolved.ok_or_else(|| {
            let ids: Vec<_> = entries.iter().map(|entry| entry.canonical_id()).collect();
            let (name, ids) = (quoted(name), ids.join(", "));
            let message = format!("The model {name} does not exist; this server has {ids}.");
            ApiError::at(ErrorCode::ModelNotFound, "model", message)
        })
    }

    /// Every name that leads to a model at present, canonical ids first.
    pub(crate) fn names(&self, config: &ModelsConfig) -> Vec<String> {
        let entries = self.loaded();
        let mut names: Vec<String> = entries.iter().flat_map(|e| e.ids.iter().cloned()).collect();
        let more = config.aliases.keys().map(String::as_str);
        let more = more.chain(ALIASES.iter().map(|(alias, _)| *alias));
        for name in more.chain(LEGACY.iter().map(|(alias, _)| *alias)) {
            if !names.iter().any(|known| known == name) && self.resolve(name, config).is_ok() {
                names.push(name.to_owned());
            }
        }
        names
    }
}

/// Has a compiler get ready in the background, so that the first request that needs it need not
/// wait.
fn warm(compiler: &Arc<GrammarCompiler>) {
    let compiler = Arc::clone(compiler);
    let work = move || {
        if let Err(error) = compiler.warm() {
            tracing::warn!(%error, "this model's answers cannot be constrained");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("fathom-warm".to_owned()).spawn(work) {
        tracing::debug!(%error, "grammars get ready when they are first needed");
    }
}

fn find(entries: &[Arc<ModelEntry>], id: &str) -> Option<Arc<ModelEntry>> {
    entries.iter().find(|entry| entry.ids.iter().any(|known| known == id)).cloned()
}

/// The thinking default of a legacy name, unless legacy names are off.
fn legacy(name: &str, config: &ModelsConfig) -> Option<bool> {
    let known = LEGACY.iter().find(|(alias, _)| *alias == name && config.legacy_aliases);
    known.map(|(_, thinks)| *thinks)
}
