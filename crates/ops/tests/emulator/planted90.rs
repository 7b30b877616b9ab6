//! The detectors of asynchronous work on sm_90a: each finds the error planted for it, and only that.

use std::sync::Arc;

use fathom_core::num::e4m3_to_f32;
use fathom_ops::cuda::{Arg, Buffer, Device, Launch};

use crate::process::{Emulator, MODES, Mode};
use crate::weights::Random;

const BLOCKS: usize = 4;
const OUT: usize = 64 * 8;

/// `[4][rows][128]` codes of numbers below 2.
fn codes(rows: usize, random: &mut Random) -> Vec<u8> {
    (0..BLOCKS * rows * 128).map(|_| random.bits() as u8 & 0xbf).collect()
}

/// The same with the 16-byte pieces of each row exchanged as tensor cores expect them.
fn swizzled(codes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; codes.len()];
    for (row, (from, to)) in codes.chunks(128).zip(out.chunks_mut(128)).enumerate() {
        for (k, &code) in from.iter().enumerate() {
            to[k ^ (row % 8 * 16)] = code;
        }
    }
    out
}

/// The sum over the blocks of `a b^T`.
fn expected(a: &[u8], b: &[u8]) -> Vec<f32> {
    let dot = |row: usize, column: usize| -> f64 {
        let product = |block: usize, k: usize| {
            let left = e4m3_to_f32(a[(block * 64 + row) * 128 + k]);
            f64::from(left) * f64::from(e4m3_to_f32(b[(block * 8 + column) * 128 + k]))
        };
        (0..BLOCKS).flat_map(|block| (0..128).map(move |k| product(block, k))).sum()
    };
    (0..OUT).map(|i| dot(i / 8, i % 8) as f32).collect()
}

/// What came of some launches, and what the output should be.
struct Outcome {
    /// The output, or the emulator's message.
    result: Result<Vec<f32>, String>,
    expected: Vec<f32>,
}

/// Launches the kernels one after the other.
fn run(kernels: &[&'static str], threads: u32, mode: Mode) -> Option<Outcome> {
    let device: Arc<dyn Device> = Emulator::start(mode)?;
    let mut random = Random::new(3);
    let (a, b) = (codes(64, &mut random), codes(8, &mut random));
    let input_a = Buffer::from_bytes(&device, &swizzled(&a)).unwrap().for_weights().unwrap();
    let input_b = Buffer::from_bytes(&device, &swizzled(&b)).unwrap();
    let out = Buffer::from_bytes(&device, &[0; OUT * 4]).unwrap();
    let args = [&input_a, &input_b, &out].map(|buffer| Arg::Address(buffer.address()));
    for &kernel in kernels {
        let launch = Launch {
            kernel,
            grid: [4, 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 20 * 1024,
            args: &args,
        };
        // SAFETY: the emulator checks every access itself.
        if let Err(error) = unsafe { device.launch(launch) } {
            return Some(Outcome { result: Err(error.to_string()), expected: expected(&a, &b) });
        }
    }
    let bytes = out.read(0, OUT * 4).unwrap();
    let got = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Some(Outcome { result: Ok(got), expected: expected(&a, &b) })
}

/// In the late modes (in every mode with `also_eager`) one of the messages is the error's.
fn finds(kernel: &'static str, also_eager: bool, messages: &[&str]) {
    for mode in MODES.into_iter().filter(|mode| also_eager || !mode.eager) {
        let Some(Outcome { result, .. }) = run(&[kernel], 256, mode) else { return };
        let got = result.expect_err(kernel);
        assert!(got.contains(kernel), "{got}");
        assert!(messages.iter().any(|m| got.contains(m)), "{kernel}, {mode:?}: {got}");
    }
}

#[test]
fn a_sound_pipeline_of_copies_and_products_gives_the_exact_sum() {
    for mode in MODES {
        let Some(Outcome { result: got, expected }) = run(&["planted90_sound"], 256, mode) else {
            return;
        };
        for (got, expected) in got.unwrap().iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{got} {expected}");
        }
    }
}

#[test]
fn missing_waits_on_barriers_are_seen() {
    finds("planted90_no_full_wait", true, &["never written", "asynchronous copy"]);
    finds("planted90_no_empty_wait", true, &["one arrival more", "race", "seen the last one"]);
    finds("planted90_early_release", false, &["race", "never written"]);
}

#[test]
fn wrong_byte_counts_end_in_the_table_of_who_waits_for_what() {
    for kernel in ["planted90_too_few_bytes", "planted90_too_many_bytes"] {
        finds(kernel, true, &["bytes outstanding", "one arrival more"]);
    }
}

#[test]
fn misused_barriers_are_seen() {
    finds("planted90_no_init_fence", true, &["initialisation was not fenced"]);
    finds("planted90_no_init_barrier", true, &["race", "before it is initialised"]);
    let twice = ["one arrival more", "seen the last one", "race", "never written"];
    finds("planted90_double_arrival", true, &twice);
}

#[test]
fn stores_that_tensor_cores_cannot_see_yet_are_seen() {
    finds("planted90_no_proxy_fence", true, &["without fence_proxy_async"]);
}

#[test]
fn products_without_a_fence_or_a_wait_are_seen() {
    finds("planted90_no_wgmma_fence", true, &["without wgmma_fence"]);
    for mode in MODES {
        let Some(Outcome { result: got, .. }) = run(&["planted90_no_product_wait"], 256, mode)
        else {
            return;
        };
        assert!(got.unwrap().iter().any(|x| x.is_nan()));
    }
}

#[test]
fn blocks_of_a_cluster_must_meet_before_and_after_they_exchange() {
    for mode in MODES {
        let Some(Outcome { result: got, .. }) = run(&["planted90_ring"], 256, mode) else { return };
        assert_eq!(got.unwrap()[..4], [3.0, 0.0, 1.0, 2.0]);
    }
    finds("planted90_ring_unread", true, &["never written", "race"]);
    finds("planted90_ring_ended", true, &["block 1, which has ended"]);
}

#[test]
fn warps_cannot_have_more_registers_than_there_are() {
    let kernel = "planted90_too_many_registers";
    let Some(Outcome { result, .. }) = run(&[kernel], 384, MODES[0]) else { return };
    assert!(result.expect_err(kernel).contains("there are 65536"));
}

#[test]
fn a_launch_that_may_start_early_must_wait_before_it_loads_results_or_stores() {
    let dependent = "planted90_dependent";
    for mode in MODES {
        let Some(Outcome { result: got, .. }) = run(&[dependent, dependent], 256, mode) else {
            return;
        };
        got.unwrap();
    }
    finds("planted90_early_store", true, &["stores before it has waited"]);
    finds("planted90_early_load", true, &["loads what is no weight before it has waited"]);
    finds("planted90_early_prefetch", true, &["loads what is no weight before it has waited"]);
    finds("planted90_unawaited", true, &["a block ends without having waited"]);
    finds("planted90_stored_weight", true, &["stores to weights"]);
}

#[test]
fn copies_count_as_loads_when_they_are_issued() {
    let copies = ["planted90_early_bulk_copy", "planted90_early_copy"];
    for kernel in copies {
        finds(kernel, true, &["loads what is no weight before it has waited"]);
    }
}
