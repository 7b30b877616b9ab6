//! The long file: a prompt of 4,173 tokens, six sequences in mixed batches, recurrent MTP drafts.

use fathom_core::{Numerics, TokenId};
use fathom_model::session::Rows;
use fathom_model::{NoProbe, Session, StepOutput};
use fathom_ops::cpu::{CpuOps, HostTensor};
use fathom_ops::{Backend, Batch, CacheSpec, Solo};

use super::compare::Checker;
use super::files::{Case, Goldens, Manifest};
use super::pool::argmax;
use super::record::Recorder;
use super::run::{CaseRun, Model, append, load, read_entries, run_case};
use super::{CHUNK, blocks::BlockList};

const FILE: &str = "nano_f32_long.safetensors";
/// Drafts per round in the goldens.
const N_DRAFTS: usize = 4;

/// The long prompt and the second MTP prompt, each alone.
pub(crate) fn check_long_prompts() -> Checker {
    let (goldens, manifest) = (Goldens::load(FILE), Manifest::long());
    let model = load(Numerics::F32);
    let mut checker = Checker::new("long", Numerics::F32);
    for name in ["p4173", "p129", "m129"] {
        let case = &manifest.cases[name];
        checker.case(name, &goldens, case, &run_case(&model, case, CHUNK, false));
    }
    checker
}

/// The six sequences of a batch, started one after the other, in chunks that mix with decode rows.
pub(crate) fn check_batches() -> Checker {
    let (goldens, manifest) = (Goldens::load(FILE), Manifest::long());
    let model = load(Numerics::F32);
    let mut checker = Checker::new("batches", Numerics::F32);
    for names in &manifest.batches {
        let cases: Vec<&Case> = names.iter().map(|name| &manifest.cases[name]).collect();
        for (name, run) in names.iter().zip(run_batch(&model, &cases)) {
            checker.case(name, &goldens, &manifest.cases[name], &run);
        }
    }
    checker
}

/// One sequence of a batch under way.
struct Member<'a> {
    case: &'a Case,
    slot: u32,
    blocks: BlockList,
    position: usize,
    prefill_logits: HostTensor,
    decode_logits: HostTensor,
    finished_prefill: Option<CaseRun>,
}

impl Member<'_> {
    /// The tokens of the next step; none when done.
    fn next(&self, chunk: usize) -> &[TokenId] {
        let n_prompt = self.case.ids.len();
        match self.position.checked_sub(n_prompt) {
            None => &self.case.ids[self.position..(self.position + chunk).min(n_prompt)],
            Some(step) => self.case.forced.get(step..=step).unwrap_or(&[]),
        }
    }
}

/// Runs `cases` together. Member `i` joins at step `2 i`, so that every step mixes prefill chunks
/// of 7 to 61 tokens with decode rows; blocks of all members are interleaved.
fn run_batch(model: &Model, cases: &[&Case]) -> Vec<CaseRun> {
    let n_members = cases.len() as u32;
    let (kv, index_keys) = CacheSpec::formats_for(model.ops().numerics());
    let layers = model.cache_layers().to_vec();
    let spec = CacheSpec {
        layers,
        n_slots: cases.len(),
        n_blocks: 4 * cases.len(),
        n_snapshots: 0,
        spare_rows: 0,
        draft_width: 0,
        kv,
        index_keys,
    };
    let mut cache = model.new_cache(&spec).unwrap();
    let mut recorder = Recorder::new(false);
    let mut members: Vec<Member<'_>> = cases
        .iter()
        .enumerate()
        .map(|(i, case)| Member {
            case,
            slot: n_members - 1 - i as u32,
            blocks: BlockList::strided(i as u32, n_members, 4),
            position: 0,
            prefill_logits: HostTensor::default(),
            decode_logits: HostTensor::default(),
            finished_prefill: None,
        })
        .collect();

    for step in 0.. {
        let mut batch = Batch::default();
        let mut running = Vec::new();
        for (i, member) in members.iter().enumerate().take(step / 2 + 1) {
            let tokens = member.next(7 + (step * 13 + i * 29) % 55);
            if !tokens.is_empty() {
                let blocks = member.blocks.covering(member.position + tokens.len());
                batch.push(member.slot, member.position as u32, tokens, blocks, false);
                running.push(i);
            }
        }
        if running.is_empty() && step / 2 >= cases.len() {
            break;
        }
        batch.logit_rows = (0..batch.n_tokens() as u32).collect();
        recorder.expect(&batch.sequences);
        let output = model.forward(&batch, &mut cache, &Solo, false, &mut recorder).unwrap();
        let logits = output.logits.unwrap();
        for (&i, sequence) in running.iter().zip(&batch.sequences) {
            let member = &mut members[i];
            let rows: Vec<u32> = sequence.rows().map(|row| row as u32).collect();
            let logits = model.ops().select_rows(&logits, &rows).unwrap();
            let is_prefill = member.position < member.case.ids.len();
            let into =
                if is_prefill { &mut member.prefill_logits } else { &mut member.decode_logits };
            append(into, &logits);
            member.position += rows.len();
            if is_prefill && member.position == member.case.ids.len() {
                let read = |layer, entry| {
                    model.ops().read_entry(&cache, layer, member.blocks.all(), entry).unwrap()
                };
                member.finished_prefill = Some(CaseRun {
                    prefill: recorder.take(member.slot),
                    entries: read_entries(model, member.position, read),
                    ..CaseRun::default()
                });
            }
        }
    }
    members
        .into_iter()
        .map(|member| CaseRun {
            prefill_logits: member.prefill_logits,
            decode_logits: member.decode_logits,
            decode: recorder.take(member.slot),
            ..member.finished_prefill.expect("every member ran to its end")
        })
        .collect()
}

