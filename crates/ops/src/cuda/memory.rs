//! Who owns which part of a device's memory: arenas for weights, cache and workspace, and buffers.
//!
//! Serving takes one allocation for each [`Place`] at start, of a size known by then
//! ([`rehearsal`](super::rehearsal)); buffers are parts of these, so a step allocates nothing. Tests
//! and tools let every buffer be an allocation of its own.
//!
//! Invariants:
//! - a buffer of an arena lies in it, and no two live buffers overlap;
//! - the same allocations and releases after an empty arena give the same addresses, which is what
//!   makes recorded launches repeatable;
//! - releasing while launches still use a buffer is fine: whoever gets the bytes next comes later on
//!   the same stream. While a branch is open ([`Memory::beside`]) nobody gets released bytes, because
//!   then later is not after.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::{Device, DeviceError};
use super::draw::Draws;
use crate::OpError;
use crate::traits::Drawing;

/// Every buffer begins at a multiple of this, as allocations of the driver do.
pub const ALIGNMENT: usize = 256;

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Loaded once, read only.
    Weights,
    /// Window rings, compressor state, blocks and snapshots.
    Cache,
    /// Lives for part of a step.
    Workspace,
}

impl Place {
    /// All places, in the order in which they are allocated.
    pub const ALL: [Self; 3] = [Self::Weights, Self::Cache, Self::Workspace];

    /// Its name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Cache => "cache",
            Self::Workspace => "workspace",
        }
    }
}

/// Bytes of each arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ArenaSizes {
    /// Bytes for [`Place::Weights`].
    pub weights: usize,
    /// Bytes for [`Place::Cache`].
    pub cache: usize,
    /// Bytes for [`Place::Workspace`].
    pub workspace: usize,
}

impl ArenaSizes {
    /// Bytes for `place`.
    #[must_use]
    pub const fn of(&self, place: Place) -> usize {
        match place {
            Place::Weights => self.weights,
            Place::Cache => self.cache,
            Place::Workspace => self.workspace,
        }
    }
}

/// One allocation, given out in parts: the lowest gap that is large enough.
#[derive(Debug)]
struct Arena {
    device: Arc<dyn Device>,
    place: Place,
    base: u64,
    capacity: usize,
    used: Mutex<Used>,
}

/// The parts that are given out, ascending, and how far they ever reached.
#[derive(Debug, Default)]
struct Used {
    parts: Vec<(usize, usize)>,
    bytes: usize,
    reach: usize,
    /// Starts of parts given back while a branch is open.
    held: Option<Vec<usize>>,
}

impl Used {
    fn insert(&mut self, at: usize, start: usize, len: usize) {
        self.parts.insert(at, (start, start + len));
        self.bytes += len;
        self.reach = self.reach.max(start + len);
    }

