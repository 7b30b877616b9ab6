//! A sequence's values depend on the sequence alone: bit for bit, in every numeric mode.

use fathom_core::{Numerics, TokenId};
use fathom_model::session::Rows;
use fathom_model::{NoProbe, Session};
use fathom_ops::cpu::CpuCache;
use fathom_ops::{Backend, Batch, CacheSpec, IndexKeyFormat, KvFormat, RowFormats, Solo};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::golden::blocks::BlockList;
use crate::golden::run::{Model, load};

const MODES: [Numerics; 3] = [Numerics::F32, Numerics::F32Qat, Numerics::Bf16];

/// Blocks of each sequence: enough for 768 tokens.
const N_BLOCKS: u32 = 3;

/// Tokens that repeat nothing and mean nothing.
fn tokens(seed: u32, n: usize) -> Vec<TokenId> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % 1000
        })
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Logits of every row of `tokens`, run alone in one chunk.
fn alone(model: &Model, tokens: &[TokenId]) -> Vec<u32> {
    in_chunks(model, tokens, &[tokens.len()])
}

/// The same in chunks of the given sizes, repeated until all tokens have run.
fn in_chunks(model: &Model, tokens: &[TokenId], chunks: &[usize]) -> Vec<u32> {
    let mut session = Session::new(model, &Solo, tokens.len(), 0).unwrap();
    let mut logits = Vec::new();
    let mut sizes = chunks.iter().cycle();
    while session.position() < tokens.len() {
        let end = tokens.len().min(session.position() + sizes.next().unwrap());
        let step = session.run(&tokens[session.position()..end], Rows::All, false, &mut NoProbe);
        logits.extend(bits(&step.unwrap().logits.unwrap().data));
    }
    logits
}

/// A cache in which several sequences meet.
fn shared_cache(model: &Model, n_slots: u32, n_snapshots: usize) -> CpuCache {
    let (kv, index_keys) = CacheSpec::formats_for(model.ops().numerics());
    let layers = model.cache_layers().to_vec();
    let (n_blocks, n_slots) = ((n_slots * N_BLOCKS) as usize, n_slots as usize);
    let spec = CacheSpec {
        layers,
        n_slots,
        n_blocks,
        n_snapshots,
        spare_rows: 0,
        draft_width: 0,
        kv,
        index_keys,
    };
    model.new_cache(&spec).unwrap()
}

/// Logits of every row of `tokens` over a cache whose rows have these formats, in two chunks.
fn in_formats(model: &Model, tokens: &[TokenId], formats: RowFormats) -> Vec<u32> {
    let spec = CacheSpec {
        layers: model.cache_layers().to_vec(),
        n_slots: 1,
        n_blocks: N_BLOCKS as usize,
        n_snapshots: 0,
        spare_rows: 0,
        draft_width: 0,
        kv: formats.kv(),
        index_keys: formats.index_keys(),
    };
    let mut cache = model.new_cache(&spec).unwrap();
    let mut logits = Vec::new();
    for (start, end) in [(0, 150), (150, tokens.len())] {
        let mut batch = Batch::default();
        let blocks = BlockList::strided(0, 1, N_BLOCKS);
        batch.push(0, start as u32, &tokens[start..end], blocks.covering(end), false);
        batch.logit_rows = (0..batch.n_tokens() as u32).collect();
        logits.extend(forward(model, &batch, &mut cache));
    }
    logits
}

fn forward(model: &Model, batch: &Batch, cache: &mut CpuCache) -> Vec<u32> {
    let output = model.forward(batch, cache, &Solo, false, &mut NoProbe).unwrap();
    output.logits.map_or_else(Vec::new, |logits| bits(&logits.data))
}

/// Runs `sequences` together, `chunks[i]` tokens of sequence `i` per step from step `starts[i]` on;
/// returns the logits of each at the positions that it `wants`.
fn together(
    model: &Model,
    sequences: &[Vec<TokenId>],
    chunks: &[usize],
    starts: &[usize],
    wants: impl Fn(usize) -> bool,
) -> Vec<Vec<u32>> {
    let n = sequences.len();
    let mut cache = shared_cache(model, n as u32, 0);
    let mut positions = vec![0; n];
    let mut logits = vec![Vec::new(); n];
    for step in 0.. {
        let mut batch = Batch::default();
        let mut parts = Vec::new();
        for i in 0..n {
            if step < starts[i] || positions[i] == sequences[i].len() {
                continue;
            }
            let end = sequences[i].len().min(positions[i] + chunks[i]);
            let blocks = BlockList::strided(i as u32, n as u32, N_BLOCKS);
            let (slot, run) = ((n - 1 - i) as u32, &sequences[i][positions[i]..end]);
            let (first_row, start) = (batch.n_tokens(), positions[i]);
            batch.push(slot, positions[i] as u32, run, blocks.covering(end), false);
            let wanted = (start..end).filter(|&position| wants(position));
            let rows: Vec<_> =
                wanted.map(|position| (first_row + position - start) as u32).collect();
            parts.push((i, rows.len()));
            batch.logit_rows.extend(rows);
            positions[i] = end;
        }
        if parts.is_empty() && step >= *starts.iter().max().unwrap() {
            return logits;
        }
        if parts.is_empty() {
            continue;
        }
        let mut rows = forward(model, &batch, &mut cache).into_iter();
        let width = model.config().vocab_size;
        for (i, n_rows) in parts {
            logits[i].extend(rows.by_ref().take(n_rows * width));
        }
    }
    unreachable!("the loop returns when all sequences are done")
}

