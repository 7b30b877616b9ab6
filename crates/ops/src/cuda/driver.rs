//! The device behind the CUDA driver, opened at run time.
//!
//! Machine code of a kernel comes from the pack, else from the disk cache, else from NVRTC if it is
//! installed, else the launch fails and names what is missing. One stream; memory is stream-ordered.
//!
//! Not yet run on a GPU.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use super::compile;
use super::device::{Device, DeviceError, Launch};
use super::pack;
use super::source;

/// Dynamic shared memory a kernel has without asking.
const FREE_SHARED_BYTES: u32 = 48 * 1024;

/// Where machine code may come from, beside the embedded pack.
#[derive(Debug, Clone, Default)]
pub struct KernelSources {
    /// A pack file that goes before the embedded one.
    pub pack: Option<Vec<u8>>,
    /// Folder for code that NVRTC compiled.
    pub cache: Option<PathBuf>,
}

/// A CUDA GPU.
pub struct DriverDevice {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Architectures whose code runs here, best first.
    archs: Vec<&'static str>,
    sources: KernelSources,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// With the dynamic shared memory it may use.
    functions: HashMap<&'static str, (CudaFunction, u32)>,
}

impl std::fmt::Debug for DriverDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DriverDevice").field("archs", &self.archs).finish_non_exhaustive()
    }
}

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

fn failed(call: &'static str) -> impl Fn(DriverError) -> DeviceError {
    move |error| DeviceError::Failed { call, reason: error.to_string() }
}

impl DriverDevice {
    /// Opens GPU number `ordinal`. Never panics where there is no driver.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`]; [`DeviceError::NoGpu`] with the driver's reason;
    /// [`DeviceError::UnknownArch`] for a GPU that no code is made for.
    pub fn open(ordinal: usize, sources: KernelSources) -> Result<Self, DeviceError> {
        if !has_driver() {
            return Err(DeviceError::NoDriver);
        }
        let context = CudaContext::new(ordinal)
            .map_err(|error| DeviceError::NoGpu { ordinal, reason: error.to_string() })?;
        let attribute =
            |name| context.attribute(name).map_err(failed("reading the compute capability"));
        let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let archs = archs_for(major, minor).to_vec();
        if archs.is_empty() {
            return Err(DeviceError::UnknownArch { major, minor });
        }
        let stream = context.new_stream().map_err(failed("making a stream"))?;
        Ok(Self { context, stream, archs, sources, loaded: Mutex::default() })
    }

    /// Machine code of kernel file `path`.
    fn image(&self, path: &'static str) -> Result<Vec<u8>, String> {
        let packs = [self.sources.pack.as_deref(), Some(source::PACK)];
        let images: Vec<_> = packs.into_iter().flatten().filter_map(pack::read).flatten().collect();
        for arch in &self.archs {
            if let Some(image) = images.iter().find(|i| i.path == path && i.arch == *arch) {
                return Ok(image.cubin.to_vec());
            }
        }
        let missing = "the kernel pack has none, and";
        let Some(version) = compile::nvrtc_version() else {
            return Err(format!("{missing} NVRTC (libnvrtc) is not installed"));
        };
        let text = source::flatten(path, &source::embedded)?;
        let arch = self.archs[0];
        let key = compile::key(&text, arch, version);
        let cached = self.sources.cache.as_ref().map(|dir| dir.join(format!("{key}.cubin")));
        if let Some(cubin) = cached.as_ref().and_then(|file| std::fs::read(file).ok()) {
            return Ok(cubin);
        }
        let cubin = compile::compile(&text, path, arch)
            .map_err(|log| format!("{missing} NVRTC refuses the source: {log}"))?
            .cubin;
        if let Some(file) = cached {
            // A cache that cannot be written costs time at the next start, nothing else. Renaming
            // keeps a reader from seeing half a file.
            let unfinished = file.with_extension(format!("{}.part", std::process::id()));
            let _ = file.parent().map(std::fs::create_dir_all);
            let _ = std::fs::write(&unfinished, &cubin)
                .and_then(|()| std::fs::rename(&unfinished, &file));
        }
        Ok(cubin)
    }

