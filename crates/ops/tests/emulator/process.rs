//! The emulator for tests: built once, started per case and mode.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use fathom_ops::cuda::emulator::{self, build};
pub(crate) use fathom_ops::cuda::emulator::{MODES, Mode};
use fathom_ops::cuda::{Buffer, Device};

/// A way to build the program.
type Build = fn(&Path, &Path) -> io::Result<Option<PathBuf>>;

/// The program, or `None` without a compiler.
///
/// # Panics
/// If a file does not compile, with the compiler's message.
fn program(program: &'static OnceLock<Option<PathBuf>>, build: Build) -> Option<&'static Path> {
    let build = || {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        build(&kernels.canonicalize().unwrap(), &out).unwrap_or_else(|e| panic!("{e}"))
    };
    program.get_or_init(build).as_deref()
}

/// Starts emulators.
pub(crate) struct Emulator;

impl Emulator {
    /// Starts a process; prints a line and returns `None` without a compiler.
    pub(crate) fn start(mode: Mode) -> Option<Arc<dyn Device>> {
        Self::start_as(mode, "sm_80")
    }

    /// The same with the kernels of another architecture.
    pub(crate) fn start_as(mode: Mode, arch: &'static str) -> Option<Arc<dyn Device>> {
        Some(Arc::new(Self::open(mode)?.with_arch(arch)))
    }

    /// The same, as a GPU that has no room for clusters of sixteen blocks.
    pub(crate) fn start_narrow(mode: Mode, arch: &'static str) -> Option<Arc<dyn Device>> {
        Some(Arc::new(Self::open(mode)?.with_arch(arch).without_large_clusters()))
    }

    /// The same with kernels and emulator compiled with AddressSanitizer and UBSan, which see each thread's own
    /// accesses and arithmetic, but not how threads are ordered.
    pub(crate) fn start_sanitized(mode: Mode, arch: &'static str) -> Option<Arc<dyn Device>> {
        static SANITIZED: OnceLock<Option<PathBuf>> = OnceLock::new();
        let device = Self::open_program(program(&SANITIZED, build::build_sanitized), mode)?;
        Some(Arc::new(device.with_arch(arch)))
    }

    fn open(mode: Mode) -> Option<emulator::Emulator> {
        static HOOKED: OnceLock<Option<PathBuf>> = OnceLock::new();
        Self::open_program(program(&HOOKED, build::build), mode)
    }

    fn open_program(program: Option<&Path>, mode: Mode) -> Option<emulator::Emulator> {
        let Some(program) = program else {
            println!("skipped: no C++ compiler (g++) to build the block emulator with");
            return None;
        };
        Some(emulator::Emulator::start(program, mode).unwrap())
    }
}

/// A copy of `bytes` that kernels may read before they wait for the launch before.
pub(crate) fn weight_buffer(device: &Arc<dyn Device>, bytes: &[u8]) -> Buffer {
    Buffer::from_bytes(device, bytes).unwrap().for_weights().unwrap()
}

/// Runs `case` in every mode; does nothing without a C++ compiler.
pub(crate) fn in_every_mode(case: impl Fn(&Arc<dyn Device>)) {
    for mode in MODES {
        let Some(device) = Emulator::start(mode) else { return };
        case(&device);
    }
}

/// The same with the kernels of sm_90a.
pub(crate) fn in_every_mode_on_hopper(case: impl Fn(&Arc<dyn Device>)) {
    in_every_mode_as("sm_90a", case);
}

/// The same with the kernels of `arch`.
pub(crate) fn in_every_mode_as(arch: &'static str, case: impl Fn(&Arc<dyn Device>)) {
    for mode in MODES {
        let Some(device) = Emulator::start_as(mode, arch) else { return };
        case(&device);
    }
}
