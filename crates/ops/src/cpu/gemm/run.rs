//! Several products at once: `x` packed, the work divided among threads.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::isa::{Block, GROUP, Level};
use super::kernel::{PANEL_TOKENS, Product, STRIP, Scratch};
use super::linear::CpuLinear;
use super::pack::Pack;
use crate::OpError;
use crate::error::check_len;

/// Fewer multiply-adds than this in all run on the calling thread: waking another costs more.
const INLINE_MULTIPLY_ADDS: usize = 100_000;
/// A piece of work for one thread is not made smaller than this.
const PIECE_MULTIPLY_ADDS: usize = 1 << 18;
/// Pieces per thread, so that a thread that is held up does not hold up the others.
const PIECES_PER_THREAD: usize = 4;

/// One product: `out [n, rows] = x [n, cols] W^T`, row-major.
#[derive(Debug)]
pub struct Job<'a> {
    /// `W [rows, cols]`.
    pub linear: &'a CpuLinear,
    /// `[n, cols]`.
    pub x: &'a [f32],
    /// `[n, rows]`.
    pub out: &'a mut [f32],
}

/// Runs products together, so that the thread pool is entered once.
///
/// Neither the other jobs nor the number of threads changes any result.
///
/// # Errors
/// [`OpError::Shape`] if an `x` is not a whole number of rows or an `out` does not fit it; then
/// nothing has been written.
pub fn run(jobs: &mut [Job<'_>]) -> Result<(), OpError> {
    run_at(Level::best(), jobs)
}

/// [`run`] with a chosen instruction set, for tests and benches.
///
/// # Errors
/// As [`run`].
pub fn run_at(level: Level, jobs: &mut [Job<'_>]) -> Result<(), OpError> {
    for job in jobs.iter() {
        let n_tokens = job.n_tokens();
        check_len("matmul", "x", job.x.len(), n_tokens * job.linear.n_cols())?;
        check_len("matmul", "out", job.out.len(), n_tokens * job.linear.n_rows())?;
    }
    let total: usize = jobs.iter().map(Job::multiply_adds).sum();
    let n_threads = if total < INLINE_MULTIPLY_ADDS { 1 } else { rayon::current_num_threads() };

    // Taken, not borrowed: while this thread waits for others, rayon may run a step of another
    // caller on it.
    let mut memory = CALLER.take();
    memory.plan(jobs, n_threads, total);
    let Memory { packed, packs, pieces } = &mut memory;
    let mut rest = &mut packed[..];
    let mut parts = Vec::new();
    for pack in packs.iter() {
        let job = &jobs[pack.job];
        let out;
        (out, rest) = rest.split_at_mut(pack.len);
        let (cols, stride) = (job.linear.n_cols(), job.linear.stored.stride());
        let panel = panel_tokens(job.n_tokens());
        let panels = job.x.chunks(panel * cols).zip(out.chunks_mut(panel * job.linear.n_blocks()));
        parts.extend(panels.map(|(x, out)| Pack { x, cols, stride, out }));
    }
    if n_threads == 1 || parts.len() == 1 {
        parts.into_iter().for_each(|part| level.run(part));
    } else {
        parts.into_par_iter().with_max_len(1).for_each(|part| level.run(part));
    }

    let outputs: Vec<Output<'_>> = jobs.iter_mut().map(Output::new).collect();
    let compute = |piece: &Piece| {
        let output = &outputs[piece.job];
        let mut scratch = SCRATCH.take();
        level.run(Product {
            linear: output.linear,
            x: &packed[piece.x.clone()],
            panel_tokens: panel_tokens(output.n_tokens),
            rows: piece.rows.clone(),
            tokens: piece.tokens.clone(),
            out: output,
            scratch: &mut scratch,
        });
        SCRATCH.set(scratch);
    };
    if n_threads == 1 || pieces.len() == 1 {
        pieces.iter().for_each(compute);
    } else {
        pieces.par_iter().with_max_len(1).for_each(compute);
    }
    CALLER.set(memory);
    Ok(())
}

thread_local! {
    static CALLER: Cell<Memory> = const { Cell::new(Memory::NEW) };
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::NEW) };
}

impl Job<'_> {
    fn n_tokens(&self) -> usize {
        self.x.len() / self.linear.n_cols().max(1)
    }

    fn multiply_adds(&self) -> usize {
        self.n_tokens() * self.linear.n_rows() * self.linear.n_cols()
    }
}

/// What a call needs besides its arguments, kept from call to call.
#[derive(Debug, Default)]
struct Memory {
    packed: Vec<Block>,
    packs: Vec<Packed>,
    pieces: Vec<Piece>,
}