/// Runs a property a few times: a case costs a tenth of a second.
fn holds<S: Strategy>(cases: u32, strategy: &S, property: impl Fn(S::Value)) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(strategy, |value| {
            property(value);
            Ok(())
        })
        .unwrap();
}

#[test]
fn row_formats_change_memory_and_never_a_logit() {
    for numerics in MODES {
        let model = load(numerics);
        let tokens = tokens(9, 200);
        let smallest = RowFormats::smallest(numerics);
        let expected = alone(&model, &tokens);
        let mut n_formats = 0;
        for kv in KvFormat::ALL {
            for index_keys in IndexKeyFormat::ALL {
                // The two are stored apart: one at a time is enough.
                if kv != smallest.kv() && index_keys != smallest.index_keys() {
                    continue;
                }
                let chosen = RowFormats::choose(numerics, Some(kv), Some(index_keys));
                let Ok(formats) = chosen else { continue };
                n_formats += 1;
                let got = in_formats(&model, &tokens, formats);
                assert!(got == expected, "{numerics}: rows in {kv}, keys in {index_keys}");
            }
        }
        let expected = [(Numerics::F32, 1), (Numerics::F32Qat, 4), (Numerics::Bf16, 6)];
        assert!(expected.contains(&(numerics, n_formats)), "{numerics}: {n_formats} formats");
    }
}

#[test]
fn logits_do_not_depend_on_the_chunks_a_prompt_comes_in() {
    for numerics in MODES {
        let model = load(numerics);
        let tokens = tokens(1, 300);
        let expected = alone(&model, &tokens);
        // Sizes around everything that has a size: a token, a group, the window, a block.
        for chunks in [&[1][..], &[3], &[4, 1], &[127, 2], &[128], &[129], &[255, 1, 2]] {
            assert!(in_chunks(&model, &tokens, chunks) == expected, "{numerics} {chunks:?}");
        }
        let sizes = prop::collection::vec(1..200_usize, 1..6);
        holds(4, &sizes, |chunks| {
            assert!(in_chunks(&model, &tokens, &chunks) == expected, "{numerics} {chunks:?}");
        });
    }
}

#[test]
fn logits_do_not_depend_on_who_else_is_in_the_batch() {
    for numerics in MODES {
        let model = load(numerics);
        let member = (1..300_usize, 1..70_usize, 0..8_usize);
        holds(3, &prop::collection::vec(member, 2..6), |members| {
            let sequences: Vec<_> =
                members.iter().enumerate().map(|(i, m)| tokens(i as u32, m.0)).collect();
            let chunks: Vec<_> = members.iter().map(|member| member.1).collect();
            let starts: Vec<_> = members.iter().map(|member| member.2).collect();
            let logits = together(&model, &sequences, &chunks, &starts, |_| true);
            for (logits, sequence) in logits.iter().zip(&sequences) {
                assert!(*logits == alone(&model, sequence), "{numerics} {members:?}");
            }
        });
    }
}

#[test]
fn what_nobody_asks_for_changes_nothing() {
    // Nothing for a while, then all; the last of a block; a few of every chunk.
    let patterns: [fn(usize) -> bool; 3] = [|at| at >= 140, |at| at % 128 == 127, |at| at % 7 == 3];
    for numerics in MODES {
        let model = load(numerics);
        let sequences = [tokens(21, 290), tokens(22, 150), tokens(23, 40)];
        let width = model.config().vocab_size;
        let expected = sequences.each_ref().map(|sequence| alone(&model, sequence));
        for (pattern, wants) in patterns.into_iter().enumerate() {
            let logits = together(&model, &sequences, &[130, 60, 1], &[0, 1, 0], wants);
            for (logits, all) in logits.iter().zip(&expected) {
                let rows = all.chunks(width).enumerate().filter(|(position, _)| wants(*position));
                let expected: Vec<u32> = rows.flat_map(|(_, row)| row).copied().collect();
                assert!(*logits == expected, "{numerics}, pattern {pattern}");
            }
        }
    }
}

#[test]
fn a_slot_used_by_a_long_sequence_shows_nothing_of_it_to_a_short_one() {
    for numerics in MODES {
        let model = load(numerics);
        let long = tokens(7, 400);
        let mut session = Session::new(&model, &Solo, long.len(), 0).unwrap();
        for n_tokens in 1..=5 {
            session.run(&long, Rows::None, false, &mut NoProbe).unwrap();
            session.rewind(0);
            let short = tokens(n_tokens as u32, n_tokens + 8);
            let mut logits = Vec::new();
            // A prompt of 1 to 5 tokens, then decode.
            let (prompt, decode) = short.split_at(n_tokens);
            for part in std::iter::once(prompt).chain(decode.chunks(1)) {
                let step = session.run(part, Rows::All, false, &mut NoProbe).unwrap();
                logits.extend(bits(&step.logits.unwrap().data));
            }
            assert!(logits == alone(&model, &short), "{numerics}, prompt of {n_tokens}");
            session.rewind(0);
        }
    }
}

