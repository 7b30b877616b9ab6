//! The binary on the emulated driver (`kernels/emulator/driver`): everything that it does on a GPU but the
//! GPU, from opening the driver to replayed graphs, on every architecture.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use fathom_ops::cuda::emulator::build;
use fathom_ops::cuda::{compile, source};

use crate::fathom;
use crate::serve::Server;

/// The folder with the emulated driver; `None` without a C++ compiler.
fn driver() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        build::build_driver(&kernels.canonicalize().unwrap(), &out)
            .unwrap_or_else(|e| panic!("{e}"))
    });
    if folder.is_none() {
        println!("skipped: no C++ compiler (g++) to build the emulated driver with");
    }
    folder.as_deref()
}

/// Machine code for `arch`, where `fathom` looks for what was compiled earlier: what `cargo xtask kernels`
/// has compiled of these very sources, which every launch is then held against; else a stand-in.
fn machine_code(arch: &str) -> PathBuf {
    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let compiled = temporary.parent().unwrap().join("kernels");
    let folder = temporary.join(format!("machine-code-{arch}"));
    fs::create_dir_all(&folder).unwrap();
    for (path, _) in source::files().filter(|(_, archs)| archs.contains(&arch)) {
        let text = source::flatten(path, &source::embedded).unwrap();
        let code = fs::read(compiled.join(compile::key(&text, arch, (13, 0)) + ".cubin"))
            .unwrap_or_else(|_| b"\x7fELF\0".to_vec());
        let name = compile::source_key(&text, arch) + "-13.0.cubin";
        let unfinished = folder.join(format!("{name}.{}", std::process::id()));
        fs::write(&unfinished, code).unwrap();
        fs::rename(unfinished, folder.join(name)).unwrap();
    }
    folder
}

/// The binary on an emulated GPU; `gpu` as `EMULATED_GPU` takes it, beginning with the architecture.
fn fathom_on(gpu: &str) -> Option<Command> {
    let folder = driver()?;
    let arch = gpu.split(' ').next().unwrap();
    let mut command = fathom();
    command
        .env("LD_LIBRARY_PATH", folder)
        .env("EMULATED_GPU", gpu)
        .env("FATHOM_KERNEL_CACHE", machine_code(arch));
    Some(command)
}

fn text_of(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

/// Cases of `fathom device-check` whose names contain `only` pass on such a GPU. What was printed.
fn checks_out(gpu: &str, only: &str, settings: &[(&str, &str)]) -> Option<String> {
    let mut fathom = fathom_on(gpu)?;
    let output = fathom
        .envs(settings.iter().copied())
        .args(["device-check", "--small", "--only", only])
        .output()
        .unwrap();
    let text = text_of(&output);
    assert!(output.status.success() && text.contains(" 0 failed"), "{gpu}: {text}");
    // Also no complaint of the emulated driver at the end.
    assert!(!text.contains("emulated driver:"), "{gpu}: {text}");
    Some(text)
}

#[test]
fn the_device_check_passes_on_ampere_and_leaves_its_results_as_json() {
    let Some(mut fathom) = fathom_on("sm_80 late") else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("check.json");
    let goldens = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano/goldens");
    let output = fathom
        .args(["device-check", "--small", "--goldens", goldens, "--out"])
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    assert!(text.trim_end().lines().last().unwrap().starts_with("16 passed, 0 failed"), "{text}");
    assert!(!text_of(&output).contains("emulated driver:"), "{}", text_of(&output));
    let json: serde_json::Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert_eq!(json["cases"].as_array().unwrap().len(), 16);
    assert_eq!(json["cases"][0]["passes"], true);
}

#[test]
fn the_model_runs_on_ada_whose_blocks_have_little_shared_memory() {
    checks_out("sm_89 seed=3", "device against", &[]);
}

#[test]
fn steps_replay_on_hopper_with_launches_that_overlap() {
    checks_out("sm_90a late seed=5", "replayed", &[("FATHOM_CUDA_PDL", "2")]);
}

#[test]
fn hopper_without_room_for_large_clusters_launches_more_kernels() {
    let Some(text) = checks_out("sm_90a clusters=8", "device against", &[]) else { return };
    assert!(text.contains("no room for a cluster"), "{text}");
}

#[test]
fn the_model_runs_on_blackwell() {
    checks_out("sm_100f eager", "device against", &[]);
}

#[test]
fn the_model_runs_on_a_consumer_blackwell() {
    checks_out("sm_120 late", "device against", &[]);
}

#[test]
fn every_launch_can_be_waited_for_to_find_an_error() {
    checks_out("sm_80 seed=9", "device against", &[("FATHOM_CUDA_CAREFUL", "1")]);
}

#[test]
fn what_a_launch_costs_is_measured_with_and_without_overlap() {
    let launches = |gpu: &str| {
        let text = text_of(
            &fathom_on(gpu)?
                .args(["bench", "kernels", "--small", "--only", "launch"])
                .output()
                .unwrap(),
        );
        assert!(!text.contains("emulated driver:") && text.contains("at small sizes"), "{text}");
        Some(text.lines().filter(|line| line.starts_with("launch behind another")).count())
    };
    let Some(n) = launches("sm_90a seed=4") else { return };
    assert_eq!((n, launches("sm_80 seed=4")), (4, Some(2)));
}

/// Small enough for the emulator.
const LIMITS: [&str; 8] = [
    "--max-num-seqs",
    "1",
    "--max-num-batched-tokens",
    "32",
    "--max-model-len",
    "512",
    "--kv-cache-memory-bytes",
    "8000000",
];

/// A GPU does not get well again: what runs ends with an error, and nothing waits for ever.
#[test]
fn a_model_is_served_from_a_gpu_and_requests_end_when_that_fails() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken");
    let Some(fathom) = fathom_on(&format!("sm_80 seed=2 fails_when={}", broken.display())) else {
        return;
    };
    let args = [&["--port", "0", "--device", "cuda"][..], &LIMITS].concat();
    let server = Server::start_as(fathom, &args);
    for expected in [
        "bf16 on Emulated sm_80",
        "for CUDA 13.0",
        "memory    weights 1",
        "workspace",
        "cache",
        "GB/s that it takes from pinned memory",
    ] {
        assert!(server.banner.contains(expected), "{}", server.banner);
    }
    let (_, n_prompt, _) = server.ask("Hi");
    assert!(n_prompt > 0);
    fs::write(broken, "").unwrap();
    for _ in 0..2 {
        let response = server.post("Hi", 8);
        assert!(response.starts_with("HTTP/1.1 50"), "{response}");
        assert!(response.contains("error"), "{response}");
    }
}

#[test]
fn a_gpu_that_cannot_be_used_is_refused_with_the_reason() {
    for (gpu, expected) in [
        ("sm_80 none", "no GPU"),
        ("sm_90a driver=12080", "it knows CUDA 12.8"),
        ("sm_80 memory=30000000", "MiB"),
    ] {
        let Some(mut fathom) = fathom_on(gpu) else { return };
        let output = fathom
            .args(["serve", "--port", "0", "--device", "cuda"])
            .args(LIMITS)
            .output()
            .unwrap();
        let text = text_of(&output);
        assert!(!output.status.success() && text.contains(expected), "{gpu}: {text}");
    }
}
