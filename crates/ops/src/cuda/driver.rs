//! The device behind the CUDA driver, opened at run time.
//!
//! One stream, and a second for branches; memory is stream-ordered; bytes travel through pinned memory (`staging`); recordings
//! are CUDA graphs. Where the machine code of kernels comes from is in [`code`](super::code).
//!
//! Not yet run on a GPU.

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result, sys,
};
use cudarc::nvrtc::Ptx;

use super::code::{KernelSources, Origin};
use super::device::{Device, DeviceError, Launch, MemoryInfo, Stamp};
use super::event::Event;
use super::gpu::{GpuFacts, gpus, needed_cuda};
use super::overlap::{self, Level, Overlap};
use super::recordings::{Graph, Recordings};
use super::staging::Staging;
use super::tensor_map::{MapElement, Swizzle, TensorMap, TensorMapSpec};
use super::{cluster, pool, source};

/// Dynamic shared memory a kernel has without asking.
const FREE_SHARED_BYTES: u32 = 48 * 1024;

/// Name of the variable that makes a device wait for every launch, on one stream and without
/// recordings, whatever its value: an error then names the kernel that made it.
pub const CAREFUL: &str = "FATHOM_CUDA_CAREFUL";

/// A CUDA GPU.
pub struct DriverDevice {
    facts: GpuFacts,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    branch: Branch,
    /// Architectures whose code runs here, best first.
    archs: &'static [&'static str],
    sources: KernelSources,
    /// See [`CAREFUL`].
    is_careful: bool,
    overlap: Overlap,
    loaded: Mutex<Loaded>,
    /// Made when first needed.
    staging: Mutex<Option<Staging>>,
    recordings: Mutex<Recordings>,
}

/// The second stream, and where the two wait for each other.
struct Branch {
    stream: Arc<CudaStream>,
    forked: CudaEvent,
    ended: CudaEvent,
    open: Mutex<Option<Side>>,
}

/// Where launches go while a branch is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Branch,
    Main,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// With the dynamic shared memory it may use.
    functions: HashMap<&'static str, (CudaFunction, u32)>,
    /// Where code was found.
    origins: HashSet<(&'static str, Origin)>,
    /// Whether clusters of a kernel with so many threads a block can run.
    room: HashMap<(&'static str, u32), bool>,
}

impl std::fmt::Debug for DriverDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DriverDevice").field("facts", &self.facts).finish_non_exhaustive()
    }
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> DeviceError {
    move |error| DeviceError::Failed { call, reason: error.to_string() }
}

