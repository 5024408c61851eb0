//! The kernel for AVX2 and FMA.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_abs_epi8, _mm256_add_epi32, _mm256_cvtepi32_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi8,
    _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_sign_epi8, _mm256_storeu_ps, _mm256_xor_si256,
};

use super::{Activations, BLOCK, LANES, Rounded};

/// The plain form, compiled for wider registers.
///
/// # Safety
///
/// The processor must have the features named below.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn quantise(values: &[f32], into: Rounded<'_>) {
    super::quantise(values, into);
}

/// `N` activation rows at once. The only product of bytes takes one side unsigned and adds pairs in 16 bits: with the
/// sign of the activation moved to the weight, two products of at most 127 times 127 fit.
///
/// # Safety
///
/// The processor must have the features named below; `out` holds `N` rows of 16, `weights` and `scales` the blocks of one
/// group, and the activations at least `first + N` rows. The slices are indexed with checks outside the inner loop.
#[target_feature(enable = "avx2,fma")]
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
    let (signed, ones) = (_mm256_set1_epi8(-128), _mm256_set1_epi16(1));
    let mut totals: [[__m256; 2]; N] = [[_mm256_setzero_ps(); 2]; N];
    for block in 0..blocks {
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for step in 0..BLOCK / 4 {
            // SAFETY: two times 32 bytes within `weights`, by the assertion above.
            let weight: [__m256i; 2] = unsafe {
                let at: *const __m256i =
                    weights.as_ptr().add((block * (BLOCK / 4) + step) * 4 * LANES).cast();
                [
                    _mm256_xor_si256(_mm256_loadu_si256(at), signed),
                    _mm256_xor_si256(_mm256_loadu_si256(at.add(1)), signed),
                ]
            };
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: within `quads`, which holds N rows of `quads_per_row`.
                let quad = unsafe { *quads.get_unchecked(row * quads_per_row + block * (BLOCK / 4) + step) };
                let quad = _mm256_set1_epi32(quad);
                let size = _mm256_abs_epi8(quad);
                for (sum, weight) in sums.iter_mut().zip(weight) {
                    let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(weight, quad));
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for half in 0..2 {
            // SAFETY: within `scales`, by the assertion above.
            let weight_scale =
                unsafe { _mm256_loadu_ps(scales.as_ptr().add(block * LANES + half * LANES / 2)) };
            for (row, (sums, totals)) in sums.iter().zip(&mut totals).enumerate() {
                let scale = _mm256_mul_ps(weight_scale, _mm256_set1_ps(row_scales[row * blocks + block]));
                totals[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half]), scale, totals[half]);
            }
        }
    }
    for (row, totals) in totals.iter().enumerate() {
        for (half, total) in totals.iter().enumerate() {
            // SAFETY: `out` holds N rows of 16, by the assertion above.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(row * LANES + half * LANES / 2), *total) };
        }
    }
}
