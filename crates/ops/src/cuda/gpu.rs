//! What is known of a GPU before anything runs on it, and whether kernels can run there.

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute};

use super::compile;
use super::device::{DeviceError, MemoryInfo};

/// A GPU and its driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuFacts {
    /// Its number.
    pub ordinal: usize,
    /// As the driver calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub n_sms: i32,
    /// All of its memory, in bytes.
    pub total_bytes: u64,
    /// CUDA version of the driver: 1000 times major plus 10 times minor.
    pub driver_cuda: i32,
}

/// CUDA version that precompiled kernels ask of a driver.
pub const PACK_CUDA: i32 = 13_000;

/// CUDA version of the newest function that is called here (`cuEventElapsedTime_v2`): a driver without
/// one would end the program in the middle.
const CALLS_CUDA: i32 = 12_080;

/// Architectures of a pack that run on compute capability `major.minor`, best first.
#[must_use]
pub fn archs_for(major: i32, minor: i32) -> &'static [&'static str] {
    match (major, minor) {
        (8, 9) => &["sm_89", "sm_80"],
        (8, _) => &["sm_80"],
        (9, 0) => &["sm_90a"],
        (10, _) => &["sm_100f"],
        (12, _) => &["sm_120"],
        _ => &[],
    }
}

/// Whether the driver's library can be opened.
#[must_use]
pub fn has_driver() -> bool {
    // SAFETY: the function only tries to open the library.
    unsafe { sys::is_culib_present() }
}

/// CUDA version of the driver, as in [`GpuFacts::driver_cuda`].
///
/// # Errors
/// [`DeviceError::NoDriver`]; [`DeviceError::Failed`] if the driver does not say.
pub fn driver_cuda() -> Result<i32, DeviceError> {
    if !has_driver() {
        return Err(DeviceError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: the library is there and the pointer is to a live integer.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(|error| failed("cuDriverGetVersion", &error))?;
    Ok(version)
}

/// Release of the driver, such as `580.65.06`: what its kernel module says, which it does not everywhere
/// (not under WSL, for example).
#[must_use]
pub fn driver_release() -> Option<String> {
    let files = ["/sys/module/nvidia/version", "/proc/driver/nvidia/version"];
    files.into_iter().find_map(|file| release_in(&std::fs::read_to_string(file).ok()?))
}

/// The first word of `text` that is a release.
fn release_in(text: &str) -> Option<String> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let is_release = |word: &&str| word.contains('.') && word.split('.').all(is_number);
    text.split_whitespace().find(is_release).map(str::to_owned)
}

/// All GPUs that the driver shows, in its order.
///
/// # Errors
/// [`DeviceError::NoDriver`]; [`DeviceError::NoGpu`] if the driver shows none or does not start.
pub fn gpus() -> Result<Vec<GpuFacts>, DeviceError> {
    let driver_cuda = driver_cuda()?;
    let no_gpu = |ordinal, error: &result::DriverError| DeviceError::NoGpu {
        ordinal,
        reason: error.to_string(),
    };
    result::init().map_err(|error| no_gpu(0, &error))?;
    let n = result::device::get_count().map_err(|error| no_gpu(0, &error))?;
    if n == 0 {
        let reason = "the driver shows no GPU (is CUDA_VISIBLE_DEVICES set?)".to_owned();
        return Err(DeviceError::NoGpu { ordinal: 0, reason });
    }
    let facts = |ordinal: i32| {
        let device = result::device::get(ordinal)?;
        let attribute = |name| {
            // SAFETY: the device was just given by the driver.
            unsafe { result::device::get_attribute(device, name) }
        };
        Ok(GpuFacts {
            ordinal: ordinal as usize,
            name: result::device::get_name(device)?,
            capability: (
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            n_sms: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            // SAFETY: as above.
            total_bytes: unsafe { result::device::total_mem(device) }? as u64,
            driver_cuda,
        })
    };
    (0..n).map(|ordinal| facts(ordinal).map_err(|error| no_gpu(ordinal as usize, &error))).collect()
}

fn failed(call: &'static str, error: &result::DriverError) -> DeviceError {
    DeviceError::Failed { call, reason: error.to_string() }
}

impl GpuFacts {
    /// Architectures whose code runs here, best first.
    ///
    /// # Errors
    /// [`DeviceError::UnknownArch`] for a GPU that no code is made for;
    /// [`DeviceError::DriverTooOld`] if the driver knows less than CUDA `needed`.
    pub fn archs(&self, needed: i32) -> Result<&'static [&'static str], DeviceError> {
        let (major, minor) = self.capability;
        let archs = archs_for(major, minor);
        if archs.is_empty() {
            return Err(DeviceError::UnknownArch { major, minor });
        }
        if self.driver_cuda < needed {
            return Err(DeviceError::DriverTooOld { found: self.driver_cuda, needed });
        }
        Ok(archs)
    }

    /// Whether its tensor cores multiply FP8 values.
    #[must_use]
    pub const fn has_fp8(&self) -> bool {
        matches!(self.capability, (8, 9) | (9.., _))
    }

    /// Memory if nothing else is on the GPU.
    #[must_use]
    pub const fn memory(&self) -> MemoryInfo {
        MemoryInfo { free: self.total_bytes, total: self.total_bytes }
    }
}

/// CUDA version that a driver must know: that of the pack, or of the compiler where there is none.
#[must_use]
pub fn needed_cuda(has_pack: bool) -> i32 {
    match compile::nvrtc_version() {
        Some((major, _)) if !has_pack => (1000 * major).max(CALLS_CUDA),
        _ => PACK_CUDA,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(capability: (i32, i32), driver_cuda: i32) -> GpuFacts {
        GpuFacts {
            ordinal: 0,
            name: "test".to_owned(),
            capability,
            n_sms: 132,
            total_bytes: 80 << 30,
            driver_cuda,
        }
    }

    #[test]
    fn the_release_is_the_same_in_both_forms_that_the_kernel_module_tells_it_in() {
        let release = Some("580.65.06".to_owned());
        assert_eq!(release_in("580.65.06\n"), release);
        let module = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release \
                      Build\nGCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6)\n";
        assert_eq!(release_in(module), release);
        assert_eq!(release_in("NVRM version: 580 x86.64 .."), None);
    }

    #[test]
    fn every_architecture_of_the_pack_runs_somewhere() {
        let gpus = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)];
        for arch in compile::ARCHS {
            assert!(
                gpus.iter().any(|&capability| {
                    gpu(capability, 13_000).archs(13_000).unwrap()[0] == arch
                })
            );
        }
    }

    #[test]
    fn an_old_gpu_and_an_old_driver_are_told_apart_and_named() {
        let refusal = |gpu: GpuFacts| gpu.archs(13_000).unwrap_err().to_string();
        assert!(refusal(gpu((7, 5), 12_000)).contains("7.5"));
        let old = refusal(gpu((9, 0), 12_080));
        assert!(old.contains("CUDA 12.8") && old.contains("13.0"), "{old}");
        assert_eq!(gpu((9, 0), 13_010).archs(13_000).unwrap(), ["sm_90a"]);
    }

    #[test]
    fn without_a_driver_looking_for_gpus_says_so_instead_of_panicking() {
        match gpus() {
            Err(DeviceError::NoDriver) => assert!(!has_driver()),
            Err(DeviceError::NoGpu { .. }) => assert!(has_driver()),
            Ok(gpus) => assert!(has_driver() && !gpus.is_empty()),
            Err(other) => panic!("{other}"),
        }
    }
}