    fn remove(&mut self, start: usize) {
        if let Ok(at) = self.parts.binary_search_by_key(&start, |&(from, _)| from) {
            let (from, to) = self.parts.remove(at);
            self.bytes -= to - from;
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.device.free(self.base, self.capacity);
    }
}

const fn aligned(bytes: usize) -> usize {
    // An empty buffer still needs an address of its own.
    if bytes == 0 { ALIGNMENT } else { bytes.next_multiple_of(ALIGNMENT) }
}

impl Arena {
    fn new(device: &Arc<dyn Device>, place: Place, bytes: usize) -> Result<Self, OpError> {
        let capacity = aligned(bytes);
        let base = device.alloc(capacity).map_err(OpError::device)?;
        if place == Place::Weights {
            device.hold_weights(base).map_err(OpError::device)?;
        }
        let device = Arc::clone(device);
        Ok(Self { device, place, base, capacity, used: Mutex::default() })
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offset of `bytes` free bytes, which are taken.
    fn take(&self, bytes: usize) -> Result<usize, DeviceError> {
        let len = aligned(bytes);
        let mut used = self.used();
        let (mut at, mut start) = (used.parts.len(), 0);
        // The weights only ever grow: their next part is behind the last.
        if used.bytes == used.reach {
            start = used.reach;
        } else {
            for (index, &(from, to)) in used.parts.iter().enumerate() {
                if from - start >= len {
                    at = index;
                    break;
                }
                start = to;
            }
        }
        if self.capacity - start < len {
            let (place, capacity) = (self.place.name(), self.capacity);
            return Err(DeviceError::ArenaFull { place, bytes, used: used.bytes, capacity });
        }
        used.insert(at, start, len);
        Ok(start)
    }

    /// Takes exactly these bytes; `false` if any of them is in use.
    fn claim(&self, start: usize, bytes: usize) -> bool {
        let len = aligned(bytes);
        let mut used = self.used();
        let at = used.parts.partition_point(|&(_, to)| to <= start);
        let is_free = used.parts.get(at).is_none_or(|&(from, _)| from >= start + len);
        if is_free && start + len <= self.capacity {
            used.insert(at, start, len);
            return true;
        }
        false
    }

    fn give_back(&self, start: usize) {
        let mut used = self.used();
        if let Some(held) = &mut used.held {
            held.push(start);
        } else {
            used.remove(start);
        }
    }

    /// From here to [`release`](Self::release), nothing that is given back is given out.
    fn hold(&self) {
        self.used().held = Some(Vec::new());
    }

    fn release(&self) {
        let mut used = self.used();
        for start in used.held.take().unwrap_or_default() {
            used.remove(start);
        }
    }
}

/// Where buffers come from: three arenas, or the device itself.
#[derive(Debug, Clone)]
pub struct Memory {
    device: Arc<dyn Device>,
    arenas: Option<Arc<[Arena; 3]>>,
    /// Where weights are drawn instead of read.
    draws: Option<Arc<Draws>>,
}

impl Memory {
    /// Every buffer is an allocation of its own.
    #[must_use]
    pub fn loose(device: Arc<dyn Device>) -> Self {
        Self { device, arenas: None, draws: None }
    }

    /// Buffers are parts of three allocations made here.
    ///
    /// # Errors
    /// [`OpError::Device`] if the device has no room for them.
    pub fn planned(device: Arc<dyn Device>, sizes: ArenaSizes) -> Result<Self, OpError> {
        let [weights, cache, workspace] =
            Place::ALL.map(|place| Arena::new(&device, place, sizes.of(place)));
        let arenas = Some(Arc::new([weights?, cache?, workspace?]));
        Ok(Self { device, arenas, draws: None })
    }

    /// The same; weights loaded into it are drawn on the device, and nothing of a checkpoint but its
    /// shapes is read.
    #[must_use]
    pub fn drawing(self, drawing: Drawing) -> Self {
        Self { draws: Some(Arc::new(Draws::new(drawing))), ..self }
    }

    pub(crate) fn draws(&self) -> Option<&Draws> {
        self.draws.as_deref()
    }

