//! The emulator as a [`Device`]: a child process that speaks the protocol of `serve.cpp`.
//!
//! Every case runs in several modes: asynchronous copies land late or at once, warps run in
//! ascending order or shuffled. An error of a kernel ends the process; its message becomes the
//! error of the call.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};

use fathom_ops::cuda::{Device, DeviceError, Launch};

use crate::build;

/// How copies land (`eager`) and in which order warps run (`seed`, 0 is ascending).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mode {
    pub(crate) eager: bool,
    pub(crate) seed: u32,
}

/// The modes every case runs in.
pub(crate) const MODES: [Mode; 3] = [
    Mode { eager: false, seed: 0 },
    Mode { eager: true, seed: 7 },
    Mode { eager: false, seed: 11 },
];

/// Runs `case` in every mode; does nothing without a C++ compiler.
pub(crate) fn in_every_mode(case: impl Fn(&Arc<dyn Device>)) {
    for mode in MODES {
        let Some(device) = Emulator::start(mode) else { return };
        let device: Arc<dyn Device> = device;
        case(&device);
    }
}

/// The same with the kernels of sm_90a.
pub(crate) fn in_every_mode_on_hopper(case: impl Fn(&Arc<dyn Device>)) {
    for mode in MODES {
        let Some(device) = Emulator::start_as(mode, "sm_90a") else { return };
        let device: Arc<dyn Device> = device;
        case(&device);
    }
}

/// A running emulator.
#[derive(Debug)]
pub(crate) struct Emulator {
    pipes: Mutex<Pipes>,
    /// Whose variants of kernels the launchers take.
    arch: &'static str,
}

#[derive(Debug)]
struct Pipes {
    child: Child,
    requests: Option<ChildStdin>,
    answers: ChildStdout,
}

impl Emulator {
    /// Starts a process for the kernels of sm_80; prints a line and returns `None` without a compiler.
    pub(crate) fn start(mode: Mode) -> Option<Arc<Self>> {
        Self::start_as(mode, "sm_80")
    }

    fn start_as(mode: Mode, arch: &'static str) -> Option<Arc<Self>> {
        let Some(program) = build::emulator() else {
            println!("skipped: no C++ compiler (g++) to build the block emulator with");
            return None;
        };
        let mut child = Command::new(program)
            .args([u32::from(mode.eager).to_string(), mode.seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (requests, answers) = (child.stdin.take(), child.stdout.take().unwrap());
        Some(Arc::new(Self { pipes: Mutex::new(Pipes { child, requests, answers }), arch }))
    }

    fn call(
        &self,
        call: &'static str,
        request: &[u8],
        answer: &mut [u8],
    ) -> Result<(), DeviceError> {
        let mut pipes = self.pipes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let failed = |reason: String| DeviceError::Failed { call, reason };
        let requests = pipes.requests.as_mut().ok_or_else(|| failed("no process".to_owned()))?;
        let sent = requests.write_all(request).and_then(|()| requests.flush());
        if sent.and_then(|()| pipes.answers.read_exact(answer)).is_ok() {
            return Ok(());
        }
        // The process has ended: what it said is the error.
        pipes.requests = None;
        let mut message = String::new();
        if let Some(mut stderr) = pipes.child.stderr.take() {
            let _ = stderr.read_to_string(&mut message);
        }
        let _ = pipes.child.wait();
        Err(failed(message.trim().to_owned()))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let pipes = self.pipes.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        pipes.requests = None;
        let _ = pipes.child.wait();
    }
}

/// A request under construction.
struct Request(Vec<u8>);

impl Request {
    fn new(code: u32) -> Self {
        Self(code.to_le_bytes().to_vec())
    }
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

impl Device for Emulator {
    fn name(&self) -> String {
        "block emulator".to_owned()
    }

    fn arch(&self) -> &'static str {
        self.arch
    }

    fn alloc(&self, bytes: usize) -> Result<u64, DeviceError> {
        let mut address = [0; 8];
        self.call("alloc", &Request::new(1).u64(bytes as u64).0, &mut address)?;
        Ok(u64::from_le_bytes(address))
    }

    fn free(&self, address: u64, _bytes: usize) {
        // A process that has ended has no memory left to free.
        let _ = self.call("free", &Request::new(2).u64(address).0, &mut []);
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let request = Request::new(3).u64(address).u64(bytes.len() as u64).bytes(bytes);
        self.call("write", &request.0, &mut [])
    }

    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        self.call("read", &Request::new(4).u64(address).u64(out.len() as u64).0, out)
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), DeviceError> {
        let name = launch.kernel.as_bytes();
        let mut request = Request::new(5).u32(name.len() as u32).bytes(name);
        for size in launch.grid.into_iter().chain(launch.block) {
            request = request.u32(size);
        }
        request = request.u64(u64::from(launch.shared_bytes)).u32(launch.args.len() as u32);
        for arg in launch.args {
            let (bytes, len) = arg.bytes();
            request = request.u32(len as u32).bytes(&bytes[..len]);
        }
        self.call("launch", &request.0, &mut [0; 4])
    }
}
