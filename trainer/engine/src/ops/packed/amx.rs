//! The kernel for tiles of bytes (AMX-INT8): sixteen activation rows at once, the sums of a block in one instruction.

use std::arch::x86_64::{
    _mm512_add_epi32, _mm512_cvtepi32_ps, _mm512_fmadd_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::mem::MaybeUninit;

use super::{Activations, BLOCK, LANES};
use crate::ops::amx::{BYTES, ROWS, Tiles, tile};

/// Blocks whose sums are under way: a tile takes long to reach memory, so others are begun meanwhile.
const AHEAD: usize = 4;

/// Sums of one block: 16 rows of 16.
#[repr(C, align(64))]
struct Sums([i32; ROWS * LANES]);

/// The registers as [`tile`] wants them: four of sums, two of activations, two of weights.
///
/// # Safety
///
/// The processor must have AMX-INT8, and this process the permission.
pub(super) unsafe fn tiles() -> Tiles {
    let (sums, activations, weights) = ((ROWS, BYTES), (ROWS, BLOCK), (BLOCK / 4, BYTES));
    // SAFETY: the caller's word.
    unsafe { Tiles::new([sums, sums, sums, sums, activations, activations, weights, weights]) }
}

/// Sixteen activation rows.
///
/// # Safety
///
/// The processor must have the features named below, and this thread [`tiles`]; `out` holds 16 rows of 16, `weights` and
/// `scales` the blocks of one group, and the activations at least `first + 16` rows.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn tile(
    weights: &[u8],
    scales: &[f32],
    activations: &Activations,
    first: usize,
    out: &mut [f32],
) {
    let blocks = activations.blocks;
    let row_bytes = blocks * BLOCK;
    assert!(
        out.len() == ROWS * LANES
            && weights.len() == blocks * LANES * BLOCK
            && scales.len() == blocks * LANES
    );
    let quads = &activations.quads[first * row_bytes / 4..][..ROWS * row_bytes / 4];
    let row_scales = &activations.scales[first * blocks..][..ROWS * blocks];
    let offsets = &activations.offsets[first * blocks..][..ROWS * blocks];
    let mut totals = [_mm512_setzero_ps(); ROWS];
    // Zeroed memory would take as long as the sums.
    let mut sums = [const { MaybeUninit::<Sums>::uninit() }; AHEAD];
    macro_rules! start {
        ($block:expr, $sums:literal, $activations:literal, $weights:literal) => {
            // SAFETY: 16 rows of 32 bytes, `row_bytes` apart, lie within `quads`, and a block's 512 bytes within
            // `weights`, by the assertion above; `sums` holds 16 rows of 64 bytes.
            unsafe {
                tile!(zero $sums);
                tile!(load $activations, quads.as_ptr().cast::<u8>().add($block * BLOCK), row_bytes);
                tile!(load $weights, weights.as_ptr().add($block * LANES * BLOCK), BYTES);
                tile!(dpbsud $sums, $activations, $weights);
                tile!(store $sums, sums[$block % AHEAD].as_mut_ptr(), BYTES);
            }
        };
    }
    macro_rules! start_any {
        ($block:expr) => {
            match $block % AHEAD {
                0 => start!($block, 0, 4, 6),
                1 => start!($block, 1, 5, 7),
                2 => start!($block, 2, 4, 6),
                _ => start!($block, 3, 5, 7),
            }
        };
    }
    for block in 0..blocks.min(AHEAD - 1) {
        start_any!(block);
    }
    for block in 0..blocks {
        let next = block + AHEAD - 1;
        if next < blocks {
            start_any!(next);
        }
        let sums: *const i32 = sums[block % AHEAD].as_ptr().cast();
        // SAFETY: within `scales`, by the assertion above.
        let weight_scale = unsafe { _mm512_loadu_ps(scales.as_ptr().add(block * LANES)) };
        for (row, total) in totals.iter_mut().enumerate() {
            // SAFETY: 16 aligned rows of 16 sums, which the tile was stored to; `offsets` and `row_scales` hold 16 rows of `blocks`.
            let (sum, offset, scale) = unsafe {
                let at = row * blocks + block;
                let sum = _mm512_load_si512(sums.add(row * LANES).cast());
                (sum, *offsets.get_unchecked(at), *row_scales.get_unchecked(at))
            };
            let sum = _mm512_add_epi32(sum, _mm512_set1_epi32(offset));
            let scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scale));
            *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
        }
    }
    for (total, out) in totals.iter().zip(out.chunks_exact_mut(LANES)) {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *total) };
    }
}
