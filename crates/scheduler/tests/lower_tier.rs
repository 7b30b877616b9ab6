//! A lower tier for the model engine: bounded, slow, and it loses things.

use std::collections::HashMap;

use fathom_scheduler::{BLOCK_TOKENS, Load, Save, Scheduler, StateKey, StateKind, StepPlan};

use crate::model_engine::Device;

/// What a block or a snapshot holds.
#[derive(Debug, Clone, PartialEq)]
enum Content {
    Block(Vec<u64>),
    Snapshot((u64, u32)),
}

/// Keeps the newest `capacity` pieces.
#[derive(Debug, Clone)]
pub(crate) struct Lower {
    capacity: usize,
    /// Steps that a load takes.
    delay: u32,
    /// Every so many items that are loaded, one turns out to be damaged; 0 is never.
    damage: u32,
    content: HashMap<StateKey, Content>,
    /// Oldest first.
    order: Vec<StateKey>,
    loads: Vec<(u32, Load)>,
    pub(crate) n_loaded: u32,
}

impl Lower {
    pub(crate) fn new(capacity: usize, delay: u32, damage: u32) -> Self {
        let (content, order) = (HashMap::new(), Vec::new());
        Self { capacity, delay, damage, content, order, loads: Vec::new(), n_loaded: 0 }
    }

    /// Tells a new scheduler what is there.
    pub(crate) fn announce(&self, scheduler: &mut Scheduler) {
        self.order.iter().for_each(|&state| scheduler.set_lower(state, true));
    }

    /// Copies what the scheduler offers, and takes the loads of the plan.
    pub(crate) fn copy_down(
        &mut self,
        scheduler: &mut Scheduler,
        device: &Device,
        plan: &StepPlan,
    ) {
        let (mut saves, mut drops) = (Vec::new(), Vec::new());
        scheduler.take_saves(&mut saves);
        scheduler.take_drops(&mut drops);
        for save in saves {
            self.save(scheduler, &save, read(device, &save));
        }
        for state in drops {
            self.forget(scheduler, state);
        }
        self.loads.extend(plan.loads.iter().map(|load| (self.delay, load.clone())));
    }

    fn save(&mut self, scheduler: &mut Scheduler, save: &Save, content: Content) {
        if let Some(old) = self.content.get(&save.state) {
            assert_eq!(*old, content, "equal keys mean equal content");
            return;
        }
        if self.order.len() == self.capacity {
            let oldest = self.order[0];
            self.forget(scheduler, oldest);
        }
        self.content.insert(save.state, content);
        self.order.push(save.state);
        scheduler.set_lower(save.state, true);
    }

    fn forget(&mut self, scheduler: &mut Scheduler, state: StateKey) {
        self.content.remove(&state);
        self.order.retain(|&other| other != state);
        scheduler.set_lower(state, false);
    }

    /// Ends loads whose time has come, or all; returns whether there were any.
    pub(crate) fn finish_loads(
        &mut self,
        scheduler: &mut Scheduler,
        device: &mut Device,
        all: bool,
    ) -> bool {
        let loads = std::mem::take(&mut self.loads);
        let n_before = loads.len();
        for (left, load) in loads {
            if left > 0 && !all {
                self.loads.push((left - 1, load));
                continue;
            }
            let arrived: Vec<bool> = load
                .items
                .iter()
                .map(|item| {
                    self.n_loaded += 1;
                    if self.damage > 0 && self.n_loaded.is_multiple_of(self.damage) {
                        self.forget(scheduler, item.state);
                    }
                    let content = self.content.get(&item.state);
                    content.is_some_and(|content| {
                        write(device, item.id, content);
                        true
                    })
                })
                .collect();
            scheduler.finish_load(load.id, &arrived);
        }
        self.loads.len() < n_before
    }
}

fn rows(block: u32) -> std::ops::Range<usize> {
    let start = (block * BLOCK_TOKENS) as usize;
    start..start + BLOCK_TOKENS as usize
}

fn read(device: &Device, save: &Save) -> Content {
    match save.state.kind {
        StateKind::Block => Content::Block(device.rows[rows(save.id)].to_vec()),
        StateKind::Snapshot => Content::Snapshot(device.snapshots[save.id as usize]),
    }
}

fn write(device: &mut Device, id: u32, content: &Content) {
    match content {
        Content::Block(values) => device.rows[rows(id)].copy_from_slice(values),
        Content::Snapshot(state) => device.snapshots[id as usize] = *state,
    }
}