    /// The kernel, allowed to use `shared_bytes` of dynamic shared memory.
    fn function(
        &self,
        kernel: &'static str,
        shared_bytes: u32,
    ) -> Result<CudaFunction, DeviceError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((function, allowed)) = loaded.functions.get(kernel)
            && *allowed >= shared_bytes
        {
            return Ok(function.clone());
        }
        let no_kernel = |reason: String| {
            let (kernel, arch) = (kernel.to_owned(), self.archs[0].to_owned());
            DeviceError::NoKernel { kernel, arch, reason }
        };
        let path = source::file_of(kernel)
            .ok_or_else(|| no_kernel("no kernel has this name".to_owned()))?;
        let module = match loaded.modules.get(path) {
            Some(module) => Arc::clone(module),
            None => {
                let image = self.image(path).map_err(&no_kernel)?;
                let module = self.context.load_module(Ptx::from_binary(image));
                module.map_err(|error| no_kernel(format!("the driver refuses it: {error}")))?
            }
        };
        loaded.modules.insert(path, Arc::clone(&module));
        let function =
            module.load_function(kernel).map_err(|error| no_kernel(error.to_string()))?;
        let allowed = shared_bytes.max(FREE_SHARED_BYTES);
        if shared_bytes > FREE_SHARED_BYTES {
            let name = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = shared_bytes as i32;
            function.set_attribute(name, bytes).map_err(failed("reserving shared memory"))?;
        }
        loaded.functions.insert(kernel, (function.clone(), allowed));
        Ok(function)
    }

    fn bind(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(failed("binding the context"))
    }
}

impl Device for DriverDevice {
    fn name(&self) -> String {
        self.context.name().unwrap_or_else(|error| format!("unknown GPU ({error})"))
    }

    fn arch(&self) -> &'static str {
        self.archs[0]
    }

    fn alloc(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.bind()?;
        // SAFETY: the stream lives as long as this device.
        unsafe { result::malloc_async(self.stream.cu_stream(), bytes) }.map_err(|_| {
            let free = self.context.mem_get_info().map_or(0, |(free, _)| free);
            DeviceError::OutOfMemory { bytes, free }
        })
    }

    fn free(&self, address: u64, _bytes: usize) {
        if self.bind().is_ok() {
            // SAFETY: the address came from `alloc` and its only owner gives it back; being ordered
            // in the stream, it stays until launches before have ended. A failure leaks it.
            let _ = unsafe { result::free_async(address, self.stream.cu_stream()) };
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller's address has room for the bytes. From pageable memory the driver has
        // taken the bytes when the call returns.
        unsafe { result::memcpy_htod_async(address, bytes, self.stream.cu_stream()) }
            .map_err(failed("copying to the device"))
    }

    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller's address holds as many bytes; `out` is not used before the
        // synchronisation below.
        unsafe { result::memcpy_dtoh_async(out, address, self.stream.cu_stream()) }
            .map_err(failed("copying from the device"))?;
        self.stream.synchronize().map_err(failed("waiting for the device"))
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), DeviceError> {
        self.bind()?;
        let function = self.function(launch.kernel, launch.shared_bytes)?;
        let mut values: Vec<u64> =
            launch.args.iter().map(|arg| u64::from_le_bytes(arg.bytes().0)).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let (grid, block) = (launch.grid.into(), launch.block.into());
        // SAFETY: the caller promises that the arguments fit the kernel; each pointer is to a value
        // that outlives the call, which copies it.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                grid,
                block,
                launch.shared_bytes,
                self.stream.cu_stream(),
                &mut pointers,
            )
        }
        .map_err(failed(launch.kernel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_opening_a_device_says_so_instead_of_panicking() {
        match DriverDevice::open(0, KernelSources::default()) {
            Err(DeviceError::NoDriver) => assert!(!has_driver()),
            Err(DeviceError::NoGpu { .. }) | Ok(_) => assert!(has_driver()),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn every_architecture_of_the_pack_runs_somewhere() {
        let gpus = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)];
        for arch in compile::ARCHS {
            assert!(
                gpus.iter().any(|&(major, minor)| archs_for(major, minor)[0] == arch),
                "{arch}"
            );
        }
        assert_eq!(archs_for(7, 5), [""; 0]);
    }
}
