//! A checkpoint: a checked config and its tensors, each a slice of a mapped file.
//!
//! Opening reads `config.json`, the index and the shards' headers, and checks everything they can
//! tell: names, formats, shapes, offsets, file lengths, totals. It touches no tensor, so that the
//! 69,187 tensors of Flash open in well under a second; values are checked as they are read (see
//! [`verify`](crate::verify)).
//!
//! Not here: what the tensors mean (`model`), sizes by component (`report`).

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use fathom_core::ModelConfig;

use crate::check::{self, Found, FoundMap};
use crate::config::{
    GenerationConfig, MAX_CONFIG_BYTES, ParsedConfig, parse_config, parse_generation_config,
};
use crate::dtype::StoredDtype;
use crate::error::LoadError;
use crate::files::Files;
use crate::index::{INDEX, Index, MAX_INDEX_BYTES, parse_index};
use crate::names;
use crate::shard::{HeaderDtype, LENGTH_BYTES, header_end, parse_header};
use crate::view::TensorView;

/// A checkpoint in one file has no index.
const SINGLE: &str = "model.safetensors";
/// Longest tokenizer file that is read (the release's has 7 MB).
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Longest prompt encoder that is read.
const MAX_ENCODER_BYTES: u64 = 16 << 20;

/// Which table of reasoning-effort prompts a checkpoint was trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EffortProfileHint {
    /// The first releases of Flash and Pro.
    Preview,
    /// The official Flash of July 2026.
    Official0731,
}

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    files: Files,
    parsed: ParsedConfig,
    generation: GenerationConfig,
    shards: Vec<Shard>,
    tensors: FoundMap,
    n_bytes: u64,
}

/// A mapped shard.
#[derive(Debug)]
struct Shard {
    file: Arc<str>,
    data: Bytes,
}

/// What opening found: the checkpoint as far as it goes, and everything wrong with it.
pub(crate) struct Examined {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) problems: Vec<LoadError>,
}

impl Checkpoint {
    /// Opens the checkpoint in the directory `dir`.
    ///
    /// # Errors
    /// The first [`LoadError`]; `fathom inspect` shows all of them.
    pub fn open(dir: &Path) -> Result<Self, LoadError> {
        Self::sound(examine(Files::dir(dir)?)?)
    }

    /// Opens a checkpoint whose files are part of the binary, as `(name, content)`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]: the checks are the same.
    pub fn from_embedded(files: &[(&str, &'static [u8])]) -> Result<Self, LoadError> {
        let files = files.iter().map(|(name, data)| ((*name).to_owned(), *data)).collect();
        Self::sound(examine(Files::Embedded(files))?)
    }

    fn sound(examined: Examined) -> Result<Self, LoadError> {
        match examined.problems.into_iter().next() {
            Some(problem) => Err(problem),
            None => Ok(examined.checkpoint),
        }
    }

    /// The model's dimensions.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.parsed.config
    }

    /// The config with what was assumed on the way.
    #[must_use]
    pub const fn parsed_config(&self) -> &ParsedConfig {
        &self.parsed
    }

    /// The sampling values the checkpoint recommends; those of the releases where it names none.
    #[must_use]
    pub const fn generation_config(&self) -> &GenerationConfig {
        &self.generation
    }

    /// What was assumed, ignored or repaired: one sentence each, for the log.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.parsed.notices
    }

    /// Tensors that are loaded.
    #[must_use]
    pub fn n_tensors(&self) -> usize {
        self.tensors.values().filter(|tensor| tensor.expected).count()
    }

    /// Files the tensors lie in.
    #[must_use]
    pub fn n_shards(&self) -> usize {
        self.shards.len()
    }

