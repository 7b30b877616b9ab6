//! What `fathom bench slice` measures: its arguments, and the cases they mean.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result};
use fathom_core::ModelConfig;

/// Configurations inside the binary.
const MODELS: [(&str, &str); 3] = [
    ("flash", include_str!("../../../../../models/flash/config.json")),
    ("pro", include_str!("../../../../../models/pro/config.json")),
    ("nano", include_str!("../../../../../models/nano/config.json")),
];
/// Layers of a prefill slice at most: both kinds of compressing layers five times.
pub(super) const PREFILL_LAYERS: usize = 12;
/// The case with popular experts.
const ZIPF_BATCH: usize = 64;

/// A number of tokens, with `K` for 1,024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tokens(pub(super) usize);

impl FromStr for Tokens {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, unit) = match text.strip_suffix(['K', 'k']) {
            Some(digits) => (digits, 1024),
            None => (text, 1),
        };
        let n = digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit));
        n.map(Self).ok_or_else(|| format!("`{text}` is no number of tokens, such as 8 or 32K"))
    }
}

/// Kinds of cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Part {
    /// One token per sequence
    Decode,
    /// Chunks of a prompt
    Prefill,
    /// Decode where few experts are popular
    Zipf,
}

/// Arguments of `fathom bench slice`.
#[derive(Debug, clap::Args)]
pub(crate) struct SliceArgs {
    /// `flash`, `pro`, `nano`, or a config.json or a folder with one
    #[arg(long, default_value = "flash")]
    pub(super) model: String,
    /// Layers to run; as many as fit by default
    #[arg(long)]
    pub(super) layers: Option<usize>,
    /// Sequences of a decode step
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,64,128")]
    pub(super) batch: Vec<usize>,
    /// Context of a decode step, and tokens before a prefill chunk, e.g. 1K
    #[arg(long, value_delimiter = ',', default_value = "1K,32K,128K")]
    pub(super) context: Vec<Tokens>,
    /// Tokens of a prefill chunk
    #[arg(long, value_delimiter = ',', default_value = "8K,2K")]
    pub(super) prefill: Vec<Tokens>,
    /// Keep to these kinds of cases
    #[arg(long, value_delimiter = ',', default_value = "decode,prefill,zipf")]
    pub(super) only: Vec<Part>,
    /// Timed steps of a case
    #[arg(long, default_value_t = 30)]
    pub(super) samples: usize,
    /// Fewer samples, no times by kind of layer
    #[arg(long)]
    pub(super) quick: bool,
    /// Run each case once more with results that do not depend on the batch, and tell what that costs
    #[arg(long)]
    pub(super) deterministic: bool,
    /// Print floors and stop: needs no GPU
    #[arg(long)]
    pub(super) floors_only: bool,
    /// Begin no case after this many seconds
    #[arg(long, value_name = "SECONDS")]
    pub(super) budget_s: Option<f64>,
    /// Write the result as JSON to this file too, after every case
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<std::path::PathBuf>,
}

impl SliceArgs {
    /// Timed steps of a case.
    pub(super) fn n_samples(&self) -> usize {
        if self.quick { self.samples.clamp(1, 7) } else { self.samples.max(1) }
    }
}

/// The configuration that `--model` means.
///
/// # Errors
/// If it is no name of ours and no file that can be read, or a model that is refused.
pub(super) fn model(name: &str) -> Result<ModelConfig> {
    let text = match MODELS.iter().find(|(known, _)| *known == name) {
        Some((_, text)) => (*text).to_owned(),
        None => {
            let path = Path::new(name);
            let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
            std::fs::read_to_string(&file).with_context(|| {
                format!("reading {}; --model is flash, pro, nano or a config.json", file.display())
            })?
        }
    };
    let parsed = fathom_weights::parse_config(text.as_bytes())
        .with_context(|| format!("the configuration of {name}"))?;
    Ok(parsed.config)
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// `batch` sequences of about `context` tokens, one more each.
    Decode { batch: usize, context: usize },
    /// `n_tokens` of one prompt after `prefix` others.
    Prefill { n_tokens: usize, prefix: usize },
}

/// One case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) work: Work,
    /// Whether experts are popular by Zipf's law.
    pub(super) zipf: bool,
}

impl Case {
    /// For tables and messages.
    pub(super) fn name(&self) -> String {
        let routing = if self.zipf { ", Zipf" } else { "" };
        match self.work {
            Work::Decode { batch, context } => format!("decode {batch} x {context}{routing}"),
            Work::Prefill { n_tokens, prefix } => format!("prefill {n_tokens} after {prefix}"),
        }
    }
}

