//! Shape of attention: rows of each sequence in a batch, and sizes of the heads.

use std::ops::Range;

/// Rows of one sequence in a batch: rows `start .. start + len` are the tokens `past .. past + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First row in the batch.
    pub start: usize,
    /// Number of rows in the batch.
    pub len: usize,
    /// Number of earlier tokens of the sequence, whose keys are in the KV cache.
    pub past: usize,
}

impl Segment {
    /// Splits the rows into parts: the first part has up to `first` rows, the others up to `each`.
    pub(crate) fn split(self, each: usize, first: usize) -> impl Iterator<Item = Self> {
        let begins = std::iter::once(0).chain((first..self.len).step_by(each));
        begins.filter(move |begin| *begin < self.len).map(move |begin| {
            let most = if begin == 0 { first } else { each };
            Self { start: self.start + begin, len: most.min(self.len - begin), past: self.past + begin }
        })
    }
}

/// Numbers and size of attention heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionHeads {
    /// Number of query heads.
    pub query: usize,
    /// Number of key and value heads; divides `query`.
    pub kv: usize,
    /// Elements per head.
    pub dim: usize,
}

impl AttentionHeads {
    /// Factor on the scores, `1 / sqrt(dim)`.
    pub(crate) fn score_scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    pub(crate) fn query_width(self) -> usize {
        self.query * self.dim
    }

    pub(crate) fn kv_width(self) -> usize {
        self.kv * self.dim
    }

    /// Returns the query heads that share key head `kv`.
    pub(crate) fn query_group(self, kv: usize) -> Range<usize> {
        let size = self.query / self.kv;
        kv * size..(kv + 1) * size
    }
}
