//! Ids: content hashes for records, models and files, and unique ids for requests.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// First 128 bits of a BLAKE3 hash, as 32 hexadecimal digits.
///
/// Equal ids mean equal content. A position in a file is never an id.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ContentId(String);

impl ContentId {
    /// Hashes `parts` with their lengths, so that `["ab", "c"]` and `["a", "bc"]` differ.
    pub fn from_parts(parts: &[&str]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Self(hasher.finalize().to_hex()[..32].to_owned())
    }

    /// Hashes one byte string, such as a file or a weight tensor, without its length.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).to_hex()[..32].to_owned())
    }

    /// Returns the 32 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the first 64 bits as a seed that depends on the content alone.
    pub fn seed(&self) -> u64 {
        u64::from_str_radix(self.0.get(..16).unwrap_or_default(), 16).unwrap_or_default()
    }
}

/// Incremental form of [`ContentId::of_bytes`].
#[derive(Default)]
pub struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    /// Appends `bytes` to the hashed content.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Returns the id of the content so far.
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

/// Returns a new id `<prefix>-<24 hexadecimal digits>`, such as `req-0193…`.
///
/// A counter makes ids unique within the process; a random key per process separates processes. The id is not
/// a secret.
pub fn unique_id(prefix: &str) -> String {
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
    fn same_text_split_differently_gives_other_ids() {
        assert_ne!(ContentId::from_parts(&["ab", "c"]), ContentId::from_parts(&["a", "bc"]));
        assert_eq!(ContentId::from_parts(&["ab", "c"]), ContentId::from_parts(&["ab", "c"]));
    }

    #[test]
    fn unique_ids_do_not_repeat() {
        let ids: std::collections::HashSet<_> = (0..10_000).map(|_| unique_id("req")).collect();
        assert_eq!(ids.len(), 10_000);
    }
}
