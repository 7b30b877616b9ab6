//! `fathom logits`: the logits of given prompts, for comparing Fathom with another implementation.
//!
//! Reads the format of the golden manifests, writes the keys of the golden files:
//! `NAME/prefill/logits_last [V]` and, where a case forces tokens, `NAME/decode/logits
//! [n_forced, V]`, both f32. Decode runs one token per step, as serving does.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use fathom_core::{Numerics, Rank, TokenId};
use fathom_model::session::Rows;
use fathom_model::{LoadOptions, NoProbe, Session, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::{Backend, Solo};
use fathom_weights::Checkpoint;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// Tokens of a prefill chunk unless `--chunk` says otherwise.
const DEFAULT_CHUNK: NonZeroUsize = NonZeroUsize::new(512).expect("512 is not 0");

/// Arguments of `fathom logits`.
#[derive(Debug, clap::Args)]
pub(crate) struct LogitsArgs {
    /// Directory of the checkpoint
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Prompts: {"cases": {NAME: {"ids": [...], "forced": [...]}}}; other keys are ignored
    #[arg(long, value_name = "FILE.json")]
    cases: PathBuf,
    /// Numeric mode: f32, f32qat or bf16
    #[arg(long, value_name = "MODE", default_value_t = Numerics::Bf16)]
    numerics: Numerics,
    /// Where to write; replaced if it exists
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
    /// Prompt tokens per step; the result does not depend on it
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CHUNK)]
    chunk: NonZeroUsize,
}

/// A prompt, and the tokens fed after it.
#[derive(Debug, PartialEq, Eq)]
struct Case {
    ids: Vec<TokenId>,
    forced: Vec<TokenId>,
}

/// Runs the command.
///
/// # Errors
/// If the cases are malformed (naming case and position), the checkpoint cannot be loaded, or the
/// output cannot be written.
pub(crate) fn run(args: LogitsArgs) -> Result<()> {
    let json = std::fs::read(&args.cases)
        .with_context(|| format!("reading the cases in {}", args.cases.display()))?;
    let checkpoint = Checkpoint::open(&args.model)
        .with_context(|| format!("opening the checkpoint {}", args.model.display()))?;
    let config = checkpoint.config();
    let cases = parse_cases(&json, config.vocab_size, config.max_position_embeddings)
        .with_context(|| format!("in {}", args.cases.display()))?;

    let (ops, options) = (CpuOps::new(args.numerics), LoadOptions { mtp: false });
    let model = Transformer::load(ops, &checkpoint, Rank::solo(), options, &mut |_| {})
        .with_context(|| format!("loading the model from {}", args.model.display()))?;
    let mut tensors = BTreeMap::new();
    for (name, case) in &cases {
        let logits = run_case(&model, case, args.chunk.get())
            .with_context(|| format!("running case `{name}`"))?;
        tracing::info!(case = name, tokens = case.ids.len(), forced = case.forced.len(), "done");
        tensors.extend(logits.into_iter().map(|(key, values)| (format!("{name}/{key}"), values)));
    }
    write(&args.out, &tensors).with_context(|| format!("writing {}", args.out.display()))?;
    tracing::info!(cases = cases.len(), out = %args.out.display(), "logits written");
    Ok(())
}

/// Reads the cases and checks every token id and length against the model.
fn parse_cases(
    json: &[u8],
    vocab_size: usize,
    max_position_embeddings: usize,
) -> Result<BTreeMap<String, Case>> {
    let root: Value = serde_json::from_slice(json).context("the file is not JSON")?;
    let cases = root.get("cases").context("there is no key `cases`")?;
    let cases = cases.as_object().context("`cases` is not an object of named cases")?;
    ensure!(!cases.is_empty(), "`cases` is empty: give at least one case");
    let parse = |(name, value): (&String, &Value)| {
        let ids = token_ids(name, value, "ids", vocab_size)?
            .ok_or_else(|| anyhow!("case `{name}` has no `ids`"))?;
        ensure!(!ids.is_empty(), "case `{name}`: `ids` is empty, a prompt has at least one token");
        let forced = token_ids(name, value, "forced", vocab_size)?.unwrap_or_default();
        let n_tokens = ids.len() + forced.len();
        ensure!(
            n_tokens <= max_position_embeddings,
            "case `{name}` has {n_tokens} tokens, the model was made for {max_position_embeddings}"
        );
        Ok((name.clone(), Case { ids, forced }))
    };
    cases.iter().map(parse).collect()
}

/// The token ids under `key` of a case, or `None` if the key is absent.
fn token_ids(
    name: &str,
    case: &Value,
    key: &str,
    vocab_size: usize,
) -> Result<Option<Vec<TokenId>>> {
    let Some(ids) = case.get(key) else { return Ok(None) };
    let Some(ids) = ids.as_array() else {
        bail!("case `{name}`: `{key}` is not an array of token ids");
    };
    let check = |(index, id): (usize, &Value)| {
        let in_vocabulary = |id: &u64| usize::try_from(*id).is_ok_and(|id| id < vocab_size);
        let token = id.as_u64().filter(in_vocabulary).and_then(|id| TokenId::try_from(id).ok());
        token.ok_or_else(|| {
            anyhow!("case `{name}`: {key}[{index}] is {id}, expected a token id below {vocab_size}")
        })
    };
    ids.iter().enumerate().map(check).collect::<Result<_>>().map(Some)
}

/// Shape and values of a tensor to write.
type Logits = (Vec<usize>, Vec<f32>);

