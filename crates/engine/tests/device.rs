//! The CUDA backend behind the engine's boundary, on the block emulator: steps that are replayed, and
//! tokens that are chosen on the device. Without a C++ compiler every test prints a line and passes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use fathom_core::{Numerics, ParallelConfig, Rank, SamplingParams, TokenId};
use fathom_engine::sample::{RequestSampler, SampleScratch};
use fathom_engine::{RankRunner, StepInput, StepOutput, StepRunner};
use fathom_model::{LoadOptions, NoProbe, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::check::Poisoned;
use fathom_ops::cuda::emulator::{Emulator, MODES, build};
use fathom_ops::cuda::rehearsal::Rehearsal;
use fathom_ops::cuda::{
    Activations, ArenaSizes, Buffer, CudaOps, Device, DeviceTensor, Element, Memory, Place,
};
use fathom_ops::sample::{Choice, RowChoice};
use fathom_ops::{Backend, Batch, CacheSpec, Ops, Solo};
use fathom_weights::Checkpoint;

pub(crate) fn emulator() -> Option<Arc<dyn Device>> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        build::build(&kernels.canonicalize().unwrap(), &out).unwrap_or_else(|e| panic!("{e}"))
    });
    let Some(program) = program else {
        println!("skipped: no C++ compiler (g++) to build the block emulator with");
        return None;
    };
    Some(Arc::new(Emulator::start(program, MODES[0]).unwrap()))
}

fn load<O: Ops>(ops: O) -> Transformer<O> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    Transformer::load(ops, &checkpoint, Rank::solo(), LoadOptions { mtp: false }, &mut |_| {})
        .unwrap()
}

fn spec(layers: &[fathom_core::LayerKind]) -> CacheSpec {
    let (kv, index_keys) = CacheSpec::formats_for(Numerics::Bf16);
    let layers = layers.to_vec();
    CacheSpec {
        layers,
        n_slots: 3,
        n_blocks: 3,
        n_snapshots: 2,
        spare_rows: 0,
        draft_width: 0,
        kv,
        index_keys,
    }
}

/// A step: (slot, position, tokens) of each sequence; slot `s` has block `s`.
fn batch(sequences: &[(u32, u32, &[TokenId])]) -> Batch {
    let mut batch = Batch::default();
    for &(slot, position, tokens) in sequences {
        batch.push(slot, position, tokens, &[slot], true);
    }
    batch
}

/// Prompts, then answers of changing sequences and contents, three of one shape in a row.
fn steps() -> Vec<Batch> {
    vec![
        batch(&[(0, 0, &[5, 9, 8]), (2, 0, &[77, 3])]),
        batch(&[(0, 3, &[12]), (2, 2, &[13])]),
        batch(&[(2, 3, &[14]), (0, 4, &[15])]),
        batch(&[(1, 0, &[1000]), (0, 5, &[16])]),
        batch(&[(0, 6, &[17]), (1, 1, &[18]), (2, 4, &[19])]),
    ]
}

/// Sizes that a rehearsal of `steps` needs.
fn sizes() -> ArenaSizes {
    let memory = Rehearsal::memory("sm_80");
    let model = load(CudaOps::over(memory.clone(), Activations::Fp8Grid));
    let mut cache = model.new_cache(&spec(model.cache_layers())).unwrap();
    for batch in steps() {
        model.forward(&batch, &mut cache, &Solo, false, &mut NoProbe).unwrap();
    }
    ArenaSizes {
        weights: memory.reach(Place::Weights),
        cache: memory.reach(Place::Cache),
        workspace: memory.reach(Place::Workspace),
    }
}

/// Logits of every step.
fn run<O: Ops>(model: &Transformer<O>, cache: &mut O::Cache) -> Vec<Vec<f32>> {
    let forward = |batch| {
        let output = model.forward(&batch, cache, &Solo, false, &mut NoProbe).unwrap();
        model.ops().download(&output.logits.unwrap()).unwrap()
    };
    steps().into_iter().map(forward).collect()
}

