//! Attention's splits: the same bits whoever adds them up, and their sum itself.

use std::sync::Arc;

use fathom_core::model_config::HEAD_DIM;
use fathom_ops::cuda::{Arg, Buffer, Device, Launch};

use crate::compare::{BF16_STEP, assert_close};
use crate::process::{Emulator, MODES, in_every_mode, in_every_mode_on_hopper, weight_buffer};
use crate::weights::Random;

const KEYS: usize = 64;
const RING: usize = 131;
const ROW_BYTES: usize = 584;
/// Entries of a block of 256 tokens.
const BLOCK_ROWS: usize = 64;
const N_BLOCKS: usize = 8;

fn launch(
    device: &Arc<dyn Device>,
    kernel: &'static str,
    grid: [usize; 3],
    (threads, shared_bytes): (u32, u32),
    args: &[Arg],
) {
    let grid = grid.map(|n| n as u32);
    let launch = Launch { kernel, grid, block: [threads, 1, 1], shared_bytes, args };
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(launch) }.unwrap();
}

fn words(device: &Arc<dyn Device>, values: &[u32]) -> Buffer {
    let bytes: Vec<u8> = values.iter().flat_map(|word| word.to_le_bytes()).collect();
    Buffer::from_bytes(device, &bytes).unwrap()
}

fn floats(device: &Arc<dyn Device>, values: &[f32]) -> Buffer {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    weight_buffer(device, &bytes)
}

fn sizes<const N: usize>(values: [usize; N]) -> [Arg; N] {
    values.map(|value| Arg::U32(value as u32))
}

/// Rows of the cache, of values about one.
fn rows(device: &Arc<dyn Device>, random: &mut Random, n: usize) -> Buffer {
    let mut bytes = Vec::with_capacity(n * ROW_BYTES);
    for _ in 0..n {
        bytes.extend((0..448).map(|_| {
            let bits = random.bits();
            (bits & 0x80) as u8 | ((bits >> 8) as u8 % 0x60)
        }));
        let rope = random.values(64, 2.0);
        bytes.extend(rope.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()));
        bytes.extend((0..7).map(|_| 123 + (random.bits() % 3) as u8));
        bytes.push(0);
    }
    Buffer::from_bytes(device, &bytes).unwrap()
}

/// Two tokens of a ratio-4 layer: one with the whole window and `n_chosen` entries, one with 41 keys.
struct Case {
    buffers: Vec<Buffer>,
    sink: Buffer,
    frequencies: Buffer,
    positions: Buffer,
    n_heads: usize,
    n_chosen: usize,
}

impl Case {
    fn new(device: &Arc<dyn Device>, n_heads: usize, n_chosen: usize) -> Self {
        let random = &mut Random::new(5);
        let q = random.values(2 * n_heads * HEAD_DIM, 0.3);
        let q: Vec<u8> = q.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
        let n_rows = (N_BLOCKS * BLOCK_ROWS) as u32;
        let chosen: Vec<u32> = (0..2 * n_chosen.max(1)).map(|_| random.below(n_rows)).collect();
        let positions = words(device, &[1999, 40]);
        let buffers = vec![
            Buffer::from_bytes(device, &q).unwrap(),
            rows(device, random, 2 * RING),
            rows(device, random, 2),
            rows(device, random, N_BLOCKS * BLOCK_ROWS),
            words(device, &chosen),
            words(device, &[n_chosen as u32, 0]),
            positions.clone(),
            words(device, &[0, 1]),
            words(device, &[0, 0, 1, 1999, 0, 8, 0, 0, 1, 1, 1, 40, 0, 8, 0, 0]),
            words(device, &[3, 0, 5, 1, 4, 2, 7, 6]),
        ];
        let sink = floats(device, &random.values(n_heads, 2.0));
        let frequencies = floats(device, &random.values(32, 1.0));
        Self { buffers, sink, frequencies, positions, n_heads, n_chosen }
    }

