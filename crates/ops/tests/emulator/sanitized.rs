//! Every kernel under AddressSanitizer and UBSan, and an error planted for each of what these see.

use std::sync::Arc;

use fathom_ops::Activations;
use fathom_ops::cuda::check::CASES;
use fathom_ops::cuda::{Arg, Buffer, Device, Launch};

use crate::device_check::all_pass;
use crate::process::{Emulator, MODES};

const WORDS: usize = 64;

fn launch(
    device: &Arc<dyn Device>,
    kernel: &'static str,
    input: u64,
    out: u64,
) -> Result<(), String> {
    let (grid, block, shared_bytes) = ([1; 3], [WORDS as u32, 1, 1], 4 * WORDS as u32);
    let args = &[Arg::Address(input), Arg::Address(out)];
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(Launch { kernel, grid, block, shared_bytes, args }) }
        .map_err(|error| error.to_string())
}

/// What the sanitizers say of a kernel.
fn said_of(kernel: &'static str) -> Option<Result<(), String>> {
    let device = Emulator::start_sanitized(MODES[2], "sm_80")?;
    let input = Buffer::from_bytes(&device, &[0; 4 * WORDS]).unwrap();
    let out = Buffer::new(&device, 4 * WORDS).unwrap();
    Some(launch(&device, kernel, input.address(), out.address()))
}

#[test]
fn sanitizers_find_what_is_planted_for_them() {
    let planted = [
        ("planted_local_index", "runtime error: index 4 out of bounds"),
        ("planted_local_behind", "AddressSanitizer: stack-buffer-overflow"),
        ("planted_shared_arena", "AddressSanitizer: use-after-poison"),
        ("planted_buffer_behind", "AddressSanitizer: use-after-poison"),
        ("planted_buffer_before", "AddressSanitizer: use-after-poison"),
        ("planted_shift", "runtime error: shift exponent 32 is too large"),
        ("planted_overflow", "runtime error: signed integer overflow"),
        ("planted_unaligned", "runtime error: load of misaligned address"),
    ];
    for (kernel, expected) in planted {
        let Some(said) = said_of(kernel) else { return };
        let said = said.expect_err(kernel);
        assert!(
            said.contains(expected) && said.contains("planted_undefined.cu"),
            "{kernel}: {said}"
        );
    }
    if let Some(said) = said_of("planted_defined") {
        said.unwrap();
    }
}

#[test]
fn memory_that_was_given_back_cannot_be_used() {
    let Some(device) = Emulator::start_sanitized(MODES[0], "sm_80") else { return };
    let (input, out) = [(); 2].map(|()| Buffer::new(&device, 4 * WORDS).unwrap()).into();
    let address = input.address();
    drop(input);
    let said = launch(&device, "planted_defined", address, out.address()).unwrap_err();
    assert!(said.contains("AddressSanitizer: use-after-poison"), "{said}");
}

#[test]
fn every_case_passes_on_sm_80() {
    all_pass(Emulator::start_sanitized, &CASES, Activations::Fp8Grid, MODES[0], "sm_80");
}

#[test]
fn every_case_passes_on_sm_90a() {
    all_pass(Emulator::start_sanitized, &CASES, Activations::Fp8Grid, MODES[1], "sm_90a");
}

#[test]
fn every_case_passes_on_sm_100f() {
    all_pass(Emulator::start_sanitized, &CASES, Activations::Fp8Grid, MODES[0], "sm_100f");
}
