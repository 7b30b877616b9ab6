//! Running nano over golden cases.

use std::collections::BTreeMap;

use fathom_core::{Numerics, Rank, TokenId};
use fathom_model::session::Rows;
use fathom_model::{LoadOptions, Session, Transformer};
use fathom_ops::Solo;
use fathom_ops::cpu::{CpuOps, HostTensor};
use fathom_weights::Checkpoint;

use super::files::{Case, nano};
use super::pool::argmax;
use super::record::{Record, Recorder};

pub(crate) type Model = Transformer<CpuOps>;

/// First and last compressed entry of a layer, with indexer keys on ratio-4 layers.
pub(crate) type Entries = [(Vec<f32>, Option<Vec<f32>>); 2];

/// What the model did with a case.
#[derive(Debug, Default)]
pub(crate) struct CaseRun {
    /// `[s, V]`.
    pub(crate) prefill_logits: HostTensor,
    pub(crate) prefill: Record,
    pub(crate) entries: BTreeMap<usize, Entries>,
    /// `[n_forced, V]`.
    pub(crate) decode_logits: HostTensor,
    pub(crate) decode: Record,
    pub(crate) mtp: Option<MtpRun>,
}

/// What the MTP block did with a case.
#[derive(Debug)]
pub(crate) struct MtpRun {
    /// The copies of all prompt rows, `[s, 4 * D]`.
    pub(crate) hidden_in: HostTensor,
    pub(crate) logits_last: Vec<f32>,
    /// `[n, V]`.
    pub(crate) decode_logits: HostTensor,
}

pub(crate) fn load(numerics: Numerics) -> Model {
    load_rank(numerics, Rank::solo())
}

pub(crate) fn load_rank(numerics: Numerics, rank: Rank) -> Model {
    let checkpoint = Checkpoint::open(&nano()).unwrap();
    let ops = CpuOps::new(numerics);
    Transformer::load(ops, &checkpoint, rank, LoadOptions::default(), &mut |_| {}).unwrap()
}

/// Appends the rows of `more`.
pub(crate) fn append(to: &mut HostTensor, more: &HostTensor) {
    to.cols = more.cols;
    to.rows += more.rows;
    to.data = [&to.data[..], &more.data].concat().into();
}

/// Runs a case alone, its prompt in chunks of `chunk` tokens.
pub(crate) fn run_case(model: &Model, case: &Case, chunk: usize, keeps_rows: bool) -> CaseRun {
    let n_prompt = case.ids.len();
    let mut session = Session::new(model, &Solo, n_prompt + case.forced.len(), 0).unwrap();
    let mut recorder = Recorder::new(keeps_rows);
    let mut prefill_logits = HostTensor::default();
    let mut mtp = case.mtp_prefill_ids.as_ref().map(|_| MtpRun {
        hidden_in: HostTensor::default(),
        logits_last: Vec::new(),
        decode_logits: HostTensor::default(),
    });

    for (index, tokens) in case.ids.chunks(chunk).enumerate() {
        let position = index * chunk;
        let step = session.run(tokens, Rows::All, mtp.is_some(), &mut recorder).unwrap();
        append(&mut prefill_logits, &step.logits.unwrap());
        if let (Some(mtp), Some(ids)) = (&mut mtp, &case.mtp_prefill_ids) {
            let copies = step.copies.unwrap();
            let next = &ids[position..position + tokens.len()];
            let draft = session.draft(position, next, &copies, Rows::Last, &mut recorder).unwrap();
            append(&mut mtp.hidden_in, &copies);
            mtp.logits_last = draft.logits.unwrap().data.into();
        }
    }
    let prefill = recorder.take(0);
    let entries =
        read_entries(model, n_prompt, |layer, entry| session.entry(layer, entry).unwrap());

    let mut decode_logits = HostTensor::default();
    for (index, &token) in case.forced.iter().enumerate() {
        let position = n_prompt + index;
        let step = session.run(&[token], Rows::Last, mtp.is_some(), &mut recorder).unwrap();
        append(&mut decode_logits, &step.logits.unwrap());
        let next = case.mtp_decode_ids.as_ref().and_then(|ids| ids.get(index));
        if let (Some(mtp), Some(&next)) = (&mut mtp, next) {
            let copies = step.copies.unwrap();
            let draft = session.draft(position, &[next], &copies, Rows::Last, &mut recorder);
            append(&mut mtp.decode_logits, &draft.unwrap().logits.unwrap());
        }
    }
    let decode = recorder.take(0);
    CaseRun { prefill_logits, prefill, entries, decode_logits, decode, mtp }
}

/// First and last entry of each layer that has any after `n_tokens` tokens.
pub(crate) fn read_entries(
    model: &Model,
    n_tokens: usize,
    read: impl Fn(usize, usize) -> (Vec<f32>, Option<Vec<f32>>),
) -> BTreeMap<usize, Entries> {
    let kinds = model.cache_layers().iter().enumerate();
    kinds
        .filter_map(|(layer, kind)| {
            let last = kind.n_entries(n_tokens).checked_sub(1)?;
            Some((layer, [read(layer, 0), read(layer, last)]))
        })
        .collect()
}

/// Greedy logits of `n` steps after `ids`: the row that chose each token, and the token.
pub(crate) fn run_greedy(
    model: &Model,
    ids: &[TokenId],
    n: usize,
) -> impl Iterator<Item = (Vec<f32>, TokenId)> {
    let mut session = Session::new(model, &Solo, ids.len() + n, 0).unwrap();
    let mut next = ids.to_vec();
    (0..n).map(move |_| {
        let step = session.run(&next, Rows::Last, false, &mut fathom_model::NoProbe).unwrap();
        let logits = Vec::from(step.logits.unwrap().data);
        let token = argmax(&logits) as TokenId;
        next = vec![token];
        (logits, token)
    })
}
