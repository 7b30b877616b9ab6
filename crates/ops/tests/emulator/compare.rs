//! How close two results are.

/// Largest difference as a share of the largest expected magnitude.
pub(crate) fn max_error(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let error = |(g, e): (&f32, &f32)| if g == e { 0.0 } else { (g - e).abs() };
    let worst = got.iter().zip(expected).map(error).fold(0.0, |m: f32, e| {
        // NaN must not pass as small.
        if e.is_nan() { f32::INFINITY } else { m.max(e) }
    });
    worst / largest
}

/// Fails unless every value is within `limit` of the expected one, relative to the largest.
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], expected: &[f32], limit: f32) {
    let error = max_error(got, expected);
    assert!(error <= limit, "{what}: error {error:.2e} of the largest value, limit {limit:.2e}");
}

/// One rounding to bf16, of values up to the largest.
pub(crate) const BF16_STEP: f32 = 1.0 / 128.0;
