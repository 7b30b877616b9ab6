//! `fathom bench kernels` at sizes that the emulator runs: every operator, and what a launch costs.

use fathom_ops::Activations;
use fathom_ops::cuda::Effort;
use fathom_ops::cuda::check::bench::{self, Shape};

use crate::process::{Emulator, MODES};

fn every_operator_is_timed(arch: &'static str) {
    let Some(device) = Emulator::start_as(MODES[0], arch) else { return };
    let shapes = bench::small_shapes();
    let mut measured = Vec::new();
    let mut report = |one| measured.push(one);
    bench::run(&device, Activations::Fp8Grid, &shapes, true, &mut report).unwrap();
    let names: Vec<&str> = measured.iter().map(|one| one.name.as_str()).collect();
    let expected: Vec<String> = shapes.iter().map(Shape::name).collect();
    assert_eq!(names, expected);
    for one in &measured {
        assert!(one.timed.median > 0.0 && one.timed.samples == 1, "{one:?}");
    }
}

#[test]
fn every_operator_is_timed_on_ampere() {
    every_operator_is_timed("sm_80");
}

#[test]
fn every_operator_is_timed_on_hopper() {
    every_operator_is_timed("sm_90a");
}

#[test]
fn every_operator_is_timed_on_blackwell() {
    every_operator_is_timed("sm_100f");
}

#[test]
fn the_cost_of_a_launch_is_told_for_recordings_and_without() {
    let Some(device) = Emulator::start(MODES[0]) else { return };
    let mut costs = Vec::new();
    bench::launches(&device, Effort::LEAST, &mut |cost| costs.push(cost)).unwrap();
    // The emulator's launches never overlap.
    let names: Vec<&str> = costs.iter().map(|cost| cost.name).collect();
    assert_eq!(names, ["recorded", "by itself"]);
    // Twice as many launches of the same kernel take longer.
    assert!(costs.iter().all(|cost| cost.seconds > 0.0), "{costs:?}");
}