#[test]
fn replayed_steps_give_the_bits_of_steps_launched_one_by_one_and_stay_inside_the_plan() {
    let Some(device) = emulator() else { return };
    let memory = Memory::planned(Arc::clone(&device), sizes()).unwrap();
    let planned = load(CudaOps::over(memory.clone(), Activations::Fp8Grid));
    let mut cache = planned.new_cache(&spec(planned.cache_layers())).unwrap();
    let replayed = run(&planned, &mut cache);
    // Two rows: plain, recorded and replayed, replayed; four rows, for three sequences: plain.
    assert_eq!(planned.ops().n_replays(&cache), 2);
    assert_eq!(memory.used(Place::Workspace), 0);

    // Where nothing can be recorded, everything is launched.
    let Some(device) = emulator() else { return };
    let device: Arc<dyn Device> = Arc::new(Poisoned::new(device).without_recordings());
    let memory = Memory::planned(device, sizes()).unwrap();
    let plain = load(CudaOps::over(memory.clone(), Activations::Fp8Grid));
    let mut cache = plain.new_cache(&spec(plain.cache_layers())).unwrap();
    let launched = run(&plain, &mut cache);
    assert_eq!(plain.ops().n_replays(&cache), 0);
    assert_eq!(memory.used(Place::Workspace), 0);
    for (index, (replayed, launched)) in replayed.iter().zip(&launched).enumerate() {
        assert!(replayed == launched, "step {index}");
    }

    let cpu = load(CpuOps::new(Numerics::Bf16));
    let mut cache = cpu.new_cache(&spec(cpu.cache_layers())).unwrap();
    for (index, (got, expected)) in launched.iter().zip(run(&cpu, &mut cache)).enumerate() {
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        let difference = square(&mut got.iter().zip(&expected).map(|(a, b)| a - b));
        let error = (difference / square(&mut expected.iter().copied())).sqrt();
        // The tolerance of the bf16 goldens: one ulp is amplified by quantisation.
        assert!(error < 0.1, "step {index}: {error} from the CPU");
    }
}

#[test]
fn rows_that_nobody_asks_for_change_nothing_on_a_device() {
    let Some(device) = emulator() else { return };
    let device: Arc<dyn Device> = Arc::new(Poisoned::new(device));
    // In this mode bits depend on nothing else that a step has.
    let model = load(CudaOps::new(device, Activations::Fp8Grid).with_determinism(true));
    let mut prompts = batch(&[(0, 0, &[5, 9, 8]), (1, 0, &[7, 7, 1, 30]), (2, 0, &[77, 3])]);
    let next = batch(&[(0, 3, &[12, 13]), (1, 4, &[40]), (2, 2, &[14])]);
    let mut run = |wanted: &[u32]| {
        let mut cache = model.new_cache(&spec(model.cache_layers())).unwrap();
        prompts.logit_rows = wanted.to_vec();
        let mut forward = |batch: &Batch| {
            let output = model.forward(batch, &mut cache, &Solo, false, &mut NoProbe).unwrap();
            let logits = output.logits.map(|logits| model.ops().download(&logits).unwrap());
            logits.unwrap_or_default()
        };
        (forward(&prompts), forward(&next))
    };
    let every: Vec<u32> = (0..9).collect();
    let (all, after_all) = run(&every);
    let vocab = all.len() / 9;
    for wanted in [&[2, 6, 8][..], &[4], &[]] {
        let (some, after) = run(wanted);
        let expected: Vec<f32> = wanted
            .iter()
            .flat_map(|&row| all[row as usize * vocab..(row as usize + 1) * vocab].to_vec())
            .collect();
        assert!(some == expected, "rows {wanted:?}");
        assert!(after == after_all, "the step after rows {wanted:?}");
    }
}

