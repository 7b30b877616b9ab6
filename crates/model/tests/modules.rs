//! Single modules on golden inputs: no error of an earlier layer hides or excuses anything.

use fathom_core::Numerics;
use fathom_model::session::Rows;
use fathom_model::{Block, NoProbe, Outcome, Pass, Session};
use fathom_ops::cpu::{CpuOps, HostTensor};
use fathom_ops::{Backend, Solo};

use crate::golden::compare::N_LAYERS;
use crate::golden::files::{Case, Golden, Goldens, Manifest};
use crate::golden::pool::{Spread, rel_l2};
use crate::golden::run::{Model, load};

/// Which half of a block.
#[derive(Debug, Clone, Copy)]
enum Module {
    Attention,
    Experts,
}

/// Runs one module of layer `layer` over a prompt of golden inputs, with an empty cache.
fn run(model: &Model, layer: usize, module: Module, case: &Case, x: &HostTensor) -> HostTensor {
    let block: &Block<CpuOps> = match model.layers().get(layer) {
        Some(block) => block,
        None => &model.mtp().unwrap().block[0],
    };
    let mut session = Session::new(model, &Solo, case.ids.len(), 0).unwrap();
    let batch = session.batch(0, &case.ids, Rows::None).unwrap();
    let step = model.ops().prepare_step(&batch).unwrap();
    let mut pass = Pass {
        ops: model.ops(),
        step: &step,
        cache: session.cache_mut(),
        comm: &Solo,
        probe: &mut NoProbe,
    };
    match module {
        Module::Attention => block.attn.forward(&mut pass, layer, x, Outcome::All),
        Module::Experts => block.ffn.forward(&mut pass, layer, x),
    }
    .unwrap()
}

/// Distance of each row from its golden, on golden inputs.
fn distances(numerics: Numerics, case_name: &str, mut judge: impl FnMut(&str, Module, &Spread)) {
    let (goldens, manifest) = (Goldens::of(numerics), Manifest::main());
    let (model, case) = (load(numerics), &manifest.cases[case_name]);
    for layer in 0..=N_LAYERS {
        for (module, name) in [(Module::Attention, "attn"), (Module::Experts, "ffn")] {
            let part =
                if layer < N_LAYERS { format!("prefill/layer{layer}") } else { "mtp".to_owned() };
            let what = format!("{case_name}/{part}/{name}");
            let golden = |end: &str| goldens.get(&format!("{what}_{end}"));
            let (Some(input), Some(output)) = (golden("in"), golden("out")) else {
                assert_eq!((layer, case_name), (N_LAYERS, "p129"), "{what} has no golden");
                continue;
            };
            let Golden { shape, values } = input;
            let x = HostTensor::from_vec(shape[0], shape[1], values.clone()).unwrap();
            let got = run(&model, layer, module, case, &x);
            let rows = output.rows().enumerate();
            let spread = Spread(rows.map(|(row, golden)| rel_l2(got.row(row), golden)).collect());
            judge(&what, module, &spread);
        }
    }
}

#[test]
fn every_f32_module_is_exact_on_golden_inputs() {
    for case in ["p5", "p129"] {
        distances(Numerics::F32, case, |what, _, spread| {
            // 1.4e-6 separates two orders of summation.
            assert!(spread.max() <= 1e-5, "{what}: {:.1e}", spread.max());
        });
    }
}

#[test]
fn every_f32qat_module_rounds_as_the_official_one_on_golden_inputs() {
    distances(Numerics::F32Qat, "p5", |what, _, spread| {
        assert!(spread.max() <= 1e-5, "{what}: {:.1e}", spread.max());
    });
}

#[test]
fn every_bf16_module_keeps_its_tolerance_on_golden_inputs() {
    for case in ["p5", "p129"] {
        distances(Numerics::Bf16, case, |what, module, spread| {
            let (median, p95) = (spread.quantile(0.5), spread.quantile(0.95));
            // Stricter than the published limits (0.06 and 0.15, 0.025 and 0.06), which leave room
            // for other orders of rounding. Ours: experts bit for bit; attention 0.015 and 0.025,
            // because the norm of a head rounds once where the official code rounds five times.
            let (median_max, p95_max) = match module {
                Module::Attention => (0.03, 0.06),
                Module::Experts => (0.001, 0.01),
            };
            assert!(median <= median_max && p95 <= p95_max, "{what}: {median:.4} {p95:.4}");
        });
    }
}
