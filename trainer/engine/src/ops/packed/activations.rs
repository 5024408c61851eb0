//! Activations rounded to 8 bits, with a scale for each block of 32: the other factor of a quantized
//! product.

use rayon::prelude::*;

use super::{BLOCK, Kernel, TILE};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Minimum number of tiles per rounding task.
const TILES_PER_TASK: usize = 4;

/// Activation rows in 8-bit blocks.
pub(super) struct Activations {
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
pub(super) struct Rounded<'a> {
    pub(super) quads: &'a mut [i32],
    pub(super) scales: &'a mut [f32],
    pub(super) offsets: &'a mut [i32],
    pub(super) sums: &'a mut [f32],
}

impl Activations {
    /// Rounds `n` rows of `blocks` blocks.
    pub(super) fn new(values: &[f32], n: usize, blocks: usize, kernel: Kernel) -> Self {
        // The AMX kernel reads whole tiles, so the rows are padded with zeros.
        let padded = n.next_multiple_of(TILE);
        let mut all = Self {
            blocks,
            quads: vec![0; padded * blocks * BLOCK / 4],
            scales: vec![0.0; padded * blocks],
            offsets: vec![0; padded * blocks],
            sums: vec![0.0; padded * blocks],
        };
        // Values per tile, at least one block, because chunks of size 0 would panic.
        let piece = TILE * blocks.max(1);
        let (quads, scales) = (all.quads.par_chunks_mut(piece * BLOCK / 4), all.scales.par_chunks_mut(piece));
        let numbers = scales.zip(all.offsets.par_chunks_mut(piece)).zip(all.sums.par_chunks_mut(piece));
        let tasks = quads.zip(numbers).zip(values.par_chunks(piece * BLOCK));
        tasks.with_min_len(TILES_PER_TASK).for_each(|((quads, ((scales, offsets), sums)), values)| {
            let into = Rounded { quads, scales, offsets, sums };
            match kernel {
                // SAFETY: `Kernel::all` offers a kernel only on CPUs that support its instructions.
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Kernel::Amx => unsafe { avx512::quantise(values, into) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => unsafe { avx512::quantise(values, into) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => unsafe { avx2::quantise(values, into) },
                Kernel::Plain => quantise(values, into),
            }
        });
        all
    }
}

/// Rounds activations to 8 bits, block by block.
#[inline(always)]
pub(super) fn quantise(values: &[f32], into: Rounded<'_>) {
    let numbers = into.scales.iter_mut().zip(into.offsets).zip(into.sums);
    for ((block, quads), ((scale, offset), total)) in
        values.chunks_exact(BLOCK).zip(into.quads.chunks_exact_mut(BLOCK / 4)).zip(numbers)
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
        let mut whole = [0i32; BLOCK];
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
