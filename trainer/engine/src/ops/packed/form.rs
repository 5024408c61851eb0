//! Storage of quantized weights: groups of 16 rows side by side, in blocks of 32 columns. Each row of a
//! block has its own scale.
//!
//! A quad is four columns of 16 rows, row by row: the weights that one instruction multiplies with four
//! activations. With 4 bits, two quads share 64 bytes.

use std::fmt::Debug;
use std::ops::Range;

use half::f16;

use super::layout::{BLOCK_WEIGHTS, GROUP_ROWS};

/// Quads per block.
pub(super) const K4_PER_BLOCK: usize = BLOCK_WEIGHTS / 4;

/// Format of quantized weights.
pub(super) trait QuantFormat: Debug + Copy {
    /// Type of the scales and minimums.
    type Scale: Debug + Copy + Send + Sync;
    /// Whether weights have 4 bits instead of 8.
    const IS_INT4: bool;
    /// Bytes of weights per block of 16 rows.
    const BLOCK_BYTES: usize;
    /// Scales and minimums per block of 16 rows.
    const BLOCK_SCALES: usize;

    /// Returns four stored columns of a row; `step` is the quad, `lane` the row within the block.
    fn k4(weights: &[u8], step: usize, lane: usize) -> [u8; 4];

    /// Returns the scale of a row of a block, and the value of a stored zero.
    fn scale_and_min(numbers: &[Self::Scale], lane: usize) -> (f32, f32);
}

/// 8-bit format: integers from -127 to 127, stored plus 128, times an f32 scale.
#[derive(Debug, Clone, Copy)]
pub(super) enum Int8 {}

impl QuantFormat for Int8 {
    type Scale = f32;
    const IS_INT4: bool = false;
    const BLOCK_BYTES: usize = GROUP_ROWS * BLOCK_WEIGHTS;
    const BLOCK_SCALES: usize = GROUP_ROWS;

    fn k4(weights: &[u8], step: usize, lane: usize) -> [u8; 4] {
        std::array::from_fn(|at| weights[(step * GROUP_ROWS + lane) * 4 + at])
    }

    fn scale_and_min(numbers: &[f32], lane: usize) -> (f32, f32) {
        (numbers[lane], -128.0 * numbers[lane])
    }
}

/// 4-bit format: integers from 0 to 15 times a scale plus a minimum, as in GGUF's 4-bit formats. A block
/// stores 16 scales, then 16 minimums, as f16.
#[derive(Debug, Clone, Copy)]
pub(super) enum Int4 {}

impl QuantFormat for Int4 {
    type Scale = u16;
    const IS_INT4: bool = true;
    const BLOCK_BYTES: usize = GROUP_ROWS * BLOCK_WEIGHTS / 2;
    const BLOCK_SCALES: usize = 2 * GROUP_ROWS;

    fn k4(weights: &[u8], step: usize, lane: usize) -> [u8; 4] {
        let high = 4 * (step % 2);
        std::array::from_fn(|at| weights[(step / 2 * GROUP_ROWS + lane) * 4 + at] >> high & 15)
    }

    fn scale_and_min(numbers: &[u16], lane: usize) -> (f32, f32) {
        let number = |at: usize| f16::from_bits(numbers[at]).to_f32();
        (number(lane), number(GROUP_ROWS + lane))
    }
}

/// The weights of all groups of a matrix, one after the other.
#[derive(Debug)]
pub(super) struct QuantBlocks<F: QuantFormat> {
    /// Stored weights, [`Form::BYTES`] per block.
    pub(super) weights: Vec<u8>,
    /// Scales and minimums, [`Form::NUMBERS`] per block.
    pub(super) numbers: Vec<F::Scale>,
}

/// A view of consecutive blocks of one group.
#[derive(Debug, Clone, Copy)]
pub(super) struct GroupView<'a, F: QuantFormat> {
    pub(super) weights: &'a [u8],
    pub(super) numbers: &'a [F::Scale],
}

impl<F: QuantFormat> QuantBlocks<F> {
    /// Creates blocks filled with one stored weight and one scale or minimum.
    pub(super) fn filled(blocks: usize, weight: u8, number: F::Scale) -> Self {
        Self {
            weights: vec![weight; blocks * F::BLOCK_BYTES],
            numbers: vec![number; blocks * F::BLOCK_SCALES],
        }
    }