/// What a round of recurrent drafts gave.
struct Drafts {
    logits: Vec<Vec<f32>>,
    tokens: Vec<TokenId>,
    /// The block's output copies of each draft.
    hidden: Vec<Vec<f32>>,
}

/// Recurrent drafts after a prompt, and again after all of them were rejected.
pub(crate) fn check_drafts() -> Checker {
    let (goldens, manifest) = (Goldens::load(FILE), Manifest::long());
    let model = load(Numerics::F32);
    let mut checker = Checker::new("drafts", Numerics::F32);
    for name in ["p129", "m129"] {
        let case = &manifest.cases[name];
        let n_prompt = case.ids.len();
        // One draft row is not rejected: it comes from the target's own copies.
        let spare_rows = N_DRAFTS;
        let mut session = Session::new(&model, &Solo, n_prompt + 8, spare_rows).unwrap();

        let step = session.run(&case.ids, Rows::None, true, &mut NoProbe).unwrap();
        let next = case.mtp_prefill_ids.as_ref().expect("an MTP case");
        let first = session.draft(0, next, &step.copies.unwrap(), Rows::Last, &mut NoProbe);
        let drafts = recur(&model, &mut session, n_prompt - 1, first.unwrap());
        checker.drafts(name, "draft", &goldens, &drafts.logits, &drafts.tokens, &drafts.hidden);

        // All rejected: the target decodes its own token, its copies give row 129 anew.
        let step = session.run(&case.forced[..1], Rows::None, true, &mut NoProbe).unwrap();
        let next = &case.mtp_decode_ids.as_ref().expect("an MTP case")[..1];
        let copies = step.copies.unwrap();
        let first = session.draft(n_prompt, next, &copies, Rows::Last, &mut NoProbe).unwrap();
        let redrafts = recur(&model, &mut session, n_prompt, first);
        let Drafts { logits, tokens, hidden } = &redrafts;
        checker.drafts(name, "redraft", &goldens, logits, tokens, hidden);
    }
    checker
}

/// From a first draft, whose last row is at `position`, three more, each from the block's own
/// output copies and the token drafted before.
fn recur(
    model: &Model,
    session: &mut Session<'_, CpuOps>,
    position: usize,
    first: StepOutput<CpuOps>,
) -> Drafts {
    let mut drafts = Drafts { logits: Vec::new(), tokens: Vec::new(), hidden: Vec::new() };
    let mut output = first;
    for n_done in 1..=N_DRAFTS {
        let logits = output.logits.unwrap().data;
        let copies = output.copies.unwrap();
        let last = model.ops().select_rows(&copies, &[copies.rows as u32 - 1]).unwrap();
        let token = argmax(&logits) as TokenId;
        drafts.logits.push(logits.into());
        drafts.tokens.push(token);
        drafts.hidden.push(last.data.to_vec());
        if n_done == N_DRAFTS {
            break;
        }
        let draft = session.draft(position + n_done, &[token], &last, Rows::Last, &mut NoProbe);
        output = draft.unwrap();
    }
    drafts
}
