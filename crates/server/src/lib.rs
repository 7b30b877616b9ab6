//! HTTP: routes, lowering to the engine and raising back, SSE, TLS, auth, limits, metrics, traces,
//! shutdown.
//!
//! [`Server::bind`] listens at once, before any model is loaded; [`Server::registry`] is where
//! models are installed when they are; [`Server::run`] serves until its signal, then drains.
//!
//! Not here: what a model computes (`engine`), what a prompt looks like (`chat`), and the JSON
//! itself (`protocol`).

mod anthropic;
mod app;
mod auth;
mod body;
mod compression;
pub mod config;
mod cors;
mod error;
mod generate;
mod health;
mod metrics;
mod observe;
mod openai;
mod openapi;
mod recall;
mod record;
pub mod registry;
mod responses;
mod routes;
mod sse;
mod telemetry;
mod tls;
mod transport;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::app::App;
use crate::telemetry::Exporter;
use crate::tls::Tls;
use crate::transport::Patience;

pub use auth::KeysError;
pub use config::{ConfigError, ServerConfig};
pub use registry::{BuildInfo, ModelEntry, Registry};
pub use tls::TlsError;

/// After the engines have stopped: how long answers already written may take to leave.
const FLUSH: Duration = Duration::from_secs(5);

/// The server cannot listen.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum BindError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot listen on {host}:{port}; choose another `server.port` or `server.host`")]
    Listen { host: String, port: u16, source: std::io::Error },
}

/// Files cannot be read again.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum ReloadError {
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A listening server.
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
    address: SocketAddr,
    exporter: Option<Exporter>,
}

impl Server {
    /// Checks the settings and begins to listen; nothing is answered before [`Server::run`].
    ///
    /// # Errors
    /// [`BindError`] if the settings contradict the contract or the address is taken.
    pub async fn bind(config: ServerConfig, registry: Registry) -> Result<Self, BindError> {
        config.check()?;
        let (host, port) = (config.server.host.clone(), config.server.port);
        let tls = Tls::load(&config.server)?;
        let (tracer, exporter) = telemetry::channel(&config.telemetry).unzip();
        let app = Arc::new(App::new(config, registry, tls, tracer)?);
        let bound = TcpListener::bind((host.as_str(), port)).await;
        let bound = bound.and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (address, listener) =
            bound.map_err(|source| BindError::Listen { host, port, source })?;
        Ok(Self { app, listener, address, exporter })
    }

    /// Where the server listens; the port that the system chose if the settings said 0.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The list of models, for installing them once they are loaded.
    #[must_use]
    pub fn registry(&self) -> Registry {
        self.app.registry.clone()
    }

    /// What reads files again while the server runs.
    #[must_use]
    pub fn reloader(&self) -> Reloader {
        Reloader { app: Arc::clone(&self.app) }
    }

    /// Serves until `shutdown` completes, then drains: new requests are refused while running ones
    /// have `server.drain_s` to end, and what is left then ends with an error. Returns when every
    /// engine has stopped and every answer has left or had its chance to.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { app, listener, exporter, .. } = self;
        let router = routes::router(Arc::clone(&app));
        let stop = CancellationToken::new();
        let connections = TaskTracker::new();
        let patience = Patience {
            head: Duration::from_secs(app.config.limits.head_s),
            write: app.config.sse.write_timeout(),
        };
        let drained = async {
            shutdown.await;
            drain(&app).await;
            stop.cancel();
        };
        let accepting =
            transport::accept(&listener, router, app.tls.as_ref(), patience, &stop, &connections);
        let served = CancellationToken::new();
        let serving = async {
            tokio::join!(accepting, drained);
            connections.close();
            // What still hangs on a client that does not read is dropped with the runtime.
            if tokio::time::timeout(FLUSH, connections.wait()).await.is_err() {
                tracing::warn!(open = connections.len(), "connections still open at the end");
            }
            served.cancel();
        };
        let exporting = async {
            if let Some(exporter) = exporter {
                exporter.run(&served).await;
            }
        };
        tokio::join!(serving, exporting);
    }
}

/// Reads the files that the settings name again, without disturbing what runs.
#[derive(Clone)]
pub struct Reloader {
    app: Arc<App>,
}

impl Reloader {
    /// Reads the keys file, the certificate and its key. Requests that have begun go on under the
    /// key they began with, and connections under their certificate; what keys have used goes on
    /// being counted.
    ///
    /// # Errors
    /// Why a file cannot be used; what it held before stays in force.
    pub fn reload(&self) -> Result<(), ReloadError> {
        let n_keys = self.app.keys.reload(&self.app.config)?;
        if let Some(tls) = &self.app.tls {
            tls.reload()?;
        }
        tracing::info!(n_keys, "keys and certificates are read again");
        Ok(())
    }
}

/// Refuses new requests and waits until no request runs any more.
async fn drain(app: &App) {
    app.draining.cancel();
    let drain = Duration::from_secs(app.config.server.drain_s);
    let entries = app.registry.loaded();
    join_all(entries.iter().map(|entry| entry.engine.shutdown(drain))).await;
    app.tasks.close();
    if tokio::time::timeout(FLUSH, app.tasks.wait()).await.is_err() {
        tracing::warn!(streams = app.tasks.len(), "streams still open at the end");
    }
}
