//! The GPU path of the binary: on the block emulator in place of a GPU, and what is said without one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use fathom_ops::cuda::emulator::build;

use crate::fathom;

/// The emulator; `None` without a C++ compiler.
fn emulator() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        build::build(&kernels.canonicalize().unwrap(), &out).unwrap_or_else(|e| panic!("{e}"))
    });
    if program.is_none() {
        println!("skipped: no C++ compiler (g++) to build the block emulator with");
    }
    program.as_deref()
}

fn has_driver() -> bool {
    fathom_ops::cuda::gpu::has_driver()
}

#[test]
fn a_cache_that_does_not_fit_is_refused_with_numbers_before_anything_is_loaded() {
    let Some(emulator) = emulator() else { return };
    let output = fathom()
        .env("FATHOM_EMULATOR", emulator)
        .args(["serve", "--port", "0", "--device", "cuda", "--max-model-len", "1048576"])
        .args(["--max-num-seqs", "256", "--max-num-batched-tokens", "256"])
        .args(["--kv-cache-memory-bytes", "1000000"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("planning the KV cache"), "{text}");
    assert!(text.contains("256 sequences"), "{text}");
}

#[test]
fn without_a_driver_a_gpu_is_refused_with_the_reason_and_modes_a_gpu_lacks_are_named() {
    let failure = |args: &[&str]| {
        let output = fathom().arg("serve").args(["--port", "0"]).args(args).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    if !has_driver() {
        let text = failure(&["--device", "cuda"]);
        assert!(
            text.contains("no CUDA driver") && text.contains("hint: `fathom doctor`"),
            "{text}"
        );
    }
    let text = failure(&["--device", "tpu"]);
    assert!(text.contains("tpu") && text.contains("cuda"), "{text}");
}

#[test]
fn the_doctor_looks_at_this_machine_and_says_what_to_do() {
    let output = fathom().args(["doctor", "--device", "cpu"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("memory"), "{text}");
    let output = fathom().args(["doctor", "--device", "cuda", "--json"]).output().unwrap();
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    if !has_driver() {
        assert!(!output.status.success());
        assert_eq!(findings[0]["about"], "driver");
        assert_eq!(findings[0]["level"], "problem");
    }
}

#[test]
fn every_kernel_is_timed_on_the_emulator_with_its_spread_and_what_a_launch_costs() {
    let Some(emulator) = emulator() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("kernels.json");
    let output = fathom()
        .env("FATHOM_EMULATOR", emulator)
        .args(["bench", "kernels", "--out"])
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("say nothing about a GPU") && text.contains("our 128^3: "), "{text}");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let shapes = fathom_ops::cuda::check::bench::small_shapes();
    let kernels = json["kernels"].as_array().unwrap();
    assert_eq!(kernels.len(), shapes.len());
    for (kernel, shape) in kernels.iter().zip(&shapes) {
        assert_eq!(kernel["name"], shape.name());
        assert!(kernel["quartiles"][0].as_f64().unwrap() > 0.0, "{kernel}");
    }
    assert!(json["large_products"]["bf16_flops"].as_f64().unwrap() > 0.0);
    let launches = json["launches"].as_array().unwrap();
    assert_eq!(launches.len(), 2, "recorded, and by itself");
    assert!(text.contains("launch behind another, recorded"), "{text}");
}

#[test]
fn a_slice_of_nano_runs_on_the_emulator_and_is_measured_against_its_own_floors() {
    let Some(emulator) = emulator() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("slice.json");
    let output = fathom()
        .env("FATHOM_EMULATOR", emulator)
        .args(["bench", "slice", "--model", "nano", "--layers", "2", "--batch", "2"])
        .args(["--context", "40", "--prefill", "5", "--samples", "1", "--deterministic", "--out"])
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("say nothing about a GPU"), "{text}");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(json["is_emulator"], true);
    let cases = json["cases"].as_array().unwrap();
    let names: Vec<&str> = cases.iter().map(|case| case["case"].as_str().unwrap()).collect();
    assert_eq!(names, ["decode 2 x 40", "prefill 5 after 0", "decode 2 x 40, Zipf"]);
    for case in cases {
        assert_eq!(case["layers"], 2);
        assert!(case["median_s"].as_f64().unwrap() > 0.0);
        // Two tokens of three experts each, of eight.
        let distinct = case["distinct_experts"].as_f64().unwrap();
        assert!((3.0..=8.0).contains(&distinct), "{distinct}");
        assert!(case["largest_hidden"].as_f64().unwrap() > 0.0);
        assert_eq!(case["is_replayed"], case["work"] == "decode");
        assert!(case["deterministic"]["median_s"].as_f64().unwrap() > 0.0);
        // Two groups of heads and two sequences: two ranks can share heads, no four anything.
        let several = case["estimated_on_several_gpus"].as_array().unwrap();
        assert_eq!(several.len(), usize::from(case["work"] == "decode"), "{several:?}");
        assert!(several.iter().all(|one| one["label"] == "estimated" && one["gpus"] == 2));
    }
    assert!(text.contains("estimated, 2 x TP: "), "{text}");
    // A window layer and one of ratio 4, with their cache rows at 30 and 50 tokens, and the head.
    let distinct = cases[0]["distinct_experts"].as_f64().unwrap();
    let dense = 2.0 * 1_052_724.0 + f64::from((2048 + 512 + 8) * 256 * 2 + 1024 * 128 + 8);
    let cache = f64::from(2 * (30 + 50) * 584 + (7 + 12) * (584 + 68));
    let head = f64::from(1024 * 256 * 2);
    let bytes = dense + cache + head + 2.0 * distinct * 52_224.0;
    let rate = json["ceilings"]["used"]["bytes_per_s"].as_f64().unwrap();
    let floor = cases[0]["floor_s"].as_f64().unwrap();
    assert!(floor >= bytes / rate * 0.999, "{floor} s for {bytes} bytes at {rate}");
    for kind in ["window", "ratio-4"] {
        assert_eq!(cases[0]["kinds"][kind]["layers"], 1, "{kind}");
    }
}

#[test]
fn loading_is_timed_on_the_emulator() {
    let Some(emulator) = emulator() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("load.json");
    let output = fathom()
        .env("FATHOM_EMULATOR", emulator)
        .args(["bench", "load", "--rounds", "2", "--out"])
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let rounds = json["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 2);
    for round in rounds {
        assert!(round["bytes"].as_f64().unwrap() > 1e6 && round["seconds"].as_f64().unwrap() > 0.0);
        // The emulator has no pinned memory.
        assert!(round["host_to_device_bytes_per_s"].is_null(), "{round}");
    }
}

#[test]
fn a_slice_without_a_gpu_or_without_room_says_what_would_do() {
    let failure = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(!output.status.success());
        [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat()
    };
    if !has_driver() {
        let text = failure(fathom().args(["bench", "slice"]));
        assert!(text.contains("no GPU") && text.contains("--floors-only"), "{text}");
    }
    let Some(emulator) = emulator() else { return };
    let text = failure(
        fathom()
            .env("FATHOM_EMULATOR", emulator)
            .args(["bench", "slice", "--layers", "8", "--batch", "1", "--context", "1K"])
            .args(["--only", "decode", "--quick"]),
    );
    // The emulator says that it has 16 GiB.
    assert!(text.contains("8 layers need") && text.contains("--layers 3 would fit"), "{text}");
}

#[test]
fn floors_are_printed_without_a_gpu() {
    let output = fathom().args(["bench", "slice", "--floors-only"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.lines().count() == 1 + 15 + 6, "{text}");
    assert!(text.contains("model    2.61 ms"), "{text}");
}

#[test]
fn no_library_of_cuda_is_linked() {
    let Ok(output) = Command::new("ldd").arg(env!("CARGO_BIN_EXE_fathom")).output() else {
        println!("skipped: there is no ldd");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("libc.so"), "{text}");
    for library in ["cuda", "cublas", "cudart", "curand", "nvrtc", "nccl", "nvidia"] {
        assert!(!text.contains(library), "{text}");
    }
}

/// `device-check --sanitize` with a script in place of compute-sanitizer; what it printed.
#[cfg(unix)]
fn sanitized(script: &str) -> (bool, String, serde_json::Value) {
    use std::os::unix::fs::PermissionsExt;

    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("compute-sanitizer");
    std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let out = directory.path().join("sanitize.json");
    let path = std::env::join_paths([directory.path(), Path::new("/bin"), Path::new("/usr/bin")]);
    let output = fathom()
        .env("PATH", path.unwrap())
        .args(["device-check", "--sanitize", "--only", "linear", "--out"])
        .arg(&out)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let json = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
    (output.status.success(), String::from_utf8(text).unwrap(), json)
}

#[cfg(unix)]
#[test]
fn sanitizers_run_the_small_cases_and_what_they_find_is_shown() {
    // --tool T --error-exitcode N --log-file FILE PROGRAM ARGUMENTS
    let (passes, text, json) = sanitized(
        r#"echo "========= $2 of $8 $9" > "$6"
        if [ "$2" = racecheck ]; then echo "========= Error: Race in linear_8" >> "$6"; exit "$4"; fi"#,
    );
    assert!(!passes, "{text}");
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[1].starts_with("ok     memcheck"), "{text}");
    assert!(lines[3].starts_with("FAILED racecheck"), "{text}");
    assert!(text.contains("Error: Race in linear_8"), "{text}");
    assert!(text.contains("1 of 3 tools are not content"), "{text}");
    assert_eq!(json["tools"][0]["report"], "memcheck of device-check --small");
    assert_eq!(json["tools"][1]["passes"], false);
    assert_eq!(json["tools"][2]["passes"], true);
}

#[cfg(unix)]
#[test]
fn a_sanitizer_that_does_not_look_is_no_success() {
    let (passes, text, _) = sanitized("exit 0");
    assert!(!passes && text.contains("it ended with 0 and left no report"), "{text}");
    let (passes, text, _) = sanitized("echo no device > \"$6\"; exit 1");
    assert!(!passes && text.contains("no finding, but it ended with 1"), "{text}");
    assert!(text.contains("no device"), "{text}");
}
