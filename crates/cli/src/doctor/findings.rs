//! What the facts mean for serving.

use fathom_ops::cuda::gpu;
use serde::Serialize;

use super::facts::Facts;
use crate::bytes::readable;
use crate::gpu::DeviceChoice;
use crate::gpu::plan::RESERVE_BYTES;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// Keeps the server from running as asked.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) level: Level,
    pub(super) about: &'static str,
    pub(super) text: String,
    /// What to do.
    pub(super) advice: Option<String>,
}

/// Files a server holds open beside one socket per client.
const FILES: u64 = 4096;

fn finding(
    level: Level,
    about: &'static str,
    text: impl Into<String>,
    advice: Option<&str>,
) -> Finding {
    Finding { level, about, text: text.into(), advice: advice.map(str::to_owned) }
}

/// All findings, in the order of a start.
pub(super) fn judge(facts: &Facts, device: DeviceChoice) -> Vec<Finding> {
    let mut findings = Vec::new();
    if device != DeviceChoice::Cpu {
        // Without a GPU `auto` computes on the CPU.
        let absent = if device == DeviceChoice::Cuda { Level::Problem } else { Level::Note };
        driver(facts, absent, &mut findings);
        gpus(facts, absent, &mut findings);
        kernels(facts, absent, &mut findings);
        nccl(facts, &mut findings);
    }
    memory(facts, &mut findings);
    limits(facts, &mut findings);
    findings
}

