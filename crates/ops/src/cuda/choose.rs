//! Choosing tokens on the device: launchers of `sample/choose.cu`.
//!
//! Choices are queued behind the step that made the logits: one copy brings all lists, one launch
//! chooses, one copy takes what was chosen.
//!
//! Not here: what a request has seen and what its grammar allows (the engine keeps both), when an
//! answer ends.

use fathom_core::{TokenId, TokenLogprob};

use super::device::Arg;
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::tensor::{DeviceTensor, Element, f32_values, u32_bytes, u32_values};
use crate::error::check_len;
use crate::sample::{Beside, Choice, ChoiceOps, Chosen, RowChoice, penalises};
use crate::{Backend, OpError};

/// Threads of a block, shared memory of `ChooseShared`.
const THREADS: u32 = 512;
const CHOOSE_SHARED: u32 = 256 * 8 + 512 * 8 + 512 * 4 + 3 * 16 * 4 + 16;
/// Most likely tokens that can be reported beside the chosen one.
pub const MAX_TOP: usize = 20;
const NONE: u32 = u32::MAX;
const OP: &str = "choose_tokens";
/// Words of `Row`.
const ROW_WORDS: usize = 20;
/// Words that the kernel writes per row.
const OUT_WORDS: usize = 3 + 2 * MAX_TOP;

/// Rows and lists as the kernel reads them.
#[derive(Default)]
struct Tables {
    rows: Vec<u32>,
    seen: Vec<u32>,
    bias: Vec<u32>,
    forbidden: Vec<u32>,
    masks: Vec<u32>,
}

impl Tables {
    /// Adds row `source` of the logits.
    fn push(&mut self, source: u32, row: &RowChoice<'_>) {
        let p = row.params;
        let seen = if penalises(p) { row.seen } else { &[] };
        let first_mask = row.mask.map_or(NONE, |_| self.masks.len() as u32);
        self.rows.extend([p.temperature, p.top_p, p.min_p].map(f32::to_bits));
        self.rows.push(p.top_k);
        let penalties = [p.repetition_penalty, p.frequency_penalty, p.presence_penalty];
        self.rows.extend(penalties.map(f32::to_bits));
        self.rows.extend([p.seed as u32, (p.seed >> 32) as u32, p.choice, row.position]);
        self.rows.extend([self.seen.len() as u32 / 2, seen.len() as u32]);
        self.rows.extend([self.bias.len() as u32 / 2, p.logit_bias.len() as u32]);
        self.rows.extend([self.forbidden.len() as u32, row.forbidden.len() as u32, first_mask]);
        self.rows.extend([p.logprobs.unwrap_or(NONE), source]);
        self.seen.extend(seen.iter().flat_map(|&(token, count)| [token, count]));
        self.bias.extend(p.logit_bias.iter().flat_map(|&(token, value)| [token, value.to_bits()]));
        self.forbidden.extend_from_slice(row.forbidden);
        self.masks.extend_from_slice(row.mask.unwrap_or_default());
    }

    /// All of them, back to back: pairs first, so that each is aligned to its size.
    const fn parts(&self) -> [&Vec<u32>; 5] {
        [&self.rows, &self.seen, &self.bias, &self.forbidden, &self.masks]
    }
}

/// What choosing takes on the device, for `n` rows.
struct Room {
    tables: Buffer,
    shaped: Buffer,
    /// Tokens, states, log-probabilities, likeliest tokens: `[n]`, `[n]`, `[n, 21]`, `[n, 20]`.
    out: Buffer,
}

/// What a launch chooses by, and where it leaves what it chose.
pub(crate) struct Prepared {
    room: Room,
    /// Settings, counts of seen tokens, biases, forbidden tokens and masks.
    lists: [Arg; 5],
    n: usize,
}

/// Words of the lists of one row, without its mask.
fn list_words(row: &RowChoice<'_>) -> usize {
    let n_seen = if penalises(row.params) { row.seen.len() } else { 0 };
    2 * (n_seen + row.params.logit_bias.len()) + row.forbidden.len()
}

/// Whether the device chooses for a row: more log-probabilities than it keeps room for, or lists that
/// are a large part of what they would save, are the host's.
fn can_choose(row: &RowChoice<'_>, vocab: usize) -> bool {
    row.params.logprobs.unwrap_or(0) as usize <= MAX_TOP && list_words(row) <= most_words(vocab)
}

/// The longest lists of a row that the device chooses for.
const fn most_words(vocab: usize) -> usize {
    vocab / 4
}

