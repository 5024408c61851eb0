//! Storage of quantized weights: groups of 16 rows side by side, in blocks of 32 columns. Each row of a
//! block has its own scale.
//!
//! A quad is four columns of 16 rows, row by row: the weights that one instruction multiplies with four
//! activations. With 4 bits, two quads share 64 bytes.

use std::fmt::Debug;
use std::ops::Range;

use half::f16;

use super::{BLOCK, LANES};

/// Quads per block.
pub(super) const QUADS: usize = BLOCK / 4;

/// Format of quantized weights.
pub(super) trait Form: Debug + Copy {
    /// Type of the scales and minimums.
    type Number: Debug + Copy + Send + Sync;
    /// Whether weights have 4 bits instead of 8.
    const FOUR: bool;
    /// Bytes of weights per block of 16 rows.
    const BYTES: usize;
    /// Scales and minimums per block of 16 rows.
    const NUMBERS: usize;

    /// Returns four stored columns of a row; `step` is the quad, `lane` the row within the block.
    fn quad(weights: &[u8], step: usize, lane: usize) -> [u8; 4];

    /// Returns the scale of a row of a block, and the value of a stored zero.
    fn numbers(numbers: &[Self::Number], lane: usize) -> (f32, f32);
}

/// 8-bit format: integers from -127 to 127, stored plus 128, times an f32 scale.
#[derive(Debug, Clone, Copy)]
pub(super) enum Eight {}

impl Form for Eight {
    type Number = f32;
    const FOUR: bool = false;
    const BYTES: usize = LANES * BLOCK;
    const NUMBERS: usize = LANES;

    fn quad(weights: &[u8], step: usize, lane: usize) -> [u8; 4] {
        std::array::from_fn(|at| weights[(step * LANES + lane) * 4 + at])
    }

    fn numbers(numbers: &[f32], lane: usize) -> (f32, f32) {
        (numbers[lane], -128.0 * numbers[lane])
    }
}

/// 4-bit format: integers from 0 to 15 times a scale plus a minimum, as in GGUF's 4-bit formats. A block
/// stores 16 scales, then 16 minimums, as f16.
#[derive(Debug, Clone, Copy)]
pub(super) enum Four {}

impl Form for Four {
    type Number = u16;
    const FOUR: bool = true;
    const BYTES: usize = LANES * BLOCK / 2;
    const NUMBERS: usize = 2 * LANES;

    fn quad(weights: &[u8], step: usize, lane: usize) -> [u8; 4] {
        let high = 4 * (step % 2);
        std::array::from_fn(|at| weights[(step / 2 * LANES + lane) * 4 + at] >> high & 15)
    }

    fn numbers(numbers: &[u16], lane: usize) -> (f32, f32) {
        let number = |at: usize| f16::from_bits(numbers[at]).to_f32();
        (number(lane), number(LANES + lane))
    }
}

/// The weights of all groups of a matrix, one after the other.
#[derive(Debug)]
pub(super) struct Blocks<F: Form> {
    /// Stored weights, [`Form::BYTES`] per block.
    pub(super) weights: Vec<u8>,
    /// Scales and minimums, [`Form::NUMBERS`] per block.
    pub(super) numbers: Vec<F::Number>,
}

/// A view of consecutive blocks of one group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group<'a, F: Form> {
    pub(super) weights: &'a [u8],
    pub(super) numbers: &'a [F::Number],
}

impl<F: Form> Blocks<F> {
    /// Creates blocks filled with one stored weight and one scale or minimum.
    pub(super) fn new(blocks: usize, weight: u8, number: F::Number) -> Self {
        Self { weights: vec![weight; blocks * F::BYTES], numbers: vec![number; blocks * F::NUMBERS] }
    }

    /// Returns the size in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.weights.len() + size_of_val(self.numbers.as_slice())
    }

    /// Returns a range of blocks.
    pub(super) fn group(&self, blocks: Range<usize>) -> Group<'_, F> {
        Group {
            weights: &self.weights[blocks.start * F::BYTES..blocks.end * F::BYTES],
            numbers: &self.numbers[blocks.start * F::NUMBERS..blocks.end * F::NUMBERS],
        }
    }
}

impl<'a, F: Form> Group<'a, F> {
    /// Iterates over the blocks.
    pub(super) fn blocks(self) -> impl Iterator<Item = Self> {
        let blocks = self.weights.chunks_exact(F::BYTES).zip(self.numbers.chunks_exact(F::NUMBERS));
        blocks.map(|(weights, numbers)| Group { weights, numbers })
    }

    /// Returns the dequantized weights of one row of a block.
    pub(super) fn row(self, lane: usize) -> [f32; BLOCK] {
        let (scale, least) = F::numbers(self.numbers, lane);
        let mut values = [0.0; BLOCK];
        for (step, values) in values.chunks_exact_mut(4).enumerate() {
            for (value, byte) in values.iter_mut().zip(F::quad(self.weights, step, lane)) {
                *value = if F::FOUR {
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
pub struct FourBits {
    /// Difference of adjacent values.
    pub scale: f32,
    /// Minimum: the weight for value 0.
    pub least: f32,
    /// Stored values, 0 to 15.
    pub values: [u8; BLOCK],
}

impl FourBits {
    /// Writes the weights as row `lane` of a block. Returns false if scale or minimum exceed f16.
    pub(super) fn write(&self, lane: usize, weights: &mut [u8], numbers: &mut [u16]) -> bool {
        for (at, values) in self.values.chunks_exact(8).enumerate() {
            let (low, high) = values.split_at(4);
            for (to, (low, high)) in
                weights[(at * LANES + lane) * 4..][..4].iter_mut().zip(low.iter().zip(high))
            {
                *to = low & 15 | high << 4;
            }
        }
        let halves = [self.scale, self.least].map(f16::from_f32);
        [numbers[lane], numbers[LANES + lane]] = halves.map(f16::to_bits);
        halves.iter().all(|half| half.is_finite())
    }
}

/// Rounds whole rows of `blocks` blocks to 8 bits.
pub(super) fn round(values: &[f32], blocks: usize, weights: &mut [u8], scales: &mut [f32]) {
    for (row, values) in values.chunks_exact(blocks * BLOCK).enumerate() {
        let (group, lane) = (row / LANES, row % LANES);
        for (block, values) in values.chunks_exact(BLOCK).enumerate() {
            let block = group * blocks + block;
            let most = values.iter().fold(0f32, |most, value| most.max(value.abs()));
            let scale = most / 127.0;
            scales[block * LANES + lane] = scale;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let quads = weights[block * LANES * BLOCK..][..LANES * BLOCK].chunks_exact_mut(4 * LANES);
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
