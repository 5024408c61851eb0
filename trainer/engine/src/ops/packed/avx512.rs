//! The quantized kernel for AVX-512 with VNNI.

use std::arch::x86_64::{
    __m128i, __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm_storeu_si128, _mm256_loadu_si256, _mm512_abs_ps,
    _mm512_add_epi32, _mm512_and_si512, _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
    _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_epi32, _mm512_reduce_max_ps, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_srli_epi16, _mm512_storeu_ps,
};

use super::activations::{ActivationRowsMut, QuantizedActivations};
use super::form::{GroupView, K4_PER_BLOCK, QuantFormat};
use super::layout::{BLOCK_WEIGHTS, GROUP_ROWS};

/// Activation rows per pass: as many sums as fit the registers.
const TILE_ROWS: usize = 8;
/// Prefetch distance in bytes. With one activation row, memory is the only limit.
const PREFETCH_BYTES: usize = 4096;

/// Rounds activations to 8 bits, with the bits of the portable form.
///
/// # Safety
///
/// The CPU must have the features named below. `values` must hold no more blocks than `into` has scales.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn quantize(values: &[f32], into: ActivationRowsMut<'_>) {
    let blocks = values.len() / BLOCK_WEIGHTS;
    assert!(blocks <= into.scales.len() && into.quads.len() == into.scales.len() * K4_PER_BLOCK);
    let numbers = into.scales.iter_mut().zip(into.offsets).zip(into.sums);
    for (block, ((scale, offset), sum)) in numbers.take(blocks).enumerate() {
        // SAFETY: the assertion above keeps every block within `values` and `quads`.
        unsafe {
            let from = values.as_ptr().add(block * BLOCK_WEIGHTS);
            let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(GROUP_ROWS)));
            let most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
            *scale = most / 127.0;
            let inverse = _mm512_set1_ps(if most > 0.0 { 127.0 / most } else { 0.0 });
            // The conversion rounds to nearest, ties to even.
            let low = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
            let high = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
            let whole = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
            (*offset, *sum) = (-128 * whole, whole as f32 * *scale);
            let to: *mut __m128i = into.quads.as_mut_ptr().add(block * K4_PER_BLOCK).cast();
            _mm_storeu_si128(to, _mm512_cvtepi32_epi8(low));
            _mm_storeu_si128(to.add(1), _mm512_cvtepi32_epi8(high));
        }
    }
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
                3 => multiply_tile::<3, F>(group, activations, first, out),
                4 => multiply_tile::<4, F>(group, activations, first, out),
                5 => multiply_tile::<5, F>(group, activations, first, out),
                6 => multiply_tile::<6, F>(group, activations, first, out),
                7 => multiply_tile::<7, F>(group, activations, first, out),
                _ => multiply_tile::<8, F>(group, activations, first, out),
            }
        }
    }
}

/// Loads two quads of weights, one byte per weight.
///
/// # Safety
///
/// `at` must point to 128 weights.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn load_two_k4<F: QuantFormat>(at: *const u8) -> [__m512i; 2] {
    // SAFETY: the caller guarantees 128 weights: 64 bytes for 4 bits, 128 for 8.
    unsafe {
        let first = _mm512_loadu_si512(at.cast());
        if F::IS_INT4 {
            let low = _mm512_set1_epi8(15);
            [_mm512_and_si512(first, low), _mm512_and_si512(_mm512_srli_epi16::<4>(first), low)]
        } else {
            [first, _mm512_loadu_si512(at.add(4 * GROUP_ROWS).cast())]
        }
    }
}

/// Loads the scales of the 16 rows of a block, and the minimums or zeros.
///
/// # Safety
///
/// `at` must point to the scales of a block.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn load_scales<F: QuantFormat>(at: *const F::Scale) -> (__m512, __m512) {
    // SAFETY: the caller guarantees a whole block: 32 f16 values for 4 bits, 16 f32 values for 8.
    unsafe {
        if F::IS_INT4 {
            let half = |at: *const F::Scale| _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()));
            (half(at), half(at.add(GROUP_ROWS)))
        } else {
            (_mm512_loadu_ps(at.cast()), _mm512_setzero_ps())
        }
    }
}

/// Multiplies `N` activation rows at once.
///
/// # Safety
///
/// The CPU must have the features named below.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
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
    let offsets = &activations.offsets[first * blocks..][..N * blocks];
    let row_sums = &activations.sums[first * blocks..][..N * blocks];
    let mut totals = [_mm512_setzero_ps(); N];
    for block in 0..blocks {
        let mut sums = [_mm512_set1_epi32(0); N];
        if !F::IS_INT4 {
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_set1_epi32(offsets[row * blocks + block]);
            }
        }
        for step in (0..K4_PER_BLOCK).step_by(2) {
            // SAFETY: the assertion above keeps the address within the group.
            let weights = unsafe {
                let at = group
                    .weights
                    .as_ptr()
                    .add(block * F::BLOCK_BYTES + step * (F::BLOCK_BYTES / K4_PER_BLOCK));
                if N == 1 {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES).cast());
                    if !F::IS_INT4 {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES + 4 * GROUP_ROWS).cast());
                    }
                }
                load_two_k4::<F>(at)
            };
            for (row, sum) in sums.iter_mut().enumerate() {
                for (at, weights) in weights.into_iter().enumerate() {
                    // SAFETY: the index lies within `quads`, which holds N rows of `quads_per_row`.
                    let quad = unsafe {
                        *quads.get_unchecked(row * quads_per_row + block * K4_PER_BLOCK + step + at)
                    };
                    *sum = _mm512_dpbusd_epi32(*sum, weights, _mm512_set1_epi32(quad));
                }
            }
        }
        // SAFETY: the assertion above keeps the address within the group.
        let (weight_scale, least) =
            unsafe { load_scales::<F>(group.numbers.as_ptr().add(block * F::BLOCK_SCALES)) };
        for (row, (sum, total)) in sums.iter().zip(&mut totals).enumerate() {
            let at = row * blocks + block;
            if F::IS_INT4 {
                *total = _mm512_fmadd_ps(_mm512_set1_ps(row_sums[at]), least, *total);
            }
            let scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(row_scales[at]));
            *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*sum), scale, *total);
        }
    }
    for (row, total) in totals.iter().enumerate() {
        // SAFETY: the assertion above guarantees that `out` holds N rows of 16.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(row * GROUP_ROWS), *total) };
    }
}
