//! Copies between the runner's cache memory and its lower tiers, as the scheduler asks for them.
//!
//! One batch of copies down before every step, while everything the plan may overwrite is still
//! there, and one batch up for every load that has arrived.
//!
//! Not here: what is copied (`scheduler`), where it is kept (`tier`).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fathom_scheduler::{Save, Scheduler, StateKey, StateKind, StepPlan};

use crate::config::EngineConfig;
use crate::runner::{StateRef, StepError, StepRunner};
use crate::stats::TierCounts;
use crate::step_loop::guard;
use crate::tier::{Arrived, DirectoryError, Tiers};

/// The lower tiers of one engine, if it has any, and scratch memory.
#[derive(Debug, Default)]
pub(crate) struct TierCopies {
    tiers: Option<Tiers>,
    saves: Vec<Save>,
    drops: Vec<StateKey>,
    items: Vec<StateRef>,
    bytes: Vec<Bytes>,
}

impl TierCopies {
    /// Opens the tiers that `config` names. If a cache directory is among them, its seed becomes the
    /// configuration's.
    ///
    /// # Errors
    /// [`DirectoryError::Io`] if the cache directory cannot be used.
    pub(crate) fn open(
        config: &mut EngineConfig,
        runner: &dyn StepRunner,
    ) -> Result<Self, DirectoryError> {
        if config.tiers.host_bytes == 0 && config.tiers.directory.is_none() {
            return Ok(Self::default());
        }
        let layout = runner.state_layout();
        let reuses = config.prefix_cache && runner.capacity().n_snapshots > 0;
        let Some(layout) = layout.filter(|_| reuses) else {
            tracing::warn!("prefixes are not reused: the lower tiers of the cache stay unused");
            return Ok(Self::default());
        };
        let (tiers, seed) = Tiers::open(&config.tiers, &config.cache_namespace, &layout)?;
        config.cache_seed = seed.unwrap_or(config.cache_seed);
        Ok(Self { tiers, ..Self::default() })
    }

    /// Whether there is a tier.
    pub(crate) const fn is_enabled(&self) -> bool {
        self.tiers.is_some()
    }

    /// Tells a new scheduler what there is.
    pub(crate) fn announce(&self, scheduler: &mut Scheduler) {
        if let Some(tiers) = &self.tiers {
            tiers.announce(scheduler);
        }
    }

    /// Copies what the scheduler offers, as far as a tier wants it.
    ///
    /// # Errors
    /// [`StepError`] if the runner cannot be read: its memory cannot be trusted.
    pub(crate) fn copy_down(
        &mut self,
        scheduler: &mut Scheduler,
        runner: &mut dyn StepRunner,
    ) -> Result<(), StepError> {
        let Some(tiers) = &mut self.tiers else { return Ok(()) };
        scheduler.take_drops(&mut self.drops);
        scheduler.take_saves(&mut self.saves);
        let drops = &self.drops;
        self.saves.retain(|save| !drops.contains(&save.state) && tiers.wants(save));
        for state in self.drops.drain(..) {
            tiers.forget(state);
        }
        if self.saves.is_empty() {
            return Ok(());
        }
        self.items.clear();
        self.items.extend(self.saves.iter().map(|save| on_device(save.state, save.id)));
        let (items, bytes) = (&self.items, &mut self.bytes);
        let result = guard(|| runner.read_state(items, bytes));
        for (save, bytes) in self.saves.drain(..).zip(self.bytes.drain(..)) {
            if result.is_ok() {
                tiers.keep(&save, &bytes, scheduler);
            }
        }
        result
    }

    /// Starts the loads of a plan, and notes which prefixes it uses.
    pub(crate) fn start_loads(&mut self, scheduler: &Scheduler, plan: &mut StepPlan) {
        let Some(tiers) = &mut self.tiers else { return };
        for restore in &plan.restores {
            tiers.touch(scheduler.prefix_keys(restore.index, restore.position));
        }
        plan.loads.drain(..).for_each(|load| tiers.begin(load));
    }

    /// Whether loads are under way.
    pub(crate) fn is_loading(&self) -> bool {
        self.tiers.as_ref().is_some_and(Tiers::is_loading)
    }

    /// Writes what has arrived to the device, waiting up to `timeout` for the first of it.
    ///
    /// # Errors
    /// [`StepError`] if the runner cannot be written: its memory cannot be trusted.
    pub(crate) fn bring_up(
        &mut self,
        timeout: Duration,
        scheduler: &mut Scheduler,
        runner: &mut dyn StepRunner,
    ) -> Result<(), StepError> {
        let Some(tiers) = &mut self.tiers else { return Ok(()) };
        tiers.poll(timeout, scheduler);
        while let Some(Arrived { load, bytes }) = tiers.take_arrived() {
            let found: Vec<bool> = bytes.iter().map(Option::is_some).collect();
            let items = load.items.iter().zip(bytes).filter_map(|(item, bytes)| {
                bytes.map(|bytes| (on_device(item.state, item.id), bytes))
            });
            let items = Arc::new(items.collect::<Vec<_>>());
            let written = guard(|| runner.write_state(&items));
            let arrived: Vec<bool> = found.iter().map(|&found| found && written.is_ok()).collect();
            scheduler.finish_load(load.id, &arrived);
            written?;
        }
        Ok(())
    }

    /// Gauges and counters.
    pub(crate) fn counts(&self) -> TierCounts {
        self.tiers.as_ref().map_or_else(TierCounts::default, Tiers::counts)
    }
}

const fn on_device(state: StateKey, id: u32) -> StateRef {
    match state.kind {
        StateKind::Block => StateRef::Block(id),
        StateKind::Snapshot => StateRef::Snapshot(id),
    }
}