    /// Bytes of all tensors on disk, ignored ones included (`total_size` of the index).
    #[must_use]
    pub const fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Names of all tensors that are loaded, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().filter(|(_, tensor)| tensor.expected).map(|(name, _)| &**name)
    }

    /// Whether there is a tensor called `name` to load.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|tensor| tensor.expected)
    }

    /// The tensor called `name` in the release's spelling. Copies nothing.
    ///
    /// Scales in E8M0 are checked here: the caller is about to read them anyway.
    ///
    /// # Errors
    /// [`LoadError::UnknownTensor`]; [`LoadError::NanScale`] for a damaged scale.
    pub fn tensor(&self, name: &str) -> Result<TensorView, LoadError> {
        let view = self.view(name)?;
        if view.dtype == StoredDtype::F8E8M0 {
            crate::verify::check_scales(&view)?;
        }
        Ok(view)
    }

    /// The same without a look at its bytes, for those who ask for names, shapes and formats only.
    ///
    /// # Errors
    /// [`LoadError::UnknownTensor`].
    pub fn unread_tensor(&self, name: &str) -> Result<TensorView, LoadError> {
        self.view(name)
    }

    /// The expert ids of the hash-routed layer whose table is `name`:
    /// `[vocab_size, num_experts_per_tok]`, every id in range, no id twice for a token.
    ///
    /// # Errors
    /// [`LoadError::ExpertOutOfRange`] and [`LoadError::ExpertRepeated`] name token and expert.
    pub fn tid2eid(&self, name: &str) -> Result<Vec<u16>, LoadError> {
        self.view(name)?.tid2eid(self.config().n_routed_experts)
    }

    /// Reads every tensor and checks its values: scales, expert ids, numbers that are not finite.
    ///
    /// # Errors
    /// The first [`LoadError`], in order of names.
    pub fn verify(&self) -> Result<(), LoadError> {
        let mut names: Vec<&str> = self.names().collect();
        names.sort_unstable();
        for name in names {
            let view = self.view(name)?;
            match view.dtype {
                StoredDtype::I64 => drop(view.tid2eid(self.config().n_routed_experts)?),
                StoredDtype::F32 if name.ends_with(".scale") => {
                    crate::verify::check_scales(&view)?;
                }
                _ => crate::verify::check_values(&view)?,
            }
        }
        Ok(())
    }

    /// The bytes of `tokenizer.json`.
    ///
    /// # Errors
    /// [`LoadError::MissingFile`] where there is none.
    pub fn tokenizer_json(&self) -> Result<Bytes, LoadError> {
        self.files.require("tokenizer.json", MAX_TOKENIZER_BYTES)
    }

    /// The bytes of `tokenizer_config.json`, where there is one.
    ///
    /// # Errors
    /// [`LoadError::Read`] and its kin where it cannot be read.
    pub fn tokenizer_config_json(&self) -> Result<Option<Bytes>, LoadError> {
        self.files.read("tokenizer_config.json", MAX_TOKENIZER_BYTES)
    }

    /// Which effort prompts the checkpoint's own encoder has, where it tells.
    ///
    /// The encoder is the release's `encoding/encoding_dsv4.py`; without it, `dspark_*` keys of
    /// the config mark the official Flash.
    ///
    /// # Errors
    /// [`LoadError::Read`] and its kin where the encoder is there but cannot be read.
    pub fn effort_profile_hint(&self) -> Result<Option<EffortProfileHint>, LoadError> {
        let encoder = self.files.read("encoding/encoding_dsv4.py", MAX_ENCODER_BYTES)?;
        let text = String::from_utf8_lossy(encoder.as_deref().unwrap_or_default());
        // The later encoder defines both, so the table of the later one decides.
        Ok(if text.contains("REASONING_EFFORT_PROMPTS") {
            Some(EffortProfileHint::Official0731)
        } else if text.contains("REASONING_EFFORT_MAX") {
            Some(EffortProfileHint::Preview)
        } else {
            self.parsed.dspark.then_some(EffortProfileHint::Official0731)
        })
    }

    /// Format and bytes of a tensor on disk, loaded or not.
    pub(crate) fn stored(&self, name: &str) -> Option<(StoredDtype, u64)> {
        let tensor = self.tensors.get(name)?;
        match tensor.dtype {
            HeaderDtype::Known(dtype) => Some((dtype, tensor.range.len() as u64)),
            HeaderDtype::Other(_) => None,
        }
    }

    fn view(&self, name: &str) -> Result<TensorView, LoadError> {
        let unknown = || LoadError::UnknownTensor { name: name.to_owned() };
        let tensor = self.tensors.get(name).filter(|tensor| tensor.expected).ok_or_else(unknown)?;
        let HeaderDtype::Known(dtype) = tensor.dtype else { return Err(unknown()) };
        let shard = &self.shards[tensor.shard];
        Ok(TensorView {
            name: name.to_owned(),
            dtype,
            shape: tensor.shape.to_vec(),
            data: shard.data.slice(tensor.range.clone()),
            file: Arc::clone(&shard.file),
        })
    }
}