    /// Whether weights are what the checkpoint holds.
    pub(crate) fn keeps_contents(&self) -> bool {
        self.draws.is_none() && self.device.keeps_contents()
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Whether addresses repeat from step to step.
    #[must_use]
    pub fn is_planned(&self) -> bool {
        self.arenas.is_some()
    }

    fn arena(&self, place: Place) -> Option<(&Arc<[Arena; 3]>, &Arena)> {
        self.arenas.as_ref().map(|arenas| (arenas, &arenas[place as usize]))
    }

    /// `bytes` bytes with undefined values.
    ///
    /// # Errors
    /// [`OpError::Device`] if there is no room.
    pub fn buffer(&self, place: Place, bytes: usize) -> Result<Buffer, OpError> {
        let Some((arenas, arena)) = self.arena(place) else {
            let buffer = Buffer::new(&self.device, bytes)?;
            return if place == Place::Weights { buffer.for_weights() } else { Ok(buffer) };
        };
        let start = arena.take(bytes).map_err(OpError::device)?;
        Ok(Buffer::part_of(arenas, place, start, bytes))
    }

    /// A copy of `bytes`.
    ///
    /// # Errors
    /// [`OpError::Device`] if there is no room or the copy fails.
    pub fn holding(&self, place: Place, bytes: &[u8]) -> Result<Buffer, OpError> {
        let buffer = self.buffer(place, bytes.len())?;
        if !bytes.is_empty() {
            buffer.write(0, bytes)?;
        }
        Ok(buffer)
    }

    /// The buffer that is at this address of an arena again, if its bytes are free.
    pub(crate) fn claim(&self, place: Place, address: u64, bytes: usize) -> Option<Buffer> {
        let (arenas, arena) = self.arena(place)?;
        let start = usize::try_from(address.checked_sub(arena.base)?).ok()?;
        arena.claim(start, bytes).then(|| Buffer::part_of(arenas, place, start, bytes))
    }

    /// Runs what `side` launches beside what `main` launches, where buffers are parts of arenas;
    /// else, inside of another such pair, and on a device that has one stream, in this order. Neither
    /// may use what the other makes; what comes after may use both.
    ///
    /// # Errors
    /// The first of what the two and the device fail with.
    pub(crate) fn beside<A, B, E: From<OpError>>(
        &self,
        side: impl FnOnce() -> Result<A, E>,
        main: impl FnOnce() -> Result<B, E>,
    ) -> Result<(A, B), E> {
        let workspace = self.arena(Place::Workspace).map(|(_, arena)| arena);
        let Some(workspace) = workspace.filter(|arena| arena.used().held.is_none()) else {
            return Ok((side()?, main()?));
        };
        let device = |outcome: Result<(), DeviceError>| outcome.map_err(OpError::device);
        device(self.device.fork())?;
        workspace.hold();
        // Joined in any case, also if one panics: else the branch would be open for ever.
        let mut open = OpenBranch { device: &*self.device, workspace, is_open: true };
        let a = side();
        let back = device(self.device.back());
        let b = main();
        let joined = device(open.join());
        drop(open);
        let outcome = (a?, b?);
        back.and(joined)?;
        Ok(outcome)
    }

    /// Bytes of an arena that live buffers take; 0 without arenas.
    #[must_use]
    pub fn used(&self, place: Place) -> usize {
        self.arena(place).map_or(0, |(_, arena)| arena.used().bytes)
    }

    /// How large an arena must be for everything it has given out so far; 0 without arenas.
    #[must_use]
    pub fn reach(&self, place: Place) -> usize {
        self.arena(place).map_or(0, |(_, arena)| arena.used().reach)
    }
}

/// A branch of a device; what is given back to the workspace meanwhile stays taken.
struct OpenBranch<'a> {
    device: &'a dyn Device,
    workspace: &'a Arena,
    is_open: bool,
}

impl OpenBranch<'_> {
    fn join(&mut self) -> Result<(), DeviceError> {
        self.is_open = false;
        self.device.join()
    }
}

impl Drop for OpenBranch<'_> {
    fn drop(&mut self) {
        if self.is_open {
            // A panic is on its way: nobody is there to hear of an error.
            let _ = self.join();
        }
        self.workspace.release();
    }
}

/// Device memory, given back when the last holder is gone.
#[derive(Debug, Clone)]
pub struct Buffer {
    memory: Arc<Allocation>,
    address: u64,
    bytes: usize,
}

/// Whom memory goes back to.
#[derive(Debug)]
enum Allocation {
    Loose { device: Arc<dyn Device>, address: u64, bytes: usize },
    Part { arenas: Arc<[Arena; 3]>, place: Place, start: usize },
}

impl Drop for Allocation {
    fn drop(&mut self) {
        match self {
            Self::Loose { device, address, bytes } => device.free(*address, *bytes),
            Self::Part { arenas, place, start } => arenas[*place as usize].give_back(*start),
        }
    }
}

impl Allocation {
    fn device(&self) -> &Arc<dyn Device> {
        match self {
            Self::Loose { device, .. } => device,
            Self::Part { arenas, place, .. } => &arenas[*place as usize].device,
        }
    }
}