#[test]
fn a_runner_on_a_device_warms_up_keeps_snapshots_and_starts_anew() {
    let Some(device) = emulator() else { return };
    let memory = Memory::planned(device, sizes()).unwrap();
    let model = load(CudaOps::over(memory, Activations::Fp8Grid));
    let spec = spec(model.cache_layers());
    let parallel = ParallelConfig { tensor: 1, expert: 1 };
    let mut runner = RankRunner::new(vec![model], parallel, spec, 256).unwrap();
    runner.warm_up().unwrap();
    let logits_of = |runner: &mut RankRunner<CudaOps>, batch| {
        let mut output = StepOutput::default();
        let input = StepInput { batch, ..StepInput::default() };
        runner.step(&Arc::new(input), &mut output).unwrap();
        output.logits
    };
    let first = logits_of(&mut runner, batch(&[(1, 0, &[4, 5, 6])]));
    assert_eq!(first.len(), 1024);
    runner.reset().unwrap();
    assert!(first == logits_of(&mut runner, batch(&[(0, 0, &[4, 5, 6])])));
    let unknown = StepInput { batch: batch(&[(0, 0, &[1024])]), ..StepInput::default() };
    let error = runner.step(&Arc::new(unknown), &mut StepOutput::default()).unwrap_err();
    assert!(error.to_string().contains("token id 1024"), "{error}");
}

/// Logits of `n` rows of `vocab` tokens, some of them equal, on both sides.
fn logits(n: usize, vocab: usize) -> Vec<f32> {
    let mut state = 9_u64;
    (0..n * vocab)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f32 / 2_f32.powi(24) * 60.0).round() / 4.0 - 7.0
        })
        .collect()
}

/// Every stage alone and some together.
fn requests() -> Vec<SamplingParams> {
    let base = |seed| SamplingParams::sampled(10, seed);
    vec![
        SamplingParams::greedy(10),
        SamplingParams { logprobs: Some(5), ..base(1) },
        SamplingParams { temperature: 0.3, ..base(1 << 40) },
        SamplingParams { top_k: 7, ..base(3) },
        SamplingParams { top_p: 0.8, ..base(4) },
        SamplingParams { min_p: 0.2, ..base(5) },
        SamplingParams { top_k: 40, top_p: 0.6, min_p: 0.01, temperature: 1.7, ..base(6) },
        SamplingParams { top_k: 1, logprobs: Some(0), ..base(7) },
        SamplingParams { top_p: 0.0, ..base(8) },
        SamplingParams { temperature: 1e-39, ..base(9) },
        SamplingParams { repetition_penalty: 1.8, choice: 3, ..base(10) },
        SamplingParams {
            frequency_penalty: 0.7,
            presence_penalty: 0.4,
            temperature: 0.2,
            ..base(11)
        },
        SamplingParams {
            logit_bias: vec![(3, 30.0), (3, -29.0), (40, -100.0), (9999, 1.0)],
            temperature: 0.5,
            logprobs: Some(20),
            ..base(12)
        },
        SamplingParams { top_p: 0.95, temperature: 3.0, ..base(13) },
    ]
}