    /// Returns the size in bytes.
    pub(super) fn size_bytes(&self) -> usize {
        self.weights.len() + size_of_val(self.numbers.as_slice())
    }

    /// Returns a range of blocks.
    pub(super) fn block_range(&self, blocks: Range<usize>) -> GroupView<'_, F> {
        GroupView {
            weights: &self.weights[blocks.start * F::BLOCK_BYTES..blocks.end * F::BLOCK_BYTES],
            numbers: &self.numbers[blocks.start * F::BLOCK_SCALES..blocks.end * F::BLOCK_SCALES],
        }
    }
}

impl<'a, F: QuantFormat> GroupView<'a, F> {
    /// Iterates over the blocks.
    pub(super) fn blocks(self) -> impl Iterator<Item = Self> {
        let blocks =
            self.weights.chunks_exact(F::BLOCK_BYTES).zip(self.numbers.chunks_exact(F::BLOCK_SCALES));
        blocks.map(|(weights, numbers)| GroupView { weights, numbers })
    }

    /// Returns the dequantized weights of one row of a block.
    pub(super) fn dequantize_row(self, lane: usize) -> [f32; BLOCK_WEIGHTS] {
        let (scale, least) = F::scale_and_min(self.numbers, lane);
        let mut values = [0.0; BLOCK_WEIGHTS];
        for (step, values) in values.chunks_exact_mut(4).enumerate() {
            for (value, byte) in values.iter_mut().zip(F::k4(self.weights, step, lane)) {
                *value = if F::IS_INT4 {
                    f32::from(byte).mul_add(scale, least)
                } else {
                    (f32::from(byte) - 128.0) * scale
                };
            }
        }
        values
    }
}

/// 32 weights of a row in 4 bits: `scale * value + least`, with values from 0 to 15.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Int4Block {
    /// Difference of adjacent values.
    pub scale: f32,
    /// Minimum: the weight for value 0.
    pub least: f32,
    /// Stored values, 0 to 15.
    pub values: [u8; BLOCK_WEIGHTS],
}

impl Int4Block {
    /// Writes the weights as row `lane` of a block. Returns false if scale or minimum exceed f16.
    pub(super) fn write_lane(&self, lane: usize, weights: &mut [u8], numbers: &mut [u16]) -> bool {
        for (at, values) in self.values.chunks_exact(8).enumerate() {
            let (low, high) = values.split_at(4);
            for (to, (low, high)) in
                weights[(at * GROUP_ROWS + lane) * 4..][..4].iter_mut().zip(low.iter().zip(high))
            {
                *to = low & 15 | high << 4;
            }
        }
        let halves = [self.scale, self.least].map(f16::from_f32);
        [numbers[lane], numbers[GROUP_ROWS + lane]] = halves.map(f16::to_bits);
        halves.iter().all(|half| half.is_finite())
    }
}

/// Rounds whole rows of `blocks` blocks to 8 bits.
pub(super) fn quantize_int8_rows(values: &[f32], blocks: usize, weights: &mut [u8], scales: &mut [f32]) {
    for (row, values) in values.chunks_exact(blocks * BLOCK_WEIGHTS).enumerate() {
        let (group, lane) = (row / GROUP_ROWS, row % GROUP_ROWS);
        for (block, values) in values.chunks_exact(BLOCK_WEIGHTS).enumerate() {
            let block = group * blocks + block;
            let most = values.iter().fold(0f32, |most, value| most.max(value.abs()));
            let scale = most / 127.0;
            scales[block * GROUP_ROWS + lane] = scale;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let quads = weights[block * GROUP_ROWS * BLOCK_WEIGHTS..][..GROUP_ROWS * BLOCK_WEIGHTS]
                .chunks_exact_mut(4 * GROUP_ROWS);
            for (quad, four) in quads.zip(values.chunks_exact(4)) {
                for (byte, value) in quad[lane * 4..][..4].iter_mut().zip(four) {
                    // Adding 128.5 rounds to the nearest integer, because the cast truncates and all sums
                    // are positive.
                    *byte = (value * inverse + 128.5) as u8;
                }
            }
        }
    }
}
