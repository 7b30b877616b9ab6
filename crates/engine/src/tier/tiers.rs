//! Both lower tiers together: what is kept where, and loads on their way back.
//!
//! Runs on the engine's thread and never waits, except where told to. Availability in any tier is
//! reported to the scheduler as it changes.
//!
//! Not here: copying from and to the device (`step_loop`).

use std::collections::HashMap;
use std::sync::mpsc::TryRecvError;
use std::time::Duration;

use bytes::Bytes;
use fathom_scheduler::{BlockKey, Load, Save, SaveReason, Scheduler, StateKey, StateKind};
use xxhash_rust::xxh3::xxh3_128;

use super::TierConfig;
use super::directory::{CacheDirectory, DirectoryError};
use super::disk::{DiskStore, Namespace, write_file};
use super::host::HostTier;
use super::worker::{DiskCounts, DiskEvent, DiskWorker};
use crate::runner::StateLayout;
use crate::stats::TierCounts;

/// Bytes that may wait to be written to disk: seconds of publishing at full speed.
const QUEUE_BYTES: u64 = 256 << 20;

/// What the engine's thread knows about a state's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnDisk {
    Queued,
    Stored,
    /// It must not be used again, whatever events about it are still under way.
    Removing,
}

/// A load with what was found: `bytes[i]` belongs to `load.items[i]`.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) load: Load,
    pub(crate) bytes: Vec<Option<Bytes>>,
}

/// Host memory and disk below the device.
#[derive(Debug)]
pub(crate) struct Tiers {
    host: HostTier,
    disk: Option<DiskWorker>,
    on_disk: HashMap<StateKey, OnDisk>,
    /// Loads that wait for the disk.
    waiting: Vec<Arrived>,
    arrived: Vec<Arrived>,
    counts: TierCounts,
    /// Scratch.
    evicted: Vec<StateKey>,
}

impl Tiers {
    /// Opens the configured tiers, for state of `layout` that belongs to the model and numeric mode
    /// described by `model`. `None` if none is configured, or the only one is in use elsewhere. The
    /// second value is the seed for prefix keys if a directory dictates it.
    ///
    /// # Errors
    /// [`DirectoryError::Io`] if the cache directory cannot be used.
    pub(crate) fn open(
        config: &TierConfig,
        model: &str,
        layout: &StateLayout,
    ) -> Result<(Option<Self>, Option<u64>), DirectoryError> {
        let mut tiers = Self {
            host: HostTier::new(config.host_bytes),
            disk: None,
            on_disk: HashMap::new(),
            waiting: Vec::new(),
            arrived: Vec::new(),
            counts: TierCounts::default(),
            evicted: Vec::new(),
        };
        let directory = match config.directory.as_deref().map(CacheDirectory::open).transpose() {
            Err(error @ DirectoryError::InUse { .. }) => {
                tracing::warn!("{error}: running without the disk tier");
                None
            }
            directory => directory?,
        };
        let seed = directory.as_ref().map(CacheDirectory::seed);
        if let Some(directory) = directory {
            tiers.open_disk(directory, config.disk_bytes, model, layout)?;
        }
        let any = tiers.disk.is_some() || tiers.host.is_enabled();
        Ok((any.then_some(tiers), seed))
    }

    fn open_disk(
        &mut self,
        directory: CacheDirectory,
        limit_bytes: u64,
        model: &str,
        layout: &StateLayout,
    ) -> Result<(), DirectoryError> {
        let path = directory.path().to_owned();
        let failed = |doing| {
            let path = path.clone();
            move |source| DirectoryError::Io { path, doing, source }
        };
        let StateLayout { block_bytes, snapshot_bytes, format } = layout;
        let text = format!("{model}\n{format}\n{block_bytes}\n{snapshot_bytes}");
        let namespace = Namespace {
            hash: xxh3_128(text.as_bytes()),
            block_bytes: *block_bytes,
            snapshot_bytes: *snapshot_bytes,
        };
        let store = DiskStore::open(directory, namespace, limit_bytes, write_file)
            .map_err(failed("list it"))?;
        self.on_disk.extend(store.states().map(|state| (state, OnDisk::Stored)));
        tracing::info!(
            path = %path.display(),
            n_reusable = self.on_disk.len(),
            n_files = store.n_files(),
            bytes = store.used_bytes(),
            limit_bytes,
            "opened the cache directory"
        );
        let worker = DiskWorker::start(store, QUEUE_BYTES).map_err(failed("start its thread"))?;
        self.disk = Some(worker);
        Ok(())
    }

    /// Tells a new scheduler what there is.
    pub(crate) fn announce(&self, scheduler: &mut Scheduler) {
        self.on_disk.keys().for_each(|&state| scheduler.set_lower(state, true));
    }

    fn is_available(&self, state: StateKey) -> bool {
        self.host.contains(state) || self.on_disk.get(&state) == Some(&OnDisk::Stored)
    }

    fn wants_host(&self, save: &Save) -> bool {
        save.reason == SaveReason::Evicted
            && self.host.is_enabled()
            && !self.host.contains(save.state)
    }

    fn wants_disk(&self, save: &Save) -> bool {
        self.disk.is_some() && !self.on_disk.contains_key(&save.state)
    }

    /// Whether the bytes of `save` are of any use here.
    pub(crate) fn wants(&mut self, save: &Save) -> bool {
        self.host.touch(save.state);
        self.wants_host(save) || self.wants_disk(save)
    }

