//! The quantized kernel for AVX2 with FMA and F16C.

use std::arch::x86_64::{
    __m256, __m256i, _mm_loadu_si128, _mm256_abs_epi8, _mm256_add_epi32, _mm256_and_si256,
    _mm256_cvtepi32_ps, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_sign_epi8,
    _mm256_srli_epi16, _mm256_storeu_ps, _mm256_xor_si256,
};

use super::activations::{self, ActivationRowsMut, QuantizedActivations};
use super::form::{GroupView, K4_PER_BLOCK, QuantFormat};
use super::layout::GROUP_ROWS;

/// Activation rows per pass: as many sums as fit the registers.
const TILE_ROWS: usize = 3;
/// Lanes per register.
const REGISTER_LANES: usize = GROUP_ROWS / 2;

/// The portable rounding, compiled for AVX2.
///
/// # Safety
///
/// The CPU must have the features named below.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn quantize(values: &[f32], into: ActivationRowsMut<'_>) {
    activations::quantize(values, into);
}

/// Multiplies one group of weights with the activation rows from `first` on, for all rows of `out`.
///
/// # Safety
///
/// The CPU must have the features of [`tile`].
pub(super) unsafe fn multiply_rows<F: QuantFormat>(
    group: GroupView<'_, F>,
    activations: &QuantizedActivations,
    first: usize,
    out: &mut [f32],
) {
    for (part, out) in out.chunks_mut(TILE_ROWS * GROUP_ROWS).enumerate() {
        let first = first + part * TILE_ROWS;
        // SAFETY: the caller guarantees the CPU features.
        unsafe {
            match out.len() / GROUP_ROWS {
                1 => multiply_tile::<1, F>(group, activations, first, out),
                2 => multiply_tile::<2, F>(group, activations, first, out),
                _ => multiply_tile::<3, F>(group, activations, first, out),
            }
        }
    }
}

/// Loads two quads of weights as bytes, in two registers of eight rows each; 8-bit weights become signed.
///
/// # Safety
///
/// `at` must point to 128 weights.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_two_k4<F: QuantFormat>(at: *const u8) -> [[__m256i; 2]; 2] {
    let at: *const __m256i = at.cast();
    // SAFETY: the caller guarantees 128 weights: 64 bytes for 4 bits, 128 for 8.
    unsafe {
        if F::IS_INT4 {
            let low = _mm256_set1_epi8(15);
            let both = [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))];
            [
                both.map(|both| _mm256_and_si256(both, low)),
                both.map(|both| _mm256_and_si256(_mm256_srli_epi16::<4>(both), low)),
            ]
        } else {
            let signed = _mm256_set1_epi8(-128);
            let half = |half: usize| _mm256_xor_si256(_mm256_loadu_si256(at.add(half)), signed);
            [[half(0), half(1)], [half(2), half(3)]]
        }
    }
}

/// Loads the scales of eight rows of a block, and the minimums or zeros.
///
/// # Safety
///
/// `at` must point to the scales of a block.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load_scales<F: QuantFormat>(at: *const F::Scale, half: usize) -> (__m256, __m256) {
    // SAFETY: the caller guarantees a whole block: 32 f16 values for 4 bits, 16 f32 values for 8.
    unsafe {
        let at = at.add(half * REGISTER_LANES);
        if F::IS_INT4 {
            let wide = |at: *const F::Scale| _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
            (wide(at), wide(at.add(GROUP_ROWS)))
        } else {
            (_mm256_loadu_ps(at.cast()), _mm256_setzero_ps())
        }
    }
}

/// Multiplies `N` activation rows at once. AVX2's byte product takes one unsigned side and adds pairs in 16
/// bits. 4-bit weights are unsigned. For 8-bit weights the sign of the activation moves to the weight, so
/// two products of at most 127 * 127 fit.
///
/// # Safety
///
/// The CPU must have the features named below.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_tile<const N: usize, F: QuantFormat>(
    group: GroupView<'_, F>,
    activations: &QuantizedActivations,
    first: usize,
    out: &mut [f32],
) {
    let blocks = activations.blocks;
    let quads_per_row = blocks * K4_PER_BLOCK;
    assert!(
        out.len() == N * GROUP_ROWS
            && group.weights.len() == blocks * F::BLOCK_BYTES
            && group.numbers.len() == blocks * F::BLOCK_SCALES
    );
    let quads = &activations.quads[first * quads_per_row..][..N * quads_per_row];
    let row_scales = &activations.scales[first * blocks..][..N * blocks];
    let row_sums = &activations.sums[first * blocks..][..N * blocks];
    let ones = _mm256_set1_epi16(1);
    let mut totals: [[__m256; 2]; N] = [[_mm256_setzero_ps(); 2]; N];
    for block in 0..blocks {
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for step in (0..K4_PER_BLOCK).step_by(2) {
            // SAFETY: the assertion above keeps the address within the group.
            let weights = unsafe {
                load_two_k4::<F>(
                    group
                        .weights
                        .as_ptr()
                        .add(block * F::BLOCK_BYTES + step * (F::BLOCK_BYTES / K4_PER_BLOCK)),
                )
            };
            for (row, sums) in sums.iter_mut().enumerate() {
                for (at, weights) in weights.into_iter().enumerate() {
                    // SAFETY: the index lies within `quads`, which holds N rows of `quads_per_row`.
                    let quad = unsafe {
                        *quads.get_unchecked(row * quads_per_row + block * K4_PER_BLOCK + step + at)
                    };
                    let quad = _mm256_set1_epi32(quad);
                    for (sum, weight) in sums.iter_mut().zip(weights) {
                        let pairs = if F::IS_INT4 {
                            _mm256_maddubs_epi16(weight, quad)
                        } else {
                            _mm256_maddubs_epi16(_mm256_abs_epi8(quad), _mm256_sign_epi8(weight, quad))
                        };
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                    }
                }
            }
        }
        for half in 0..2 {
            // SAFETY: the assertion above keeps the address within the group.
            let (weight_scale, least) =
                unsafe { load_scales::<F>(group.numbers.as_ptr().add(block * F::BLOCK_SCALES), half) };
            for (row, (sums, totals)) in sums.iter().zip(&mut totals).enumerate() {
                let at = row * blocks + block;
                if F::IS_INT4 {
                    totals[half] = _mm256_fmadd_ps(_mm256_set1_ps(row_sums[at]), least, totals[half]);
                }
                let scale = _mm256_mul_ps(weight_scale, _mm256_set1_ps(row_scales[at]));
                totals[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half]), scale, totals[half]);
            }
        }
    }
    for (row, totals) in totals.iter().enumerate() {
        for (half, total) in totals.iter().enumerate() {
            // SAFETY: the assertion above guarantees that `out` holds N rows of 16.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr().add(row * GROUP_ROWS + half * REGISTER_LANES), *total)
            };
        }
    }
}
