//! Sparse attention on sm_100f, `attn_sparse100` by itself: 64 and more heads, splits of every length, keys of every
//! kind. Rows that no token may see hold NaN.

use std::sync::Arc;

use fathom_core::num::e4m3_to_f32;
use fathom_ops::cuda::{Arg, Buffer, Device, Launch};

use crate::compare::assert_close;
use crate::process::{in_every_mode_as, weight_buffer};
use crate::weights::Random;

const ARCH: &str = "sm_100f";
const DIM: usize = 512;
const ROW: usize = 584;
const WINDOW: usize = 128;
const RING: usize = 131;
const KEYS: usize = 64;
const TOP_K: usize = 200;
const SCALE: f64 = 0.044194173824159216;

/// Two sequences: their slots, and where their entries lie among ten blocks.
const SLOTS: [u32; 2] = [1, 0];
const BLOCKS: [[u32; 5]; 2] = [[7, 2, 9, 4, 0], [3, 8, 1, 6, 5]];

/// A row of the cache: codes of 448 channels, 64 rotated ones, scales; later entries are larger, so that maxima grow.
fn row(sequence: usize, is_entry: bool, index: usize) -> Vec<u8> {
    let mut random = Random::new((index * 4 + sequence * 2 + usize::from(is_entry) + 1) as u64);
    let mut bytes: Vec<u8> = (0..448)
        .map(|_| {
            let bits = random.bits();
            (bits & 0x80) as u8 | ((bits >> 8) % 0x48) as u8
        })
        .collect();
    for _ in 0..64 {
        bytes.extend(half::bf16::from_f32(random.unit() * 0.5).to_le_bytes());
    }
    let scale = if is_entry && index > 100 { 126 } else { 124 };
    bytes.extend((0..7).map(|i| scale + i % 2));
    bytes.push(0);
    bytes
}

fn values(row: &[u8]) -> Vec<f64> {
    let code = |i: usize| {
        let scale = 2_f64.powi(i32::from(row[576 + i / 64]) - 127);
        f64::from(e4m3_to_f32(row[i])) * scale
    };
    let rope =
        |i: usize| f64::from(half::bf16::from_le_bytes([row[448 + 2 * i], row[449 + 2 * i]]));
    (0..448).map(code).chain((0..64).map(rope)).collect()
}

/// Tokens of a step: sequences that go on at a position with so many tokens.
struct Step {
    ratio: usize,
    heads: usize,
    parts: &'static [(usize, usize, usize)],
}

/// What a token attends to, in the kernel's order.
struct Token {
    sequence: usize,
    position: usize,
    chosen: Vec<usize>,
}

impl Step {
    fn tokens(&self) -> Vec<Token> {
        let token = |sequence: usize, position: usize| {
            let n = (position + 1).checked_div(self.ratio).unwrap_or(0);
            let mut chosen: Vec<usize> = (0..n).collect();
            if self.ratio == 4 {
                let mut random = Random::new(position as u64);
                while chosen.len() > TOP_K {
                    chosen.remove(random.below(chosen.len() as u32) as usize);
                }
            }
            Token { sequence, position, chosen }
        };
        let part = |&(sequence, first, n): &(usize, usize, usize)| {
            (first..first + n).map(move |position| token(sequence, position))
        };
        self.parts.iter().flat_map(part).collect()
    }

    fn queries(&self, token: &Token) -> Vec<f32> {
        let seed = 1000 + token.position * 2 + token.sequence;
        Random::new(seed as u64).values(self.heads * DIM, 8.0)
    }
}

impl Token {
    /// Rows, in blocks of at most 64 keys.
    fn keys(&self) -> Vec<Vec<Vec<f64>>> {
        let first = (self.position + 1).saturating_sub(WINDOW);
        let window: Vec<_> =
            (first..=self.position).map(|at| values(&row(self.sequence, false, at))).collect();
        let entries: Vec<_> =
            self.chosen.iter().map(|&entry| values(&row(self.sequence, true, entry))).collect();
        window.chunks(KEYS).chain(entries.chunks(KEYS)).map(<[Vec<f64>]>::to_vec).collect()
    }
}

fn scores(q: &[f32], keys: &[Vec<f64>]) -> Vec<f64> {
    let dot = |key: &Vec<f64>| key.iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>();
    keys.iter().map(|key| dot(key) * SCALE).collect()
}

