//! The JSON that crosses the network: requests, responses, errors and SSE frames; serde types only.
