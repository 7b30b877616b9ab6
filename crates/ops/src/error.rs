//! What an operator refuses.

/// An operator got arguments it cannot work with, or a rank it works with is gone.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum OpError {
    #[error("{op}: `{arg}` has {got} values, expected {expected}")]
    Shape { op: &'static str, arg: &'static str, got: usize, expected: usize },
    #[error("weight `{name}`: {reason}")]
    Weight { name: String, reason: String },
    #[error("{op}: {what} {got} is out of range, the limit is {limit}")]
    OutOfRange { op: &'static str, what: &'static str, got: usize, limit: usize },
    #[error("a rank left the group during {op}; the other ranks cannot go on")]
    RankLost { op: &'static str },
    #[error("the device cannot go on")]
    Device { source: crate::cuda::DeviceError },
}

impl OpError {
    /// An operator's view of a device error. Not `From`: a second conversion into this type would
    /// leave `?` in closures without a type.
    pub(crate) const fn device(source: crate::cuda::DeviceError) -> Self {
        Self::Device { source }
    }
}

/// Refuses a slice whose length is not what the shapes imply.
pub(crate) fn check_len(
    op: &'static str,
    arg: &'static str,
    got: usize,
    expected: usize,
) -> Result<(), OpError> {
    if got == expected { Ok(()) } else { Err(OpError::Shape { op, arg, got, expected }) }
}
