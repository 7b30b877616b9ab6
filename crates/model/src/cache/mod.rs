//! The cache as the model plans it; its stores belong to the backend, its geometry to
//! [`CacheSpec`](fathom_ops::CacheSpec).

pub mod plan;
