//! Rules of the model that can be stated without a golden: who is routed where, who sees what.

use std::collections::BTreeMap;

use fathom_core::{LayerKind, Numerics, Rank, TokenId};
use fathom_model::session::Rows;
use fathom_model::{LoadOptions, LoadProgress, ModelError, NoProbe, Session, Transformer, rope};
use fathom_ops::cpu::CpuOps;
use fathom_ops::{OpError, Solo};
use fathom_weights::Checkpoint;
use safetensors::SafeTensors;

use crate::golden::files::nano;
use crate::golden::record::{Record, Recorder};
use crate::golden::run::{Model, load};

/// Layers of nano: hash, hash, score, score, and the MTP block.
const HASH_LAYERS: [usize; 2] = [0, 1];
const SCORE_LAYERS: [usize; 2] = [2, 3];
/// Entries a ratio-4 layer of nano chooses at most.
const INDEX_TOP_K: usize = 16;

fn tokens(n: usize, step: u32) -> Vec<TokenId> {
    (0..n as u32).map(|i| (i * step + 17) % 1000).collect()
}

fn record(model: &Model, tokens: &[TokenId]) -> Record {
    let mut session = Session::new(model, &Solo, tokens.len(), 0).unwrap();
    let mut recorder = Recorder::new(false);
    session.run(tokens, Rows::None, false, &mut recorder).unwrap();
    recorder.take(0)
}

#[test]
fn hash_layers_choose_experts_by_token_id_alone_and_weigh_them_by_content() {
    let model = load(Numerics::F32);
    let checkpoint = Checkpoint::open(&nano()).unwrap();
    // The same tokens in another order: each id in another context.
    let prompt = tokens(40, 7);
    let mut reversed = prompt.clone();
    reversed.reverse();
    let (first, second) = (record(&model, &prompt), record(&model, &reversed));
    for layer in HASH_LAYERS {
        let table = checkpoint.tid2eid(&format!("layers.{layer}.ffn.gate.tid2eid")).unwrap();
        for (row, &token) in prompt.iter().enumerate() {
            let experts = &table[token as usize * 3..][..3];
            let experts: Vec<u32> = experts.iter().map(|&id| u32::from(id)).collect();
            let other = prompt.len() - 1 - row;
            assert_eq!(first[&layer].router_ids[row], experts, "layer {layer}, token {token}");
            assert_eq!(second[&layer].router_ids[other], experts, "layer {layer}, token {token}");
        }
    }
    // Layer 1 has seen attention: same experts, other weights.
    let last = prompt.len() - 1;
    assert_ne!(first[&1].router_w[last], second[&1].router_w[0]);
}

#[test]
fn routing_weights_sum_to_the_scaling_factor_and_no_expert_is_chosen_twice() {
    let model = load(Numerics::Bf16);
    let record = record(&model, &tokens(60, 11));
    for layer in HASH_LAYERS.into_iter().chain(SCORE_LAYERS) {
        let layer = &record[&layer];
        for (ids, weights) in layer.router_ids.iter().zip(&layer.router_w) {
            let mut distinct = ids.clone();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), 3, "{ids:?}");
            assert!((weights.iter().sum::<f32>() - 1.5).abs() < 1e-5, "{weights:?}");
        }
    }
}

#[test]
fn an_entry_is_visible_from_the_token_that_completes_its_group() {
    let model = load(Numerics::F32);
    let record = record(&model, &tokens(80, 13));
    for (layer, kind) in model.cache_layers().iter().enumerate() {
        if !kind.has_indexer() {
            continue;
        }
        let chosen = &record[&layer].chosen;
        assert_eq!(chosen[2], [0_u32; 0], "nothing is complete after 3 tokens");
        assert_eq!(chosen[3], [0]);
        for (position, entries) in chosen.iter().enumerate() {
            let n_candidates = (position + 1) / 4;
            // Fewer candidates than top-k, as many, more.
            assert_eq!(entries.len(), n_candidates.min(INDEX_TOP_K), "position {position}");
            assert!(entries.iter().all(|&entry| (entry as usize) < n_candidates));
            assert!(entries.is_sorted_by(|a, b| a < b), "{entries:?}");
        }
        assert!(chosen.iter().any(|entries| entries.len() == INDEX_TOP_K && entries[15] > 15));
    }
}