impl Buffer {
    /// An allocation of its own: `bytes` bytes with undefined values.
    ///
    /// # Errors
    /// [`OpError::Device`] if the device has no room.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, OpError> {
        // An empty tensor still needs an address of its own.
        let bytes = bytes.max(1);
        let address = device.alloc(bytes).map_err(OpError::device)?;
        let memory = Allocation::Loose { device: Arc::clone(device), address, bytes };
        Ok(Self { memory: Arc::new(memory), address, bytes })
    }

    /// The same for what launches may read ahead of those before them ([`Device::hold_weights`]); the
    /// buffer is an allocation of its own.
    ///
    /// # Errors
    /// [`OpError::Device`] if the device fails.
    pub fn for_weights(self) -> Result<Self, OpError> {
        self.device().hold_weights(self.address).map_err(OpError::device)?;
        Ok(self)
    }

    /// An allocation of its own: a copy of `bytes`.
    ///
    /// # Errors
    /// [`OpError::Device`] if the device has no room or the copy fails.
    pub fn from_bytes(device: &Arc<dyn Device>, bytes: &[u8]) -> Result<Self, OpError> {
        let buffer = Self::new(device, bytes.len())?;
        device.write(buffer.address(), bytes).map_err(OpError::device)?;
        Ok(buffer)
    }

    fn part_of(arenas: &Arc<[Arena; 3]>, place: Place, start: usize, bytes: usize) -> Self {
        let address = arenas[place as usize].base + start as u64;
        let memory = Allocation::Part { arenas: Arc::clone(arenas), place, start };
        Self { memory: Arc::new(memory), address, bytes: bytes.max(1) }
    }

    /// The bytes `start .. start + len`, which live as long as their holder or this one.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if the buffer ends before.
    pub fn part(&self, start: usize, len: usize) -> Result<Self, OpError> {
        self.check("part", start, len)?;
        let memory = Arc::clone(&self.memory);
        Ok(Self { memory, address: self.address + start as u64, bytes: len })
    }

    /// Address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether this is a part of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The device it lies on.
    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        self.memory.device()
    }

    /// The bytes from `start` on.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if the buffer ends before; [`OpError::Device`] if the copy fails.
    pub fn read(&self, start: usize, len: usize) -> Result<Vec<u8>, OpError> {
        self.check("read", start, len)?;
        let mut bytes = vec![0; len];
        self.device().read(self.address + start as u64, &mut bytes).map_err(OpError::device)?;
        Ok(bytes)
    }

    /// Overwrites the bytes from `start` on.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&self, start: usize, bytes: &[u8]) -> Result<(), OpError> {
        self.check("write", start, bytes.len())?;
        self.device().write(self.address + start as u64, bytes).map_err(OpError::device)
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// [`OpError::Device`] if the device fails.
    pub fn fill(&self, value: u8) -> Result<(), OpError> {
        self.device().fill(self.address, self.bytes, value).map_err(OpError::device)
    }

    fn check(&self, op: &'static str, start: usize, len: usize) -> Result<(), OpError> {
        let (got, limit) = (start.saturating_add(len), self.len());
        if got <= limit {
            return Ok(());
        }
        Err(OpError::OutOfRange { op, what: "device byte", got, limit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::rehearsal::Rehearsal;

    #[test]
    fn while_a_branch_is_open_nobody_gets_released_bytes() {
        let memory = Rehearsal::memory("sm_80");
        let buffer = || memory.buffer(Place::Workspace, 1000);
        let (first, last) = (buffer().unwrap(), buffer().unwrap());
        let address = first.address();
        let (side, main) = memory
            .beside(
                || {
                    drop(first);
                    buffer()
                },
                // Inside of a branch another pair runs in order.
                || memory.beside(buffer, buffer),
            )
            .unwrap();
        let addresses = [side.address(), main.0.address(), main.1.address()];
        assert!(!addresses.contains(&address), "{addresses:?} and {address}");
        assert_eq!(buffer().unwrap().address(), address);
        drop((last, side, main));
        assert_eq!(memory.used(Place::Workspace), 0);
    }

    #[test]
    fn a_branch_that_fails_is_closed() {
        let memory = Rehearsal::memory("sm_80");
        let full = || OpError::OutOfRange { op: "test", what: "byte", got: 1, limit: 0 };
        let outcome = memory.beside(|| Err::<(), _>(full()), || memory.buffer(Place::Workspace, 1));
        assert!(outcome.is_err());
        assert!(memory.arena(Place::Workspace).unwrap().1.used().held.is_none());
        assert_eq!(memory.used(Place::Workspace), 0);
    }
}
