//! Identities: content hashes for records, random ids for requests.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// The first 128 bits of a BLAKE3 hash, as 32 hexadecimal digits. Two records with the same id have the same content:
/// position in a file never identifies anything.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ContentId(String);

impl ContentId {
    /// Hashes `parts` with their lengths, so that `["ab", "c"]` and `["a", "bc"]` differ.
    pub fn of(parts: &[&str]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Self(hasher.finalize().to_hex()[..32].to_owned())
    }

    /// Hashes bytes as they are (a file, a weight tensor).
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).to_hex()[..32].to_owned())
    }

    /// The 32 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 64 bits as a number: a seed that depends on nothing but the content.
    pub fn seed(&self) -> u64 {
        u64::from_str_radix(self.0.get(..16).unwrap_or_default(), 16).unwrap_or_default()
    }
}

/// Hashes bytes that come piece by piece, as [`ContentId::of_bytes`] does with all at once.
#[derive(Default)]
pub struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    /// Takes the next piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The id of all pieces.
    pub fn finish(&self) -> ContentId {
        ContentId(self.0.finalize().to_hex()[..32].to_owned())
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A fresh id such as `req-0193…`, unique within and (by a random base per process) across processes. Not a secret.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static BASE: std::sync::OnceLock<RandomState> = std::sync::OnceLock::new();
    let mut hasher = BASE.get_or_init(RandomState::new).build_hasher();
    hasher.write_u64(NEXT.fetch_add(1, Ordering::Relaxed));
    let high = hasher.finish();
    hasher.write_u64(high);
    let mut id = String::with_capacity(prefix.len() + 25);
    id.push_str(prefix);
    id.push('-');
    let mut hexadecimal = |number: u64, digits: u32| {
        for digit in (0..digits).rev() {
            id.push(char::from(b"0123456789abcdef"[(number >> (4 * digit)) as usize & 15]));
        }
    };
    hexadecimal(high, 16);
    hexadecimal(hasher.finish(), 8);
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_between_parts_count() {
        assert_ne!(ContentId::of(&["ab", "c"]), ContentId::of(&["a", "bc"]));
        assert_eq!(ContentId::of(&["ab", "c"]), ContentId::of(&["ab", "c"]));
    }

    #[test]
    fn unique_ids_differ() {
        let ids: std::collections::HashSet<_> = (0..10_000).map(|_| unique("req")).collect();
        assert_eq!(ids.len(), 10_000);
    }
}
