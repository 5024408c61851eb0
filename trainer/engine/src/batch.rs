//! A ragged batch: the rows of several sequences one after the other, without padding. One row is one
//! token.

use std::sync::Arc;

use crate::ops::attention::Segment;

/// Tokens of a step, their positions, and the rows of each sequence.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token ids, one per row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Sequences in row order; together they cover all rows.
    pub segments: Arc<Vec<Segment>>,
}

impl Batch {
    /// Concatenates the rows of all sequences. Each item is `(tokens, past)`; `past` counts the tokens that
    /// the KV cache already holds.
    pub fn new<'a>(sequences: impl IntoIterator<Item = (&'a [u32], usize)>) -> Self {
        let (mut rows, mut positions, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        for (tokens, past) in sequences {
            segments.push(Segment { start: rows.len(), len: tokens.len(), past });
            rows.extend_from_slice(tokens);
            positions.extend((0..tokens.len()).map(|i| (past + i) as u32));
        }
        Self { tokens: rows, positions, segments: Arc::new(segments) }
    }

    /// Returns the index of each sequence's last row.
    pub fn last_row_indices(&self) -> Vec<u32> {
        self.segments.iter().map(|s| (s.start + s.len - 1) as u32).collect()
    }
}