/// Prefill, then a step per forced token.
fn run_case(
    model: &Transformer<CpuOps>,
    case: &Case,
    chunk: usize,
) -> Result<Vec<(&'static str, Logits)>> {
    let mut session = Session::new(model, &Solo, case.ids.len() + case.forced.len(), 0)?;
    let mut step = |tokens: &[TokenId], rows| -> Result<Vec<f32>> {
        let output = session.run(tokens, rows, false, &mut NoProbe)?;
        Ok(output
            .logits
            .map(|logits| model.ops().download(&logits))
            .transpose()?
            .unwrap_or_default())
    };
    let vocab_size = model.config().vocab_size;
    let mut last = Vec::new();
    let n_chunks = case.ids.len().div_ceil(chunk);
    for (index, tokens) in case.ids.chunks(chunk).enumerate() {
        last = step(tokens, if index + 1 == n_chunks { Rows::Last } else { Rows::None })?;
    }
    let mut logits = vec![("prefill/logits_last", (vec![vocab_size], last))];
    if !case.forced.is_empty() {
        let mut rows = Vec::with_capacity(case.forced.len() * vocab_size);
        for token in &case.forced {
            rows.extend(step(&[*token], Rows::Last)?);
        }
        logits.push(("decode/logits", (vec![case.forced.len(), vocab_size], rows)));
    }
    Ok(logits)
}

fn write(path: &Path, tensors: &BTreeMap<String, Logits>) -> Result<()> {
    let bytes: Vec<(&String, &[usize], Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| {
            let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name, shape.as_slice(), data)
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, data)| Ok((name, TensorView::new(Dtype::F32, shape.to_vec(), data)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    // To a neighbour first, so that an interrupted run leaves no half a file under this name.
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".part");
    safetensors::serialize_to_file(views, None, Path::new(&unfinished))?;
    std::fs::rename(&unfinished, path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn refusal(json: &str) -> String {
        format!("{:#}", parse_cases(json.as_bytes(), 1024, 16).unwrap_err())
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_named_by_case_and_position() {
        let json = r#"{"cases": {"p3": {"ids": [0, 5, 1024]}}}"#;
        assert_eq!(refusal(json), "case `p3`: ids[2] is 1024, expected a token id below 1024");
        let json = r#"{"cases": {"p3": {"ids": [0], "forced": [-1]}}}"#;
        assert_eq!(refusal(json), "case `p3`: forced[0] is -1, expected a token id below 1024");
        let json = r#"{"cases": {"p3": {"ids": [0, "1"]}}}"#;
        assert_eq!(refusal(json), "case `p3`: ids[1] is \"1\", expected a token id below 1024");
    }

    #[test]
    fn each_other_malformed_file_has_its_own_refusal() {
        assert!(refusal("{").starts_with("the file is not JSON: "));
        assert_eq!(refusal(r#"{"case": {}}"#), "there is no key `cases`");
        assert_eq!(refusal(r#"{"cases": []}"#), "`cases` is not an object of named cases");
        assert_eq!(refusal(r#"{"cases": {}}"#), "`cases` is empty: give at least one case");
        assert_eq!(refusal(r#"{"cases": {"a": {}}}"#), "case `a` has no `ids`");
        assert!(refusal(r#"{"cases": {"a": {"ids": []}}}"#).contains("`ids` is empty"));
        assert!(refusal(r#"{"cases": {"a": {"ids": 1}}}"#).contains("not an array"));
        let long = format!(r#"{{"cases": {{"a": {{"ids": {:?}, "forced": [1]}}}}}}"#, [0; 16]);
        assert_eq!(refusal(&long), "case `a` has 17 tokens, the model was made for 16");
    }

    #[test]
    fn other_keys_are_ignored_and_forced_may_be_absent() {
        let json = br#"{"checkpoint": 1, "cases": {"a": {"ids": [7], "margin": 0.5}}}"#;
        let cases = parse_cases(json, 1024, 16).unwrap();
        assert_eq!(cases["a"], Case { ids: vec![7], forced: vec![] });
    }

    #[test]
    fn the_file_has_one_row_per_forced_token_and_does_not_depend_on_the_chunk() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
        let dir = tempfile::tempdir().unwrap();
        let cases = dir.path().join("cases.json");
        let json = r#"{"cases": {"a": {"ids": [1, 2, 3, 4, 5, 6, 7], "forced": [8, 9]},
                                 "b": {"ids": [3]}}}"#;
        std::fs::write(&cases, json).unwrap();
        let files = [1, 3, 100].map(|chunk| {
            let (out, chunk) = (dir.path().join(format!("{chunk}")), NonZeroUsize::new(chunk));
            let (model, cases) = (model.clone(), cases.clone());
            let numerics = Numerics::Bf16;
            let args = LogitsArgs { model, cases, numerics, out, chunk: chunk.unwrap() };
            let out = args.out.clone();
            run(args).unwrap();
            std::fs::read(out).unwrap()
        });
        assert_eq!(files[0], files[1]);
        assert_eq!(files[0], files[2]);
        let file = SafeTensors::deserialize(&files[0]).unwrap();
        let mut names = file.names();
        names.sort_unstable();
        assert_eq!(names, ["a/decode/logits", "a/prefill/logits_last", "b/prefill/logits_last"]);
        assert_eq!(file.tensor("a/decode/logits").unwrap().shape(), [2, 1024]);
        assert_eq!(file.tensor("b/prefill/logits_last").unwrap().shape(), [1024]);
    }
}