fn branch_error(call: &'static str, reason: &str) -> DeviceError {
    DeviceError::Failed { call, reason: reason.to_owned() }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far [`DriverDevice::load_all`] is.
#[derive(Debug, Clone, Copy)]
pub struct LoadedKernels {
    /// Kernel files whose code is on the device.
    pub n_files: usize,
    /// Of how many.
    pub of: usize,
}

impl DriverDevice {
    /// Opens GPU number `ordinal`. Never panics where there is no driver.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`]; [`DeviceError::NoGpu`] with the driver's reason;
    /// [`DeviceError::UnknownArch`] for a GPU that no code is made for;
    /// [`DeviceError::DriverTooOld`].
    pub fn open(ordinal: usize, sources: KernelSources) -> Result<Self, DeviceError> {
        let all = gpus()?;
        let n = all.len();
        let facts = all.into_iter().nth(ordinal).ok_or_else(|| DeviceError::NoGpu {
            ordinal,
            reason: format!("the driver shows {n}, counted from 0"),
        })?;
        let (major, minor) = facts.capability;
        let has_pack = sources.has_pack_for(super::gpu::archs_for(major, minor));
        let archs = facts.archs(needed_cuda(has_pack))?;
        let context = CudaContext::new(ordinal)
            .map_err(|error| DeviceError::NoGpu { ordinal, reason: error.to_string() })?;
        // SAFETY: all memory and launches here are ordered by one stream of our own.
        unsafe { context.disable_event_tracking() };
        pool::keep_freed(&context).map_err(failed("setting up the memory pool"))?;
        let new_stream = || context.new_stream().map_err(failed("making a stream"));
        let new_event = || context.new_event(None).map_err(failed("making an event"));
        let stream = new_stream()?;
        let branch = Branch {
            stream: new_stream()?,
            forked: new_event()?,
            ended: new_event()?,
            open: Mutex::default(),
        };
        let is_careful = std::env::var_os(CAREFUL).is_some();
        let can_overlap = overlap::is_possible(archs[0]) && !is_careful;
        let level = if can_overlap { Level::asked_for() } else { Level::Off };
        Ok(Self {
            facts,
            context,
            stream,
            branch,
            archs,
            sources,
            is_careful,
            overlap: Overlap::new(level),
            loaded: Mutex::default(),
            staging: Mutex::default(),
            recordings: Mutex::default(),
        })
    }

    /// The GPU.
    #[must_use]
    pub const fn facts(&self) -> &GpuFacts {
        &self.facts
    }

    /// Which launches may begin before the one before them has ended.
    #[must_use]
    pub fn overlap(&self) -> Level {
        self.overlap.level()
    }

    /// Brings the code of every kernel for this GPU onto it, so that what is missing shows at start
    /// and not in the middle of a request. `progress` hears of each file.
    ///
    /// # Errors
    /// [`DeviceError::NoKernel`] for the first kernel without code.
    pub fn load_all(&self, progress: &mut dyn FnMut(LoadedKernels)) -> Result<(), DeviceError> {
        let is_ours = |archs: &[&str]| self.archs.iter().any(|arch| archs.contains(arch));
        let files: Vec<_> = source::FILES.iter().filter(|(_, archs, _)| is_ours(archs)).collect();
        self.bind()?;
        for (index, (path, _, entries)) in files.iter().enumerate() {
            for entry in *entries {
                let function = self.function(entry, path, 0)?;
                // Else the driver would bring it at its first launch, after memory was divided.
                // SAFETY: the function is of a module that this device keeps.
                unsafe { sys::cuFuncLoad(function.cu_function()) }
                    .result()
                    .map_err(failed("cuFuncLoad"))?;
            }
            progress(LoadedKernels { n_files: index + 1, of: files.len() });
        }
        Ok(())
    }

    /// Architectures of the code in use and where it was found.
    #[must_use]
    pub fn origins(&self) -> Vec<(&'static str, Origin)> {
        locked(&self.loaded).origins.iter().copied().collect()
    }

    /// The kernel of a launch.
    fn function_of(&self, launch: &Launch<'_>) -> Result<CudaFunction, DeviceError> {
        let path = source::file_of(launch.kernel).ok_or_else(|| DeviceError::NoKernel {
            kernel: launch.kernel.to_owned(),
            arch: self.archs[0].to_owned(),
            reason: "no kernel has this name".to_owned(),
        })?;
        self.function(launch.kernel, path, launch.shared_bytes)
    }

    /// Kernel `kernel` of file `path`, allowed to use `shared_bytes` of dynamic shared memory.
    fn function(
        &self,
        kernel: &'static str,
        path: &'static str,
        shared_bytes: u32,
    ) -> Result<CudaFunction, DeviceError> {
        let mut loaded = locked(&self.loaded);
        if let Some((function, allowed)) = loaded.functions.get(kernel)
            && shared_bytes <= *allowed
        {
            return Ok(function.clone());
        }
        let no_kernel = |reason: String| {
            let (kernel, arch) = (kernel.to_owned(), self.archs[0].to_owned());
            DeviceError::NoKernel { kernel, arch, reason }
        };
        let module = match loaded.modules.get(path) {
            Some(module) => Arc::clone(module),
            None => {
                let code = self.sources.find(path, self.archs).map_err(&no_kernel)?;
                loaded.origins.insert((code.arch, code.origin));
                let module = self.context.load_module(Ptx::from_binary(code.cubin));
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

    /// The context, bound, for what is no launch; refused while launches are recorded or a branch is
    /// open.
    fn bind_for(&self, call: &'static str) -> Result<(), DeviceError> {
        if locked(&self.recordings).is_recording {
            return Err(DeviceError::Recording { call });
        }
        if locked(&self.branch.open).is_some() {
            return Err(branch_error(call, "a branch is open: only launches are ordered in it"));
        }
        self.overlap.interrupt();
        self.bind()
    }

    fn staged(
        &self,
        call: &'static str,
        copy: impl FnOnce(&mut Staging) -> Result<(), DriverError>,
    ) -> Result<(), DeviceError> {
        self.bind_for(call)?;
        let mut staging = locked(&self.staging);
        if staging.is_none() {
            *staging = Some(Staging::new().map_err(failed("allocating pinned host memory"))?);
        }
        staging.as_mut().map_or(Ok(()), copy).map_err(failed(call))
    }
}

impl Drop for DriverDevice {
    fn drop(&mut self) {
        // A failure means that the context is gone already.
        let _ = self.bind();
        let graphs = std::mem::take(&mut locked(&self.recordings).graphs);
        for graph in graphs.into_values() {
            // SAFETY: nobody can launch it any more.
            let _ = unsafe { result::graph::exec_destroy(graph.0) };
        }
        // Pinned memory goes while the context is bound.
        *locked(&self.staging) = None;
    }
}

impl Device for DriverDevice {
    fn name(&self) -> String {
        self.facts.name.clone()
    }

    fn arch(&self) -> &'static str {
        self.archs[0]
    }

    fn memory(&self) -> Option<MemoryInfo> {
        self.bind().ok()?;
        // Else what the pool keeps would count as taken; without it the answer is too low at most.
        let _ = pool::release_freed(&self.context);
        let (free, total) = self.context.mem_get_info().ok()?;
        Some(MemoryInfo { free: free as u64, total: total as u64 })
    }

    fn set_overlap(&self, level: Level) -> Level {
        let can_overlap = overlap::is_possible(self.archs[0]) && !self.is_careful;
        self.overlap.set_level(if can_overlap { level } else { Level::Off })
    }

    fn alloc(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.bind_for("allocating")?;
        // SAFETY: the stream lives as long as this device.
        unsafe { result::malloc_async(self.stream.cu_stream(), bytes) }.map_err(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                // Of an earlier launch, as likely as not.
                return failed("allocating")(error);
            }
            let free = self.context.mem_get_info().map_or(0, |(free, _)| free);
            DeviceError::OutOfMemory { bytes, free }
        })
    }

    fn free(&self, address: u64, _bytes: usize) {
        let mut recordings = locked(&self.recordings);
        if recordings.is_recording {
            recordings.to_free.push(address);
        } else if self.bind().is_ok() {
            self.overlap.interrupt();
            // SAFETY: the address came from `alloc` and its only owner gives it back; being ordered
            // in the stream, it stays until launches before have ended. A failure leaks it.
            let _ = unsafe { result::free_async(address, self.stream.cu_stream()) };
        }
    }

    fn fill(&self, address: u64, bytes: usize, value: u8) -> Result<(), DeviceError> {
        self.bind_for("filling")?;
        // SAFETY: the caller's address has room for the bytes.
        unsafe { result::memset_d8_async(address, value, bytes, self.stream.cu_stream()) }
            .map_err(failed("filling device memory"))
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: the caller's address has room for the bytes; the stream is ours.
        self.staged("copying to the device", |staging| unsafe {
            staging.write(address, bytes, self.stream.cu_stream())
        })
    }

    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: the caller's address holds as many bytes; the stream is ours.
        self.staged("copying from the device", |staging| unsafe {
            staging.read(address, out, self.stream.cu_stream())
        })
    }

    fn host_rate(&self) -> Result<Option<f64>, DeviceError> {
        let address = self.alloc(Staging::BYTES)?;
        let mut rate = None;
        // SAFETY: the address has room for what is sent; the stream is ours.
        let measured = self.staged("copying to the device", |staging| unsafe {
            rate = Some(staging.rate(address, &self.context, &self.stream)?);
            Ok(())
        });
        self.free(address, Staging::BYTES);
        measured.map(|()| rate)
    }

    fn encode(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, DeviceError> {
        spec.check()?;
        self.bind()?;
        let element = match spec.element {
            MapElement::U8 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            MapElement::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            MapElement::Padded4 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B,
        };
        let swizzle = match spec.swizzle {
            Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::B64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the map is ours and as aligned as the driver wants it; the arrays have as many
        // entries as the rank says, as `check` saw; nothing is read of the tensor.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                element,
                spec.dims.len() as u32,
                spec.address as *mut c_void,
                spec.dims.as_ptr(),
                spec.strides.as_ptr(),
                spec.box_dims.as_ptr(),
                [1; 5].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|error| DeviceError::TensorMap { reason: format!("{error}, of {spec:?}") })?;
        let mut bytes = [0; 128];
        for (to, from) in bytes.chunks_exact_mut(8).zip(map.opaque) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        Ok(TensorMap(bytes))
    }

    fn has_room_for(&self, launch: &Launch<'_>) -> Result<bool, DeviceError> {
        if !matches!(self.archs[0], "sm_90a" | "sm_100f") {
            return Ok(false);
        }
        let key = (launch.kernel, launch.block[0]);
        if let Some(&known) = locked(&self.loaded).room.get(&key) {
            return Ok(known);
        }
        self.bind()?;
        let function = self.function_of(launch)?;
        let has_room = cluster::has_room(&function, launch, &self.stream);
        locked(&self.loaded).room.insert(key, has_room);
        Ok(has_room)
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), DeviceError> {
        self.bind()?;
        let function = self.function_of(&launch)?;
        let mut values: Vec<_> = launch.args.iter().map(|arg| arg.bytes().0).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let on_branch = !self.is_careful && *locked(&self.branch.open) == Some(Side::Branch);
        let stream = if on_branch { &self.branch.stream } else { &self.stream };
        let is_dependent = source::is_dependent(launch.kernel);
        self.overlap
            .launch(on_branch, is_dependent, |overlaps| {
                let (function, stream) = (function.cu_function(), stream.cu_stream());
                // SAFETY: the caller promises that the arguments fit the kernel; each pointer is to
                // a value that outlives the call, which copies it.
                unsafe {
                    overlap::launch_kernel(function, &launch, stream, &mut pointers, overlaps)
                }
            })
            .map_err(failed(launch.kernel))?;
        if self.is_careful {
            stream.synchronize().map_err(failed(launch.kernel))?;
        }
        Ok(())
    }

    fn fork(&self) -> Result<(), DeviceError> {
        let Branch { stream, forked, open, .. } = &self.branch;
        let mut open = locked(open);
        if open.is_some() {
            return Err(branch_error("fork", "a branch is open already"));
        }
        self.bind()?;
        self.overlap.fork(locked(&self.recordings).is_recording);
        forked.record(&self.stream).map_err(failed("cuEventRecord"))?;
        stream.wait(forked).map_err(failed("cuStreamWaitEvent"))?;
        *open = Some(Side::Branch);
        Ok(())
    }

    fn back(&self) -> Result<(), DeviceError> {
        let mut open = locked(&self.branch.open);
        if *open != Some(Side::Branch) {
            return Err(branch_error("back", "no branch is open"));
        }
        *open = Some(Side::Main);
        Ok(())
    }

    fn join(&self) -> Result<(), DeviceError> {
        let Branch { stream, ended, open, .. } = &self.branch;
        if locked(open).take().is_none() {
            return Err(branch_error("join", "no branch is open"));
        }
        self.bind()?;
        self.overlap.interrupt();
        let joined = ended
            .record(stream)
            .map_err(failed("cuEventRecord"))
            .and_then(|()| self.stream.wait(ended).map_err(failed("cuStreamWaitEvent")));
        if joined.is_err() && !locked(&self.recordings).is_recording {
            // What comes after must not run beside the branch; its error is the one to tell.
            let _ = stream.synchronize();
        }
        joined
    }

    fn begin_record(&self) -> Result<(), DeviceError> {
        const CALL: &str = "begin_record";
        self.bind_for(CALL)?;
        if self.is_careful {
            let reason = format!("{CAREFUL} is set");
            return Err(DeviceError::Failed { call: CALL, reason });
        }
        // Other threads may go on using the driver meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed("cuStreamBeginCapture"))?;
        locked(&self.recordings).is_recording = true;
        Ok(())
    }

    fn end_record(&self) -> Result<u64, DeviceError> {
        self.bind()?;
        self.overlap.interrupt();
        let to_free = {
            let mut recordings = locked(&self.recordings);
            recordings.is_recording = false;
            std::mem::take(&mut recordings.to_free)
        };
        // SAFETY: the stream is ours and was recording.
        let graph = unsafe { result::stream::end_capture(self.stream.cu_stream()) };
        to_free.into_iter().for_each(|address| self.free(address, 0));
        let graph = graph.map_err(failed("cuStreamEndCapture"))?;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was just made; it is not needed once it can be launched.
        let exec = unsafe {
            let exec = result::graph::instantiate(graph, flags);
            let _ = result::graph::destroy(graph);
            exec
        }
        .map_err(failed("cuGraphInstantiate"))?;
        let mut recordings = locked(&self.recordings);
        let id = recordings.next;
        recordings.next += 1;
        recordings.graphs.insert(id, Graph(exec));
        Ok(id)
    }

    unsafe fn replay(&self, record: u64) -> Result<(), DeviceError> {
        const CALL: &str = "cuGraphLaunch";
        self.bind_for(CALL)?;
        let recordings = locked(&self.recordings);
        let graph = recordings.graphs.get(&record).ok_or_else(|| DeviceError::Failed {
            call: CALL,
            reason: format!("there is no recording {record}"),
        })?;
        // SAFETY: the graph is alive; the caller keeps the promise of its launches.
        unsafe { result::graph::launch(graph.0, self.stream.cu_stream()) }.map_err(failed(CALL))
    }

    fn forget(&self, record: u64) {
        let graph = locked(&self.recordings).graphs.remove(&record);
        if let Some(graph) = graph
            && self.bind().is_ok()
        {
            // A launch of it that has not ended keeps what it needs. A failure leaks it.
            // SAFETY: nobody can launch it any more.
            let _ = unsafe { result::graph::exec_destroy(graph.0) };
        }
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), DeviceError> {
        self.bind_for("copying")?;
        // SAFETY: the caller's addresses have room for the bytes; the stream is ours.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
            .map_err(failed("copying on the device"))
    }

    fn stamp(&self) -> Result<Stamp, DeviceError> {
        const CALL: &str = "cuEventRecord";
        self.bind_for(CALL)?;
        Event::record(&self.context, &self.stream).map(Stamp::Event).map_err(failed(CALL))
    }

    fn seconds_between(&self, first: &Stamp, second: &Stamp) -> Result<f64, DeviceError> {
        const CALL: &str = "cuEventElapsedTime";
        let (Stamp::Event(first), Stamp::Event(second)) = (first, second) else {
            let reason = "the stamps are another device's".to_owned();
            return Err(DeviceError::Failed { call: CALL, reason });
        };
        self.bind_for(CALL)?;
        first.milliseconds_to(second).map(|ms| f64::from(ms) / 1e3).map_err(failed(CALL))
    }
}

#[cfg(test)]
mod tests {
    use super::super::gpu::has_driver;
    use super::*;

    #[test]
    fn without_a_driver_opening_a_device_says_so_instead_of_panicking() {
        match DriverDevice::open(0, KernelSources::default()) {
            Err(DeviceError::NoDriver) => assert!(!has_driver()),
            Err(_) | Ok(_) => assert!(has_driver()),
        }
    }
}