#[test]
fn logits_do_not_depend_on_the_number_of_threads() {
    for numerics in MODES {
        let model = load(numerics);
        let tokens = tokens(3, 270);
        let with_threads = |n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            pool.install(|| in_chunks(&model, &tokens, &[200, 1, 17, 1]))
        };
        let one = with_threads(1);
        assert!(one == with_threads(2), "{numerics}: two threads");
        assert!(one == with_threads(5), "{numerics}: five threads");
    }
}

#[test]
fn tokens_taken_back_leave_no_trace() {
    const SPARE: usize = 4;
    for numerics in MODES {
        let model = load(numerics);
        let real = tokens(11, 144);
        let expected = alone(&model, &real);
        let width = model.config().vocab_size;
        // Rejection at every offset around multiples of 4 and of 128.
        for n_kept in 122..=134 {
            let mut session = Session::new(&model, &Solo, 256, SPARE).unwrap();
            session.run(&real[..n_kept], Rows::None, false, &mut NoProbe).unwrap();
            let wrong = tokens(99, SPARE);
            session.run(&wrong, Rows::None, false, &mut NoProbe).unwrap();
            session.rewind(n_kept);
            let step = session.run(&real[n_kept..], Rows::All, false, &mut NoProbe).unwrap();
            let logits = bits(&step.logits.unwrap().data);
            assert!(logits == expected[n_kept * width..], "{numerics}, {n_kept} tokens kept");
        }
    }
}

#[test]
fn a_snapshot_resumes_as_if_nothing_had_happened() {
    for numerics in MODES {
        let model = load(numerics);
        let real = tokens(5, 400);
        let expected = alone(&model, &real);
        let width = model.config().vocab_size;
        for position in [128, 256, 384] {
            let mut cache = shared_cache(&model, 2, 1);
            let blocks = BlockList::strided(0, 1, N_BLOCKS);
            let run = |slot, first: usize, tokens: &[TokenId], cache: &mut CpuCache| {
                let mut batch = Batch::default();
                let blocks = blocks.covering(first + tokens.len());
                batch.push(slot, first as u32, tokens, blocks, false);
                batch.logit_rows = (0..batch.n_tokens() as u32).collect();
                forward(&model, &batch, cache)
            };
            run(0, 0, &real[..position], &mut cache);
            model.ops().capture(&mut cache, 0, position as u32, 0).unwrap();
            // The slot goes another way, and the other slot held somebody else.
            run(0, position, &tokens(8, 400 - position), &mut cache);
            let mut other = Batch::default();
            let other_blocks = BlockList::strided(N_BLOCKS, 1, N_BLOCKS);
            other.push(1, 0, &tokens(6, 200), other_blocks.covering(200), true);
            forward(&model, &other, &mut cache);

            model.ops().restore(&mut cache, 0, 1, position as u32).unwrap();
            let logits = run(1, position, &real[position..], &mut cache);
            assert!(logits == expected[position * width..], "{numerics} at {position}");
        }
    }
}

#[test]
fn a_snapshot_beyond_4096_tokens_resumes_too() {
    const POSITION: usize = 4096 + 128;
    let model = load(Numerics::Bf16);
    let (kv, index_keys) = CacheSpec::formats_for(Numerics::Bf16);
    let n_blocks = (POSITION + 8).div_ceil(256);
    let layers = model.cache_layers().to_vec();
    let (n_slots, n_snapshots) = (2, 1);
    let (spare_rows, draft_width) = (0, 0);
    let spec = CacheSpec {
        layers,
        n_slots,
        n_blocks,
        n_snapshots,
        spare_rows,
        draft_width,
        kv,
        index_keys,
    };
    let mut cache = model.new_cache(&spec).unwrap();
    let blocks: Vec<u32> = (0..n_blocks as u32).collect();
    let real = tokens(5, POSITION + 8);
    let run = |slot, first: usize, end: usize, wants_logits, cache: &mut CpuCache| {
        let mut batch = Batch::default();
        let covering = &blocks[..end.div_ceil(256)];
        batch.push(slot, first as u32, &real[first..end], covering, wants_logits);
        let output = model.forward(&batch, cache, &Solo, false, &mut NoProbe).unwrap();
        output.logits.map(|logits| bits(&logits.data))
    };
    for first in (0..POSITION).step_by(528) {
        run(0, first, (first + 528).min(POSITION), false, &mut cache);
    }
    model.ops().capture(&mut cache, 0, POSITION as u32, 0).unwrap();
    let expected = run(0, POSITION, POSITION + 8, true, &mut cache);
    model.ops().restore(&mut cache, 0, 1, POSITION as u32).unwrap();
    assert!(run(1, POSITION, POSITION + 8, true, &mut cache) == expected && expected.is_some());
}
