//! The emulated driver (`kernels/emulator/driver`): it refuses what a driver refuses, leaves undone what
//! nobody waited for, and ends a program that a GPU might not survive. Then the driver's device on it.

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{CUevent_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};
use fathom_ops::cuda::emulator::build;
use fathom_ops::cuda::{
    Arg, Device, DeviceError, DriverDevice, KernelSources, Launch, compile, pack, source,
};

/// Whether the emulated driver is what this process finds as `libcuda` from here on; not without a C++
/// compiler, nor where a driver is installed.
fn is_there() -> bool {
    static LIBRARY: OnceLock<Option<libloading::Library>> = OnceLock::new();
    let load = || {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        let folder = build::build_driver(&kernels.canonicalize().unwrap(), &out).unwrap()?;
        // SAFETY: what runs when the library is loaded reserves memory and makes lists of kernels.
        let library = unsafe { libloading::Library::new(folder.join("libcuda.so.1")) };
        Some(library.unwrap())
    };
    let is_there = LIBRARY.get_or_init(load).is_some();
    if !is_there {
        println!("skipped: no C++ compiler (g++) to build the emulated driver with");
    }
    is_there
}

struct Fixture {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    other: Arc<CudaStream>,
}

impl Fixture {
    fn new() -> Option<Self> {
        is_there().then(|| {
            let context = CudaContext::new(0).unwrap();
            assert!(context.name().unwrap().starts_with("Emulated"));
            let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
            Self { context, stream, other }
        })
    }

    fn alloc(&self, bytes: usize) -> Result<u64, DriverError> {
        // SAFETY: the stream is alive.
        unsafe { result::malloc_async(self.stream.cu_stream(), bytes) }
    }

    fn fill(&self, stream: &CudaStream, address: u64, value: u8) -> Result<(), DriverError> {
        // SAFETY: the tests' buffers have 16 bytes.
        unsafe { result::memset_d8_async(address, value, 16, stream.cu_stream()) }
    }

    fn pinned(&self) -> &'static mut [u8] {
        // SAFETY: 16 bytes that stay until the process ends, or are not used any more.
        unsafe {
            let memory = result::malloc_host(16, 0).unwrap();
            std::slice::from_raw_parts_mut(memory.cast(), 16)
        }
    }

    fn begin(&self) {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).unwrap();
    }

    fn end(&self) -> Result<(), DriverError> {
        // SAFETY: the stream is alive.
        unsafe { result::stream::end_capture(self.stream.cu_stream()) }.map(|_| ())
    }
}

fn is<T: std::fmt::Debug>(got: Result<T, DriverError>, expected: CUresult) {
    assert_eq!(got.unwrap_err().0, expected);
}

