//! Sorted output of a stage. Records arrive in the order of completion and leave in the order of their keys, so the
//! stage file does not depend on timing.
//!
//! Until then the records lie in a temporary file on disk; memory holds 16 bytes per record. Deliberately absent:
//! merging of existing files.

use std::marker::PhantomData;
use std::path::Path;

use potstill_shared::durable::{DurableError, Lines, Scratch, write_with};
use potstill_shared::id::{ContentHasher, ContentId};
use serde::{Deserialize, Serialize};

/// Record with a sort key.
pub trait Keyed: Serialize + for<'de> Deserialize<'de> {
    /// Returns the sort key: the id, and a string that orders records with equal ids.
    fn key(&self) -> (ContentId, String);
}

/// Error while collecting or writing records.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// A file cannot be read or written.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// A record cannot be converted to or from JSON.
    #[error("a record cannot be written: {0}")]
    Record(#[from] serde_json::Error),
}

/// Collects records and writes them in sorted order.
pub struct Spool<T> {
    scratch: Scratch,
    /// First 64 bits of the id, and byte offset in the temporary file, of each record.
    places: Vec<(u64, u64)>,
    records: PhantomData<fn(T)>,
}

/// Result of writing a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Number of records.
    pub records: usize,
    /// Hash of the file's bytes.
    pub hash: ContentId,
}

impl<T: Keyed> Spool<T> {
    /// Creates the temporary file in `folder`, which must exist.
    pub fn new(folder: &Path) -> Result<Self, DurableError> {
        Ok(Self { scratch: Scratch::new(folder)?, places: Vec::new(), records: PhantomData })
    }

    /// Adds a record.
    pub fn push(&mut self, record: &T) -> Result<(), SpoolError> {
        let place = self.scratch.append(&serde_json::to_vec(record)?)?;
        self.places.push((record.key().0.seed(), place));
        Ok(())
    }

    /// Returns the number of records added so far.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Returns whether no record was added.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Writes the records to `path` in sorted order, atomically.
    pub fn finish(mut self, path: &Path) -> Result<Written, SpoolError> {
        let lines = self.scratch.lines()?;
        self.places.sort_unstable();
        settle_ties::<T>(&mut self.places, &lines)?;
        let mut hasher = ContentHasher::default();
        let mut fault = None;
        let written = write_with(path, |file| {
            use std::io::Write;
            for (_, place) in &self.places {
                let mut line = match lines.read(*place) {
                    Ok(line) => line,
                    Err(error) => {
                        let io = std::io::Error::other(error.to_string());
                        fault = Some(error);
                        return Err(io);
                    }
                };
                line.push('\n');
                hasher.update(line.as_bytes());
                file.write_all(line.as_bytes())?;
            }
            Ok(())
        });
        if let Some(fault) = fault {
            return Err(fault.into());
        }
        written?;
        Ok(Written { records: self.places.len(), hash: hasher.finish() })
    }
}

/// Sorts records with equal first 64 id bits by their complete keys.
fn settle_ties<T: Keyed>(places: &mut [(u64, u64)], lines: &Lines) -> Result<(), SpoolError> {
    for group in places.chunk_by_mut(|a, b| a.0 == b.0).filter(|group| group.len() > 1) {
        let mut keyed = Vec::with_capacity(group.len());
        for (_, place) in group.iter() {
            let record: T = serde_json::from_str(&lines.read(*place)?)?;
            keyed.push((record.key(), *place));
        }
        keyed.sort();
        for (at, (_, place)) in group.iter_mut().zip(keyed) {
            at.1 = place;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Row {
        id: u8,
        rest: u8,
    }

    impl Keyed for Row {
        fn key(&self) -> (ContentId, String) {
            (ContentId::of(&[&self.id.to_string()]), format!("{:03}", self.rest))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn output_does_not_depend_on_the_input_order(rows in prop::collection::vec((0u8..9, any::<u8>()), 0..60)) {
            let folder = tempfile::tempdir().unwrap();
            let mut rows: Vec<Row> = rows.into_iter().map(|(id, rest)| Row { id, rest }).collect();
            let path = folder.path().join("rows.jsonl");
            let mut written = Vec::new();
            for _ in 0..2 {
                let mut spool = Spool::new(folder.path()).unwrap();
                for row in &rows {
                    spool.push(row).unwrap();
                }
                let found = spool.finish(&path).unwrap();
                let bytes = std::fs::read(&path).unwrap();
                prop_assert_eq!(&found.hash, &ContentId::of_bytes(&bytes));
                let again: Vec<Row> = crate::jsonl::read_records(&path).unwrap();
                prop_assert!(again.is_sorted_by_key(Keyed::key));
                prop_assert_eq!(again.len(), rows.len());
                written.push(bytes);
                rows.reverse();
            }
            prop_assert_eq!(&written[0], &written[1]);
        }
    }
}
