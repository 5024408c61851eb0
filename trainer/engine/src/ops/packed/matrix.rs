//! A quantized matrix.

use super::form::{Int4, Int8, QuantBlocks};

/// A quantized matrix `[rows, columns]` in 8- or 4-bit blocks.
#[derive(Debug)]
pub struct QuantizedMatrix {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) held: Storage,
}

#[derive(Debug)]
pub(super) enum Storage {
    Eight(QuantBlocks<Int8>),
    Four(QuantBlocks<Int4>),
}
