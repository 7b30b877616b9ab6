//! The detectors of tensor memory (sm_100f): each finds the error planted for it, and only that.

use std::sync::Arc;

use fathom_core::num::e4m3_to_f32;
use fathom_ops::cuda::{Arg, Buffer, Device, Launch, MapElement, Swizzle, TensorMapSpec};

use crate::process::{Emulator, MODES, Mode};
use crate::weights::Random;

const BLOCKS: usize = 4;
const ROWS: usize = 128;
const TOKENS: usize = 8;
const K: usize = 128;

/// The E8M0 byte of row (or token) `row` and a part of 32 columns.
fn scale_byte(row: usize, part: usize) -> u8 {
    (123 + (3 * row + 5 * part) % 7) as u8
}

/// The output, or the emulator's message; and what the output should be.
type Outcome = (Result<Vec<f32>, String>, Vec<f32>);

fn run(kernel: &'static str, mode: Mode) -> Option<Outcome> {
    let device: Arc<dyn Device> = Emulator::start_as(mode, "sm_100f")?;
    let mut random = Random::new(5);
    let mut codes = |rows: usize| -> Vec<u8> {
        (0..BLOCKS * rows * K).map(|_| random.bits() as u8 & 0xbf).collect()
    };
    let (a, b) = (codes(ROWS), codes(TOKENS));
    let mut swizzled = vec![0; b.len()];
    for (i, &code) in b.iter().enumerate() {
        swizzled[i ^ (i / K % 8 * 16)] = code;
    }
    let mut scales = vec![0; 4 * ROWS];
    for row in 0..ROWS {
        for part in 0..4 {
            scales[row % 32 * 16 + row / 32 * 4 + part] = scale_byte(row, part);
        }
    }
    let value = |codes: &[u8], index: usize, row: usize, k: usize| {
        f64::from(e4m3_to_f32(codes[index])) * 2_f64.powi(i32::from(scale_byte(row, k / 32)) - 127)
    };
    let dot = |row: usize, token: usize| -> f64 {
        let product = |i: usize| {
            let (block, k) = (i / K, i % K);
            value(&a, (block * ROWS + row) * K + k, row, k)
                * value(&b, (block * TOKENS + token) * K + k, token, k)
        };
        (0..BLOCKS * K).map(product).sum()
    };
    let expected = (0..ROWS * TOKENS).map(|i| dot(i / TOKENS, i % TOKENS) as f32).collect();
    let a = Buffer::from_bytes(&device, &a).unwrap();
    let map = device
        .encode(&TensorMapSpec {
            element: MapElement::U8,
            address: a.address(),
            dims: &[K as u64, (BLOCKS * ROWS) as u64],
            strides: &[K as u64],
            box_dims: &[K as u32, ROWS as u32],
            swizzle: Swizzle::B128,
        })
        .unwrap();
    let b = Buffer::from_bytes(&device, &swizzled).unwrap();
    let scales = Buffer::from_bytes(&device, &scales).unwrap();
    let out = Buffer::from_bytes(&device, &[0; 4 * ROWS * TOKENS]).unwrap();
    let args = [Arg::Map(map), (&b).into(), (&scales).into(), (&out).into()];
    let (grid, block, shared_bytes) = ([1; 3], [192, 1, 1], 40 * 1024);
    // SAFETY: the emulator checks every access itself.
    let launched =
        unsafe { device.launch(Launch { kernel, grid, block, shared_bytes, args: &args }) };
    let result = launched.map_err(|error| error.to_string()).map(|()| {
        let bytes = out.read(0, 4 * ROWS * TOKENS).unwrap();
        bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    });
    Some((result, expected))
}