impl CudaOps {
    fn room(&self, n: usize, vocab: usize, table_words: usize) -> Result<Room, OpError> {
        Ok(Room {
            tables: self.buffer(4 * table_words)?,
            shaped: self.buffer(4 * n * vocab)?,
            out: self.buffer(4 * n * OUT_WORDS)?,
        })
    }

    /// Takes the memory that choosing for every row of `logits` could take, and gives it back.
    ///
    /// # Errors
    /// [`OpError::Device`] if there is not as much.
    pub fn rehearse_choices(&self, logits: &DeviceTensor) -> Result<(), OpError> {
        let (n, vocab) = (logits.rows, logits.cols);
        let words = ROW_WORDS + most_words(vocab) + vocab.div_ceil(32);
        self.room(n, vocab, n * words).map(drop)
    }

    /// Chooses a token for each row of `logits [rows, vocab]` f32, which stay as they are.
    ///
    /// # Errors
    /// [`OpError::Shape`] if there is not one choice per row or a mask has the wrong length;
    /// [`OpError::OutOfRange`] if more log-probabilities are asked for than [`MAX_TOP`];
    /// [`OpError::Device`] if the device failed.
    pub fn choose_tokens(
        &self,
        logits: &DeviceTensor,
        rows: &[RowChoice<'_>],
    ) -> Result<Vec<Choice>, OpError> {
        check_len(OP, "rows", rows.len(), logits.rows)?;
        let rows: Vec<_> = (0..).zip(rows.iter().copied()).collect();
        self.choose_some(logits, &rows, &mut || ())
    }

    /// `rows` in device memory, to be launched for all rows of `logits` as often as wanted. For benches.
    pub(crate) fn prepare_choices(
        &self,
        vocab: usize,
        rows: &[RowChoice<'_>],
    ) -> Result<Prepared, OpError> {
        let mut tables = Tables::default();
        for (source, row) in (0..).zip(rows) {
            tables.push(source, row);
        }
        self.prepared_choices(&tables, rows.len(), vocab)
    }

    fn prepared_choices(
        &self,
        tables: &Tables,
        n: usize,
        vocab: usize,
    ) -> Result<Prepared, OpError> {
        let parts = tables.parts();
        let words: Vec<u32> = parts.into_iter().flatten().copied().collect();
        let room = self.room(n, vocab, words.len())?;
        room.tables.write(0, &u32_bytes(&words))?;
        let mut address = room.tables.address();
        let lists = parts.map(|part| {
            let start = address;
            address += 4 * part.len() as u64;
            Arg::Address(start)
        });
        Ok(Prepared { room, lists, n })
    }

    /// Chooses for every row of `prepared` and waits for nothing.
    pub(crate) fn launch_choices(
        &self,
        logits: &DeviceTensor,
        prepared: &Prepared,
    ) -> Result<(), OpError> {
        let Prepared { room, lists, n } = prepared;
        let vocab = logits.cols;
        check_len(OP, "room for weights", room.shaped.len(), (4 * n * vocab).max(1))?;
        let at = |words: usize| Arg::Address(room.out.address() + 4 * (words * n) as u64);
        let mut args = vec![Arg::from(&logits.values)];
        args.extend(lists);
        args.push((&room.shaped).into());
        args.extend([at(0), at(1), at(2), at(3 + MAX_TOP), (vocab as u32).into()]);
        // SAFETY: each row's source is a row of the logits (callers count them); `shaped` is [n,
        // vocab] f32; each row's lists lie in the tables, masks have a bit per token; `out` holds 2 +
        // 21 + 20 words per row.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [*n, 1, 1],
                threads: THREADS,
                shared_bytes: CHOOSE_SHARED,
                args: &args,
            })
        }
    }

    /// Chooses a token for some rows of `logits [.., vocab]` f32.
    fn choose_some(
        &self,
        logits: &DeviceTensor,
        rows: &[(u32, RowChoice<'_>)],
        beside: &mut Beside<'_>,
    ) -> Result<Vec<Choice>, OpError> {
        let (n, vocab) = (rows.len(), logits.cols);
        logits.expect(OP, "logits", logits.rows, vocab.max(1), Element::F32)?;
        if n == 0 {
            beside();
            return Ok(Vec::new());
        }
        let mut tables = Tables::default();
        for (source, row) in rows {
            if let Some(mask) = row.mask {
                check_len(OP, "words of a mask", mask.len(), vocab.div_ceil(32))?;
            }
            let got = row.params.logprobs.unwrap_or(0) as usize;
            if got > MAX_TOP {
                let what = "log-probability";
                return Err(OpError::OutOfRange { op: OP, what, got, limit: MAX_TOP });
            }
            tables.push(*source, row);
        }
        let prepared = self.prepared_choices(&tables, n, vocab)?;
        self.launch_choices(logits, &prepared)?;
        let room = prepared.room;
        beside();
        let reports = rows.iter().any(|(_, row)| row.params.logprobs.is_some());
        // The first words of all rows are their tokens and states.
        let bytes = room.out.read(0, 4 * n * if reports { OUT_WORDS } else { 2 })?;
        let (words, floats) = (u32_values(&bytes), f32_values(&bytes));
        let logprob = |row: usize, n_top: usize| {
            let values = &floats[2 * n + row * (MAX_TOP + 1)..];
            let tokens = &words[(3 + MAX_TOP) * n + row * MAX_TOP..];
            let top = tokens.iter().copied().zip(values[1..].iter().copied());
            TokenLogprob { logprob: values[0], top: top.take(n_top.min(vocab)).collect() }
        };
        let choice = |(index, (_, row)): (usize, &(u32, RowChoice<'_>))| match words[n + index] {
            0 => {
                let n_top = row.params.logprobs;
                Choice::Token(words[index], n_top.map(|n_top| logprob(index, n_top as usize)))
            }
            1 => Choice::NotFinite,
            _ => Choice::NothingAllowed,
        };
        Ok(rows.iter().enumerate().map(choice).collect())
    }

    /// How many leading rows of each range `(first row, rows)` have the token of `tokens` that was
    /// drafted for them; `tokens` and `drafts` are `[rows]` u32.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if a range leaves the rows; [`OpError::Device`] if the device failed.
    pub fn verify_drafts(
        &self,
        tokens: &Buffer,
        drafts: &[TokenId],
        ranges: &[(u32, u32)],
    ) -> Result<Vec<u32>, OpError> {
        const OP: &str = "verify_drafts";
        check_len(OP, "tokens", tokens.len(), (4 * drafts.len()).max(1))?;
        for &(first, n) in ranges {
            let (got, limit) = (first as usize + n as usize, drafts.len());
            if got > limit {
                return Err(OpError::OutOfRange { op: OP, what: "drafted row", got, limit });
            }
        }
        let words: Vec<u32> = ranges.iter().flat_map(|&(first, n)| [first, n]).collect();
        let (drafts, list) =
            (self.uploaded(&u32_bytes(drafts))?, self.uploaded(&u32_bytes(&words))?);
        let accepted = self.buffer(4 * ranges.len())?;
        // SAFETY: ranges lie inside of tokens and drafts (checked above); a count per range.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [ranges.len().div_ceil(128), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    tokens.into(),
                    (&drafts).into(),
                    (&list).into(),
                    (&accepted).into(),
                    (ranges.len() as u32).into(),
                ],
            })?;
        }
        Ok(u32_values(&accepted.read(0, 4 * ranges.len())?))
    }
}