/// Reads and checks the config alone.
pub(crate) fn read_config(files: &Files) -> Result<ParsedConfig, LoadError> {
    let json = files.require("config.json", MAX_CONFIG_BYTES)?;
    parse_config(&json)
        .map_err(|source| LoadError::Config { path: files.path("config.json"), source })
}

/// Opens a checkpoint and collects what is wrong with it.
///
/// # Errors
/// What leaves nothing to look at: no readable config, no index, no weights.
pub(crate) fn examine(files: Files) -> Result<Examined, LoadError> {
    let mut parsed = read_config(&files)?;
    let generation = match files.read("generation_config.json", MAX_CONFIG_BYTES)? {
        None => GenerationConfig::default(),
        Some(json) => {
            parse_generation_config(&json, parsed.config.vocab_size).map_err(|source| {
                LoadError::Config { path: files.path("generation_config.json"), source }
            })?
        }
    };
    let index_file = files.path(INDEX).display().to_string();
    let index = read_index(&files, &index_file)?;
    let opened = open_shards(&files, &index);
    let (mut tensors, mut problems, n_bytes) = (opened.tensors, opened.problems, opened.n_bytes);
    let complete = problems.is_empty();
    match index.total_size {
        Some(expected) if complete && expected != n_bytes => {
            problems.push(LoadError::TotalSize { file: index_file, expected, found: n_bytes });
        }
        None if index.listed => {
            parsed.notices.push("the index has no total_size to compare with".to_owned());
        }
        _ => {}
    }
    check::settle(&mut parsed, &tensors);
    let names: Vec<Arc<str>> = opened.shards.iter().map(|shard| Arc::clone(&shard.file)).collect();
    problems.extend(check::compare(&mut parsed, &mut tensors, &names, complete));
    let shards = opened.shards;
    let checkpoint = Checkpoint { files, parsed, generation, shards, tensors, n_bytes };
    Ok(Examined { checkpoint, problems })
}

fn read_index(files: &Files, index_file: &str) -> Result<Index, LoadError> {
    if let Some(json) = files.read(INDEX, MAX_INDEX_BYTES)? {
        let index = parse_index(&json, index_file)?;
        return match index.shards.iter().find(|shard| names::is_converted_shard(shard)) {
            Some(shard) => {
                Err(LoadError::Converted { file: files.path(shard).display().to_string() })
            }
            None => Ok(index),
        };
    }
    let present = files.names();
    if present.iter().any(|name| name == SINGLE) {
        return Ok(Index::of_single_file(SINGLE));
    }
    match present.iter().find(|name| names::is_converted_shard(name)) {
        Some(shard) => Err(LoadError::Converted { file: files.path(shard).display().to_string() }),
        None => Err(LoadError::NoWeights { dir: files.root() }),
    }
}

struct OpenedShards {
    shards: Vec<Shard>,
    tensors: FoundMap,
    problems: Vec<LoadError>,
    n_bytes: u64,
}

