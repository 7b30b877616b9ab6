//! A copy of nano to damage: links to the real files, replaced one by one.

use std::error::Error;
use std::path::{Path, PathBuf};

use fathom_weights::{Checkpoint, LoadError};
use serde_json::{Map, Value};
use tempfile::TempDir;

use crate::nano::nano_dir;

pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const SHARD_1: &str = "model-00001-of-00003.safetensors";
pub(crate) const SHARD_2: &str = "model-00002-of-00003.safetensors";
pub(crate) const SHARD_3: &str = "model-00003-of-00003.safetensors";

/// A directory that begins as nano.
pub(crate) struct Copy(TempDir);

impl Copy {
    pub(crate) fn of_nano() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for entry in std::fs::read_dir(nano_dir()).expect("nano").flatten() {
            if entry.path().is_file() {
                let real = entry.path().canonicalize().expect("exists");
                std::os::unix::fs::symlink(real, dir.path().join(entry.file_name()))
                    .expect("a link");
            }
        }
        Self(dir)
    }

    pub(crate) fn dir(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.dir().join(file)
    }

    /// Puts `content` in the place of `file`, leaving what it linked to alone.
    pub(crate) fn replace(&self, file: &str, content: &[u8]) {
        self.remove(file);
        std::fs::write(self.path(file), content).expect("written");
    }

    pub(crate) fn remove(&self, file: &str) {
        let path = self.path(file);
        if path.symlink_metadata().is_ok() {
            std::fs::remove_file(path).expect("removed");
        }
    }

    pub(crate) fn edit_bytes(&self, file: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.path(file)).expect("readable");
        edit(&mut bytes);
        self.replace(file, &bytes);
    }

    pub(crate) fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let bytes = std::fs::read(self.path(file)).expect("readable");
        let mut object = serde_json::from_slice(&bytes).expect("an object");
        edit(&mut object);
        self.replace(file, &serde_json::to_vec(&object).expect("JSON"));
    }

    pub(crate) fn edit_config(&self, key: &str, value: Value) {
        self.edit_json("config.json", |config| {
            config.insert(key.to_owned(), value);
        });
    }

    /// Edits header and payload of a shard, and writes the length that fits.
    pub(crate) fn edit_shard(
        &self,
        file: &str,
        edit: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>),
    ) {
        self.edit_bytes(file, |bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
            let mut payload = bytes.split_off(8 + usize::try_from(length).expect("small"));
            let mut header = serde_json::from_slice(&bytes[8..]).expect("a header");
            edit(&mut header, &mut payload);
            let text = serde_json::to_vec(&header).expect("JSON");
            *bytes = [&(text.len() as u64).to_le_bytes()[..], &text, &payload].concat();
        });
    }

    /// Edits the header's entry of `tensor`.
    pub(crate) fn edit_tensor(
        &self,
        file: &str,
        tensor: &str,
        edit: impl FnOnce(&mut Map<String, Value>),
    ) {
        self.edit_shard(file, |header, _| {
            edit(header[tensor].as_object_mut().expect("a tensor"));
        });
    }

    /// Renames every tensor, in the index and in all shards.
    pub(crate) fn rename(&self, rename: impl Fn(&str) -> String) {
        let renamed = |map: Map<String, Value>| {
            let name = |name: String| if name == "__metadata__" { name } else { rename(&name) };
            map.into_iter().map(|(key, value)| (name(key), value)).collect::<Map<_, _>>()
        };
        self.edit_json(INDEX, |index| {
            let map = index["weight_map"].as_object_mut().expect("a map");
            *map = renamed(std::mem::take(map));
        });
        for shard in [SHARD_1, SHARD_2, SHARD_3] {
            self.edit_shard(shard, |header, _| *header = renamed(std::mem::take(header)));
        }
    }

    /// Adds an empty tensor to shard 1 and to the index: no byte moves.
    pub(crate) fn add_empty(&self, name: &str) {
        self.edit_shard(SHARD_1, |header, payload| {
            let end = payload.len();
            let entry = serde_json::json!({
                "dtype": "F32", "shape": [0], "data_offsets": [end, end],
            });
            header.insert(name.to_owned(), entry);
        });
        self.edit_json(INDEX, |index| {
            index["weight_map"][name] = SHARD_1.into();
        });
    }

    pub(crate) fn open(&self) -> Result<Checkpoint, LoadError> {
        Checkpoint::open(self.dir())
    }

    /// Why it does not open, with causes; paths are those inside the directory.
    pub(crate) fn refusal(&self) -> String {
        let error = self.open().expect_err("this copy is damaged");
        self.text(&error)
    }

    /// An error with its causes; paths are those inside the directory.
    pub(crate) fn text(&self, error: &LoadError) -> String {
        let mut out = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            out.push_str(&format!(": {inner}"));
            cause = inner.source();
        }
        out.replace(&format!("{}/", self.dir().display()), "")
    }

    /// Where the bytes of `tensor` begin in `file`.
    pub(crate) fn offset(&self, file: &str, tensor: &str) -> usize {
        let bytes = std::fs::read(self.path(file)).expect("readable");
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
        let begin = header[tensor]["data_offsets"][0].as_u64().expect("an offset");
        8 + length + usize::try_from(begin).expect("small")
    }
}