/// Cases over one loaded model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) cases: Vec<Case>,
    pub(super) zipf: bool,
    pub(super) max_layers: Option<usize>,
}

impl Group {
    /// For messages.
    pub(super) fn name(&self) -> String {
        let first = self.cases.first().map_or_else(String::new, Case::name);
        format!("{} cases from `{first}` on", self.cases.len())
    }
}

/// What `args` ask for, the most telling first: short contexts leave room for the most layers.
pub(super) fn groups(args: &SliceArgs) -> Vec<Group> {
    let wants = |part| args.only.contains(&part);
    let mut contexts: Vec<usize> = args.context.iter().map(|tokens| tokens.0.max(1)).collect();
    contexts.sort_unstable();
    contexts.dedup();
    let mut batches: Vec<usize> = args.batch.iter().copied().filter(|&batch| batch > 0).collect();
    batches.sort_unstable();
    batches.dedup();
    let decode = |context: usize| Group {
        cases: batches
            .iter()
            .map(|&batch| Case { work: Work::Decode { batch, context }, zipf: false })
            .collect(),
        zipf: false,
        max_layers: None,
    };
    let mut groups = Vec::new();
    if wants(Part::Decode) {
        groups.extend(contexts.first().map(|&context| decode(context)));
    }
    if wants(Part::Prefill) {
        // The shortest context means no tokens before.
        let prefixes: Vec<usize> =
            [0].into_iter().chain(contexts.iter().copied().skip(1)).collect();
        let chunk = |tokens: &Tokens| {
            let n_tokens = tokens.0.max(1);
            let case =
                |&prefix: &usize| Case { work: Work::Prefill { n_tokens, prefix }, zipf: false };
            prefixes.iter().map(case).collect::<Vec<_>>()
        };
        let cases: Vec<Case> = args.prefill.iter().flat_map(chunk).collect();
        groups.push(Group { cases, zipf: false, max_layers: Some(PREFILL_LAYERS) });
    }
    if wants(Part::Decode) {
        groups.extend(contexts.iter().skip(1).rev().map(|&context| decode(context)));
    }
    if wants(Part::Zipf)
        && let Some(&context) = contexts.first()
    {
        let batch = batches.iter().copied().filter(|&batch| batch <= ZIPF_BATCH).max();
        let case = |batch| Case { work: Work::Decode { batch, context }, zipf: true };
        let cases = batch.map(case).into_iter().collect();
        groups.push(Group { cases, zipf: true, max_layers: None });
    }
    groups.retain(|group| !group.cases.is_empty());
    groups
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: SliceArgs,
    }

    fn args(words: &[&str]) -> SliceArgs {
        Line::parse_from([&["slice"], words].concat()).args
    }

    #[test]
    fn the_whole_grid_is_measured_by_default_the_shortest_context_first() {
        let names: Vec<String> =
            groups(&args(&[])).iter().flat_map(|g| g.cases.iter().map(Case::name)).collect();
        assert_eq!(names.len(), 15 + 6 + 1);
        assert_eq!(names[0], "decode 1 x 1024");
        assert_eq!(names[5], "prefill 8192 after 0");
        assert_eq!(names[8], "prefill 2048 after 0");
        assert_eq!(names[11], "decode 1 x 131072");
        assert_eq!(names[21], "decode 64 x 1024, Zipf");
    }

    #[test]
    fn parts_of_the_grid_can_be_asked_for() {
        let args = args(&["--batch", "2,1", "--context", "300", "--only", "decode"]);
        let groups = groups(&args);
        let names: Vec<String> = groups[0].cases.iter().map(Case::name).collect();
        assert_eq!(
            (groups.len(), names),
            (1, vec!["decode 1 x 300".into(), "decode 2 x 300".into()])
        );
    }

    #[test]
    fn tokens_are_counted_in_ks_and_nonsense_is_named() {
        assert_eq!("32K".parse(), Ok(Tokens(32_768)));
        assert_eq!("7".parse(), Ok(Tokens(7)));
        assert!("many".parse::<Tokens>().unwrap_err().contains("`many`"));
        assert!(model("/nowhere").unwrap_err().to_string().contains("/nowhere"));
        assert_eq!(model("flash").unwrap().num_hidden_layers, 43);
    }
}
