//! `kernels/MANIFEST.toml`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// The kernel files in the order of the manifest.
pub(crate) struct Manifest {
    pub(crate) files: Vec<File>,
}

/// One kernel file.
pub(crate) struct File {
    pub(crate) path: String,
    pub(crate) entries: Vec<String>,
    pub(crate) archs: Vec<String>,
    /// A spill is an error.
    pub(crate) hot: bool,
    /// Whether launches may begin before the one before them has ended.
    pub(crate) dependent: Option<Dependent>,
    expected: BTreeMap<String, Vec<String>>,
    forbidden: BTreeMap<String, Vec<String>>,
}

/// How the kernels of a file wait for the launch before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dependent {
    /// Before they touch memory.
    WaitsFirst,
    /// When they have begun to read weights.
    WeightsFirst,
}

impl Dependent {
    fn parse(value: &toml::Value) -> Result<Self> {
        match value.as_str() {
            Some("waits first") => Ok(Self::WaitsFirst),
            Some("weights first") => Ok(Self::WeightsFirst),
            _ => bail!("`dependent` is \"waits first\" or \"weights first\""),
        }
    }
}

impl File {
    /// Instructions that the code for `arch` must hold.
    pub(crate) fn expect<'a>(&'a self, arch: &'a str) -> impl Iterator<Item = &'a String> {
        for_arch(&self.expected, arch)
    }

    /// Instructions that it must not hold.
    pub(crate) fn forbid<'a>(&'a self, arch: &'a str) -> impl Iterator<Item = &'a String> {
        for_arch(&self.forbidden, arch)
    }
}

fn for_arch<'a>(
    lists: &'a BTreeMap<String, Vec<String>>,
    arch: &'a str,
) -> impl Iterator<Item = &'a String> {
    ["all", arch].into_iter().filter_map(|key| lists.get(key)).flatten()
}

impl Manifest {
    /// Reads the manifest in `kernels`; every file it names must exist, and the reverse.
    pub(crate) fn read(kernels: &Path) -> Result<Self> {
        let path = kernels.join("MANIFEST.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let manifest = Self::parse(&text).with_context(|| format!("in {}", path.display()))?;
        for file in &manifest.files {
            ensure!(kernels.join(&file.path).is_file(), "there is no kernels/{}", file.path);
        }
        // The emulator's planted errors are no kernels of the product.
        for folder in fs::read_dir(kernels)?.flatten().filter(|f| f.file_name() != "emulator") {
            for source in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                let (folder, name) = (folder.file_name(), source.file_name());
                let path = format!("{}/{}", folder.to_string_lossy(), name.to_string_lossy());
                let is_kernel = source.path().extension().is_some_and(|e| e == "cu");
                ensure!(
                    !is_kernel || manifest.file(&path).is_some(),
                    "{path} is not in the manifest"
                );
            }
        }
        Ok(manifest)
    }

    pub(crate) fn parse(text: &str) -> Result<Self> {
        let table: toml::Table = text.parse()?;
        let defaults = table.get("defaults").and_then(|d| d.get("archs"));
        let defaults = strings(defaults.context("`defaults.archs` is missing")?)?;
        let files = table.get("file").and_then(toml::Value::as_array).context("no `file`")?;
        let files = files.iter().map(|file| {
            let path =
                file.get("path").and_then(toml::Value::as_str).context("a file has no path")?;
            let entries = file.get("entries").with_context(|| format!("{path} has no entries"))?;
            Ok(File {
                path: path.to_owned(),
                entries: strings(entries)?,
                archs: file.get("archs").map_or_else(|| Ok(defaults.clone()), strings)?,
                hot: file.get("hot").and_then(toml::Value::as_bool).unwrap_or(false),
                dependent: file.get("dependent").map(Dependent::parse).transpose()?,
                expected: lists(file.get("expect"))?,
                forbidden: lists(file.get("forbid"))?,
            })
        });
        Ok(Self { files: files.collect::<Result<_>>()? })
    }

    pub(crate) fn file(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }
}

fn strings(value: &toml::Value) -> Result<Vec<String>> {
    let list = value.as_array().context("expected a list of strings")?;
    let string = |v: &toml::Value| v.as_str().map(str::to_owned).context("expected a string");
    list.iter().map(string).collect()
}

fn lists(value: Option<&toml::Value>) -> Result<BTreeMap<String, Vec<String>>> {
    let table = value.and_then(toml::Value::as_table);
    table.into_iter().flatten().map(|(key, list)| Ok((key.clone(), strings(list)?))).collect()
}
