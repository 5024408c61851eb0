//! Sorted output of a stage. Records arrive in the order of completion and leave in the order of their keys, so the
//! stage file does not depend on timing.
//!
//! Until then the records lie in a temporary file on disk; memory holds 16 bytes per record. Deliberately absent:
//! merging of existing files.

use std::marker::PhantomData;
use std::path::Path;

use potstill_shared::durable::{DurableError, LineReader, ScratchFile, write_file_with};
use potstill_shared::id::{ContentHasher, ContentId};
use serde::{Deserialize, Serialize};

/// Record with a sort key.
pub trait SortKey: Serialize + for<'de> Deserialize<'de> {
    /// Returns the sort key: the id, and a string that orders records with equal ids.
    fn sort_key(&self) -> (ContentId, String);
}

/// Error while collecting or writing records.
#[derive(Debug, thiserror::Error)]
pub enum SortedWriterError {
    /// A file cannot be read or written.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// A record cannot be converted to or from JSON.
    #[error("a record cannot be written: {0}")]
    Record(#[from] serde_json::Error),
}

/// Collects records and writes them in sorted order.
pub struct SortedWriter<T> {
    scratch: ScratchFile,
    /// First 64 bits of the id, and byte offset in the temporary file, of each record.
    places: Vec<(u64, u64)>,
    records: PhantomData<fn(T)>,
}

/// Result of writing a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenFile {
    /// Number of records.
    pub records: usize,
    /// Hash of the file's bytes.
    pub hash: ContentId,
}

impl<T: SortKey> SortedWriter<T> {
    /// Creates the temporary file in `folder`, which must exist.
    pub fn new(folder: &Path) -> Result<Self, DurableError> {
        Ok(Self { scratch: ScratchFile::new(folder)?, places: Vec::new(), records: PhantomData })
    }

    /// Adds a record.
    pub fn push(&mut self, record: &T) -> Result<(), SortedWriterError> {
        let place = self.scratch.append(&serde_json::to_vec(record)?)?;
        self.places.push((record.sort_key().0.seed(), place));
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
    pub fn write_sorted(mut self, path: &Path) -> Result<WrittenFile, SortedWriterError> {
        let lines = self.scratch.into_reader()?;
        self.places.sort_unstable();
        sort_ties::<T>(&mut self.places, &lines)?;
        let mut hasher = ContentHasher::default();
        let mut fault = None;
        let written = write_file_with(path, |file| {
            use std::io::Write;
            for (_, place) in &self.places {
                let mut line = match lines.read_line_at(*place) {
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
        Ok(WrittenFile { records: self.places.len(), hash: hasher.finish() })
    }
}

/// Sorts records with equal first 64 id bits by their complete keys.
fn sort_ties<T: SortKey>(places: &mut [(u64, u64)], lines: &LineReader) -> Result<(), SortedWriterError> {
    for group in places.chunk_by_mut(|a, b| a.0 == b.0).filter(|group| group.len() > 1) {
        let mut keyed = Vec::with_capacity(group.len());
        for (_, place) in group.iter() {
            let record: T = serde_json::from_str(&lines.read_line_at(*place)?)?;
            keyed.push((record.sort_key(), *place));
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

    impl SortKey for Row {
        fn sort_key(&self) -> (ContentId, String) {
            (ContentId::from_parts(&[&self.id.to_string()]), format!("{:03}", self.rest))
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
                let mut spool = SortedWriter::new(folder.path()).unwrap();
                for row in &rows {
                    spool.push(row).unwrap();
                }
                let found = spool.write_sorted(&path).unwrap();
                let bytes = std::fs::read(&path).unwrap();
                prop_assert_eq!(&found.hash, &ContentId::from_bytes(&bytes));
                let again: Vec<Row> = crate::jsonl::read_records(&path).unwrap();
                prop_assert!(again.is_sorted_by_key(SortKey::sort_key));
                prop_assert_eq!(again.len(), rows.len());
                written.push(bytes);
                rows.reverse();
            }
            prop_assert_eq!(&written[0], &written[1]);
        }
    }
}