    /// What `kernel` makes of splits of `split_blocks`, added up by a launch where there is no cluster.
    fn run(
        &self,
        device: &Arc<dyn Device>,
        kernel: &'static str,
        split_blocks: usize,
        cluster: Option<usize>,
    ) -> Vec<u8> {
        let key_blocks = 2 + self.n_chosen.div_ceil(KEYS);
        let n_splits = cluster.unwrap_or(key_blocks.div_ceil(split_blocks));
        let n_parts = 2 * n_splits * self.n_heads;
        let acc = Buffer::new(device, 4 * n_parts * HEAD_DIM).unwrap();
        let stats = Buffer::new(device, 4 * n_parts * 2).unwrap();
        let out = Buffer::new(device, 2 * 2 * self.n_heads * HEAD_DIM).unwrap();
        let mut args: Vec<Arg> = self.buffers.iter().map(Arg::from).collect();
        args.extend([&acc, &stats, &self.sink, &self.frequencies, &out].map(Arg::from));
        args.extend(sizes([0, self.n_heads, RING, 4, self.n_chosen.max(1), split_blocks]));
        let grid = [n_splits, self.n_heads.div_ceil(64), 2];
        launch(device, kernel, grid, (384, 211 * 1024), &args);
        if cluster.is_none() {
            let mut args: Vec<Arg> =
                [&acc, &stats, &self.sink, &self.frequencies, &self.positions, &out]
                    .map(Arg::from)
                    .into();
            args.extend(sizes([0, 2, self.n_heads, n_splits]));
            launch(device, "attn_merge", [(2 * self.n_heads).div_ceil(4), 1, 1], (128, 0), &args);
        }
        out.read(0, out.len()).unwrap()
    }
}

/// Shared memory of `SparseShared`.
const SPARSE_BYTES: u32 = 16 * 520 * 2 + 64 * 520 * 2 + 16 * 72 * 2 + 2 * 4 * 16 * 4 + 4;

impl Case {
    /// What `attn_sparse` makes of splits of `split_blocks` and tiles of `tile_heads`: with counts in `ended`
    /// its last splits add up, without a launch does.
    fn run_tiles(
        &self,
        device: &Arc<dyn Device>,
        split_blocks: usize,
        tile_heads: usize,
        ended: Option<&Buffer>,
    ) -> Vec<u8> {
        let n_splits = (2 + self.n_chosen.div_ceil(KEYS)).div_ceil(split_blocks);
        let n_parts = 2 * n_splits * self.n_heads;
        let acc = Buffer::new(device, 4 * n_parts * HEAD_DIM).unwrap();
        let stats = Buffer::new(device, 4 * n_parts * 2).unwrap();
        let out = Buffer::new(device, 2 * 2 * self.n_heads * HEAD_DIM).unwrap();
        let mut args: Vec<Arg> = self.buffers.iter().map(Arg::from).collect();
        args.extend([&acc, &stats, &self.sink, &self.frequencies, &out].map(Arg::from));
        args.push(ended.map_or(Arg::NULL, Arg::from));
        let top_k = self.n_chosen.max(1);
        args.extend(sizes([tile_heads, 0, self.n_heads, RING, 4, top_k, split_blocks]));
        let grid = [n_splits, self.n_heads.div_ceil(tile_heads), 2];
        launch(device, "attn_sparse", grid, (128, SPARSE_BYTES), &args);
        if ended.is_none() {
            let mut args: Vec<Arg> =
                [&acc, &stats, &self.sink, &self.frequencies, &self.positions, &out]
                    .map(Arg::from)
                    .into();
            args.extend(sizes([0, 2, self.n_heads, n_splits]));
            launch(device, "attn_merge", [(2 * self.n_heads).div_ceil(4), 1, 1], (128, 0), &args);
        }
        out.read(0, out.len()).unwrap()
    }
}

#[test]
fn the_last_split_of_a_tile_adds_up_to_the_bits_of_a_launch() {
    in_every_mode(|device| {
        for (n_heads, n_chosen, split_blocks, tile_heads) in
            [(6, 70, 1, 4), (17, 0, 2, 8), (20, 130, 4, 16), (5, 300, 1, 16)]
        {
            let case = Case::new(device, n_heads, n_chosen);
            let expected = case.run_tiles(device, split_blocks, 16, None);
            let n_words = 2 * n_heads.div_ceil(tile_heads);
            let ended = words(device, &vec![0; n_words]);
            // Twice: the first leaves the counts as they were.
            for _ in 0..2 {
                let got = case.run_tiles(device, split_blocks, tile_heads, Some(&ended));
                assert!(got == expected, "{n_heads} heads, {n_chosen} chosen");
            }
            assert!(expected.iter().filter(|&&byte| byte != 0).count() > expected.len() / 2);
        }
    });
}

