//! One sequence: its tokens, what of them has been computed, and what it holds.
//!
//! Invariants:
//! - `n_computed < tokens.len()` always: the newest token is input of the next step;
//! - a sequence holds a slot and blocks exactly while it runs; its blocks cover what was computed
//!   and what the current step computes;
//! - tokens are only ever appended, so keys once derived stay right, also through preemption.

use std::time::Duration;

use fathom_core::{FinishReason, RequestId, TokenId};

use crate::BLOCK_TOKENS;
use crate::keys::BlockKey;
use crate::lower::LoadId;

/// What the scheduler must know about a request.
#[derive(Debug, Clone)]
pub struct SequenceSpec<'a> {
    /// The request's number.
    pub id: RequestId,
    /// Its tokens; at least one.
    pub prompt: Vec<TokenId>,
    /// Most tokens to generate, at least 1; cut to what the context allows.
    pub max_tokens: u32,
    /// Lower runs earlier.
    pub priority: i32,
    /// Whom the work is charged to.
    pub user: Option<&'a str>,
    /// Prefixes are shared only under equal salts.
    pub cache_salt: Option<&'a str>,
}

/// A sequence's number inside the scheduler: small, dense, reused after the sequence has ended.
pub type SequenceIndex = u32;

/// How far a request had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Never started.
    Queued,
    /// Started, but no token was produced yet.
    Prefill,
    /// It produces tokens.
    Decode,
}

/// Why a sequence left the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// As it should, or cancelled.
    Finished(FinishReason),
    /// It was never started, for this long.
    QueueTimeout {
        /// Time since submission.
        waited: Duration,
    },
    /// Its step or its sampling failed; the caller knows why.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The entry is unused.
    Vacant,
    /// Waiting, with nothing held: never started, or preempted.
    Waiting,
    /// Running, with known tokens left to compute.
    Prefill,
    /// Running, one token to compute.
    Decode,
}

/// The last snapshot that a sequence took of its own progress, replaced by the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rolling {
    pub(crate) snapshot: u32,
    pub(crate) key: BlockKey,
}

/// One sequence of the scheduler.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) state: State,
    pub(crate) priority: i32,
    /// Order of submission.
    pub(crate) arrival: u64,
    pub(crate) account: u32,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) n_prompt: u32,
    /// Length at which generation ends.
    pub(crate) max_len: u32,
    pub(crate) n_computed: u32,
    pub(crate) slot: u32,
    pub(crate) blocks: Vec<u32>,
    pub(crate) root: BlockKey,
    pub(crate) keys: Vec<BlockKey>,
    pub(crate) n_published: u32,
    pub(crate) rolling: Option<Rolling>,
    /// Tokens skipped when it was first started.
    pub(crate) cached_tokens: u32,
    pub(crate) started: bool,
    /// Tokens below this were charged to the user; running them again is free.
    pub(crate) charged: u32,
    /// Prefill tokens granted in the plan being made.
    pub(crate) granted: u32,
    /// Draft tokens it wants to run in its next decode step.
    pub(crate) n_drafts: u32,
    /// Key of the block that ended exactly where the last committed step did.
    pub(crate) boundary: Option<BlockKey>,
    /// It is part of a plan that was not committed yet.
    pub(crate) in_flight: bool,
    pub(crate) cancelled: bool,
    /// Cache version at which it did not fit.
    pub(crate) blocked_at: u64,
    /// The load it waits for.
    pub(crate) load: Option<LoadId>,
    /// Loads since it was last started.
    pub(crate) n_loads: u32,
}

impl Sequence {
    /// Prompt and generated tokens so far.
    #[must_use]
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Tokens of the prompt.
    #[must_use]
    pub const fn n_prompt(&self) -> u32 {
        self.n_prompt
    }

    /// Prompt tokens that were skipped when the sequence was first started.
    #[must_use]
    pub const fn cached_tokens(&self) -> u32 {
        self.cached_tokens
    }

    /// The KV blocks it holds, in order of position.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    pub(crate) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    pub(crate) fn n_generated(&self) -> u32 {
        self.len() - self.n_prompt
    }

    /// How far the request has come, as its client sees it.
    pub(crate) fn phase(&self) -> Phase {
        if !self.started {
            Phase::Queued
        } else if self.n_generated() == 0 {
            Phase::Prefill
        } else {
            Phase::Decode
        }
    }

    /// Draft tokens that its next decode step could run: none after which the sequence would be too
    /// long if all were accepted, and none past the next block boundary, where a snapshot may be due
    /// that could not be taken of a step that ran further.
    #[must_use]
    pub fn room_for_drafts(&self) -> u32 {
        let boundary = (self.n_computed / BLOCK_TOKENS + 1) * BLOCK_TOKENS;
        boundary.min(self.max_len - 1).saturating_sub(self.n_computed + 1)
    }

    /// Draft tokens that the decode step being planned runs, of those it wanted, at most `budget`.
    pub(crate) fn take_drafts(&mut self, budget: u32) -> u32 {
        let wanted = std::mem::take(&mut self.n_drafts);
        wanted.min(budget).min(self.room_for_drafts())
    }

    /// Where the next prefill chunk must end at the latest: at the next position where a snapshot
    /// is due, else after the last known token.
    pub(crate) fn chunk_limit(&self, snapshot_interval: Option<u32>) -> u32 {
        let Some(interval) = snapshot_interval else { return self.len() };
        let after = |due: u32| if due > self.n_computed { due } else { self.len() };
        let regular = (self.n_computed / interval + 1) * interval;
        self.len().min(regular).min(after(self.last_shared_boundary()))
    }

    /// The last block boundary at which an identical prompt could resume: at least one token must
    /// be left to compute.
    pub(crate) fn last_shared_boundary(&self) -> u32 {
        let last = self.len() - 1;
        last - last % BLOCK_TOKENS
    }
}
