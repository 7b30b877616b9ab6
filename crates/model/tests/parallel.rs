//! Sharded over ranks, the model computes what it computes alone.

use fathom_core::{Numerics, ParallelConfig, ParallelError, TokenId};
use fathom_model::session::Rows;
use fathom_model::{LoadOptions, ModelError, NoProbe, Session, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::{Communicator, LocalComm, Solo};
use fathom_weights::Checkpoint;

use crate::golden::files::{Case, Goldens, Limits, Manifest, nano};
use crate::golden::pool::{LogitPool, rel_l2};
use crate::golden::run::{load, load_rank};

const CONFIGS: [ParallelConfig; 3] = [
    ParallelConfig { tensor: 2, expert: 1 },
    ParallelConfig { tensor: 1, expert: 2 },
    ParallelConfig { tensor: 2, expert: 2 },
];

/// Logits of the last prompt row and of each forced step, then of the MTP block over the prompt, then of
/// the last prompt row where the copies of the others were not kept.
fn run(model: &Transformer<CpuOps>, comm: &dyn Communicator, case: &Case) -> Vec<Vec<f32>> {
    let n_tokens = case.ids.len() + case.forced.len();
    let mut session = Session::new(model, comm, n_tokens, 0).unwrap();
    let prompt = session.run(&case.ids, Rows::Last, true, &mut NoProbe).unwrap();
    let mut logits = vec![prompt.logits.unwrap().data.into()];
    for token in &case.forced {
        let step = session.run(&[*token], Rows::Last, false, &mut NoProbe).unwrap();
        logits.push(step.logits.unwrap().data.into());
    }
    let mut next: Vec<TokenId> = case.ids[1..].to_vec();
    next.push(case.forced[0]);
    let draft = session.draft(0, &next, &prompt.copies.unwrap(), Rows::Last, &mut NoProbe);
    logits.push(draft.unwrap().logits.unwrap().data.into());

    session.rewind(0);
    let (first, last) = case.ids.split_at(case.ids.len() / 2);
    session.run(first, Rows::None, false, &mut NoProbe).unwrap();
    let prompt = session.run(last, Rows::Last, false, &mut NoProbe).unwrap();
    logits.push(prompt.logits.unwrap().data.into());
    logits
}

/// The same on all ranks of `config`, each on a thread of its own.
fn run_on_ranks(numerics: Numerics, config: ParallelConfig, case: &Case) -> Vec<Vec<Vec<f32>>> {
    let comms = LocalComm::group(config).unwrap();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = comms
            .into_iter()
            .map(|comm| scope.spawn(move || run(&load_rank(numerics, comm.rank()), &comm, case)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn f32_logits_of_sharded_ranks_equal_those_of_one_rank() {
    let manifest = Manifest::main();
    let model = load(Numerics::F32);
    for name in ["p5", "p129", "p260"] {
        let case = &manifest.cases[name];
        let expected = run(&model, &Solo, case);
        for config in CONFIGS {
            let ranks = run_on_ranks(Numerics::F32, config, case);
            for (row, expected) in expected.iter().enumerate() {
                let distance = rel_l2(&ranks[0][row], expected);
                assert!(distance <= 1e-5, "{name} {config:?} row {row}: {distance:.1e}");
            }
            // Sums are taken in rank order everywhere, so every rank holds the same bits.
            assert!(ranks.iter().all(|rank| *rank == ranks[0]), "{name} {config:?}");
        }
    }
}

#[test]
fn quantised_logits_of_sharded_ranks_keep_the_golden_tolerances() {
    let manifest = Manifest::main();
    for numerics in [Numerics::F32Qat, Numerics::Bf16] {
        let (goldens, limits) = (Goldens::of(numerics), Limits::of(numerics));
        for config in CONFIGS {
            let mut pool = LogitPool::default();
            for name in ["p5", "p128", "p129", "p252", "p260"] {
                let ranks = run_on_ranks(numerics, config, &manifest.cases[name]);
                let golden = |key: &str| goldens.get(&format!("{name}/{key}")).unwrap();
                let expected = golden("prefill/logits_last").rows();
                let expected: Vec<&[f32]> =
                    expected.chain(golden("decode/logits").rows()).collect();
                for (got, expected) in ranks[0].iter().zip(expected) {
                    pool.add(got, expected);
                }
            }
            let prefix = if numerics == Numerics::Bf16 { "" } else { "long_" };
            for (limit, value) in [
                ("logits_relL2_median_max", pool.rel_l2.quantile(0.5)),
                ("logits_relL2_p95_max", pool.rel_l2.quantile(0.95)),
                ("logits_relL2_max", pool.rel_l2.max()),
            ] {
                let bound = limits.get(&format!("{prefix}{limit}")).unwrap();
                assert!(value <= bound, "{numerics} {config:?}: {limit} {bound}, got {value:.3}");
            }
            let (cosine, bound) = (pool.cosine_min(), limits.get("cosine_min").unwrap());
            assert!(cosine >= bound, "{numerics} {config:?}: cosine {cosine:.4} below {bound}");
        }
    }
}

#[test]
fn a_model_that_cannot_be_shared_equally_is_refused_by_what_does_not_divide() {
    let checkpoint = Checkpoint::open(&nano()).unwrap();
    let refusal = |tensor, expert| {
        let rank = ParallelConfig { tensor, expert }.rank(0).unwrap();
        let (ops, options) = (CpuOps::new(Numerics::F32), LoadOptions::default());
        let result = Transformer::load(ops, &checkpoint, rank, options, &mut |_| {});
        match result.unwrap_err() {
            ModelError::Parallel(ParallelError::Indivisible { what, .. }) => what,
            other => panic!("{other}"),
        }
    };
    // 2 output groups, 8 experts, a vocabulary of 1,024.
    assert_eq!(refusal(4, 1), "output groups");
    assert_eq!(refusal(3, 1), "vocabulary rows");
    assert_eq!(refusal(1, 3), "routed experts");
}
