//! Rounding of activations by the fastest kernel, in parallel.

use rayon::prelude::*;

use super::activations::{ActivationRowsMut, QuantizedActivations, quantize};
use super::kernel::Kernel;
use super::layout::{BLOCK_WEIGHTS, TILE_ROWS};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Minimum number of tiles per rounding task.
const MIN_TILES_PER_TASK: usize = 4;

impl QuantizedActivations {
    /// Rounds `n` rows of `blocks` blocks.
    pub(super) fn new(values: &[f32], n: usize, blocks: usize, kernel: Kernel) -> Self {
        // The AMX kernel reads whole tiles, so the rows are padded with zeros.
        let padded = n.next_multiple_of(TILE_ROWS);
        let mut all = Self {
            blocks,
            quads: vec![0; padded * blocks * BLOCK_WEIGHTS / 4],
            scales: vec![0.0; padded * blocks],
            offsets: vec![0; padded * blocks],
            sums: vec![0.0; padded * blocks],
        };
        // Values per tile, at least one block, because chunks of size 0 would panic.
        let piece = TILE_ROWS * blocks.max(1);
        let (quads, scales) =
            (all.quads.par_chunks_mut(piece * BLOCK_WEIGHTS / 4), all.scales.par_chunks_mut(piece));
        let numbers = scales.zip(all.offsets.par_chunks_mut(piece)).zip(all.sums.par_chunks_mut(piece));
        let tasks = quads.zip(numbers).zip(values.par_chunks(piece * BLOCK_WEIGHTS));
        tasks.with_min_len(MIN_TILES_PER_TASK).for_each(|((quads, ((scales, offsets), sums)), values)| {
            let into = ActivationRowsMut { quads, scales, offsets, sums };
            match kernel {
                // SAFETY: `Kernel::all` offers a kernel only on CPUs that support its instructions.
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Kernel::Amx => unsafe { avx512::quantize(values, into) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => unsafe { avx512::quantize(values, into) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => unsafe { avx2::quantize(values, into) },
                Kernel::Portable => quantize(values, into),
            }
        });
        all
    }
}
