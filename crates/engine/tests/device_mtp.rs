//! The MTP block drafts on the CUDA backend, on the block emulator: as the CPU does, whatever the
//! sequence went through. Without a C++ compiler every test prints a line and passes.

use std::path::Path;
use std::sync::Arc;

use fathom_core::{Numerics, ParallelConfig, Rank, SamplingParams, TokenId};
use fathom_engine::{
    DraftInput, RankRunner, SnapshotCopy, StateRef, StepInput, StepOutput, StepRunner,
};
use fathom_model::{LoadOptions, NoProbe, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::rehearsal::Rehearsal;
use fathom_ops::cuda::{Activations, ArenaSizes, CudaOps, Memory, Place};
use fathom_ops::{Backend, Batch, CacheSpec, Ops, Solo};
use fathom_weights::Checkpoint;

use crate::device::emulator;
use crate::nano::prompt;

const DRAFTS: usize = 4;

fn load<O: Ops>(ops: O) -> Transformer<O> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let options = LoadOptions { mtp: true };
    Transformer::load(ops, &checkpoint, Rank::solo(), options, &mut |_| {}).unwrap()
}

fn spec<O: Ops>(model: &Transformer<O>) -> CacheSpec {
    let (kv, index_keys) = CacheSpec::formats_for(Numerics::Bf16);
    CacheSpec {
        layers: model.cache_layers().to_vec(),
        n_slots: 2,
        n_blocks: 2,
        n_snapshots: 1,
        spare_rows: DRAFTS,
        draft_width: model.draft_width(),
        kv,
        index_keys,
    }
}

/// A runner whose slot `s` has block `s`.
struct Driver<O: Ops>(RankRunner<O>);

impl<O: Ops> Driver<O> {
    fn new(ops: O) -> Self {
        let model = load(ops);
        let spec = spec(&model);
        Self(RankRunner::new(vec![model], ParallelConfig::default(), spec, 256).unwrap())
    }

    /// Runs `tokens` and returns the likeliest token after the last.
    fn step(&mut self, slot: u32, position: usize, tokens: &[TokenId]) -> TokenId {
        self.run(slot, position, tokens, StepInput::default())
    }

    fn run(
        &mut self,
        slot: u32,
        first: usize,
        tokens: &[TokenId],
        mut input: StepInput,
    ) -> TokenId {
        input.batch.push(slot, first as u32, tokens, &[slot], true);
        let mut output = StepOutput::default();
        self.0.step(&Arc::new(input), &mut output).unwrap();
        let most = output.logits.iter().copied().fold(f32::MIN, f32::max);
        output.logits.iter().position(|&logit| logit == most).unwrap() as TokenId
    }

    /// Drafts after `tokens`, all but the last of which have run in `slot`.
    fn draft(&mut self, slot: u32, tokens: &[TokenId]) -> Vec<TokenId> {
        let input = DraftInput {
            slot,
            position: tokens.len() as u32 - 1,
            token: tokens[tokens.len() - 1],
            n_drafts: DRAFTS as u32,
            sampling: Arc::new(SamplingParams::greedy(1)),
        };
        let mut drafts = [Vec::new()];
        self.0.draft(&Arc::new(vec![input]), &mut drafts, &mut || ()).unwrap();
        let [draft] = drafts;
        assert_eq!(draft.len(), DRAFTS);
        draft
    }
}

fn n_equal(a: &[TokenId], b: &[TokenId]) -> usize {
    a.iter().zip(b).filter(|(a, b)| a == b).count()
}

#[test]
fn a_device_drafts_as_the_cpu_does_whatever_was_rejected_before_and_changes_no_token() {
    let Some(device) = emulator() else { return };
    let text = prompt(4, 9);
    let mut cpu = Driver::new(CpuOps::new(Numerics::Bf16));
    cpu.step(0, 0, &text[..8]);
    let expected = cpu.draft(0, &text);

    let mut gpu = Driver::new(CudaOps::new(device, Activations::Fp8Grid));
    gpu.step(0, 0, &text[..8]);
    let drafts = gpu.draft(0, &text);
    assert!(n_equal(&drafts, &expected) >= 3, "{drafts:?}, the CPU {expected:?}");

    // The same tokens after drafts that were wrong, in chunks.
    gpu.step(1, 0, &text[..5]);
    gpu.draft(1, &text[..6]);
    gpu.step(1, 5, &[text[5], 900, 901]);
    gpu.step(1, 6, &text[6..8]);
    let without = gpu.step(1, 8, &text[8..]);
    assert_eq!(gpu.step(0, 8, &text[8..]), without);
    // The last token is taken back and drafted for again.
    assert_eq!(gpu.draft(1, &text), drafts);
}