#[test]
fn tokens_and_logprobs_chosen_on_the_device_are_those_of_the_engines_sampler() {
    let Some(device) = emulator() else { return };
    let vocab = 601;
    let (requests, ops) = (requests(), CudaOps::new(Arc::clone(&device), Activations::Fp8Grid));
    let values = logits(requests.len(), vocab);
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let stored = Buffer::from_bytes(&device, &bytes).unwrap();
    let tensor = DeviceTensor::of(requests.len(), vocab, Element::F32, stored).unwrap();
    let prompt: Vec<TokenId> = (0..40).collect();
    let said = [5, 9, 5, 77];
    for position in [0, 17] {
        let seen: Vec<Vec<(TokenId, u32)>> = requests
            .iter()
            .map(|params| {
                let from_prompt: &[TokenId] =
                    if params.repetition_penalty == 1.0 { &[] } else { &prompt };
                let mut seen: std::collections::BTreeMap<_, _> =
                    from_prompt.iter().map(|&token| (token, 0)).collect();
                said.iter().for_each(|&token| *seen.entry(token).or_insert(0) += 1);
                seen.into_iter().collect()
            })
            .collect();
        let rows: Vec<RowChoice<'_>> = requests
            .iter()
            .zip(&seen)
            .map(|(params, seen)| RowChoice { params, position, seen, mask: None, forbidden: &[] })
            .collect();
        let choices = ops.choose_tokens(&tensor, &rows).unwrap();
        for (index, (params, choice)) in requests.iter().zip(&choices).enumerate() {
            let mut sampler = RequestSampler::new(params.clone(), &prompt, None);
            // What was said before: forced through the sampler one token at a time.
            for &token in &said {
                let mut forced = vec![f32::MIN; vocab];
                forced[token as usize] = 1e30;
                let mut scratch = SampleScratch::default();
                let sampled = sampler.sample(&mut forced, 0, &[], &mut scratch).unwrap();
                assert_eq!(sampled.token, token);
            }
            let mut row = values[index * vocab..(index + 1) * vocab].to_vec();
            let mut scratch = SampleScratch::default();
            let expected = sampler.sample(&mut row, position, &[], &mut scratch).unwrap();
            let Choice::Token(token, logprob) = choice else { panic!("row {index}: {choice:?}") };
            assert_eq!(*token, expected.token, "row {index}: {params:?}");
            assert_eq!(logprob.is_some(), expected.logprob.is_some());
            if let (Some(got), Some(expected)) = (logprob, &expected.logprob) {
                assert!((got.logprob - expected.logprob).abs() < 1e-5, "{got:?} {expected:?}");
                assert_eq!(got.top.len(), expected.top.len());
                for (got, expected) in got.top.iter().zip(&expected.top) {
                    assert_eq!(got.0, expected.0);
                    assert!((got.1 - expected.1).abs() < 1e-5);
                }
            }
        }
    }
}

#[test]
fn masks_forbidden_tokens_and_broken_rows_concern_their_row_only() {
    let Some(device) = emulator() else { return };
    let (n, vocab) = (4, 70);
    let ops = CudaOps::new(Arc::clone(&device), Activations::Fp8Grid);
    let mut values = logits(n, vocab);
    values[vocab + 3] = f32::NAN;
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let stored = Buffer::from_bytes(&device, &bytes).unwrap();
    let tensor = DeviceTensor::of(n, vocab, Element::F32, stored).unwrap();
    let params = SamplingParams::greedy(1);
    let row = RowChoice { params: &params, position: 0, seen: &[], mask: None, forbidden: &[] };
    let all: Vec<TokenId> = (0..vocab as u32).collect();
    let best = |row: usize, allowed: &dyn Fn(usize) -> bool| {
        let row = &values[row * vocab..(row + 1) * vocab];
        let most = (0..vocab).filter(|&i| allowed(i)).map(|i| row[i]).fold(f32::MIN, f32::max);
        (0..vocab).find(|&i| allowed(i) && row[i] == most).unwrap() as TokenId
    };
    let likeliest = best(0, &|_| true);
    let choices = ops
        .choose_tokens(
            &tensor,
            &[
                RowChoice { forbidden: &[likeliest], ..row },
                row,
                RowChoice { mask: Some(&[1 << 5 | 1 << 9, 0, 1 << 2]), ..row },
                RowChoice { forbidden: &all, ..row },
            ],
        )
        .unwrap();
    let allowed = |i| [5, 9, 66].contains(&i);
    assert_eq!(
        choices,
        [
            Choice::Token(best(0, &|i| i != likeliest as usize), None),
            Choice::NotFinite,
            Choice::Token(best(2, &allowed), None),
            Choice::NothingAllowed,
        ]
    );
}

#[test]
fn drafts_are_accepted_up_to_the_first_that_was_not_chosen() {
    let Some(device) = emulator() else { return };
    let ops = CudaOps::new(Arc::clone(&device), Activations::Fp8Grid);
    let words = |values: &[u32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let chosen = Buffer::from_bytes(&device, &words(&[4, 5, 6, 7, 4, 5])).unwrap();
    let drafts = [4, 5, 9, 7, 4, 5];
    let ranges = [(0, 3), (3, 0), (3, 2), (5, 1), (2, 1)];
    assert_eq!(ops.verify_drafts(&chosen, &drafts, &ranges).unwrap(), [2, 0, 2, 1, 0]);
    assert!(ops.verify_drafts(&chosen, &drafts, &[(5, 2)]).is_err());
}
