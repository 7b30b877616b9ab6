//! What several tests need: the nano tokenizer and golden files.

use std::path::PathBuf;
use std::sync::LazyLock;

use fathom_chat::Tokenizer;
use serde_json::Value;

/// A file below `models/nano`.
pub(crate) fn nano(path: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../models/nano", path].iter().collect()
}

pub(crate) fn nano_json() -> Vec<u8> {
    std::fs::read(nano("tokenizer.json")).unwrap()
}

/// The tokenizer of the nano checkpoint.
pub(crate) fn tokenizer() -> Tokenizer {
    static TOKENIZER: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::from_json(&nano_json()).unwrap());
    TOKENIZER.clone()
}

/// The lines of a golden file.
pub(crate) fn golden_lines(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(nano("goldens").join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub(crate) fn ids(json: &Value) -> Vec<u32> {
    let ids = json.as_array().unwrap();
    ids.iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}
