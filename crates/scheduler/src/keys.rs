//! Names of prefixes: a hash chain over the tokens of full blocks.
//!
//! The key of a block covers all tokens up to its end, the namespace (model, numeric profile, row
//! format) and the request's scope (salt, user). Equal keys therefore mean equal cache content.
//! Keys are 128 bits of xxh3 under a seed that only this process (or cache directory) knows, so a
//! client cannot construct two prompts with one key.

use std::hash::{BuildHasherDefault, Hasher};

use fathom_core::TokenId;
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128_with_seed};

use crate::BLOCK_TOKENS;

const KEY_BYTES: usize = size_of::<u128>();
const TOKEN_BYTES: usize = size_of::<TokenId>();

/// Name of one prefix, a whole number of blocks long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey(pub u128);

/// Derives keys.
#[derive(Debug, Clone)]
pub(crate) struct KeyHasher {
    seed: u64,
    namespace: u128,
}

impl KeyHasher {
    pub(crate) fn new(seed: u64, namespace: &str) -> Self {
        Self { seed, namespace: xxh3_128_with_seed(namespace.as_bytes(), seed) }
    }

    /// The key of the empty prefix in a scope: the chain's start.
    pub(crate) fn root(&self, salt: Option<&str>, user: Option<&str>) -> BlockKey {
        let mut bytes = self.namespace.to_le_bytes().to_vec();
        for part in [salt, user] {
            // The length keeps ("ab", "c") and ("a", "bc") apart, its absence None and "".
            if let Some(part) = part {
                bytes.extend_from_slice(&(part.len() as u64 + 1).to_le_bytes());
                bytes.extend_from_slice(part.as_bytes());
            } else {
                bytes.extend_from_slice(&0_u64.to_le_bytes());
            }
        }
        BlockKey(xxh3_128_with_seed(&bytes, self.seed))
    }

    /// The key of the prefix that ends with `block`, whose predecessor's key is `parent`.
    pub(crate) fn next(&self, parent: BlockKey, block: &[TokenId]) -> BlockKey {
        let mut bytes = [0; KEY_BYTES + BLOCK_TOKENS as usize * TOKEN_BYTES];
        bytes[..KEY_BYTES].copy_from_slice(&parent.0.to_le_bytes());
        write_tokens(&mut bytes[KEY_BYTES..], block);
        BlockKey(xxh3_128_with_seed(&bytes, self.seed))
    }

    /// A hash of a first block without its scope: tells whether another scope has the same tokens.
    pub(crate) fn unscoped(&self, block: &[TokenId]) -> u64 {
        let mut bytes = [0; BLOCK_TOKENS as usize * TOKEN_BYTES];
        write_tokens(&mut bytes, block);
        xxh3_64_with_seed(&bytes, self.seed)
    }

    /// Extends `keys` so that it holds the keys of the first `n_blocks` blocks of `tokens`.
    pub(crate) fn extend(
        &self,
        root: BlockKey,
        keys: &mut Vec<BlockKey>,
        tokens: &[TokenId],
        n_blocks: usize,
    ) {
        while keys.len() < n_blocks {
            let parent = keys.last().copied().unwrap_or(root);
            keys.push(self.next(parent, block_tokens(tokens, keys.len())));
        }
    }
}

/// The tokens of full block `index`.
pub(crate) fn block_tokens(tokens: &[TokenId], index: usize) -> &[TokenId] {
    let size = BLOCK_TOKENS as usize;
    &tokens[index * size..(index + 1) * size]
}

fn write_tokens(bytes: &mut [u8], block: &[TokenId]) {
    debug_assert_eq!(bytes.len(), block.len() * TOKEN_BYTES);
    for (bytes, token) in bytes.as_chunks_mut::<TOKEN_BYTES>().0.iter_mut().zip(block) {
        *bytes = token.to_le_bytes();
    }
}

/// Hashes values that are hashes already, by taking their low bits.
#[derive(Debug, Default)]
pub(crate) struct TakeLowBits(u64);

impl Hasher for TakeLowBits {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }

    fn write_u128(&mut self, value: u128) {
        self.0 = value as u64;
    }
}

pub(crate) type ByHash = BuildHasherDefault<TakeLowBits>;

#[cfg(test)]
mod tests {
    use super::*;

    fn block(first: TokenId) -> Vec<TokenId> {
        (first..first + BLOCK_TOKENS).collect()
    }

    #[test]
    fn a_key_depends_on_every_earlier_token_and_on_the_scope() {
        let hasher = KeyHasher::new(7, "model");
        let root = hasher.root(None, None);
        let (first, mut other) = (block(0), block(0));
        other[255] += 1;
        let second = block(900);
        let key = |first: &[TokenId]| hasher.next(hasher.next(root, first), &second);
        assert_ne!(key(&first), key(&other));
        assert_eq!(key(&first), key(&first));

        let roots = [
            root,
            hasher.root(Some(""), None),
            hasher.root(None, Some("")),
            hasher.root(Some("ab"), Some("c")),
            hasher.root(Some("a"), Some("bc")),
            KeyHasher::new(7, "other model").root(None, None),
            KeyHasher::new(8, "model").root(None, None),
        ];
        for (index, root) in roots.iter().enumerate() {
            assert!(!roots[..index].contains(root), "scope {index} repeats an earlier one");
        }
    }

    #[test]
    fn extending_a_chain_adds_the_keys_of_the_missing_blocks_only() {
        let hasher = KeyHasher::new(7, "model");
        let root = hasher.root(None, None);
        let tokens: Vec<TokenId> = (0..3 * BLOCK_TOKENS).collect();
        let mut at_once = Vec::new();
        hasher.extend(root, &mut at_once, &tokens, 3);
        let mut in_parts = Vec::new();
        hasher.extend(root, &mut in_parts, &tokens, 1);
        hasher.extend(root, &mut in_parts, &tokens, 3);
        assert_eq!(at_once, in_parts);
        assert_eq!(at_once[1], hasher.next(at_once[0], block_tokens(&tokens, 1)));
    }
}
