//! The emulator as a [`Device`]: a child process that speaks the protocol of `serve.cpp`.
//!
//! It runs in one of several modes: asynchronous copies land late or at once, warps run in
//! ascending order or shuffled. An error of a kernel ends the process; its message becomes the
//! error of the call.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cuda::device::{Device, DeviceError, Launch, MemoryInfo};
use crate::cuda::source;
use crate::cuda::tensor_map::{TensorMap, TensorMapSpec};

/// How copies land and in which order warps run.
#[derive(Debug, Clone, Copy)]
pub struct Mode {
    /// Copies land when they are issued instead of as late as the rules allow.
    pub eager: bool,
    /// Order of warps; 0 is ascending.
    pub seed: u32,
}

/// The modes a case should run in.
pub const MODES: [Mode; 3] = [
    Mode { eager: false, seed: 0 },
    Mode { eager: true, seed: 7 },
    Mode { eager: false, seed: 11 },
];

/// What an emulator says it has: it reserves address space, not memory.
const TOTAL_BYTES: u64 = 16 << 30;

/// A running emulator.
#[derive(Debug)]
pub struct Emulator {
    state: Mutex<State>,
    mode: Mode,
    /// Whose variants of kernels the launchers take.
    arch: &'static str,
    has_large_clusters: bool,
}

#[derive(Debug)]
struct State {
    child: Child,
    requests: Option<ChildStdin>,
    answers: ChildStdout,
    allocated: u64,
    /// What an open branch has launched.
    branch: Option<Branch>,
    /// Launches being noted, if any.
    recording: Option<Vec<Request>>,
    records: HashMap<u64, Vec<Request>>,
    next_record: u64,
}

/// An open branch. Its launches run at once or, where copies land late, only at the join: what
/// wrongly relies on either order is seen in one of the modes.
#[derive(Debug)]
struct Branch {
    is_current: bool,
    launches: Vec<Request>,
}

impl Emulator {
    /// Starts `program`, which [`build`](super::build::build) has made.
    ///
    /// # Errors
    /// [`DeviceError::Failed`] if the program does not start.
    pub fn start(program: &Path, mode: Mode) -> Result<Self, DeviceError> {
        let failed = |error: std::io::Error| DeviceError::Failed {
            call: "starting the block emulator",
            reason: format!("{}: {error}", program.display()),
        };
        let mut child = Command::new(program)
            .args([u32::from(mode.eager).to_string(), mode.seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let requests = child.stdin.take();
        let answers = child.stdout.take().expect("the output was asked for");
        let state = State {
            child,
            requests,
            answers,
            allocated: 0,
            branch: None,
            recording: None,
            records: HashMap::new(),
            next_record: 0,
        };
        Ok(Self { state: Mutex::new(state), mode, arch: "sm_80", has_large_clusters: true })
    }

    /// The same for the kernels of another architecture.
    #[must_use]
    pub fn with_arch(mut self, arch: &'static str) -> Self {
        self.arch = arch;
        self
    }

    /// The same as a GPU that has no room for clusters of more than eight blocks.
    #[must_use]
    pub fn without_large_clusters(mut self) -> Self {
        self.has_large_clusters = false;
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn call(
        &mut self,
        call: &'static str,
        request: &Request,
        answer: &mut [u8],
    ) -> Result<(), DeviceError> {
        let failed = |reason: String| DeviceError::Failed { call, reason };
        let requests = self.requests.as_mut().ok_or_else(|| failed("no process".to_owned()))?;
        let sent = requests.write_all(&request.0).and_then(|()| requests.flush());
        if sent.and_then(|()| self.answers.read_exact(answer)).is_ok() {
            return Ok(());
        }
        // The process has ended: what it said is the error.
        self.requests = None;
        let mut message = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut message);
        }
        let _ = self.child.wait();
        Err(failed(message.trim().to_owned()))
    }

    fn launch(&mut self, request: Request) -> Result<(), DeviceError> {
        if let Some(recording) = &mut self.recording {
            recording.push(request);
            return Ok(());
        }
        self.call("launch", &request, &mut [0; 4])
    }

    /// The same, for what takes effect at once.
    fn call_now(
        &mut self,
        call: &'static str,
        request: &Request,
        answer: &mut [u8],
    ) -> Result<(), DeviceError> {
        if self.recording.is_some() {
            return Err(DeviceError::Recording { call });
        }
        if self.branch.is_some() {
            return Err(branch_error(call, "not possible while a branch is open"));
        }
        self.call(call, request, answer)
    }
}

fn branch_error(call: &'static str, reason: &str) -> DeviceError {
    DeviceError::Failed { call, reason: reason.to_owned() }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.requests = None;
        let _ = state.child.wait();
    }
}