/// The same of kernels whose threads store to tensor memory.
fn run_stored(kernel: &'static str, mode: Mode) -> Option<Outcome> {
    const ROWS: usize = 64;
    const K: usize = 16;
    let device: Arc<dyn Device> = Emulator::start_as(mode, "sm_100f")?;
    let mut random = Random::new(6);
    let (a, b) = (random.values(ROWS * K, 1.0), random.values(ROWS * K, 1.0));
    let bytes = |x: &f32| half::bf16::from_f32(*x).to_le_bytes();
    let mut swizzled = vec![0; ROWS * 128];
    for (i, x) in b.iter().enumerate() {
        let (row, byte) = (i / K, i % K * 2);
        swizzled[row * 128 + (byte ^ (row % 8 * 16))..][..2].copy_from_slice(&bytes(x));
    }
    let dot = |row: usize, column: usize| -> f64 {
        (0..K).map(|k| f64::from(a[row * K + k]) * f64::from(b[column * K + k])).sum()
    };
    let expected = (0..ROWS * ROWS).map(|i| dot(i / ROWS, i % ROWS) as f32).collect();
    let a = Buffer::from_bytes(&device, &a.iter().flat_map(bytes).collect::<Vec<u8>>()).unwrap();
    let b = Buffer::from_bytes(&device, &swizzled).unwrap();
    let out = Buffer::from_bytes(&device, &[0; 4 * ROWS * ROWS]).unwrap();
    let args = [&a, &b, &out].map(Arg::from);
    let (grid, block, shared_bytes) = ([1; 3], [160, 1, 1], 10 * 1024);
    // SAFETY: the emulator checks every access itself.
    let launched =
        unsafe { device.launch(Launch { kernel, grid, block, shared_bytes, args: &args }) };
    let result = launched.map_err(|error| error.to_string()).map(|()| {
        let bytes = out.read(0, 4 * ROWS * ROWS).unwrap();
        bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    });
    Some((result, expected))
}

/// In every mode one of the messages is the error's.
fn finds(kernel: &'static str, messages: &[&str]) {
    finds_in(run, kernel, messages);
}

fn finds_in(
    run: impl Fn(&'static str, Mode) -> Option<Outcome>,
    kernel: &'static str,
    messages: &[&str],
) {
    for mode in MODES {
        let Some((result, _)) = run(kernel, mode) else { return };
        let got = result.expect_err(kernel);
        assert!(got.contains(kernel), "{got}");
        assert!(messages.iter().any(|m| got.contains(m)), "{kernel}, {mode:?}: {got}");
    }
}

#[test]
fn a_sound_pipeline_of_scaled_products_gives_the_exact_sum() {
    for mode in MODES {
        let Some((got, expected)) = run("planted100_sound", mode) else { return };
        for (got, expected) in got.unwrap().iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{got} {expected}");
        }
    }
}

#[test]
fn missing_waits_around_scaled_products_are_seen() {
    finds("planted100_no_full_wait", &["never written", "asynchronous copy"]);
    finds("planted100_no_empty_wait", &["one arrival more", "race", "seen the last one"]);
    finds("planted100_no_done_wait", &["unordered after the product", "never written"]);
    finds("planted100_no_commit", &["no thread can go on"]);
}

#[test]
fn loads_of_tensor_memory_without_fence_or_wait_are_seen() {
    finds("planted100_no_fence", &["without tmem_fence_after"]);
    finds("planted100_no_load_wait", &["never waited for"]);
}

#[test]
fn wrong_places_in_tensor_memory_are_seen() {
    finds("planted100_other_lanes", &["warp 1 reads lanes 0", "warp 2 reads", "warp 3 reads"]);
    finds("planted100_other_columns", &["column 32 of tensor memory is not allocated"]);
    finds("planted100_no_scales", &["reads column"]);
    finds("planted100_wrong_layout", &["not of this architecture"]);
}

#[test]
fn columns_must_be_allocated_and_given_back_in_order() {
    finds("planted100_no_dealloc", &["without giving back"]);
    finds("planted100_early_dealloc", &["unordered after a load", "is not allocated"]);
    finds("planted100_odd_columns", &["48 columns of tensor memory"]);
}

#[test]
fn a_sound_product_of_what_threads_stored_is_exact() {
    for mode in MODES {
        let Some((got, expected)) = run_stored("planted100_stored", mode) else { return };
        for (got, expected) in got.unwrap().iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{got} {expected}");
        }
    }
}

#[test]
fn stores_to_tensor_memory_that_are_not_ordered_are_seen() {
    let finds = |kernel, messages: &[&str]| finds_in(run_stored, kernel, messages);
    finds("planted100_no_store_wait", &["stored without tmem_store_wait"]);
    finds("planted100_no_fence_before", &["without tmem_fence_before"]);
    finds("planted100_no_fence_after", &["without tmem_fence_after"]);
    let early = ["never written", "unordered after a store", "stored without tmem_store_wait"];
    finds("planted100_no_barrier", &early);
    finds("planted100_load_unwaited", &["load of column 0 of tensor memory, stored without"]);
    finds("planted100_early_commit", &["unordered after the product that writes it"]);
    let overwritten =
        ["unordered after the product that reads it", "stored without", "unordered after a store"];
    finds("planted100_overwrite", &overwritten);
}

#[test]
fn products_that_tensor_cores_do_not_have_are_seen() {
    finds_in(run_stored, "planted100_upper_rows", &["rows from lane 16 on"]);
    finds_in(run_stored, "planted100_odd_width", &["a bf16 product of 128 x 8"]);
}
