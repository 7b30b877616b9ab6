//! What to try next, for errors whose message cannot know it.
//!
//! Most messages of the libraries end with the next step already; these are the others.

use std::io::ErrorKind;

use fathom_ops::cuda::DeviceError;
use fathom_weights::LoadError;

/// A hint for `error`, looked for along its chain of causes.
pub(crate) fn of(error: &anyhow::Error) -> Option<&'static str> {
    error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<LoadError>() {
            return match error {
                LoadError::NoWeights { .. } => {
                    Some("`fathom inspect DIR` works without weights; to serve, download them too")
                }
                LoadError::MissingTensor { .. }
                | LoadError::SurplusTensor { .. }
                | LoadError::WrongShape { .. }
                | LoadError::WrongDtype { .. } => {
                    Some("`fathom inspect DIR` lists everything that is wrong with a checkpoint")
                }
                _ => None,
            };
        }
        if let Some(error) = cause.downcast_ref::<DeviceError>() {
            return match error {
                DeviceError::NoDriver
                | DeviceError::NoGpu { .. }
                | DeviceError::DriverTooOld { .. }
                | DeviceError::NoKernel { .. } => {
                    Some("`fathom doctor` looks for what is missing; --device cpu needs no GPU")
                }
                _ => None,
            };
        }
        match cause.downcast_ref::<std::io::Error>()?.kind() {
            ErrorKind::AddrInUse => Some("another program listens there: choose another --port"),
            ErrorKind::AddrNotAvailable => {
                Some("this machine has no such address: --host 0.0.0.0 listens on all it has")
            }
            ErrorKind::ConnectionRefused => {
                Some("start a server with `fathom serve`, or leave out --url")
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_found_below_the_context() {
        let error = std::io::Error::from(ErrorKind::AddrInUse);
        let error = anyhow::Error::from(error).context("listening on 127.0.0.1:8000");
        assert!(of(&error).unwrap().contains("--port"));
        assert!(of(&anyhow::anyhow!("something else")).is_none());
    }
}
