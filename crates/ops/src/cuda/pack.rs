//! The pack: machine code of all kernel files for all architectures, in one file.
//!
//! Layout, little-endian: `FATHOMK3`, u32 count, then per image u16 length and bytes of the file
//! path, the same of the architecture and of the key of the source, u64 offset and u64 length; then the
//! images, each a zlib stream of its own: a start unpacks those of its architecture, some 10 MB, and a
//! damaged one is seen by its checksum.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;

/// First bytes of a pack.
const MAGIC: &[u8; 8] = b"FATHOMK3";

/// One image of a pack that is read, or to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image<'a> {
    /// Kernel file, as in the manifest.
    pub path: &'a str,
    /// Architecture it was compiled for.
    pub arch: &'a str,
    /// [`source_key`](super::compile::source_key) of what was compiled: an old pack is no code for new
    /// launchers.
    pub key: &'a str,
    /// Machine code: as it is where it is to be written, a zlib stream where it was read.
    pub cubin: &'a [u8],
}

impl Image<'_> {
    /// Machine code of an image that was read; `None` if it is damaged.
    #[must_use]
    pub fn unpacked(&self) -> Option<Vec<u8>> {
        let mut cubin = Vec::new();
        ZlibDecoder::new(self.cubin).read_to_end(&mut cubin).ok()?;
        Some(cubin)
    }
}

/// The bytes of a pack.
///
/// # Errors
/// What compressing fails with.
pub fn write(images: &[Image<'_>]) -> std::io::Result<Vec<u8>> {
    let packed = |image: &Image<'_>| {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(image.cubin)?;
        encoder.finish()
    };
    let cubins = images.iter().map(packed).collect::<std::io::Result<Vec<_>>>()?;
    let text = |s: &str| [&(s.len() as u16).to_le_bytes()[..], s.as_bytes()].concat();
    let index: usize = images.iter().map(|i| i.path.len() + i.arch.len() + i.key.len() + 22).sum();
    let mut offset = MAGIC.len() + 4 + index;
    let mut out = MAGIC.to_vec();
    out.extend((images.len() as u32).to_le_bytes());
    for (image, cubin) in images.iter().zip(&cubins) {
        out.extend(text(image.path));
        out.extend(text(image.arch));
        out.extend(text(image.key));
        out.extend((offset as u64).to_le_bytes());
        out.extend((cubin.len() as u64).to_le_bytes());
        offset += cubin.len();
    }
    cubins.iter().for_each(|cubin| out.extend_from_slice(cubin));
    Ok(out)
}

/// The images of a pack; `None` if the bytes are no whole pack.
#[must_use]
pub fn read(pack: &[u8]) -> Option<Vec<Image<'_>>> {
    let mut rest = pack.strip_prefix(MAGIC)?;
    let mut take = |n: usize| {
        let (part, tail) = rest.split_at_checked(n)?;
        rest = tail;
        Some(part)
    };
    let count = u32::from_le_bytes(take(4)?.try_into().ok()?);
    let mut images = Vec::new();
    for _ in 0..count {
        let mut text = || {
            let len = u16::from_le_bytes(take(2)?.try_into().ok()?);
            std::str::from_utf8(take(usize::from(len))?).ok()
        };
        let (path, arch, key) = (text()?, text()?, text()?);
        let mut number = || {
            let bytes = take(8)?.try_into().ok()?;
            usize::try_from(u64::from_le_bytes(bytes)).ok()
        };
        let (offset, len) = (number()?, number()?);
        let cubin = pack.get(offset..offset.checked_add(len)?)?;
        images.push(Image { path, arch, key, cubin });
    }
    Some(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_gives_back_what_was_put_in() {
        let images = [
            Image { path: "hc/mix.cu", arch: "sm_80", key: "0a", cubin: &[1, 2, 3] },
            Image { path: "hc/mix.cu", arch: "sm_90a", key: "1b", cubin: &[] },
            Image { path: "a.cu", arch: "sm_120", key: "", cubin: &[9; 70] },
        ];
        let pack = write(&images).unwrap();
        let found = read(&pack).unwrap();
        assert_eq!(found.len(), images.len());
        for (got, put) in found.iter().zip(images) {
            assert_eq!((got.path, got.arch, got.key), (put.path, put.arch, put.key));
            assert_eq!(got.unpacked().unwrap(), put.cubin);
        }
    }

    #[test]
    fn a_damaged_pack_is_refused_and_never_panics() {
        let cubin: Vec<u8> = (0..40_u32).map(|i| (i * i % 61) as u8).collect();
        let pack =
            write(&[Image { path: "a.cu", arch: "sm_80", key: "0a", cubin: &cubin }]).unwrap();
        for len in 0..pack.len() {
            assert_eq!(read(&pack[..len]), None, "cut at {len}");
        }
        for at in 0..pack.len() {
            let mut damaged = pack.clone();
            damaged[at] ^= 0xff;
            for image in read(&damaged).into_iter().flatten() {
                let found = image.unpacked();
                assert!(found.is_none_or(|found| found == cubin), "damaged at {at}");
            }
        }
        assert_eq!(read(&[]), None);
    }
}
