//! The network side: `[server]`, `[sse]`, `[metrics]`, `[telemetry]`.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Address, TLS, keys, shutdown, health.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// Address to listen on; 0.0.0.0 for all.
    pub host: String,
    /// Port to listen on; 0 for any free one.
    pub port: u16,
    /// Certificate chain in PEM, which switches TLS on; read again on SIGHUP.
    #[schemars(extend("value_name" = "FILE"), example = "/etc/fathom/tls.crt")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate, in PEM.
    #[schemars(extend("value_name" = "FILE"), example = "/etc/fathom/tls.key")]
    pub tls_key: Option<PathBuf>,
    /// TOML file with more `[[keys]]`, like those of this file; read again on SIGHUP.
    #[schemars(extend("value_name" = "FILE"), example = "/etc/fathom/keys.toml")]
    pub keys_file: Option<PathBuf>,
    /// Origins whose web pages may call the server, or `*` for all; none switches CORS off.
    #[schemars(extend("value_name" = "ORIGIN"))]
    pub cors_origins: Vec<String>,
    /// Accept request bodies compressed with gzip.
    pub accept_gzip: bool,
    /// Compress answers with gzip for clients that accept it; streams never are.
    pub compress: bool,
    /// Seconds that running requests have to end after a shutdown was asked for.
    pub drain_s: u64,
    /// With work pending and no step finished for so many seconds, `/health` fails.
    pub watchdog_s: u64,
    /// Whether `/metrics` needs a key.
    pub protect_metrics: bool,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8000,
            tls_cert: None,
            tls_key: None,
            keys_file: None,
            cors_origins: Vec::new(),
            accept_gzip: false,
            compress: false,
            drain_s: 30,
            watchdog_s: 120,
            protect_metrics: false,
        }
    }
}

/// Event streams.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SseConfig {
    /// Seconds of silence after which a comment is sent.
    pub keepalive_s: u64,
    /// Bytes that may wait for a slow reader, per stream.
    pub buffer_bytes: usize,
    /// Seconds after which a reader that takes nothing is given up.
    pub write_timeout_s: u64,
}

impl Default for SseConfig {
    fn default() -> Self {
        Self { keepalive_s: 10, buffer_bytes: 1024 * 1024, write_timeout_s: 60 }
    }
}

impl SseConfig {
    /// Longest time a reader may take nothing.
    #[must_use]
    pub const fn write_timeout(&self) -> Duration {
        Duration::from_secs(self.write_timeout_s)
    }
}

/// What `/metrics` shows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// Also show the series that autoscalers and gateways read from vLLM, under its names.
    pub vllm_names: bool,
}

/// Traces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// URL that OpenTelemetry spans are posted to (OTLP over HTTP, protobuf); unset switches traces
    /// off.
    #[schemars(extend("value_name" = "URL"), example = "http://localhost:4318/v1/traces")]
    pub otlp_endpoint: Option<String>,
    /// What traces call this server.
    pub service_name: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { otlp_endpoint: None, service_name: "fathom".into() }
    }
}
