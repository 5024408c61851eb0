//! Activations rounded to 8 bits, with a scale for each block of 32: the other factor of a quantized
//! product.

use super::layout::BLOCK_WEIGHTS;

/// Activation rows in 8-bit blocks.
pub(super) struct QuantizedActivations {
    /// Blocks per row.
    pub(super) blocks: usize,
    /// Four adjacent values per `i32`, row by row, ready to be broadcast.
    pub(super) quads: Vec<i32>,
    /// Scale of each block.
    pub(super) scales: Vec<f32>,
    /// -128 times the sum of each block's integers.
    pub(super) offsets: Vec<i32>,
    /// Sum of each block's rounded values.
    pub(super) sums: Vec<f32>,
}

/// Output views of some rows of [`Activations`].
pub(super) struct ActivationRowsMut<'a> {
    pub(super) quads: &'a mut [i32],
    pub(super) scales: &'a mut [f32],
    pub(super) offsets: &'a mut [i32],
    pub(super) sums: &'a mut [f32],
}

/// Rounds activations to 8 bits, block by block.
#[inline(always)]
pub(super) fn quantize(values: &[f32], into: ActivationRowsMut<'_>) {
    let numbers = into.scales.iter_mut().zip(into.offsets).zip(into.sums);
    for ((block, quads), ((scale, offset), total)) in
        values.chunks_exact(BLOCK_WEIGHTS).zip(into.quads.chunks_exact_mut(BLOCK_WEIGHTS / 4)).zip(numbers)
    {
        let mut most = [0f32; 8];
        for eight in block.chunks_exact(8) {
            for (most, value) in most.iter_mut().zip(eight) {
                *most = most.max(value.abs());
            }
        }
        let most = most.iter().fold(0f32, |a, b| a.max(*b));
        *scale = most / 127.0;
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        let mut whole = [0i32; BLOCK_WEIGHTS];
        for (whole, value) in whole.iter_mut().zip(block) {
            *whole = (value * inverse).round_ties_even() as i32;
        }
        let sum = whole.iter().sum::<i32>();
        (*offset, *total) = (-128 * sum, sum as f32 * *scale);
        for (quad, four) in quads.iter_mut().zip(whole.chunks_exact(4)) {
            *quad = (four[0] & 255) | ((four[1] & 255) << 8) | ((four[2] & 255) << 16) | (four[3] << 24);
        }
    }
}
