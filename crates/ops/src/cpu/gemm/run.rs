//! Several products at once: `x` packed, the work divided among threads.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::kernel::{PANEL_TOKENS, Product, STRIP, Scratch};
use super::linear::CpuLinear;
use super::output::Output;
use super::pack::Pack;
use crate::OpError;
use crate::cpu::isa::{Block, Level};
use crate::error::check_len;

/// Jobs that cost less than this together run on the calling thread: about 3 us of one core. A
/// thread that is awake takes its part after less than one.
const INLINE_COST: usize = 100_000;
/// A piece of work for one thread is not made smaller than this.
const PIECE_COST: usize = 50_000;
/// Pieces per thread, so that a thread that is held up does not hold up the others.
const PIECES_PER_THREAD: usize = 4;

/// Packing fewer blocks than this is not worth the second entry into the thread pool: 50 us.
const PARALLEL_PACK_BLOCKS: usize = 2048;

/// One product: `out [n, rows] = x [n, cols] W^T`, row-major.
#[derive(Debug)]
pub struct Job<'a> {
    /// `W [rows, cols]`.
    linear: &'a CpuLinear,
    /// `[n, width]`.
    x: &'a [f32],
    width: usize,
    /// Column of `x` that is the product's first.
    first: usize,
    /// `[n, rows]`.
    out: &'a mut [f32],
}

impl<'a> Job<'a> {
    /// The product of `x [n, cols]` and `linear [rows, cols]`.
    #[must_use]
    pub fn new(linear: &'a CpuLinear, x: &'a [f32], out: &'a mut [f32]) -> Self {
        Self::of_columns(linear, x, linear.n_cols(), 0, out)
    }

    /// The same with the columns `first..first + cols` of `x [n, width]`.
    #[must_use]
    pub fn of_columns(
        linear: &'a CpuLinear,
        x: &'a [f32],
        width: usize,
        first: usize,
        out: &'a mut [f32],
    ) -> Self {
        Self { linear, x, width, first, out }
    }
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
        check_len("matmul", "x", job.x.len(), n_tokens * job.width)?;
        if job.first + job.linear.n_cols() > job.width {
            let (got, limit) = (job.first + job.linear.n_cols(), job.width);
            return Err(OpError::OutOfRange { op: "matmul", what: "column", got, limit });
        }
        check_len("matmul", "out", job.out.len(), n_tokens * job.linear.n_rows())?;
    }
    let total: usize = jobs.iter().map(Job::cost).sum();
    let n_threads = if total < INLINE_COST { 1 } else { rayon::current_num_threads() };

    // Taken, not borrowed: while this thread waits for others, rayon may run a step of another
    // caller on it.
    let mut memory = CALLER.take();
    memory.plan(jobs, n_threads, total);
    let Memory { packed, packs, pieces } = &mut memory;
    let packed_len = packs.iter().map(|pack| pack.len).sum::<usize>();
    let mut rest = &mut packed[..];
    let mut parts = Vec::new();
    for pack in packs.iter() {
        let job = &jobs[pack.job];
        let out;
        (out, rest) = rest.split_at_mut(pack.len);
        let (width, stride) = (job.width, job.linear.stored.stride());
        let columns = job.first..job.first + job.linear.n_cols();
        let panel = panel_tokens(job.n_tokens());
        let panels = job.x.chunks(panel * width).zip(out.chunks_mut(panel * job.linear.n_blocks()));
        parts.extend(panels.map(|(x, out)| {
            let columns = columns.clone();
            Pack { x, width, columns, stride, out }
        }));
    }
    if n_threads == 1 || packed_len < PARALLEL_PACK_BLOCKS {
        parts.into_iter().for_each(|part| level.run(part));
    } else {
        parts.into_par_iter().with_max_len(1).for_each(|part| level.run(part));
    }

    let outputs: Vec<_> = jobs
        .iter_mut()
        .map(|job| (job.linear, job.n_tokens(), Output::new(job.out, job.linear.n_rows())))
        .collect();
    let compute = |piece: &Piece| {
        let (linear, n_tokens, out) = &outputs[piece.job];
        let (rows, tokens) = (piece.rows.clone(), piece.tokens.clone());
        // SAFETY: `divide` cuts a job into pieces that do not overlap, and each is computed once.
        let out = unsafe { out.rectangle(rows.clone(), tokens.clone()) };
        let (x, panel_tokens) = (&packed[piece.x.clone()], panel_tokens(*n_tokens));
        let mut scratch = SCRATCH.take();
        let own = &mut scratch;
        level.run(Product { linear, x, panel_tokens, rows, tokens, out, scratch: own });
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
        self.x.len() / self.width.max(1)
    }

    /// Time on one core, in units of 33 ps: a byte of codes takes one, a multiply-add half of one.
    fn cost(&self) -> usize {
        let multiply_adds = self.n_tokens() * self.linear.n_rows() * self.linear.n_cols();
        if multiply_adds == 0 { 0 } else { self.linear.bytes() + multiply_adds / 2 }
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
    n_tokens.div_ceil(n_tokens.div_ceil(PANEL_TOKENS)).next_multiple_of(3).min(n_tokens)
}

impl Memory {
    const NEW: Self = Self { packed: Vec::new(), packs: Vec::new(), pieces: Vec::new() };

    fn plan(&mut self, jobs: &[Job<'_>], n_threads: usize, total: usize) {
        self.packs.clear();
        self.pieces.clear();
        let mut len = 0;
        let piece_size = (total / (n_threads * PIECES_PER_THREAD)).max(PIECE_COST);
        for (job_id, job) in jobs.iter().enumerate() {
            let n_tokens = job.n_tokens();
            if n_tokens == 0 || job.linear.n_rows() == 0 {
                continue;
            }
            let shared = self.packs.iter().rev().take(8).find(|pack| {
                let other = &jobs[pack.job];
                std::ptr::eq(other.x, job.x)
                    && (other.width, other.first) == (job.width, job.first)
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
            let n_pieces = if n_threads == 1 { 1 } else { job.cost().div_ceil(piece_size) };
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
