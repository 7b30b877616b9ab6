//! Kernel source to machine code through NVRTC, which is opened at run time if it is installed.
//!
//! The loader must find NVRTC's own second library (`libnvrtc-builtins`) too: its folder belongs
//! on the library path.

use std::ffi::{CStr, CString};

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

/// Architectures a pack is made for. sm_90a and sm_100f name instructions of one family; a cubin
/// never runs on another major version.
pub const ARCHS: [&str; 5] = ["sm_80", "sm_89", "sm_90a", "sm_100f", "sm_120"];

/// Options of every compilation, beside the architecture.
pub const OPTIONS: [&str; 5] =
    ["--std=c++17", "-DNDEBUG", "-default-device", "-lineinfo", "--ptxas-options=-v"];

/// Machine code of one kernel file.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// The code.
    pub cubin: Vec<u8>,
    /// What the compiler said: registers, spills, warnings.
    pub log: String,
}

/// NVRTC's version, or `None` where it is not installed.
#[must_use]
pub fn nvrtc_version() -> Option<(i32, i32)> {
    // SAFETY: the function only tries to open the library.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are to live integers; the library is there.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().ok()?;
    Some((major, minor))
}

/// Names a compilation by everything that decides its result.
#[must_use]
pub fn key(source: &str, arch: &str, version: (i32, i32)) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{arch} {version:?} {OPTIONS:?}\n"));
    hash.update(source);
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Names a compilation by any compiler.
#[must_use]
pub fn source_key(source: &str, arch: &str) -> String {
    key(source, arch, (0, 0))
}

/// Compiles a flattened source. NVRTC must be present.
///
/// # Errors
/// The compiler's log.
pub fn compile(source: &str, name: &str, arch: &str) -> Result<Compiled, String> {
    if nvrtc_version().is_none() {
        return Err("NVRTC is not installed".to_owned());
    }
    let text = |s: &str| CString::new(s).map_err(|_| format!("{name} holds a zero byte"));
    let (source, name) = (text(source)?, text(name)?);
    let program =
        result::create_program(&source, Some(&name)).map_err(|error| error.to_string())?;
    let arch = format!("--gpu-architecture={arch}");
    let options: Vec<&str> = std::iter::once(arch.as_str()).chain(OPTIONS).collect();
    // SAFETY: the program was just made and is destroyed once, below.
    let outcome = unsafe { result::compile_program(program, &options) };
    // SAFETY: as above; the log is a string that ends with a zero.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let bytes: Vec<u8> = log.iter().map(|&c| c as u8).collect();
    let log = CStr::from_bytes_until_nul(&bytes).unwrap_or_default().to_string_lossy().into_owned();
    let compiled = match outcome {
        Ok(()) => cubin(program).map(|cubin| Compiled { cubin, log }),
        Err(_) => Err(log),
    };
    // SAFETY: nothing uses the program after this.
    let destroyed = unsafe { result::destroy_program(program) };
    destroyed.map_err(|error| error.to_string()).and(compiled)
}

fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, String> {
    let mut size = 0;
    // SAFETY: the program is compiled and alive.
    unsafe { sys::nvrtcGetCUBINSize(program, &raw mut size) }
        .result()
        .map_err(|error| error.to_string())?;
    let mut cubin = vec![0_u8; size];
    // SAFETY: the buffer has the size just asked for.
    unsafe { sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()) }
        .result()
        .map_err(|error| error.to_string())?;
    Ok(cubin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_changes_with_source_architecture_and_compiler() {
        let one = key("a", "sm_80", (13, 0));
        assert_eq!(one, key("a", "sm_80", (13, 0)));
        for other in
            [key("b", "sm_80", (13, 0)), key("a", "sm_89", (13, 0)), key("a", "sm_80", (13, 1))]
        {
            assert_ne!(one, other);
        }
    }
}
