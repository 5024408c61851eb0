//! The kernel for AVX-512 with VNNI.

use std::arch::x86_64::{
    __m128i, __m512i, _MM_HINT_T0, _mm_prefetch, _mm_storeu_si128, _mm512_abs_ps, _mm512_add_epi32,
    _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_epi32,
    _mm512_reduce_max_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::{Activations, BLOCK, LANES, Rounded};

/// Bytes of weights that are asked for ahead of their use: one row of activations waits for nothing but memory.
const AHEAD: usize = 4096;

/// The same as the plain form.
///
/// # Safety
///
/// The processor must have the features named below; `values` holds no more blocks than `into` has scales.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn quantise(values: &[f32], into: Rounded<'_>) {
    let blocks = values.len() / BLOCK;
    assert!(blocks <= into.scales.len() && into.quads.len() * 4 == into.scales.len() * BLOCK);
    for (block, (scale, offset)) in into.scales.iter_mut().zip(into.offsets).take(blocks).enumerate() {
        // SAFETY: block by block within `values` and `quads`, by the assertion above.
        unsafe {
            let from = values.as_ptr().add(block * BLOCK);
            let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(LANES)));
            let most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
            *scale = most / 127.0;
            let inverse = _mm512_set1_ps(if most > 0.0 { 127.0 / most } else { 0.0 });
            // Conversion rounds to the nearest, ties to even.
            let low = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
            let high = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
            *offset = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
            let to: *mut __m128i = into.quads.as_mut_ptr().add(block * BLOCK / 4).cast();
            _mm_storeu_si128(to, _mm512_cvtepi32_epi8(low));
            _mm_storeu_si128(to.add(1), _mm512_cvtepi32_epi8(high));
        }
    }
}

/// `N` activation rows at once.
///
/// # Safety
///
/// The processor must have the features named below; `out` holds `N` rows of 16, `weights` and `scales` the blocks of one
/// group, and the activations at least `first + N` rows. The slices are indexed with checks outside the inner loop.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn tile<const N: usize>(
    weights: &[u8],
    scales: &[f32],
    activations: &Activations,
    first: usize,
    out: &mut [f32],
) {
    let blocks = activations.blocks;
    let quads_per_row = blocks * BLOCK / 4;
    assert!(
        out.len() == N * LANES && weights.len() == blocks * LANES * BLOCK && scales.len() == blocks * LANES
    );
    let quads = &activations.quads[first * quads_per_row..][..N * quads_per_row];
    let row_scales = &activations.scales[first * blocks..][..N * blocks];
    let offsets = &activations.offsets[first * blocks..][..N * blocks];
    let mut totals = [_mm512_setzero_ps(); N];
    for block in 0..blocks {
        let mut sums = [_mm512_set1_epi32(0); N];
        for (row, sum) in sums.iter_mut().enumerate() {
            *sum = _mm512_set1_epi32(offsets[row * blocks + block]);
        }
        for step in 0..BLOCK / 4 {
            // SAFETY: within `weights`, by the assertion above.
            let weight: __m512i = unsafe {
                let at = weights.as_ptr().add((block * (BLOCK / 4) + step) * 4 * LANES);
                if N == 1 {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                }
                _mm512_loadu_si512(at.cast())
            };
            for (row, sum) in sums.iter_mut().enumerate() {
                // SAFETY: within `quads`, which holds N rows of `quads_per_row`.
                let quad = unsafe { *quads.get_unchecked(row * quads_per_row + block * (BLOCK / 4) + step) };
                *sum = _mm512_dpbusd_epi32(*sum, weight, _mm512_set1_epi32(quad));
            }
        }
        // SAFETY: within `scales`, by the assertion above.
        let weight_scale = unsafe { _mm512_loadu_ps(scales.as_ptr().add(block * LANES)) };
        for (row, (sum, total)) in sums.iter().zip(&mut totals).enumerate() {
            let scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(row_scales[row * blocks + block]));
            *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*sum), scale, *total);
        }
    }
    for (row, total) in totals.iter().enumerate() {
        // SAFETY: `out` holds N rows of 16, by the assertion above.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(row * LANES), *total) };
    }
}