/// A request under construction.
#[derive(Debug)]
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

    fn memory(&self) -> Option<MemoryInfo> {
        let free = TOTAL_BYTES.saturating_sub(self.state().allocated);
        Some(MemoryInfo { free, total: TOTAL_BYTES })
    }

    fn alloc(&self, bytes: usize) -> Result<u64, DeviceError> {
        let mut address = [0; 8];
        let mut state = self.state();
        state.call_now("alloc", &Request::new(1).u64(bytes as u64), &mut address)?;
        state.allocated += bytes as u64;
        Ok(u64::from_le_bytes(address))
    }

    fn hold_weights(&self, address: u64) -> Result<(), DeviceError> {
        self.state().call_now("hold_weights", &Request::new(7).u64(address), &mut [])
    }

    fn free(&self, address: u64, bytes: usize) {
        let mut state = self.state();
        // A process that has ended has no memory left to free.
        let _ = state.call("free", &Request::new(2).u64(address), &mut []);
        state.allocated -= bytes as u64;
    }

    fn fill(&self, address: u64, bytes: usize, value: u8) -> Result<(), DeviceError> {
        let request = Request::new(6).u64(address).u64(bytes as u64).u32(value.into());
        self.state().call_now("fill", &request, &mut [])
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let request = Request::new(3).u64(address).u64(bytes.len() as u64).bytes(bytes);
        self.state().call_now("write", &request, &mut [])
    }

    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        let request = Request::new(4).u64(address).u64(out.len() as u64);
        self.state().call_now("read", &request, out)
    }

    fn encode(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, DeviceError> {
        spec.check().map(|()| TensorMap::for_emulator(spec))
    }

    fn has_room_for(&self, _launch: &Launch<'_>) -> Result<bool, DeviceError> {
        Ok(self.has_large_clusters && matches!(self.arch, "sm_90a" | "sm_100f"))
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), DeviceError> {
        let name = launch.kernel.as_bytes();
        let mut request = Request::new(5).u32(name.len() as u32).bytes(name);
        for size in launch.grid.into_iter().chain(launch.block) {
            request = request.u32(size);
        }
        let is_dependent = source::is_dependent(launch.kernel);
        request = request.u64(u64::from(launch.shared_bytes)).u32(is_dependent.into());
        request = request.u32(launch.args.len() as u32);
        for arg in launch.args {
            let (bytes, len) = arg.bytes();
            request = request.u32(len as u32).bytes(&bytes.0[..len]);
        }
        let mut state = self.state();
        match &mut state.branch {
            Some(branch) if branch.is_current && !self.mode.eager => {
                branch.launches.push(request);
                Ok(())
            }
            _ => state.launch(request),
        }
    }

    fn fork(&self) -> Result<(), DeviceError> {
        let mut state = self.state();
        if state.branch.is_some() {
            return Err(branch_error("fork", "a branch is open already"));
        }
        state.branch = Some(Branch { is_current: true, launches: Vec::new() });
        Ok(())
    }

    fn back(&self) -> Result<(), DeviceError> {
        match &mut self.state().branch {
            Some(branch) if branch.is_current => branch.is_current = false,
            _ => return Err(branch_error("back", "no branch is open")),
        }
        Ok(())
    }

    fn join(&self) -> Result<(), DeviceError> {
        let mut state = self.state();
        let branch = state.branch.take().ok_or(branch_error("join", "no branch is open"))?;
        branch.launches.into_iter().try_for_each(|request| state.launch(request))
    }

    fn begin_record(&self) -> Result<(), DeviceError> {
        let mut state = self.state();
        if state.recording.is_some() {
            return Err(DeviceError::Recording { call: "begin_record" });
        }
        state.recording = Some(Vec::new());
        Ok(())
    }

    fn end_record(&self) -> Result<u64, DeviceError> {
        let mut state = self.state();
        let launches = state.recording.take().ok_or(DeviceError::Failed {
            call: "end_record",
            reason: "nothing is being recorded".to_owned(),
        })?;
        let id = state.next_record;
        state.next_record += 1;
        state.records.insert(id, launches);
        Ok(id)
    }

    unsafe fn replay(&self, record: u64) -> Result<(), DeviceError> {
        const CALL: &str = "replay";
        let mut state = self.state();
        if state.recording.is_some() {
            return Err(DeviceError::Recording { call: CALL });
        }
        let launches = state.records.remove(&record).ok_or_else(|| DeviceError::Failed {
            call: CALL,
            reason: format!("there is no recording {record}"),
        })?;
        let outcome =
            launches.iter().try_for_each(|request| state.call("launch", request, &mut [0; 4]));
        state.records.insert(record, launches);
        outcome
    }

    fn forget(&self, record: u64) {
        self.state().records.remove(&record);
    }
}