/// Every head's attention, [token][head][channel].
fn expected(step: &Step) -> Vec<f32> {
    let mut out = Vec::new();
    for token in step.tokens() {
        let keys = token.keys().concat();
        for q in step.queries(&token).chunks(DIM) {
            let scores = scores(q, &keys);
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut o = vec![0.0; DIM];
            for (key, weight) in keys.iter().zip(&weights) {
                o.iter_mut().zip(key).for_each(|(o, k)| *o += k * weight / sum);
            }
            out.extend(o.iter().map(|&x| x as f32));
        }
    }
    out
}

fn words(values: impl IntoIterator<Item = usize>) -> Vec<u8> {
    values.into_iter().flat_map(|x| (x as u32).to_le_bytes()).collect()
}

fn floats(buffer: &Buffer, n: usize) -> Vec<f32> {
    let bytes = buffer.read(0, 4 * n).unwrap();
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Partial results of each token, [split][head][channel] and [split][head][maximum, sum].
type Parts = (Vec<f32>, Vec<f32>);

fn attend(device: &Arc<dyn Device>, step: &Step, split_blocks: usize) -> Vec<Parts> {
    let tokens = step.tokens();
    let upload = |bytes: &[u8]| Buffer::from_bytes(device, bytes).unwrap();
    let per_block = 256 / step.ratio.max(1);
    let mut window = vec![0xff; 2 * RING * ROW];
    let mut entries = vec![0xff; 10 * per_block * ROW];
    let mut pending = Vec::new();
    let mut sequences = Vec::new();
    for (index, &(sequence, first, n)) in step.parts.iter().enumerate() {
        let slot = SLOTS[sequence] as usize;
        for at in (first + 1).saturating_sub(WINDOW)..first {
            window[(slot * RING + at % RING) * ROW..][..ROW]
                .copy_from_slice(&row(sequence, false, at));
        }
        let fields = [slot, pending.len() / ROW, n, first, 5 * index, 5, 0, 0];
        sequences.extend(words(fields));
        pending.extend((first..first + n).flat_map(|at| row(sequence, false, at)));
        let n_entries = (first + n).checked_div(step.ratio).unwrap_or(0);
        for entry in 0..n_entries {
            let block = BLOCKS[sequence][entry / per_block] as usize;
            let at = (block * per_block + entry % per_block) * ROW;
            entries[at..][..ROW].copy_from_slice(&row(sequence, true, entry));
        }
    }
    let part_of = |sequence| step.parts.iter().position(|part| part.0 == sequence).unwrap();
    let blocks = step.parts.iter().flat_map(|part| BLOCKS[part.0]).map(|block| block as usize);
    let chosen = tokens.iter().flat_map(|token| {
        let none = std::iter::repeat(usize::MAX);
        token.chosen.iter().copied().chain(none).take(TOP_K).collect::<Vec<_>>()
    });
    let q = tokens.iter().flat_map(|token| step.queries(token));
    let q: Vec<u8> = q.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect();
    let most = tokens.iter().map(|token| token.keys().len()).max().unwrap();
    let n_splits = most.div_ceil(split_blocks);
    let n_parts = tokens.len() * n_splits * step.heads;
    let acc = upload(&vec![0xff; 4 * n_parts * DIM]);
    let stats = upload(&vec![0xff; 8 * n_parts]);
    // Nothing of the window and of the block lists is written in a step.
    let (window, blocks) = (weight_buffer(device, &window), weight_buffer(device, &words(blocks)));
    let q = upload(&q);
    let (pending, entries) = (upload(&pending), upload(&entries));
    let (chosen, counts) =
        (upload(&words(chosen)), upload(&words(tokens.iter().map(|token| token.chosen.len()))));
    let positions = upload(&words(tokens.iter().map(|token| token.position)));
    let sequence_of = upload(&words(tokens.iter().map(|token| part_of(token.sequence))));
    let sequences = upload(&sequences);
    let selects = step.ratio == 4;
    let given = |buffer: &Buffer| if selects { Arg::from(buffer) } else { Arg::NULL };
    let mut args: Vec<Arg> = [&q, &window, &pending, &entries].map(Arg::from).to_vec();
    args.extend([given(&chosen), given(&counts)]);
    args.extend([&positions, &sequence_of, &sequences, &blocks, &acc, &stats].map(Arg::from));
    let numbers = [0, step.heads, RING, step.ratio, TOP_K, split_blocks];
    args.extend(numbers.map(|n| Arg::U32(n as u32)));
    let grid = [n_splits, step.heads.div_ceil(64), tokens.len()].map(|n| n as u32);
    let launch = Launch {
        kernel: "attn_sparse100",
        grid,
        block: [416, 1, 1],
        shared_bytes: 209 * 1024,
        args: &args,
    };
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(launch) }.unwrap();
    let (acc, stats) = (floats(&acc, n_parts * DIM), floats(&stats, 2 * n_parts));
    let of_token = n_splits * step.heads;
    let parts = acc.chunks(of_token * DIM).zip(stats.chunks(of_token * 2));
    parts.map(|(acc, stats)| (acc.to_vec(), stats.to_vec())).collect()
}