    /// Keeps the bytes of `save` where they are wanted and there is room.
    pub(crate) fn keep(&mut self, save: &Save, bytes: &Bytes, scheduler: &mut Scheduler) {
        let state = save.state;
        if self.wants_disk(save)
            && let Some(disk) = &self.disk
        {
            if disk.write(state, bytes.clone()) {
                self.on_disk.insert(state, OnDisk::Queued);
            } else {
                self.counts.disk_dropped += 1;
            }
        }
        if self.wants_host(save) && self.host.put(state, bytes.clone(), &mut self.evicted) {
            scheduler.set_lower(state, true);
            while let Some(evicted) = self.evicted.pop() {
                scheduler.set_lower(evicted, self.is_available(evicted));
            }
        }
    }

    /// Forgets `state` for good: what it holds may be wrong.
    pub(crate) fn forget(&mut self, state: StateKey) {
        self.host.remove(state);
        if let Some(disk) = &self.disk
            && let Some(on_disk) = self.on_disk.get_mut(&state)
            && *on_disk != OnDisk::Removing
        {
            *on_disk = OnDisk::Removing;
            disk.remove(state);
        }
    }

    /// Notes that a prefix was used. Its start is the last to be evicted.
    pub(crate) fn touch(&mut self, prefix: &[BlockKey]) {
        let Some(disk) = &self.disk else { return };
        let snapshot = prefix.last().map(|&key| StateKey { kind: StateKind::Snapshot, key });
        let blocks = prefix.iter().map(|&key| StateKey { kind: StateKind::Block, key });
        let used = snapshot.into_iter().chain(blocks.rev());
        disk.touch(used.filter(|state| self.on_disk.contains_key(state)).collect());
    }

    /// Starts a load: what host memory has is there at once.
    pub(crate) fn begin(&mut self, load: Load) {
        self.counts.loads += 1;
        let mut bytes = Vec::with_capacity(load.items.len());
        let mut wanted = Vec::new();
        for (index, item) in load.items.iter().enumerate() {
            let found = self.host.get(item.state);
            if found.is_some() {
                self.counts.host_hits += 1;
            } else {
                self.counts.host_misses += u64::from(self.host.is_enabled());
                if self.on_disk.get(&item.state) == Some(&OnDisk::Stored) {
                    wanted.push((index, item.state));
                }
            }
            bytes.push(found);
        }
        let (id, arrived) = (load.id, Arrived { load, bytes });
        match &self.disk {
            Some(disk) if !wanted.is_empty() => {
                disk.read(id, wanted);
                self.waiting.push(arrived);
            }
            _ => self.arrived.push(arrived),
        }
    }

    /// Whether a load has been begun and not been taken.
    pub(crate) const fn is_loading(&self) -> bool {
        !self.waiting.is_empty() || !self.arrived.is_empty()
    }

    /// Takes in what has happened on disk, waiting up to `timeout` for a load if none has arrived.
    pub(crate) fn poll(&mut self, mut timeout: Duration, scheduler: &mut Scheduler) {
        if !self.arrived.is_empty() {
            timeout = Duration::ZERO;
        }
        while let Some(disk) = &self.disk {
            match disk.event(timeout) {
                Ok(event) => self.note(event, scheduler),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.lose_disk(scheduler),
            }
            timeout = Duration::ZERO;
        }
    }

    fn note(&mut self, event: DiskEvent, scheduler: &mut Scheduler) {
        match event {
            DiskEvent::Stored(state) => {
                if self.on_disk.get(&state) != Some(&OnDisk::Removing) {
                    self.on_disk.insert(state, OnDisk::Stored);
                    scheduler.set_lower(state, true);
                }
            }
            DiskEvent::Gone(state) => {
                if self.on_disk.get(&state) != Some(&OnDisk::Removing) {
                    self.on_disk.remove(&state);
                    scheduler.set_lower(state, self.is_available(state));
                }
            }
            DiskEvent::Removed(state) => {
                self.on_disk.remove(&state);
            }
            DiskEvent::Read(id, found) => {
                let Some(place) = self.waiting.iter().position(|of| of.load.id == id) else {
                    return;
                };
                let mut arrived = self.waiting.remove(place);
                for (index, bytes) in found {
                    match bytes {
                        Some(_) => self.counts.disk_hits += 1,
                        None => self.counts.disk_misses += 1,
                    }
                    arrived.bytes[index] = bytes;
                }
                self.arrived.push(arrived);
            }
        }
    }

    /// Goes on without the disk: its thread has ended.
    fn lose_disk(&mut self, scheduler: &mut Scheduler) {
        tracing::error!("the disk tier of the cache has failed: going on without it");
        self.disk = None;
        for (state, _) in std::mem::take(&mut self.on_disk) {
            scheduler.set_lower(state, self.host.contains(state));
        }
        self.arrived.append(&mut self.waiting);
    }

    /// A load that has arrived, as far as it was found.
    pub(crate) fn take_arrived(&mut self) -> Option<Arrived> {
        self.arrived.pop()
    }

    /// Gauges and counters.
    pub(crate) fn counts(&self) -> TierCounts {
        let disk = self.disk.as_ref().map_or_else(DiskCounts::default, DiskWorker::counts);
        TierCounts {
            host_items: self.host.len() as u64,
            host_bytes: self.host.used_bytes(),
            disk_items: disk.files,
            disk_bytes: disk.bytes,
            disk_damaged: disk.damaged,
            disk_written_bytes: disk.written_bytes,
            disk_read_bytes: disk.read_bytes,
            disk_write_errors: disk.write_errors,
            ..self.counts
        }
    }
}
