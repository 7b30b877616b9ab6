//! Choosing tokens on the device: launchers of `sample/choose.cu`.
//!
//! Not here: what a request has seen and what its grammar allows (the engine keeps both), when an
//! answer ends.

use fathom_core::{SamplingParams, TokenId, TokenLogprob};

use super::device::Arg;
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::tensor::{DeviceTensor, Element, f32_values, u32_bytes, u32_values};
use crate::OpError;
use crate::error::check_len;

/// Threads of a block, shared memory of `ChooseShared`.
const THREADS: u32 = 512;
const CHOOSE_SHARED: u32 = 256 * 8 + 512 * 8 + 512 * 4 + 3 * 16 * 4 + 16;
/// Most likely tokens that can be reported beside the chosen one.
pub const MAX_TOP: usize = 20;
const NONE: u32 = u32::MAX;

/// How the token after one row of logits is chosen.
#[derive(Debug, Clone, Copy)]
pub struct RowChoice<'a> {
    /// Temperature, filters, penalties, bias, seed. Stop tokens and lengths are not looked at.
    pub params: &'a SamplingParams,
    /// Position of the token to choose.
    pub position: u32,
    /// Tokens that penalties concern, each once, with how often they were generated.
    pub seen: &'a [(TokenId, u32)],
    /// One bit per token, set where it is allowed; all are without it.
    pub mask: Option<&'a [u32]>,
    /// Tokens that may not come now.
    pub forbidden: &'a [TokenId],
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Choice {
    /// The token, and its log-probabilities if the parameters ask for them.
    Token(TokenId, Option<TokenLogprob>),
    /// A logit is NaN or infinite.
    NotFinite,
    /// Every token is forbidden.
    NothingAllowed,
}

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
    fn push(&mut self, row: &RowChoice<'_>) {
        let p = row.params;
        let penalises =
            p.repetition_penalty != 1.0 || p.frequency_penalty != 0.0 || p.presence_penalty != 0.0;
        let seen = if penalises { row.seen } else { &[] };
        let first_mask = row.mask.map_or(NONE, |_| self.masks.len() as u32);
        self.rows.extend([p.temperature, p.top_p, p.min_p].map(f32::to_bits));
        self.rows.push(p.top_k);
        let penalties = [p.repetition_penalty, p.frequency_penalty, p.presence_penalty];
        self.rows.extend(penalties.map(f32::to_bits));
        self.rows.extend([p.seed as u32, (p.seed >> 32) as u32, p.choice, row.position]);
        self.rows.extend([self.seen.len() as u32 / 2, seen.len() as u32]);
        self.rows.extend([self.bias.len() as u32 / 2, p.logit_bias.len() as u32]);
        self.rows.extend([self.forbidden.len() as u32, row.forbidden.len() as u32, first_mask]);
        self.rows.extend([p.logprobs.unwrap_or(NONE), 0]);
        self.seen.extend(seen.iter().flat_map(|&(token, count)| [token, count]));
        self.bias.extend(p.logit_bias.iter().flat_map(|&(token, value)| [token, value.to_bits()]));
        self.forbidden.extend_from_slice(row.forbidden);
        self.masks.extend_from_slice(row.mask.unwrap_or_default());
    }
}

impl CudaOps {
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
        const OP: &str = "choose_tokens";
        let vocab = logits.cols;
        logits.expect(OP, "logits", rows.len(), vocab.max(1), Element::F32)?;
        let mut tables = Tables::default();
        for row in rows {
            if let Some(mask) = row.mask {
                check_len(OP, "words of a mask", mask.len(), vocab.div_ceil(32))?;
            }
            let got = row.params.logprobs.unwrap_or(0) as usize;
            if got > MAX_TOP {
                let what = "log-probability";
                return Err(OpError::OutOfRange { op: OP, what, got, limit: MAX_TOP });
            }
            tables.push(row);
        }
        let list = |words: &[u32]| self.uploaded(&u32_bytes(words));
        let (settings, seen) = (list(&tables.rows)?, list(&tables.seen)?);
        let (bias, forbidden) = (list(&tables.bias)?, list(&tables.forbidden)?);
        let masks = list(&tables.masks)?;
        let shaped = self.tensor(rows.len(), vocab, Element::F32)?;
        // Tokens, status, log-probabilities, likeliest tokens: read back at once.
        let n = rows.len();
        let out = self.buffer(4 * n * (3 + 2 * MAX_TOP))?;
        let at = |words: usize| Arg::Address(out.address() + 4 * (words * n) as u64);
        // SAFETY: logits and `shaped` are [n, vocab] f32; each row's lists lie in the tables made
        // above, masks have a bit per token; `out` holds 2 + 21 + 20 words per row.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [n, 1, 1],
                threads: THREADS,
                shared_bytes: CHOOSE_SHARED,
                args: &[
                    (&logits.values).into(),
                    (&settings).into(),
                    (&seen).into(),
                    (&bias).into(),
                    (&forbidden).into(),
                    (&masks).into(),
                    (&shaped.values).into(),
                    at(0),
                    at(1),
                    at(2),
                    at(3 + MAX_TOP),
                    (vocab as u32).into(),
                ],
            })?;
        }
        if n == 0 {
            return Ok(Vec::new());
        }
        let bytes = out.read(0, 4 * n * (3 + 2 * MAX_TOP))?;
        let (words, floats) = (u32_values(&bytes), f32_values(&bytes));
        let logprob = |row: usize, n_top: usize| {
            let values = &floats[2 * n + row * (MAX_TOP + 1)..];
            let tokens = &words[(3 + MAX_TOP) * n + row * MAX_TOP..];
            let top = tokens.iter().copied().zip(values[1..].iter().copied());
            TokenLogprob { logprob: values[0], top: top.take(n_top.min(vocab)).collect() }
        };
        Ok((0..n)
            .map(|row| match words[n + row] {
                0 => {
                    let n_top = rows[row].params.logprobs;
                    Choice::Token(words[row], n_top.map(|n_top| logprob(row, n_top as usize)))
                }
                1 => Choice::NotFinite,
                _ => Choice::NothingAllowed,
            })
            .collect())
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