#[test]
fn what_a_capture_forbids_is_refused_and_spoils_it() {
    let Some(it) = Fixture::new() else { return };
    let buffer = it.alloc(16).unwrap();
    // A branch that nobody waits for.
    let event = it.context.new_event(None).unwrap();
    it.begin();
    it.fill(&it.stream, buffer, 1).unwrap();
    event.record(&it.stream).unwrap();
    it.other.wait(&event).unwrap();
    it.fill(&it.other, buffer, 2).unwrap();
    is(it.end(), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    // Work from outside of the capture.
    event.record(&it.other).unwrap();
    it.begin();
    is(it.stream.wait(&event), CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    is(it.fill(&it.stream, buffer, 1), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    is(it.end(), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    // Pinned memory, and a wait.
    it.begin();
    // SAFETY: nothing is allocated.
    is(unsafe { result::malloc_host(16, 0) }, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    is(it.end(), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    it.begin();
    is(it.stream.synchronize(), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    is(it.end(), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    // An event of a capture is no time to wait for.
    it.begin();
    event.record(&it.stream).unwrap();
    is(event.synchronize(), CUresult::CUDA_ERROR_CAPTURED_EVENT);
    it.end().unwrap();
    // After all this the stream works.
    it.fill(&it.stream, buffer, 3).unwrap();
    it.stream.synchronize().unwrap();
}

#[test]
fn what_nobody_waited_for_has_not_happened() {
    let Some(it) = Fixture::new() else { return };
    let (from, to) = (it.alloc(16).unwrap(), it.alloc(16).unwrap());
    let host = it.pinned();
    let copy = |stream: &CudaStream| {
        // SAFETY: both buffers have 16 bytes.
        unsafe { result::memcpy_dtod_async(to, from, 16, stream.cu_stream()) }.unwrap();
    };
    let mut read = |stream: &CudaStream| {
        // SAFETY: the host's 16 bytes stay.
        unsafe { result::memcpy_dtoh_async(host, to, stream.cu_stream()) }.unwrap();
        let before = host[0];
        stream.synchronize().unwrap();
        (before, host[0])
    };
    // The copy is not ordered behind the fill of the other stream.
    it.fill(&it.stream, from, 7).unwrap();
    copy(&it.other);
    assert_eq!(read(&it.other), (0xff, 0xff));
    // Now it is.
    let event = it.context.new_event(None).unwrap();
    it.fill(&it.stream, from, 8).unwrap();
    event.record(&it.stream).unwrap();
    it.other.wait(&event).unwrap();
    copy(&it.other);
    assert_eq!(read(&it.other), (0xff, 8));
}

#[test]
fn what_a_gpu_has_no_room_for_is_refused() {
    let Some(it) = Fixture::new() else { return };
    is(it.alloc(9 << 30), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    let no_time = CUevent_flags::CU_EVENT_DISABLE_TIMING;
    let (first, second) = (it.context.new_event(Some(no_time)), it.context.new_event(None));
    let (first, second) = (first.unwrap(), second.unwrap());
    first.record(&it.stream).unwrap();
    second.record(&it.stream).unwrap();
    is(first.elapsed_ms(&second), CUresult::CUDA_ERROR_INVALID_HANDLE);

    let module =
        it.context.load_module(cudarc::nvrtc::Ptx::from_binary(STAND_IN.to_vec())).unwrap();
    let function = module.load_function("gather_rows").unwrap();
    is(module.load_function("no_such_kernel"), CUresult::CUDA_ERROR_NOT_FOUND);
    let launch = |threads: u32, shared: u32| {
        let mut params = [std::ptr::null_mut::<c_void>(); 4];
        let (grid, stream) = ((1, 1, 1), it.stream.cu_stream());
        // SAFETY: it is refused before a parameter is read.
        unsafe {
            let function = function.cu_function();
            result::launch_kernel(function, grid, (threads, 1, 1), shared, stream, &mut params)
        }
    };
    for (threads, shared) in [(2048, 0), (0, 0), (128, 64 << 10)] {
        is(launch(threads, shared), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
}

/// What a program that does this prints at its end: run in a process of its own.
const FATAL: [(&str, &str); 4] = [
    ("freed", "pinned memory is freed while a copy uses it"),
    ("gone", "event"),
    ("outside", "is not inside of what was allocated"),
    ("twice", "is given back, and was not allocated"),
];

#[test]
fn what_a_gpu_might_not_survive_ends_the_program() {
    if !is_there() {
        return;
    }
    for (case, message) in FATAL {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "driver::in_a_process_of_its_own", "--nocapture"])
            .env("FATAL_CASE", case)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "{case}: {text}");
        assert!(text.contains("emulated driver: ") && text.contains(message), "{case}: {text}");
    }
}

#[test]
fn in_a_process_of_its_own() {
    let Some(case) = std::env::var_os("FATAL_CASE") else { return };
    let it = Fixture::new().unwrap();
    let buffer = it.alloc(16).unwrap();
    // SAFETY: none of it is sound; that is the point, and the emulated driver ends the process.
    unsafe {
        match case.to_str().unwrap() {
            "freed" => {
                let host = it.pinned();
                result::memcpy_dtoh_async(host, buffer, it.stream.cu_stream()).unwrap();
                result::free_host(host.as_mut_ptr().cast()).unwrap();
            }
            "gone" => {
                let event = result::event::create(CUevent_flags::CU_EVENT_DEFAULT).unwrap();
                result::event::destroy(event).unwrap();
                let _ = result::event::record(event, it.stream.cu_stream());
            }
            "outside" => {
                it.fill(&it.stream, buffer + 8, 1).unwrap();
                it.stream.synchronize().unwrap();
            }
            "twice" => {
                for _ in 0..2 {
                    result::free_async(buffer, it.stream.cu_stream()).unwrap();
                }
                it.stream.synchronize().unwrap();
            }
            other => panic!("no case {other}"),
        }
    }
}

/// An image with every kernel of the emulator.
const STAND_IN: &[u8] = b"\x7fELF\0";

fn device() -> Option<DriverDevice> {
    let paths = source::files().filter(|(_, archs)| archs.contains(&"sm_80"));
    let keys: Vec<_> = paths
        .map(|(path, _)| {
            let text = source::flatten(path, &source::embedded).unwrap();
            (path, compile::source_key(&text, "sm_80"))
        })
        .collect();
    let images: Vec<_> = keys
        .iter()
        .map(|(path, key)| pack::Image { path, arch: "sm_80", key, cubin: STAND_IN })
        .collect();
    let sources = KernelSources { pack: Some(pack::write(&images).unwrap()), cache: None };
    is_there().then(|| DriverDevice::open(0, sources).unwrap())
}

#[test]
fn a_device_runs_launches_in_order_records_them_and_waits_only_to_read() {
    let Some(device) = device() else { return };
    device.load_all(&mut |_| {}).unwrap();
    let alloc = |words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let address = device.alloc(bytes.len()).unwrap();
        device.write(address, &bytes).unwrap();
        address
    };
    let read = |address: u64| {
        let mut bytes = [0; 12];
        device.read(address, &mut bytes).unwrap();
        bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect::<Vec<_>>()
    };
    let (x, rows, y, z) = (alloc(&[5, 6, 7]), alloc(&[2, 0, 1]), alloc(&[0; 3]), alloc(&[0; 3]));
    let gather = |from: u64, to: u64| {
        let args = [from, rows, to].map(Arg::Address);
        let args = [&args[..], &[1_u32.into()]].concat();
        let launch = Launch {
            kernel: "gather_rows",
            grid: [3, 1, 1],
            block: [128, 1, 1],
            shared_bytes: 0,
            args: &args,
        };
        // SAFETY: three rows of one word each.
        unsafe { device.launch(launch) }.unwrap();
    };
    gather(x, y);
    device.fork().unwrap();
    gather(y, z);
    device.back().unwrap();
    device.join().unwrap();
    assert_eq!((read(y), read(z)), (vec![7, 5, 6], vec![6, 7, 5]));

    device.begin_record().unwrap();
    device.fork().unwrap();
    gather(z, x);
    device.back().unwrap();
    device.join().unwrap();
    gather(x, y);
    assert!(matches!(device.alloc(16), Err(DeviceError::Recording { .. })));
    // Given back when the recording has ended.
    device.free(z, 12);
    let record = device.end_record().unwrap();
    assert_eq!(read(x), [5, 6, 7], "recorded, not run");
    let z = alloc(&[10, 20, 30]);
    device.forget(record);

    device.begin_record().unwrap();
    gather(z, x);
    gather(x, y);
    let record = device.end_record().unwrap();
    for _ in 0..2 {
        // SAFETY: the buffers are there.
        unsafe { device.replay(record) }.unwrap();
    }
    assert_eq!((read(x), read(y)), (vec![30, 10, 20], vec![20, 30, 10]));
    let (first, second) = (device.stamp().unwrap(), device.stamp().unwrap());
    assert!(device.seconds_between(&first, &second).unwrap() >= 0.0);
}

#[test]
fn a_devices_memory_ends_with_numbers_and_what_is_freed_is_there_again() {
    let Some(device) = device() else { return };
    let all = device.memory().unwrap();
    let (part, total) = (32 << 20, all.total as usize);
    let first = device.alloc(part).unwrap();
    assert_eq!(device.memory().unwrap().free, all.free - part as u64);
    match device.alloc(total) {
        Err(DeviceError::OutOfMemory { bytes, free }) => {
            assert_eq!((bytes, free), (total, all.free as usize - part));
        }
        other => panic!("{other:?}"),
    }
    device.free(first, part);
    let mut word = [0; 4];
    let small = device.alloc(4).unwrap();
    device.read(small, &mut word).unwrap();
    assert_eq!(device.memory().unwrap().free, all.free - 4);
}
