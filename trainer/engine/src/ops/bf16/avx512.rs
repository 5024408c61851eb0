//! The bf16 kernel for AVX512-BF16: 16 x 16 sums in 16 registers, by dot products of pairs.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps,
};

use super::tile::{OutputRect, PANEL_ROWS, TILE_DEPTH, TILE_VALUES};

/// Computes all products of the left panels with the right panels.
///
/// # Safety
///
/// The CPU must have the features named below. `part` must lie within a matrix that no other thread
/// accesses. Panels must hold whole tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn multiply_panels(
    part: &OutputRect,
    left: &[u16],
    right: &[u16],
    panel: usize,
    add: bool,
) {
    for (r, right) in right.chunks_exact(panel).enumerate().take(part.columns.div_ceil(PANEL_ROWS)) {
        for (l, left) in left.chunks_exact(panel).enumerate().take(part.rows.div_ceil(PANEL_ROWS)) {
            let mut sums = [_mm512_setzero_ps(); PANEL_ROWS];
            for (a, b) in left.chunks_exact(TILE_VALUES).zip(right.chunks_exact(TILE_VALUES)) {
                for pair in 0..PANEL_ROWS {
                    // SAFETY: the tile has 16 rows of 64 bytes.
                    let b = unsafe { as_bf16(_mm512_loadu_si512(b.as_ptr().add(pair * TILE_DEPTH).cast())) };
                    for (row, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: the pair lies within the tile, and the read needs no alignment.
                        let a = unsafe {
                            let at: *const i32 = a.as_ptr().add(row * TILE_DEPTH + 2 * pair).cast();
                            as_bf16(_mm512_set1_epi32(at.read_unaligned()))
                        };
                        *sum = _mm512_dpbf16_ps(*sum, a, b);
                    }
                }
            }
            let mut tile = [0f32; PANEL_ROWS * PANEL_ROWS];
            for (sum, tile) in sums.iter().zip(tile.chunks_exact_mut(PANEL_ROWS)) {
                // SAFETY: the chunk has room for 16 values.
                unsafe { _mm512_storeu_ps(tile.as_mut_ptr(), *sum) };
            }
            // SAFETY: the caller guarantees that `part` lies within a matrix.
            unsafe { part.store_tile(l * PANEL_ROWS, r * PANEL_ROWS, &tile, add) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn as_bf16(line: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes, and every bit pattern is valid.
    unsafe { std::mem::transmute(line) }
}