#[test]
fn a_cluster_adds_up_its_splits_to_the_bits_of_the_launch_it_stands_for() {
    in_every_mode_on_hopper(|device| {
        // Heads, chosen entries, key blocks of a split, blocks of the cluster. Of the last token
        // most splits have no keys.
        for (n_heads, n_chosen, split_blocks, kernel, cluster) in [
            (16, 70, 4, "attn_sparse90_c1", 1),
            (128, 0, 2, "attn_sparse90_c1", 1),
            (16, 0, 1, "attn_sparse90_c2", 2),
            (70, 30, 1, "attn_sparse90_c4", 4),
            (16, 290, 2, "attn_sparse90_c4", 4),
            (64, 300, 1, "attn_sparse90_c8", 8),
            (16, 384, 1, "attn_sparse90_c8", 8),
        ] {
            let case = Case::new(device, n_heads, n_chosen);
            let expected = case.run(device, "attn_sparse90", split_blocks, None);
            let got = case.run(device, kernel, split_blocks, Some(cluster));
            assert!(got == expected, "{kernel}, {n_heads} heads, {n_chosen} chosen");
            assert!(expected.iter().filter(|&&byte| byte != 0).count() > expected.len() / 2);
        }
    });
}

#[test]
fn splits_add_up_to_their_weighted_mean() {
    const HEADS: usize = 3;
    // One mode: nothing here is shared between threads.
    let Some(device) = Emulator::start_as(MODES[0], "sm_80") else { return };
    for n_splits in [1, 2, 3, 4, 5, 8, 9, 32, 33, 70] {
        let mut random = Random::new(n_splits as u64);
        let n = n_splits * HEADS;
        let mut values = random.values(n * HEAD_DIM, 20.0);
        let mut stats: Vec<f32> =
            (0..n).flat_map(|_| [random.unit() * 6.0, 1.0 + random.unit() * 50.0]).collect();
        let sink = random.values(HEADS, 3.0);
        // A split without keys, whose values were never written.
        if n_splits > 2 {
            for head in 0..HEADS {
                let at = 2 * HEADS + head;
                (stats[2 * at], stats[2 * at + 1]) = (f32::NEG_INFINITY, 0.0);
                values[at * HEAD_DIM..][..HEAD_DIM].fill(f32::NAN);
            }
        }
        let inputs = [&values, &stats, &sink, &vec![0.0; 32]].map(|x| floats(&device, x));
        let (positions, out) =
            (words(&device, &[7]), Buffer::new(&device, 2 * HEADS * HEAD_DIM).unwrap());
        let mut args: Vec<Arg> = inputs.iter().map(Arg::from).collect();
        args.extend([&positions, &out].map(Arg::from));
        args.extend(sizes([0, 1, HEADS, n_splits]));
        launch(&device, "attn_merge", [1, 1, 1], (128, 0), &args);
        let bytes = out.read(0, out.len()).unwrap();
        let got: Vec<f32> =
            bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect();
        let mut expected = Vec::new();
        for head in 0..HEADS {
            let weight = |split: usize| f64::from(stats[2 * (split * HEADS + head)]).exp();
            let denominator: f64 = (0..n_splits)
                .map(|split| f64::from(stats[2 * (split * HEADS + head) + 1]) * weight(split))
                .sum::<f64>()
                + f64::from(sink[head]).exp();
            for channel in 0..HEAD_DIM {
                let value =
                    |split: usize| f64::from(values[(split * HEADS + head) * HEAD_DIM + channel]);
                let with_keys = (0..n_splits).filter(|&split| weight(split) > 0.0);
                let sum: f64 = with_keys.map(|split| value(split) * weight(split)).sum();
                expected.push((sum / denominator) as f32);
            }
        }
        assert_close(&format!("{n_splits} splits"), &got, &expected, BF16_STEP);
    }
}
