//! A ragged batch: the rows of several sequences one after the other, each row one token.

use std::sync::Arc;

use crate::ops::attention::Segment;

/// Tokens, their positions, and which rows belong together.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// One token id per row.
    pub tokens: Vec<u32>,
    /// Position of each row in its own sequence.
    pub positions: Vec<u32>,
    /// The sequences, in row order, without gaps.
    pub segments: Arc<Vec<Segment>>,
}

impl Batch {
    /// Lays `(tokens, past)` of each sequence one after the other.
    pub fn new<'a>(sequences: impl IntoIterator<Item = (&'a [u32], usize)>) -> Self {
        let (mut rows, mut positions, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        for (tokens, past) in sequences {
            segments.push(Segment { start: rows.len(), len: tokens.len(), past });
            rows.extend_from_slice(tokens);
            positions.extend((0..tokens.len()).map(|i| (past + i) as u32));
        }
        Self { tokens: rows, positions, segments: Arc::new(segments) }
    }

    /// The last row of each sequence.
    pub fn last_rows(&self) -> Vec<u32> {
        self.segments.iter().map(|s| (s.start + s.len - 1) as u32).collect()
    }
}
