//! Each detector of the emulator finds the error planted for it, and only that.

use fathom_ops::cuda::{Arg, Buffer, Launch};

use crate::process::{Emulator, MODES, Mode};

/// Runs a planted kernel with two warps; the output or the emulator's message.
fn run(kernel: &'static str, mode: Mode) -> Option<Result<Vec<f32>, String>> {
    let device = Emulator::start(mode)?;
    let input: Vec<u8> = (0..128).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let input = Buffer::from_bytes(&device, &input).unwrap();
    let out = Buffer::new(&device, 64 * 4).unwrap();
    let launch = Launch {
        kernel,
        grid: [1; 3],
        block: [64, 1, 1],
        shared_bytes: 512,
        args: &[Arg::Address(input.address()), Arg::Address(out.address())],
    };
    // SAFETY: the emulator checks every access itself.
    let result = unsafe { device.launch(launch) };
    Some(result.map_err(|error| error.to_string()).map(|()| {
        let bytes = out.read(0, 64 * 4).unwrap();
        bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }))
}

/// In every mode of `modes` the kernel fails with a message that contains `expected`.
fn finds(kernel: &'static str, modes: &[Mode], expected: &str) {
    for &mode in modes {
        let Some(result) = run(kernel, mode) else { return };
        let message = result.expect_err(kernel);
        assert!(message.contains(expected), "{kernel}, {mode:?}: {message}");
        assert!(message.contains(kernel), "{message}");
    }
}

#[test]
fn a_sound_kernel_runs_and_nothing_fires() {
    for mode in MODES {
        let Some(result) = run("planted_sound", mode) else { return };
        let expected: Vec<f32> = (0..64).map(|t| (63 - t + 64 + (t ^ 32)) as f32).collect();
        assert_eq!(result.unwrap(), expected);
    }
}

#[test]
fn a_wait_that_covers_too_few_copies_is_seen_when_copies_land_late() {
    let late: Vec<Mode> = MODES.into_iter().filter(|mode| !mode.eager).collect();
    finds("planted_wait_too_short", &late, "never written");
}

#[test]
fn a_missing_barrier_after_copies_is_a_race() {
    // Late copies may also be seen as bytes not there yet, if the reader runs first.
    for mode in MODES {
        let Some(result) = run("planted_copy_without_barrier", mode) else { return };
        let message = result.expect_err("a missing barrier");
        assert!(message.contains("race") || message.contains("never written"), "{message}");
    }
}

#[test]
fn a_missing_barrier_between_store_and_load_is_a_race() {
    for mode in MODES {
        let Some(result) = run("planted_race", mode) else { return };
        let message = result.expect_err("a missing barrier");
        assert!(message.contains("race") || message.contains("never written"), "{message}");
    }
    finds("planted_reuse_race", &MODES, "race");
    for mode in MODES {
        let Some(result) = run("planted_lockstep", mode) else { return };
        let message = result.expect_err("lanes in step");
        assert!(message.contains("race") || message.contains("never written"), "{message}");
    }
}

#[test]
fn shared_memory_that_was_never_written_cannot_be_read() {
    finds("planted_unwritten", &MODES, "offset 20, which was never written");
}

#[test]
fn divergent_warps_and_threads_that_never_meet_are_errors() {
    finds("planted_half_barrier", &MODES, "divergent warp");
    for mode in MODES {
        let Some(result) = run("planted_early_exit", mode) else { return };
        let message = result.expect_err("an absent lane");
        assert!(message.contains("ends while lane") || message.contains("has ended"), "{message}");
    }
    finds("planted_deadlock", &MODES, "no thread can go on");
}

#[test]
fn a_kernel_may_not_end_with_copies_on_their_way() {
    finds("planted_copies_in_flight", &MODES, "copies on their way");
}

#[test]
fn accesses_outside_of_a_buffer_or_of_shared_memory_are_errors() {
    finds("planted_store_behind", &MODES, "store of 4 bytes ends 4 bytes behind a buffer");
    finds("planted_load_behind", &MODES, "load of 4 bytes ends 4 bytes behind a buffer");
    finds("planted_shared_behind", &MODES, "store of 4 bytes at shared offset 512");
}
