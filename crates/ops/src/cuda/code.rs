//! Where the machine code of a kernel file comes from at run time: a pack, else the disk cache, else
//! NVRTC, else a reason that says what is missing.

use std::fs;
use std::path::{Path, PathBuf};

use super::compile;
use super::pack;
use super::source;

/// Where machine code may come from, beside the embedded pack.
#[derive(Debug, Clone, Default)]
pub struct KernelSources {
    /// A pack file that goes before the embedded one.
    pub pack: Option<Vec<u8>>,
    /// Folder for code that NVRTC compiled.
    pub cache: Option<PathBuf>,
}

/// Where an image was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// In a pack.
    Pack,
    /// Compiled by an earlier start.
    Cache,
    /// Compiled just now.
    Compiled,
}

/// Machine code of one kernel file.
#[derive(Debug, Clone)]
pub struct Code {
    /// The image.
    pub cubin: Vec<u8>,
    /// Architecture it is for.
    pub arch: &'static str,
    /// Where it was found.
    pub origin: Origin,
}

/// First bytes of machine code.
const ELF: &[u8] = b"\x7fELF";

impl KernelSources {
    /// Whether a pack holds any image for one of `archs`.
    #[must_use]
    pub fn has_pack_for(&self, archs: &[&str]) -> bool {
        self.images().iter().any(|image| archs.contains(&image.arch))
    }

    fn images(&self) -> Vec<pack::Image<'_>> {
        let packs = [self.pack.as_deref(), Some(source::PACK)];
        packs.into_iter().flatten().filter_map(pack::read).flatten().collect()
    }

    /// Machine code of kernel file `path` for the first of `archs` that has some.
    ///
    /// # Errors
    /// What is missing, in words.
    pub fn find(&self, path: &'static str, archs: &[&'static str]) -> Result<Code, String> {
        self.find_with(path, archs, compile::nvrtc_version(), &compile::compile)
    }

    /// The same, with NVRTC as a parameter.
    fn find_with(
        &self,
        path: &'static str,
        archs: &[&'static str],
        nvrtc: Option<(i32, i32)>,
        compile: &dyn Fn(&str, &str, &str) -> Result<compile::Compiled, String>,
    ) -> Result<Code, String> {
        let images = self.images();
        let text = source::flatten(path, &source::embedded)?;
        let mut is_old = false;
        for &arch in archs {
            let key = compile::source_key(&text, arch);
            for image in images.iter().filter(|i| i.path == path && i.arch == arch) {
                if image.key == key {
                    let cubin = image.unpacked().ok_or_else(|| {
                        format!(
                            "the kernel pack is damaged at {path} for {arch}; install this release again"
                        )
                    })?;
                    return Ok(Code { cubin, arch, origin: Origin::Pack });
                }
                is_old = true;
            }
        }
        let Some(&arch) = archs.first() else { return Err("no architecture".to_owned()) };
        // Code of any compiler version will do where this one is not installed any more.
        let key = compile::source_key(&text, arch);
        let name = nvrtc.map(|(major, minor)| format!("{key}-{major}.{minor}.cubin"));
        if let Some(folder) = &self.cache
            && let Some(cubin) = read_cached(folder, &key, name.as_deref())
        {
            return Ok(Code { cubin, arch, origin: Origin::Cache });
        }
        let missing = if is_old {
            "the kernel pack was made of other sources, and"
        } else {
            "the kernel pack has none, and"
        };
        let Some(name) = name else {
            return Err(format!(
                "{missing} NVRTC (libnvrtc.so) is not installed to compile it; use a release build, \
                 which carries a pack, or install NVRTC"
            ));
        };
        let cubin = compile(&text, path, arch)
            .map_err(|log| format!("{missing} NVRTC refuses the source: {log}"))?
            .cubin;
        if let Some(folder) = &self.cache {
            // A cache that cannot be written costs time at the next start, nothing else.
            let _ = write_cached(folder, &name, &cubin);
        }
        Ok(Code { cubin, arch, origin: Origin::Compiled })
    }
}