impl ChoiceOps for CudaOps {
    fn chooses_tokens(&self) -> bool {
        true
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn choose_rows(
        &self,
        logits: &DeviceTensor,
        rows: &[Option<RowChoice<'_>>],
        beside: &mut Beside<'_>,
    ) -> Result<Chosen, OpError> {
        if rows.is_empty() {
            beside();
            return Ok(Chosen { choices: Vec::new(), logits: self.download(logits)? });
        }
        check_len(OP, "rows", rows.len(), logits.rows)?;
        let known = (0..).zip(rows).filter_map(|(index, row)| Some((index, (*row)?)));
        let chosen: Vec<_> = known.filter(|(_, row)| can_choose(row, logits.cols)).collect();
        let mut choices = vec![None; rows.len()];
        for ((index, _), choice) in chosen.iter().zip(self.choose_some(logits, &chosen, beside)?) {
            choices[*index as usize] = Some(choice);
        }
        let mut left = Vec::new();
        let mut next = 0;
        // Neighbours are copied at once.
        for run in choices.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let row_bytes = 4 * logits.cols;
            if run[0].is_none() {
                let bytes = logits.values.read(next * row_bytes, run.len() * row_bytes)?;
                left.extend(f32_values(&bytes));
            }
            next += run.len();
        }
        Ok(Chosen { choices, logits: left })
    }
}