/// Maps all shards and gathers their tensors under canonical names.
fn open_shards(files: &Files, index: &Index) -> OpenedShards {
    let n = index.places.len();
    let mut out = OpenedShards {
        shards: Vec::with_capacity(index.shards.len()),
        tensors: HashMap::with_capacity(n),
        problems: Vec::new(),
        n_bytes: 0,
    };
    // Tensor name -> (its shard by the index, whether that shard has it).
    let mut listed: HashMap<&str, (usize, bool)> = HashMap::with_capacity(n);
    for (name, shard) in &index.places {
        if listed.insert(name, (*shard, false)).is_some() {
            let file = files.path(INDEX).display().to_string();
            out.problems.push(LoadError::IndexDuplicate { name: name.to_string(), file });
        }
    }
    let mut unreadable = vec![false; index.shards.len()];
    for (shard_id, name) in index.shards.iter().enumerate() {
        let file: Arc<str> = files.path(name).display().to_string().into();
        match open_shard(files, name, &file, shard_id, index, &mut listed, &mut out) {
            Ok(data) => out.shards.push(Shard { file, data }),
            Err(problem) => {
                unreadable[shard_id] = true;
                out.problems.push(problem);
                out.shards.push(Shard { file, data: Bytes::new() });
            }
        }
    }
    let mut absent: Vec<(&str, usize)> = listed
        .into_iter()
        .filter(|(_, (shard, seen))| !seen && !unreadable[*shard])
        .map(|(name, (shard, _))| (name, shard))
        .collect();
    absent.sort_unstable();
    let room = check::MAX_PROBLEMS.saturating_sub(out.problems.len());
    for (name, shard) in absent.into_iter().take(room) {
        let (name, file) = (name.to_owned(), out.shards[shard].file.to_string());
        out.problems.push(LoadError::NotInShard { name, file });
    }
    out
}

/// Maps one shard, and adds its tensors to `out`.
fn open_shard(
    files: &Files,
    name: &str,
    file: &Arc<str>,
    shard_id: usize,
    index: &Index,
    listed: &mut HashMap<&str, (usize, bool)>,
    out: &mut OpenedShards,
) -> Result<Bytes, LoadError> {
    let opened = files.shard(name, |first, len| header_end(first, len, file))?;
    let Some(opened) = opened else {
        let first = index.places.iter().find(|(_, shard)| *shard == shard_id);
        let name = first.map(|(name, _)| name.to_string()).unwrap_or_default();
        return Err(LoadError::MissingShard { name, file: file.to_string() });
    };
    let data_start = opened.head.len();
    let file_len = opened.all.len() as u64;
    for tensor in parse_header(&opened.head[LENGTH_BYTES as usize..], file_len, file)? {
        if index.listed {
            match listed.get_mut(&*tensor.name) {
                Some((shard, seen)) if *shard == shard_id => *seen = true,
                Some((shard, _)) => {
                    out.problems.push(LoadError::OtherShard {
                        name: tensor.name.into_string(),
                        file: file.to_string(),
                        expected: index.shards[*shard].clone(),
                    });
                    continue;
                }
                None => {
                    let (name, file) = (tensor.name.into_string(), file.to_string());
                    out.problems.push(LoadError::NotInIndex { name, file });
                    continue;
                }
            }
        }
        let bytes = tensor.end - tensor.begin;
        out.n_bytes += bytes;
        let begin = data_start + usize::try_from(tensor.begin).expect("inside the mapped file");
        let found = Found {
            shard: shard_id,
            dtype: tensor.dtype,
            shape: tensor.shape,
            range: begin..begin + usize::try_from(bytes).expect("inside the mapped file"),
            expected: false,
        };
        let key: Box<str> = names::canonical(&tensor.name).into();
        if out.tensors.insert(key.clone(), found).is_some() {
            out.problems.push(LoadError::SameTensor {
                first: key.into_string(),
                second: tensor.name.into_string(),
                file: file.to_string(),
            });
        }
    }
    Ok(opened.all)
}
