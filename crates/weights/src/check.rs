//! Tensors on disk against tensors the config implies.
//!
//! Every expected name must be there once, in its format and shape, and nothing else may be,
//! except `mtp.*` tensors that are not loaded: those are left out with a notice. All problems are
//! collected (up to a limit), so that `fathom inspect` can show them together.

use std::collections::HashMap;
use std::mem::discriminant;
use std::ops::ControlFlow;

use fathom_core::ExpertFormat;

use crate::config::ParsedConfig;
use crate::dtype::StoredDtype;
use crate::error::LoadError;
use crate::expected::{Component, Place, TensorPattern, Variant, visit_tensors};
use crate::names;
use crate::shard::HeaderDtype;

/// Problems that are kept; a wrong config makes every tensor one.
pub(crate) const MAX_PROBLEMS: usize = 50;

/// A tensor as found in a shard.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) shard: usize,
    pub(crate) dtype: HeaderDtype,
    pub(crate) shape: Box<[usize]>,
    /// Bytes from the start of the file.
    pub(crate) range: std::ops::Range<usize>,
    /// Whether the config implies it.
    pub(crate) expected: bool,
}

/// Tensors by canonical name.
pub(crate) type FoundMap = HashMap<Box<str>, Found>;

/// Lets the tensors decide what the config leaves open: the experts' format, and whether MTP
/// blocks are of a kind that is not loaded.
pub(crate) fn settle(parsed: &mut ParsedConfig, found: &FoundMap) {
    if !parsed.expert_format_given
        && let Some(expert) = found.get("layers.0.ffn.experts.0.w1.weight")
    {
        let format = match expert.dtype {
            HeaderDtype::Known(StoredDtype::I8) => Some((ExpertFormat::Fp4, "fp4")),
            HeaderDtype::Known(StoredDtype::F8E4M3) => Some((ExpertFormat::Fp8, "fp8")),
            _ => None,
        };
        if let Some((format, name)) = format {
            parsed.config.expert_format = format;
            parsed.notices.retain(|notice| !notice.starts_with("expert_dtype is absent"));
            parsed.notices.push(format!("expert_dtype is absent: {name} by the tensors' format"));
        }
    }
    let config = &mut parsed.config;
    if config.num_nextn_predict_layers > 0 && found.keys().any(|name| names::is_dspark(name)) {
        config.num_nextn_predict_layers = 0;
        config.layer_kinds.truncate(config.num_hidden_layers);
        parsed.dspark = true;
        parsed.notices.push(
            "the MTP blocks are DSpark draft stages, which are not supported: mtp.* tensors are \
             ignored, the main model is complete"
                .to_owned(),
        );
    }
}

/// Compares `found` with what `parsed` implies. Marks what is expected, reports what is wrong.
///
/// `complete` tells whether all shards could be read; if not, missing tensors are no news.
pub(crate) fn compare(
    parsed: &mut ParsedConfig,
    found: &mut FoundMap,
    files: &[std::sync::Arc<str>],
    complete: bool,
) -> Vec<LoadError> {
    let mut problems = Vec::new();
    let config = &parsed.config;
    visit_tensors(config, Variant::of(config), |_: Place, pattern, name| {
        if problems.len() >= MAX_PROBLEMS {
            return ControlFlow::Break(());
        }
        match found.get_mut(name) {
            Some(tensor) => {
                tensor.expected = pattern.component != Component::Duplicate;
                problems.extend(mismatch(name, tensor, pattern, &files[tensor.shard]));
            }
            None if complete && pattern.component != Component::Duplicate => {
                problems.push(LoadError::MissingTensor {
                    name: name.to_owned(),
                    dtype: pattern.dtype,
                    shape: pattern.shape.clone(),
                });
            }
            None => {}
        }
        ControlFlow::Continue(())
    });
    let all_visited = problems.len() < MAX_PROBLEMS;

    let mut refusals: Vec<LoadError> = Vec::new();
    let mut surplus: Vec<(&str, &Found)> = Vec::new();
    let (mut ignored, mut ignored_bytes) = (0_u64, 0_u64);
    for (name, tensor) in found.iter().filter(|(_, tensor)| !tensor.expected) {
        if names::is_mtp(name) {
            ignored += 1;
            ignored_bytes += tensor.range.len() as u64;
        } else if let Some(refusal) = names::foreign(name, &files[tensor.shard]) {
            if !refusals.iter().any(|known| discriminant(known) == discriminant(&refusal)) {
                refusals.push(refusal);
            }
        } else {
            surplus.push((name, tensor));
        }
    }
    if !refusals.is_empty() {
        // The checkpoint is of another family: what else differs is a consequence.
        refusals.sort_by_key(LoadError::to_string);
        return refusals;
    }
    if ignored > 0 && all_visited {
        parsed.notices.push(format!(
            "{ignored} mtp.* tensors ({ignored_bytes} bytes) are not needed and left unread"
        ));
    }
    if all_visited {
        surplus.sort_by_key(|(name, _)| *name);
        let room = MAX_PROBLEMS - problems.len();
        problems.extend(surplus.into_iter().take(room).map(|(name, tensor)| {
            LoadError::SurplusTensor {
                name: name.to_owned(),
                file: files[tensor.shard].to_string(),
            }
        }));
    }
    problems
}

/// What is wrong with a tensor that should look like `pattern`.
fn mismatch(name: &str, tensor: &Found, pattern: &TensorPattern, file: &str) -> Option<LoadError> {
    let (name, file) = (|| name.to_owned(), || file.to_owned());
    match &tensor.dtype {
        HeaderDtype::Known(dtype) if pattern.accepts(*dtype) => {}
        found => {
            let (found, expected) = (found.to_string(), pattern.dtype);
            return Some(LoadError::WrongDtype { name: name(), file: file(), found, expected });
        }
    }
    if *tensor.shape == *pattern.shape {
        return None;
    }
    if pattern.component == Component::Tid2eid
        && tensor.shape.len() == 2
        && tensor.shape[0] == pattern.shape[0]
    {
        let (found, expected) = (tensor.shape[1], pattern.shape[1]);
        return Some(LoadError::HashTableWidth { name: name(), file: file(), found, expected });
    }
    let (found, expected) = (tensor.shape.to_vec(), pattern.shape.clone());
    Some(LoadError::WrongShape { name: name(), file: file(), found, expected })
}