/// The image called `name`; any image of this `key` where no compiler gives a name.
fn read_cached(folder: &Path, key: &str, name: Option<&str>) -> Option<Vec<u8>> {
    let file = match name {
        Some(name) => folder.join(name),
        None => {
            fs::read_dir(folder).ok()?.filter_map(Result::ok).map(|e| e.path()).find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                name.starts_with(key) && name.ends_with(".cubin")
            })?
        }
    };
    fs::read(file).ok().filter(|cubin| cubin.starts_with(ELF))
}

fn write_cached(folder: &Path, name: &str, cubin: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    // Renaming keeps a reader from seeing half a file.
    let unfinished = folder.join(format!("{name}.{}.part", std::process::id()));
    fs::write(&unfinished, cubin)?;
    fs::rename(&unfinished, folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "embed/embed.cu";

    fn compiled(_: &str, _: &str, arch: &str) -> Result<compile::Compiled, String> {
        Ok(compile::Compiled { cubin: [ELF, arch.as_bytes()].concat(), log: String::new() })
    }

    fn refuses(_: &str, _: &str, _: &str) -> Result<compile::Compiled, String> {
        Err("line 1: no".to_owned())
    }

    #[test]
    fn a_pack_goes_first_and_its_best_architecture_before_others() {
        let text = source::flatten(PATH, &source::embedded).unwrap();
        let keys = ["sm_80", "sm_89"].map(|arch| compile::source_key(&text, arch));
        let image = |arch, key, cubin| pack::Image { path: PATH, arch, key, cubin };
        let pack = pack::write(&[
            image("sm_80", &keys[0], &[1]),
            image("sm_89", &keys[1], &[2]),
            image("sm_100f", &keys[1], &[3]),
        ])
        .unwrap();
        let sources = KernelSources { pack: Some(pack), cache: None };
        let find = |archs: &[&'static str]| sources.find_with(PATH, archs, None, &refuses);
        assert_eq!(find(&["sm_89", "sm_80"]).unwrap().cubin, [2]);
        assert_eq!(find(&["sm_80"]).unwrap().cubin, [1]);
        assert!(find(&["sm_90a"]).unwrap_err().contains("NVRTC"));
        assert!(find(&["sm_100f"]).unwrap_err().contains("made of other sources"));
        assert!(sources.has_pack_for(&["sm_80"]) && !sources.has_pack_for(&["sm_120"]));
    }

    #[test]
    fn what_was_compiled_once_is_found_again_also_without_the_compiler() {
        let folder = std::env::temp_dir().join(format!("fathom-code-{}", std::process::id()));
        let sources = KernelSources { pack: None, cache: Some(folder.clone()) };
        let find = |nvrtc, compile: &dyn Fn(&str, &str, &str) -> _| {
            sources.find_with(PATH, &["sm_90a"], nvrtc, compile)
        };
        assert!(find(None, &refuses).unwrap_err().contains("NVRTC"));
        assert!(find(Some((13, 0)), &refuses).unwrap_err().contains("line 1: no"));
        let first = find(Some((13, 0)), &compiled).unwrap();
        assert_eq!(first.origin, Origin::Compiled);
        for nvrtc in [Some((13, 0)), None] {
            let again = find(nvrtc, &refuses).unwrap();
            assert_eq!((again.origin, &again.cubin), (Origin::Cache, &first.cubin));
        }
        // Another compiler makes other code.
        assert_eq!(find(Some((13, 1)), &compiled).unwrap().origin, Origin::Compiled);

        for file in fs::read_dir(&folder).unwrap() {
            fs::write(file.unwrap().path(), "damaged").unwrap();
        }
        assert_eq!(find(Some((13, 0)), &compiled).unwrap().origin, Origin::Compiled);
        fs::remove_dir_all(folder).unwrap();
    }
}
