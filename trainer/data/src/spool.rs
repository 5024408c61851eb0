//! Records on their way into a stage's file. They come in the order in which they are done; the file holds them in the order
//! of their keys, so that it does not depend on timing. On the way they lie on the disk; in memory stand 16 bytes of each.

use std::marker::PhantomData;
use std::path::Path;

use potstill_shared::durable::{DurableError, Lines, Scratch, write_with};
use potstill_shared::id::{ContentHasher, ContentId};
use serde::{Deserialize, Serialize};

/// A record that has its place in a file.
pub trait Keyed: Serialize + for<'de> Deserialize<'de> {
    /// What it is ordered by: ids spread evenly first, the rest of the key decides between equal ones.
    fn key(&self) -> (ContentId, String);
}

/// Why records cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The disk.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// A record that is no JSON.
    #[error("a record cannot be written: {0}")]
    Record(#[from] serde_json::Error),
}

/// Records that are not yet in order.
pub struct Spool<T> {
    scratch: Scratch,
    /// First 64 bits of the id, and where the record lies.
    places: Vec<(u64, u64)>,
    records: PhantomData<fn(T)>,
}

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Records in it.
    pub records: usize,
    /// Hash of its bytes.
    pub hash: ContentId,
}

impl<T: Keyed> Spool<T> {
    /// On the disk of `folder`.
    pub fn new(folder: &Path) -> Result<Self, DurableError> {
        Ok(Self { scratch: Scratch::new(folder)?, places: Vec::new(), records: PhantomData })
    }

    /// Takes a record.
    pub fn push(&mut self, record: &T) -> Result<(), SpoolError> {
        let place = self.scratch.append(&serde_json::to_vec(record)?)?;
        self.places.push((record.key().0.seed(), place));
        Ok(())
    }

    /// Records so far.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Writes the records to `path`, in order, whole or not at all.
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

/// Orders the records whose ids begin alike by their whole keys.
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
        fn the_file_does_not_depend_on_the_order(rows in prop::collection::vec((0u8..9, any::<u8>()), 0..60)) {
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
