//! Fuzz targets: what must hold for any bytes from outside.
//!
//! A target is a function of bytes that panics if it does not hold. `cargo xtask fuzz` gives them to
//! libFuzzer (`libfuzzer/`, which needs nightly); the tests of this crate run them over `corpus/`
//! and over mutations of it that are the same in every run, which needs neither.
//!
//! Not here: properties that need a model or a golden; those are tests of their crates.

mod answer;
mod checkpoint;
mod grammar;
mod http;
mod settings;

pub use answer::output_parser;
pub use checkpoint::{config_json, safetensors_header};
pub use grammar::grammar;
pub use http::{request_body, stream_disconnects};
pub use settings::server_config;

/// A function of bytes that panics if what must hold does not.
pub type Target = fn(&[u8]);

/// Every target by the name of its corpus and of its libFuzzer binary.
pub const TARGETS: [(&str, Target); 7] = [
    ("config_json", config_json),
    ("grammar", grammar),
    ("output_parser", output_parser),
    ("request_body", request_body),
    ("safetensors_header", safetensors_header),
    ("server_config", server_config),
    ("stream_disconnects", stream_disconnects),
];
