//! The golden comparison: used by the tests, and by the example that prints the table.

pub(crate) mod blocks;
pub(crate) mod compare;
pub(crate) mod files;
pub(crate) mod long;
pub(crate) mod pool;
pub(crate) mod record;
pub(crate) mod run;

use fathom_core::Numerics;

use compare::Checker;
use files::{Goldens, Manifest};

/// Chunk of the golden prefills: the goldens were computed in one piece, and must not notice.
const CHUNK: usize = 509;

/// Runs every case of a mode's golden file and compares it.
pub(crate) fn check_mode(numerics: Numerics) -> Checker {
    let (goldens, manifest) = (Goldens::of(numerics), Manifest::main());
    let model = run::load(numerics);
    let mut checker = Checker::new(numerics.name(), numerics);
    for (name, case) in &manifest.cases {
        let keeps_rows = goldens.get(&format!("{name}/prefill/layer0/attn_in")).is_some();
        let run = run::run_case(&model, case, CHUNK, keeps_rows);
        checker.case(name, &goldens, case, &run);
    }
    for (name, free) in manifest.greedy.iter().chain(&manifest.chats) {
        checker.greedy(name, &goldens, free, &model);
    }
    checker.finish();
    checker
}
