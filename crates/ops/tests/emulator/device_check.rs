//! The cases of `fathom device-check`, small, so that the check itself is checked.

use std::sync::Arc;

use fathom_ops::Activations;
use fathom_ops::cuda::check::{CASES, Case, Size};
use fathom_ops::cuda::{Device, DeviceError, Launch, TensorMap, TensorMapSpec};

use crate::process::{Emulator, MODES, Mode};

/// One mode suffices: the tests of the operators run in all of them.
pub(crate) fn all_pass(
    start: impl Fn(Mode, &'static str) -> Option<Arc<dyn Device>>,
    cases: &[Case],
    activations: Activations,
    mode: Mode,
    arch: &'static str,
) {
    for case in cases {
        let Some(device) = start(mode, arch) else { return };
        let found = case.run(&device, activations, Size::Small, 3).unwrap();
        assert!(!found.is_empty(), "{} compares nothing", case.name);
        for comparison in found {
            assert!(comparison.passes(), "{}: {comparison:?}", case.name);
        }
    }
}

#[test]
fn every_case_passes_on_the_emulator() {
    all_pass(Emulator::start_as, &CASES, Activations::Fp8Grid, MODES[1], "sm_80");
}

#[test]
fn products_of_unquantised_activations_pass_against_the_cpus_a16_form() {
    // The others of `CASES` are made of these and of what does not depend on activations.
    let is_product = |case: &Case| case.name == "linear" || case.name.starts_with("experts");
    let cases: Vec<Case> = CASES.into_iter().filter(is_product).collect();
    assert_eq!(cases.len(), 3);
    all_pass(Emulator::start_as, &cases, Activations::Bf16, MODES[2], "sm_80");
    // FP8 weights whose scales are powers of two are expanded there, without a map from loading.
    all_pass(Emulator::start_as, &cases[..1], Activations::Bf16, MODES[2], "sm_100f");
}

#[test]
fn cases_with_forms_of_their_own_on_newer_architectures_pass_there() {
    let is_special = |case: &Case| {
        ["wrappers", "linear", "number formats", "experts, FP4", "hyper-connections and head"]
            .contains(&case.name)
            || ["attention, ratio 4", "choosing entries"].contains(&case.name)
    };
    let cases: Vec<Case> = CASES.into_iter().filter(is_special).collect();
    assert_eq!(cases.len(), 7);
    for arch in ["sm_90a", "sm_100f"] {
        all_pass(Emulator::start_as, &cases, Activations::Fp8Grid, MODES[2], arch);
    }
}

/// A device that leaves out one kernel.
#[derive(Debug)]
struct Forgetful {
    device: Arc<dyn Device>,
    kernel: &'static str,
}

impl Device for Forgetful {
    fn name(&self) -> String {
        self.device.name()
    }
    fn arch(&self) -> &'static str {
        self.device.arch()
    }
    fn alloc(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.device.alloc(bytes)
    }
    fn hold_weights(&self, address: u64) -> Result<(), DeviceError> {
        self.device.hold_weights(address)
    }
    fn free(&self, address: u64, bytes: usize) {
        self.device.free(address, bytes);
    }
    fn fill(&self, address: u64, bytes: usize, value: u8) -> Result<(), DeviceError> {
        self.device.fill(address, bytes, value)
    }
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.device.write(address, bytes)
    }
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        self.device.read(address, out)
    }
    fn encode(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, DeviceError> {
        self.device.encode(spec)
    }
    fn has_room_for(&self, launch: &Launch<'_>) -> Result<bool, DeviceError> {
        self.device.has_room_for(launch)
    }
    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), DeviceError> {
        if launch.kernel == self.kernel {
            return Ok(());
        }
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.device.launch(launch) }
    }
    fn begin_record(&self) -> Result<(), DeviceError> {
        self.device.begin_record()
    }
    fn end_record(&self) -> Result<u64, DeviceError> {
        self.device.end_record()
    }
    unsafe fn replay(&self, record: u64) -> Result<(), DeviceError> {
        // SAFETY: as above.
        unsafe { self.device.replay(record) }
    }
    fn forget(&self, record: u64) {
        self.device.forget(record);
    }
}

#[test]
fn a_kernel_that_does_nothing_is_found_by_the_case_it_belongs_to() {
    let kernels = [
        ("check_mma", "wrappers"),
        ("check_merge", "shared functions"),
        ("linear_fp8_grid_8", "linear"),
        ("linear_fp8_64", "linear"),
        ("plain_product", "linear"),
        ("plain_grid", "linear"),
        ("plain_gate", "experts, FP4"),
        ("plain_sum", "experts, FP8"),
        ("hc_post", "hyper-connections and head"),
        ("plain_mix", "hyper-connections and head"),
        ("plain_post", "hyper-connections and head"),
        ("attn_commit_window", "attention, window"),
        ("plain_scores", "attention, window"),
        ("plain_attend", "attention, ratio 128"),
        ("compress_emit_keys", "attention, ratio 4"),
        ("compress_emit_kv", "attention, ratio 128"),
        ("index_scores", "choosing entries"),
        ("index_top_k", "choosing entries"),
        ("choose_tokens", "choosing tokens"),
    ];
    for (kernel, name) in kernels {
        let Some(device) = Emulator::start(MODES[0]) else { return };
        let device: Arc<dyn Device> = Arc::new(Forgetful { device, kernel });
        let case = CASES.into_iter().find(|case| case.name == name).unwrap();
        // Poisoned ids may also lead outside of a buffer, which the emulator refuses.
        let passes = case
            .run(&device, Activations::Fp8Grid, Size::Small, 3)
            .is_ok_and(|found| found.iter().all(|comparison| comparison.passes()));
        assert!(!passes, "{name} passes without {kernel}");
    }
}
