//! HTTP: routes, lowering to the engine and raising back, SSE, auth, limits, metrics, shutdown.