#[test]
fn a_device_drafts_from_a_snapshot_and_a_block_that_a_cpu_wrote() {
    let Some(device) = emulator() else { return };
    let text = prompt(5, 130);
    let copy = SnapshotCopy { slot: 0, snapshot: 0, position: 128 };
    let mut cpu = Driver::new(CpuOps::new(Numerics::Bf16));
    let capture = StepInput { captures: vec![copy], ..StepInput::default() };
    cpu.run(0, 0, &text[..128], capture);
    let places = [StateRef::Block(0), StateRef::Snapshot(0)];
    let mut state = Vec::new();
    cpu.0.read_state(&places, &mut state).unwrap();
    cpu.step(0, 128, &text[128..129]);
    let expected = cpu.draft(0, &text);

    let mut gpu = Driver::new(CudaOps::new(device, Activations::Fp8Grid));
    gpu.0.write_state(&Arc::new(places.into_iter().zip(state.clone()).collect())).unwrap();
    let restore = StepInput { restores: vec![copy], ..StepInput::default() };
    gpu.run(0, 128, &text[128..129], restore);
    let drafts = gpu.draft(0, &text);
    assert!(n_equal(&drafts, &expected) >= 3, "{drafts:?}, the CPU {expected:?}");
    let mut kept = Vec::new();
    gpu.0.read_state(&places, &mut kept).unwrap();
    assert!(kept == state, "a device gives back the bytes it was given");
}

/// Logits and copies of three passes over two rows and one over three, each from other copies.
fn passes(model: &Transformer<CudaOps>) -> (Vec<Vec<f32>>, usize) {
    let mut cache = model.new_cache(&CacheSpec { n_slots: 3, ..spec(model) }).unwrap();
    let (ops, width) = (model.ops(), model.draft_width());
    let mut found = Vec::new();
    for (turn, n) in [2, 2, 2, 3].into_iter().enumerate() {
        let mut rows = Batch::default();
        for slot in 0..n as u32 {
            rows.push(slot, 3 * slot + turn as u32, &[0], &[], true);
        }
        let next = &prompt(turn as u32, 3)[..n];
        let values: Vec<f32> =
            (0..n * width).map(|i| ((i * 7 + turn * 3) % 13) as f32 - 6.0).collect();
        let x = ops.upload(n, width, &values).unwrap();
        let output = model.draft(&rows, next, x, &mut cache, &Solo, true, &mut NoProbe).unwrap();
        for tensor in [output.logits.unwrap(), output.copies.unwrap()] {
            found.push(ops.download(&tensor).unwrap());
        }
    }
    (found, ops.n_replays(&cache))
}

#[test]
fn draft_passes_of_one_shape_are_replayed_with_the_bits_of_passes_launched_one_by_one() {
    let Some(device) = emulator() else { return };
    let rehearsal = Rehearsal::memory("sm_80");
    passes(&load(CudaOps::over(rehearsal.clone(), Activations::Fp8Grid)));
    let sizes = ArenaSizes {
        weights: rehearsal.reach(Place::Weights),
        cache: rehearsal.reach(Place::Cache),
        workspace: rehearsal.reach(Place::Workspace),
    };
    let memory = Memory::planned(Arc::clone(&device), sizes).unwrap();
    let planned = passes(&load(CudaOps::over(memory.clone(), Activations::Fp8Grid)));
    // Plain, recorded and replayed, replayed; three rows become four: plain.
    assert_eq!(planned.1, 2);
    assert_eq!(memory.used(Place::Workspace), 0);
    let plain = passes(&load(CudaOps::new(device, Activations::Fp8Grid)));
    assert_eq!(plain.1, 0);
    assert!(planned.0 == plain.0);
}