#[test]
fn entries_and_keys_do_not_depend_on_the_chunks_they_were_compressed_in() {
    let model = load(Numerics::F32);
    let prompt = tokens(600, 31);
    let entries = |chunks: &[usize]| {
        let mut session = Session::new(&model, &Solo, prompt.len(), 0).unwrap();
        let mut sizes = chunks.iter().cycle();
        while session.position() < prompt.len() {
            let end = prompt.len().min(session.position() + sizes.next().unwrap());
            let part = &prompt[session.position()..end];
            session.run(part, Rows::None, false, &mut NoProbe).unwrap();
        }
        let mut all = BTreeMap::new();
        for (layer, kind) in model.cache_layers().iter().enumerate().take(4) {
            for entry in 0..kind.n_entries(prompt.len()) {
                all.insert((layer, entry), session.entry(layer, entry).unwrap());
            }
        }
        all
    };
    let whole = entries(&[600]);
    assert_eq!(whole.len(), 150 + 4 + 150);
    for chunks in [&[1, 2, 3, 5, 7][..], &[128, 3], &[599, 1]] {
        assert!(entries(chunks) == whole, "{chunks:?}");
    }
}

#[test]
fn rotary_frequencies_are_the_official_ones_to_the_bit() {
    let bytes = std::fs::read(nano().join("goldens/nano_units.safetensors")).unwrap();
    let units = SafeTensors::deserialize(&bytes).unwrap();
    let checkpoint = Checkpoint::open(&nano()).unwrap();
    for (kind, name) in [
        (LayerKind::Window, "rope_main"),
        (LayerKind::Csa, "rope_compress"),
        (LayerKind::Hca, "rope_compress"),
    ] {
        let golden = units.tensor(&format!("{name}/inv_freq")).unwrap();
        let expected: Vec<u8> = golden.data().to_vec();
        let got = rope::frequencies(checkpoint.config(), kind);
        let got: Vec<u8> = got.iter().flat_map(|f| f.to_le_bytes()).collect();
        assert_eq!(got, expected, "{kind:?}");
    }
}

#[test]
fn only_the_rows_asked_for_give_logits() {
    let model = load(Numerics::F32);
    let prompt = tokens(9, 3);
    let mut session = Session::new(&model, &Solo, 32, 0).unwrap();
    let none = session.run(&prompt, Rows::None, false, &mut NoProbe).unwrap();
    assert!(none.logits.is_none() && none.copies.is_none());
    session.rewind(0);
    let all = session.run(&prompt, Rows::All, true, &mut NoProbe).unwrap();
    let (logits, copies) = (all.logits.unwrap(), all.copies.unwrap());
    assert_eq!((logits.rows, logits.cols), (9, 1024));
    assert_eq!((copies.rows, copies.cols), (9, 4 * 256));
    session.rewind(0);
    let last = session.run(&prompt, Rows::Last, false, &mut NoProbe).unwrap().logits.unwrap();
    assert_eq!(*last.data, *logits.row(8));
}

#[test]
fn a_model_loaded_without_its_mtp_block_refuses_to_draft_and_needs_no_cache_for_it() {
    let checkpoint = Checkpoint::open(&nano()).unwrap();
    let options = LoadOptions { mtp: false };
    let mut progress = Vec::new();
    let mut report = |step: LoadProgress| progress.push(step);
    let ops = CpuOps::new(Numerics::F32);
    let model = Transformer::load(ops, &checkpoint, Rank::solo(), options, &mut report).unwrap();
    let expected = (1..=5).map(|loaded| LoadProgress { loaded, total: 5 });
    assert!(progress.into_iter().eq(expected));
    assert_eq!(model.cache_layers().len(), 4);

    let mut session = Session::new(&model, &Solo, 8, 0).unwrap();
    let copies = session.run(&[1, 2], Rows::None, true, &mut NoProbe).unwrap().copies.unwrap();
    let refusal = session.draft(0, &[2, 3], &copies, Rows::Last, &mut NoProbe).unwrap_err();
    assert!(matches!(refusal, ModelError::NoMtp), "{refusal}");
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let model = load(Numerics::F32);
    let mut session = Session::new(&model, &Solo, 8, 0).unwrap();
    let refusal = session.run(&[5, 1024], Rows::Last, false, &mut NoProbe).unwrap_err();
    let ModelError::Op(OpError::OutOfRange { what, got, limit, .. }) = refusal else {
        panic!("{refusal}");
    };
    assert_eq!((what, got, limit), ("token id", 1024, 1024));

    let too_many = tokens(257, 1);
    let refusal = session.run(&too_many, Rows::Last, false, &mut NoProbe).unwrap_err();
    let expected = "257 tokens were given, but the session holds 256: open a longer one";
    assert_eq!(refusal.to_string(), expected);
}
