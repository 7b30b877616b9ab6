//! Checks that read tensor bytes: NaN scales, expert ids, values that are not finite.
//!
//! Opening a checkpoint touches headers only, so that it takes well under a second. Bytes are
//! checked where they are read anyway: [`Checkpoint::tensor`](crate::Checkpoint::tensor) checks
//! scales as it hands them out, [`TensorView::tid2eid`] checks expert ids. Reading everything just
//! to check it is `fathom inspect --verify`
//! ([`Checkpoint::verify`](crate::Checkpoint::verify)).

use crate::dtype::StoredDtype;
use crate::error::LoadError;
use crate::view::TensorView;

/// Requires every scale of a scale tensor to be a number: no E8M0 byte 255, F32 finite and not
/// negative (a block of zeros may have scale 0).
///
/// # Errors
/// [`LoadError::NanScale`], [`LoadError::BadScale`]; [`LoadError::WrongDtype`] for a tensor that
/// is neither E8M0 nor F32.
pub fn check_scales(view: &TensorView) -> Result<(), LoadError> {
    match view.dtype {
        StoredDtype::F32 => {
            let (chunks, _) = view.data.as_chunks::<4>();
            let bad = |x: f32| !x.is_finite() || x < 0.0;
            let Some(i) = chunks.iter().position(|bytes| bad(f32::from_le_bytes(*bytes))) else {
                return Ok(());
            };
            Err(LoadError::BadScale {
                name: view.name.clone(),
                file: view.file.to_string(),
                position: position(&view.shape, i),
                found: f32::from_le_bytes(chunks[i]),
            })
        }
        _ => {
            view.expect(StoredDtype::F8E8M0)?;
            let Some(i) = first_byte(&view.data, |byte| byte == 255) else { return Ok(()) };
            Err(LoadError::NanScale {
                name: view.name.clone(),
                file: view.file.to_string(),
                position: position(&view.shape, i),
            })
        }
    }
}

/// Requires every value of a weight to be finite. Packed FP4 and expert ids always are.
///
/// # Errors
/// [`LoadError::NotFinite`]; for scales the errors of [`check_scales`].
pub fn check_values(view: &TensorView) -> Result<(), LoadError> {
    const BF16_EXPONENT: u16 = 0x7f80;
    let bad = match view.dtype {
        StoredDtype::F8E8M0 => return check_scales(view),
        StoredDtype::I8 | StoredDtype::I64 => None,
        StoredDtype::F8E4M3 => first_byte(&view.data, |byte| byte & 0x7f == 0x7f),
        StoredDtype::BF16 => {
            let (chunks, _) = view.data.as_chunks::<2>();
            chunks.iter().position(|b| u16::from_le_bytes(*b) & BF16_EXPONENT == BF16_EXPONENT)
        }
        StoredDtype::F32 => {
            let (chunks, _) = view.data.as_chunks::<4>();
            chunks.iter().position(|bytes| !f32::from_le_bytes(*bytes).is_finite())
        }
    };
    match bad {
        None => Ok(()),
        Some(i) => Err(LoadError::NotFinite {
            name: view.name.clone(),
            file: view.file.to_string(),
            position: position(&view.shape, i),
        }),
    }
}

/// Reads a table of expert ids, narrowed to u16.
///
/// A row that names an expert twice would make grouped dispatch add one contribution less.
pub(crate) fn expert_ids(view: &TensorView, n_experts: usize) -> Result<Vec<u16>, LoadError> {
    view.expect(StoredDtype::I64)?;
    let per_token = view.shape.last().copied().unwrap_or(1).max(1);
    let (chunks, _) = view.data.as_chunks::<8>();
    let mut out: Vec<u16> = Vec::with_capacity(chunks.len());
    for (i, bytes) in chunks.iter().enumerate() {
        let (found, token) = (i64::from_le_bytes(*bytes), i / per_token);
        let in_range = usize::try_from(found).is_ok_and(|id| id < n_experts);
        let Some(id) = u16::try_from(found).ok().filter(|_| in_range) else {
            let (name, file) = (view.name.clone(), view.file.to_string());
            return Err(LoadError::ExpertOutOfRange { name, file, token, found, n_experts });
        };
        if out[token * per_token..].contains(&id) {
            let (name, file) = (view.name.clone(), view.file.to_string());
            return Err(LoadError::ExpertRepeated { name, file, token, found });
        }
        out.push(id);
    }
    Ok(out)
}

/// Index of the first byte for which `bad` holds.
///
/// Whole chunks are tested without an early exit, which the compiler turns into vector code:
/// a checkpoint of the Flash size has 8.7 GB of scales.
fn first_byte(data: &[u8], bad: impl Fn(u8) -> bool) -> Option<usize> {
    const CHUNK: usize = 4096;
    for (n, chunk) in data.chunks(CHUNK).enumerate() {
        if chunk.iter().fold(false, |any, byte| any | bad(*byte)) {
            return chunk.iter().position(|byte| bad(*byte)).map(|i| n * CHUNK + i);
        }
    }
    None
}

/// The index of element `i` of a row-major tensor of `shape`.
fn position(shape: &[usize], i: usize) -> Vec<usize> {
    let mut rest = i;
    let mut out: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&n| {
            let index = rest % n.max(1);
            rest /= n.max(1);
            index
        })
        .collect();
    out.reverse();
    out
}