/// An `x` in packed form, shared by all jobs that have the same `x` and the same order of lanes.
#[derive(Debug)]
struct Packed {
    /// A job that has this `x`.
    job: usize,
    start: usize,
    len: usize,
}

/// The rows and tokens of a job that one thread computes.
#[derive(Debug)]
struct Piece {
    job: usize,
    x: Range<usize>,
    rows: Range<usize>,
    tokens: Range<usize>,
}

/// Rows of `x` in a panel: about equal panels, of whole tiles.
fn panel_tokens(n_tokens: usize) -> usize {
    n_tokens.div_ceil(n_tokens.div_ceil(PANEL_TOKENS)).next_multiple_of(6).min(n_tokens)
}

impl Memory {
    const NEW: Self = Self { packed: Vec::new(), packs: Vec::new(), pieces: Vec::new() };

    fn plan(&mut self, jobs: &[Job<'_>], n_threads: usize, total: usize) {
        self.packs.clear();
        self.pieces.clear();
        let mut len = 0;
        let piece_size = (total / (n_threads * PIECES_PER_THREAD)).max(PIECE_MULTIPLY_ADDS);
        for (job_id, job) in jobs.iter().enumerate() {
            let n_tokens = job.n_tokens();
            if n_tokens == 0 || job.linear.n_rows() == 0 {
                continue;
            }
            let shared = self.packs.iter().rev().take(8).find(|pack| {
                let other = &jobs[pack.job];
                std::ptr::eq(other.x, job.x)
                    && other.linear.n_cols() == job.linear.n_cols()
                    && other.linear.stored.stride() == job.linear.stored.stride()
            });
            let x = match shared {
                Some(pack) => pack.start..pack.start + pack.len,
                None => {
                    let pack_len = n_tokens * job.linear.n_blocks();
                    self.packs.push(Packed { job: job_id, start: len, len: pack_len });
                    len += pack_len;
                    len - pack_len..len
                }
            };
            let n_pieces =
                if n_threads == 1 { 1 } else { job.multiply_adds().div_ceil(piece_size) };
            self.divide(job_id, job, &x, n_pieces);
        }
        if self.packed.len() < len {
            self.packed.resize(len, Block::ZERO);
        }
    }

    /// Divides by rows first: a row's codes are then decoded by one thread only.
    fn divide(&mut self, job_id: usize, job: &Job<'_>, x: &Range<usize>, n_pieces: usize) {
        let (n_rows, n_tokens) = (job.linear.n_rows(), job.n_tokens());
        let n_panels = n_tokens.div_ceil(panel_tokens(n_tokens));
        let row_pieces = n_pieces.min(n_rows.div_ceil(STRIP));
        let token_pieces = n_pieces.div_ceil(row_pieces).min(n_panels);
        let rows_each = n_rows.div_ceil(row_pieces).next_multiple_of(STRIP);
        let tokens_each = n_panels.div_ceil(token_pieces) * panel_tokens(n_tokens);
        for row in (0..n_rows).step_by(rows_each) {
            for token in (0..n_tokens).step_by(tokens_each) {
                let rows = row..n_rows.min(row + rows_each);
                let tokens = token..n_tokens.min(token + tokens_each);
                self.pieces.push(Piece { job: job_id, x: x.clone(), rows, tokens });
            }
        }
    }
}

/// The output of a job, written by several threads at once, each its own rows and tokens.
#[derive(Debug)]
pub(super) struct Output<'a> {
    linear: &'a CpuLinear,
    n_tokens: usize,
    values: *mut f32,
    exclusive: PhantomData<&'a mut [f32]>,
}

// SAFETY: all access goes through `write`, whose callers own disjoint rectangles.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    fn new(job: &'a mut Job<'_>) -> Self {
        Self {
            linear: job.linear,
            n_tokens: job.n_tokens(),
            values: job.out.as_mut_ptr(),
            exclusive: PhantomData,
        }
    }

    /// Writes the first `n` sums to rows `row..` of token `token`.
    #[inline(always)]
    pub(super) fn write(&self, token: usize, row: usize, n: usize, sums: [f32; GROUP]) {
        let n_rows = self.linear.n_rows();
        assert!(token < self.n_tokens && row + n <= n_rows, "outside the output");
        // SAFETY: `out` is `n_tokens * n_rows` long, which `run_at` has checked, so the assertion
        // keeps the targets inside it. The pieces of a job are disjoint rectangles of rows and
        // tokens, and each is written by one thread, so nobody else touches these values.
        unsafe {
            let target = self.values.add(token * n_rows + row);
            if n == GROUP {
                target.cast::<[f32; GROUP]>().write_unaligned(sums);
            } else {
                for (i, sum) in sums.into_iter().enumerate().take(n) {
                    target.add(i).write(sum);
                }
            }
        }
    }
}
