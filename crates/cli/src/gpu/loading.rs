//! How fast weights reach a GPU, beside how fast it takes anything from pinned memory.

use std::fmt;

use anyhow::{Context, Result};
use fathom_ops::cuda::Device;
use serde_json::{Value, json};

use crate::bytes::readable;

/// Weights that were loaded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Loading {
    /// Bytes on the device.
    bytes: u64,
    seconds: f64,
    /// What the device takes from pinned memory, bytes per second, where that means something.
    host_rate: Option<f64>,
}

impl Loading {
    /// Runs `load`, which brings `bytes` bytes to `device`, and waits for the last of them.
    ///
    /// # Errors
    /// What `load` or the device fails with.
    pub(crate) fn of<T>(
        device: &dyn Device,
        bytes: u64,
        host_rate: Option<f64>,
        load: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Self)> {
        let begun = device.stamp()?;
        let loaded = load()?;
        let ended = device.stamp()?;
        let seconds = device.seconds_between(&begun, &ended).context("waiting for the weights")?;
        Ok((loaded, Self { bytes, seconds, host_rate }))
    }

    fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds.max(1e-9)
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "bytes": self.bytes,
            "seconds": self.seconds,
            "bytes_per_s": self.rate(),
            "host_to_device_bytes_per_s": self.host_rate,
            "of_host_to_device": self.host_rate.map(|rate| self.rate() / rate),
        })
    }
}

impl fmt::Display for Loading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, rate) = (readable(self.bytes), self.rate());
        write!(f, "{bytes} in {:.2} s, {:.2} GB/s", self.seconds, rate / 1e9)?;
        if let Some(host_rate) = self.host_rate {
            let (share, host_rate) = (rate / host_rate, host_rate / 1e9);
            write!(f, ", {share:.2} of the {host_rate:.2} GB/s that it takes from pinned memory")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_the_host_to_device_rate_is_told_where_there_is_one() {
        let mut loading = Loading { bytes: 90 << 30, seconds: 2.0, host_rate: None };
        assert_eq!(loading.to_string(), "90.0 GiB in 2.00 s, 48.32 GB/s");
        assert!(loading.json()["of_host_to_device"].is_null());
        loading.host_rate = Some(50e9);
        let text = loading.to_string();
        assert!(
            text.ends_with("0.97 of the 50.00 GB/s that it takes from pinned memory"),
            "{text}"
        );
        let share = loading.json()["of_host_to_device"].as_f64().unwrap();
        assert!((share - 0.9664).abs() < 1e-3, "{share}");
    }
}