/// What the splits add up to, [head][channel].
fn merged(heads: usize, (acc, stats): &Parts) -> Vec<f32> {
    let n_splits = stats.len() / heads / 2;
    let stat =
        |split: usize, head: usize, i: usize| f64::from(stats[(split * heads + head) * 2 + i]);
    let mut out = Vec::new();
    for head in 0..heads {
        let max = (0..n_splits).map(|split| stat(split, head, 0)).fold(f64::NEG_INFINITY, f64::max);
        let weight = |split: usize| (stat(split, head, 0) - max).exp();
        let sum: f64 = (0..n_splits).map(|split| weight(split) * stat(split, head, 1)).sum();
        for channel in 0..DIM {
            let part = |split: usize| {
                weight(split) * f64::from(acc[(split * heads + head) * DIM + channel])
            };
            out.push(((0..n_splits).map(part).sum::<f64>() / sum) as f32);
        }
    }
    out
}

fn check(step: &Step, splits: &[usize]) {
    let expected = expected(step);
    in_every_mode_as(ARCH, |device| {
        for &split_blocks in splits {
            let parts = attend(device, step, split_blocks);
            let got: Vec<f32> = parts.iter().flat_map(|part| merged(step.heads, part)).collect();
            let what = format!("{} heads, ratio {}", step.heads, step.ratio);
            // Weights are bf16.
            assert_close(&what, &got, &expected, 1.0 / 256.0);
        }
    });
}

/// One token with 328 keys in six blocks, the last with eight.
const CHOSEN: Step = Step { ratio: 4, heads: 64, parts: &[(0, 1029, 1)] };

#[test]
fn chosen_entries_are_attended_to_in_splits_of_any_length() {
    check(&CHOSEN, &[6, 4, 1]);
}

#[test]
fn the_largest_score_of_that_token_grows_by_little_and_by_much() {
    // So the test above sees the output rescaled, and a maximum that stays behind.
    let (mut by_little, mut by_much) = (0, 0);
    for token in CHOSEN.tokens() {
        for q in CHOSEN.queries(&token).chunks(DIM) {
            let mut max = f64::NEG_INFINITY;
            for block in token.keys() {
                let most = scores(q, &block).into_iter().fold(f64::NEG_INFINITY, f64::max);
                by_much += usize::from(most > max + 5.0 && max > f64::NEG_INFINITY);
                by_little += usize::from(most > max && most <= max + 5.0);
                max = if most > max + 5.0 { most } else { max };
            }
        }
    }
    assert!(by_little > 20 && by_much > 20, "{by_little} {by_much}");
}

#[test]
fn entries_of_128_tokens_follow_the_window() {
    check(&Step { ratio: 128, heads: 64, parts: &[(1, 1023, 2), (0, 130, 1)] }, &[2]);
}

#[test]
fn windows_that_are_not_full_and_heads_that_fill_no_tile() {
    check(&Step { ratio: 0, heads: 70, parts: &[(0, 0, 2), (1, 69, 1)] }, &[1]);
}

#[test]
fn the_heads_of_two_tiles_are_apart() {
    check(&Step { ratio: 4, heads: 128, parts: &[(0, 340, 1)] }, &[4]);
}

#[test]
fn a_token_has_the_same_bits_alone_and_beside_others() {
    let alone = Step { ratio: 4, heads: 6, parts: &[(0, 529, 1)] };
    let beside = Step { ratio: 4, heads: 6, parts: &[(1, 1027, 2), (0, 529, 1)] };
    in_every_mode_as(ARCH, |device| {
        let (alone, beside) = (attend(device, &alone, 4), attend(device, &beside, 4));
        let ((acc, stats), (other_acc, other_stats)) = (&alone[0], &beside[2]);
        // The longer token adds splits, which are empty here.
        assert_eq!(acc[..], other_acc[..acc.len()]);
        assert_eq!(stats[..], other_stats[..stats.len()]);
        assert!(other_acc[acc.len()..].iter().all(|&x| x == 0.0));
        for empty in other_stats[stats.len()..].chunks(2) {
            assert_eq!(empty, [f32::NEG_INFINITY, 0.0]);
        }
    });
}
