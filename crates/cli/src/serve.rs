//! `fathom serve`: a model behind HTTP, from settings to the last drained request.
//!
//! The address is bound before anything is loaded, so that a taken port is known at once and
//! clients hear that the model is still loading.
//!
//! Not here: settings (`config`), loading (`load`), HTTP itself (`fathom-server`).

mod banner;
mod config;
mod load;
mod memory;
mod names;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use fathom_engine::EngineState;
use fathom_server::{Registry, Reloader, Server};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

pub(crate) use config::{EngineOptions, ServeConfig, ServeOptions};

use banner::Banner;
use load::Loaded;

/// The runtime of the HTTP side; the model computes on threads of its own.
pub(crate) fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")
}

/// Serves until Ctrl-C or SIGTERM, then lets running requests end. SIGHUP reads keys again.
pub(crate) fn run(options: ServeOptions) -> Result<()> {
    runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let mut hang_up = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
        let running = tokio::select! {
            running = start(options) => running?,
            _ = tokio::signal::ctrl_c() => bail!("stopped while loading"),
            _ = terminate.recv() => bail!("stopped while loading"),
        };
        println!("{}\n", running.banner);
        loop {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => break,
                _ = terminate.recv() => break,
                _ = hang_up.recv() => running.reload(),
            }
        }
        tracing::info!("shutting down: running requests may end; Ctrl-C again to stop at once");
        tokio::select! {
            () = running.stop() => Ok(()),
            _ = tokio::signal::ctrl_c() => bail!("stopped before running requests had ended"),
        }
    })
}

/// A server that answers.
pub(crate) struct Running {
    banner: Banner,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    reloader: Reloader,
    tasks: JoinSet<()>,
}

impl Running {
    /// Where a client in this process finds it: [`ServeOptions::local`] speaks no TLS.
    pub(crate) fn url(&self) -> String {
        banner::reachable(self.address, false)
    }

    /// Reads the files again that may change while the server runs.
    fn reload(&self) {
        if let Err(error) = self.reloader.reload() {
            let error = anyhow::Error::from(error);
            tracing::error!("{error:#}; what was read before stays in force");
        }
    }

    /// Drains and waits for the end.
    pub(crate) async fn stop(mut self) {
        // The receiver is gone if the server has ended already.
        let _ = self.stop.send(());
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Starts a server and returns when its model answers.
///
/// # Errors
/// Where a setting is wrong, the address is taken, or the model cannot be loaded.
pub(crate) async fn start(options: ServeOptions) -> Result<Running> {
    let config = Arc::new(ServeConfig::new(options)?);
    let registry = Registry::default();
    let server = Server::bind(config.server.clone(), registry.clone()).await?;
    let address = server.local_addr();
    let reloader = server.reloader();
    let (stop, stopped) = oneshot::channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(server.run(async {
        // Dropping the sender stops the server too.
        let _ = stopped.await;
    }));

    if config.model.is_none() {
        tracing::warn!(
            "no --model: serving the embedded one, a tiny model with random weights; its answers \
             are noise"
        );
    }
    let loaded = load_on_a_thread(Arc::clone(&config), registry.clone()).await?;
    registry.install(vec![loaded.entry.clone()]);
    match loaded.entry.engine.started().await {
        EngineState::Failed { reason } => bail!("the model does not run: {reason}"),
        EngineState::Starting
        | EngineState::Ready
        | EngineState::Draining
        | EngineState::Stopped => {}
    }
    let banner = Banner::new(&config, &loaded, address);
    Ok(Running { banner, address, stop, reloader, tasks })
}

async fn load_on_a_thread(config: Arc<ServeConfig>, registry: Registry) -> Result<Loaded> {
    let mut loading = JoinSet::new();
    loading.spawn_blocking(move || load::load(&config, &|part| registry.set_progress(part)));
    let loaded = loading.join_next().await.context("loading was not started")?;
    loaded.context("loading panicked")?
}