fn cuda_version(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn driver(facts: &Facts, absent: Level, findings: &mut Vec<Finding>) {
    let needed = gpu::needed_cuda(facts.has_pack);
    let release = facts.release.as_deref();
    findings.push(match facts.driver {
        None => finding(
            absent,
            "driver",
            "there is no NVIDIA driver (libcuda.so.1)",
            Some(
                "install driver 580 or later; in a container, start it with `--gpus all`; if the \
                 library is elsewhere, put its folder on LD_LIBRARY_PATH",
            ),
        ),
        Some(version) if version < needed => finding(
            absent,
            "driver",
            format!(
                "the driver{} knows CUDA {}, the kernels need {}",
                release.map(|release| format!(" {release}")).unwrap_or_default(),
                cuda_version(version),
                cuda_version(needed)
            ),
            Some("install driver 580 or later"),
        ),
        Some(version) => {
            let release = release.map(|release| format!("{release}, ")).unwrap_or_default();
            let text = format!("{release}for CUDA {}", cuda_version(version));
            finding(Level::Ok, "driver", text, None)
        }
    });
}

fn gpus(facts: &Facts, absent: Level, findings: &mut Vec<Finding>) {
    let all = match &facts.gpus {
        Ok(all) => all,
        Err(_) if facts.driver.is_none() => return,
        Err(reason) => {
            let advice = "`nvidia-smi` should list the GPU; CUDA_VISIBLE_DEVICES may hide it";
            findings.push(finding(absent, "gpu", reason, Some(advice)));
            return;
        }
    };
    for one in all {
        let (major, minor) = one.capability;
        let text = format!(
            "{}: {}, {}, {} SMs, compute capability {major}.{minor}",
            one.ordinal,
            one.name,
            readable(one.total_bytes),
            one.n_sms
        );
        findings.push(if gpu::archs_for(major, minor).is_empty() {
            finding(
                absent,
                "gpu",
                text,
                Some("kernels are made for compute capability 8.0 to 12.x"),
            )
        } else {
            finding(Level::Ok, "gpu", text, None)
        });
    }
    if all.len() > 1 {
        let text = format!("{} GPUs, of which a server uses the first", all.len());
        let advice = "choose one with CUDA_VISIBLE_DEVICES; several servers can share a machine";
        findings.push(finding(Level::Note, "gpu", text, Some(advice)));
    }
}

fn kernels(facts: &Facts, absent: Level, findings: &mut Vec<Finding>) {
    if facts.gpus.as_ref().map_or(true, Vec::is_empty) {
        return;
    }
    findings.push(match (facts.has_pack, facts.nvrtc) {
        (true, _) => finding(Level::Ok, "kernels", "precompiled for the GPU", None),
        (false, Some((major, minor))) => finding(
            Level::Note,
            "kernels",
            format!("none precompiled; NVRTC {major}.{minor} compiles them at the first start"),
            Some("a release build carries them"),
        ),
        (false, None) => finding(
            absent,
            "kernels",
            "none precompiled for the GPU, and no NVRTC (libnvrtc.so) to compile them",
            Some("use a release build, or install NVRTC: `scripts/setup-cuda.sh`"),
        ),
    });
    match &facts.kernel_cache {
        Some((folder, false)) if !facts.has_pack => findings.push(finding(
            Level::Note,
            "kernels",
            format!("{} cannot be written: every start compiles again", folder.display()),
            Some("name a folder with FATHOM_KERNEL_CACHE"),
        )),
        _ => {}
    }
}

fn nccl(facts: &Facts, findings: &mut Vec<Finding>) {
    if facts.gpus.as_ref().map_or(0, Vec::len) < 2 {
        return;
    }
    // The names that are tried when the library is opened; `libnccl.so.2` is not among them.
    let is_opened = facts.nccl.iter().any(|name| name == "libnccl.so");
    findings.push(match (is_opened, facts.nccl.first()) {
        (true, _) => finding(Level::Ok, "nccl", "installed", None),
        (false, Some(name)) => finding(
            Level::Note,
            "nccl",
            format!("installed as {name} only, a name that is not looked for"),
            Some("make a link `libnccl.so` to it in the same folder"),
        ),
        (false, None) => finding(
            Level::Note,
            "nccl",
            "not installed; only models on several GPUs need it",
            Some("install NCCL 2.28 or later and link `libnccl.so` to it"),
        ),
    });
}

fn memory(facts: &Facts, findings: &mut Vec<Finding>) {
    let weights = match &facts.checkpoint {
        Some(Ok(bytes)) => Some(*bytes),
        Some(Err(reason)) => {
            let advice = "`fathom inspect DIR` says more";
            findings.push(finding(Level::Problem, "checkpoint", reason, Some(advice)));
            None
        }
        None => None,
    };
    let gpu = facts.gpus.as_ref().ok().and_then(|gpus| gpus.first());
    if let (Some(weights), Some(gpu)) = (weights, gpu) {
        let text =
            format!("weights {} on a GPU of {}", readable(weights), readable(gpu.total_bytes));
        let fits = weights + RESERVE_BYTES < gpu.total_bytes;
        let advice = "take a GPU with more memory, or --device cpu";
        findings.push(if fits {
            finding(Level::Ok, "gpu memory", text, None)
        } else {
            finding(Level::Problem, "gpu memory", text, Some(advice))
        });
    }
    let Some((available, total)) = facts.memory else { return };
    let text = format!("{} of {} available", readable(available), readable(total));
    findings.push(match weights {
        // The file's pages must stay in memory: the CPU computes from them.
        Some(weights) if gpu.is_none() && weights > available => finding(
            Level::Problem,
            "memory",
            format!("{text}; the CPU needs the weights' {} in it", readable(weights)),
            Some("every token would read the disk: take a machine with more memory, or a GPU"),
        ),
        Some(weights) if weights > total => finding(
            Level::Note,
            "page cache",
            format!("{text}: the checkpoint's {} do not stay in it", readable(weights)),
            Some("every start reads the disk; a fast local one helps"),
        ),
        _ => finding(Level::Ok, "memory", text, None),
    });
}

fn limits(facts: &Facts, findings: &mut Vec<Finding>) {
    if let Some(n) = facts.open_files {
        let text = format!("{n} open files");
        findings.push(if n < FILES {
            let advice =
                "one connection is one file: `ulimit -n 65536`, or LimitNOFILE= of a service";
            finding(Level::Note, "limits", text, Some(advice))
        } else {
            finding(Level::Ok, "limits", text, None)
        });
    }
    let has_gpu = facts.gpus.as_ref().is_ok_and(|gpus| !gpus.is_empty());
    if let Some(bytes) = facts.locked_bytes.filter(|&bytes| bytes < 64 << 20)
        && has_gpu
    {
        findings.push(finding(
            Level::Note,
            "limits",
            format!("{} of memory may be locked", readable(bytes)),
            Some(
                "should pinned memory fail: `ulimit -l unlimited`, LimitMEMLOCK=infinity of a \
                 service, or `--ulimit memlock=-1` of a container",
            ),
        ));
    }
}

#[cfg(test)]
mod tests {
    use fathom_ops::cuda::GpuFacts;

    use super::*;

    fn gpu(capability: (i32, i32)) -> GpuFacts {
        GpuFacts {
            ordinal: 0,
            name: "test GPU".to_owned(),
            capability,
            n_sms: 132,
            total_bytes: 80 << 30,
            driver_cuda: 13_000,
        }
    }

    fn sound() -> Facts {
        Facts {
            driver: Some(13_000),
            release: Some("580.65.06".to_owned()),
            gpus: Ok(vec![gpu((9, 0))]),
            has_pack: true,
            memory: Some((200 << 30, 256 << 30)),
            open_files: Some(65_536),
            nvrtc: None,
            kernel_cache: None,
            nccl: Vec::new(),
            locked_bytes: None,
            checkpoint: None,
        }
    }

    /// What is not as it should be.
    fn remarks(facts: &Facts, device: DeviceChoice) -> Vec<(Level, &'static str, String)> {
        judge(facts, device)
            .into_iter()
            .filter(|finding| finding.level != Level::Ok)
            .map(|f| {
                assert!(f.advice.is_some(), "no advice: {}", f.text);
                (f.level, f.about, f.text)
            })
            .collect()
    }

    #[test]
    fn a_sound_machine_gives_no_remarks() {
        assert_eq!(remarks(&sound(), DeviceChoice::Cuda), []);
        let text = |facts: &Facts| judge(facts, DeviceChoice::Cuda)[0].text.clone();
        assert_eq!(text(&sound()), "580.65.06, for CUDA 13.0");
        assert_eq!(text(&Facts { release: None, ..sound() }), "for CUDA 13.0");
        let old = Facts { driver: Some(12_080), ..sound() };
        assert_eq!(text(&old), "the driver 580.65.06 knows CUDA 12.8, the kernels need 13.0");
    }

    #[test]
    fn a_machine_without_a_gpu_is_a_problem_only_if_one_is_wanted() {
        let facts = Facts { driver: None, gpus: Err("no driver".to_owned()), ..sound() };
        assert_eq!(remarks(&facts, DeviceChoice::Cpu), []);
        assert_eq!(remarks(&facts, DeviceChoice::Auto)[0].0, Level::Note);
        let wanted = remarks(&facts, DeviceChoice::Cuda);
        assert_eq!((wanted.len(), wanted[0].0, wanted[0].1), (1, Level::Problem, "driver"));
    }

    #[test]
    fn old_drivers_old_gpus_and_missing_kernels_are_told_apart() {
        let about = |facts: &Facts| remarks(facts, DeviceChoice::Cuda)[0].1;
        assert_eq!(about(&Facts { driver: Some(12_080), ..sound() }), "driver");
        assert_eq!(about(&Facts { gpus: Ok(vec![gpu((7, 5))]), ..sound() }), "gpu");
        let without = Facts { has_pack: false, ..sound() };
        assert_eq!(remarks(&without, DeviceChoice::Cuda)[0].0, Level::Problem);
        let compiles = Facts { nvrtc: Some((13, 0)), ..without };
        assert_eq!(remarks(&compiles, DeviceChoice::Cuda)[0].0, Level::Note);
    }

    #[test]
    fn nccl_under_its_versioned_name_needs_a_link_and_only_several_gpus_need_it() {
        let versioned = Facts { nccl: vec!["libnccl.so.2".to_owned()], ..sound() };
        assert_eq!(remarks(&versioned, DeviceChoice::Cuda), []);
        let several = Facts { gpus: Ok(vec![gpu((9, 0)), gpu((9, 0))]), ..versioned };
        let about: Vec<_> = remarks(&several, DeviceChoice::Cuda).iter().map(|r| r.1).collect();
        assert_eq!(about, ["gpu", "nccl"]);
        let linked = Facts { nccl: vec!["libnccl.so".to_owned()], ..several };
        assert_eq!(remarks(&linked, DeviceChoice::Cuda).len(), 1);
    }

    #[test]
    fn a_checkpoint_is_held_against_the_memory_it_will_be_in() {
        let facts = |bytes, gpus| Facts { checkpoint: Some(Ok(bytes)), gpus, ..sound() };
        let none = || Err("no driver".to_owned());
        assert_eq!(remarks(&facts(40 << 30, Ok(vec![gpu((9, 0))])), DeviceChoice::Cuda), []);
        let on_gpu = remarks(&facts(150 << 30, Ok(vec![gpu((9, 0))])), DeviceChoice::Cuda);
        assert_eq!(on_gpu[0].1, "gpu memory");
        assert_eq!(remarks(&facts(150 << 30, none()), DeviceChoice::Cpu), []);
        assert_eq!(remarks(&facts(210 << 30, none()), DeviceChoice::Cpu)[0].1, "memory");
    }

    #[test]
    fn few_open_files_and_little_locked_memory_are_noted() {
        let facts = Facts { open_files: Some(1024), locked_bytes: Some(64 << 10), ..sound() };
        let texts: Vec<_> = remarks(&facts, DeviceChoice::Cuda).into_iter().map(|r| r.2).collect();
        assert_eq!(texts, ["1024 open files", "64.0 KiB of memory may be locked"]);
    }
}
