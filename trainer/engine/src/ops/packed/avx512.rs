//! The quantized kernel for AVX-512 with VNNI.

use std::arch::x86_64::{
    __m128i, __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm_storeu_si128, _mm256_loadu_si256, _mm512_abs_ps,
    _mm512_add_epi32, _mm512_and_si512, _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
    _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_epi32, _mm512_reduce_max_ps, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_srli_epi16, _mm512_storeu_ps,
};

use super::activations::{Activations, Rounded};
use super::form::{Form, Group, QUADS};
use super::{BLOCK, LANES};

/// Activation rows per pass: as many sums as fit the registers.
const TILE: usize = 8;
/// Prefetch distance in bytes. With one activation row, memory is the only limit.
const AHEAD: usize = 4096;

/// Rounds activations to 8 bits, with the bits of the portable form.
///
/// # Safety
///
/// The CPU must have the features named below. `values` must hold no more blocks than `into` has scales.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn quantise(values: &[f32], into: Rounded<'_>) {
    let blocks = values.len() / BLOCK;
    assert!(blocks <= into.scales.len() && into.quads.len() == into.scales.len() * QUADS);
    let numbers = into.scales.iter_mut().zip(into.offsets).zip(into.sums);
    for (block, ((scale, offset), sum)) in numbers.take(blocks).enumerate() {
        // SAFETY: the assertion above keeps every block within `values` and `quads`.
        unsafe {
            let from = values.as_ptr().add(block * BLOCK);
            let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(LANES)));
            let most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
            *scale = most / 127.0;
            let inverse = _mm512_set1_ps(if most > 0.0 { 127.0 / most } else { 0.0 });
            // The conversion rounds to nearest, ties to even.
            let low = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
            let high = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
            let whole = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
            (*offset, *sum) = (-128 * whole, whole as f32 * *scale);
            let to: *mut __m128i = into.quads.as_mut_ptr().add(block * QUADS).cast();
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
pub(super) unsafe fn rows<F: Form>(
    group: Group<'_, F>,
    activations: &Activations,
    first: usize,
    out: &mut [f32],
) {
    for (part, out) in out.chunks_mut(TILE * LANES).enumerate() {
        let first = first + part * TILE;
        // SAFETY: the caller guarantees the CPU features.
        unsafe {
            match out.len() / LANES {
                1 => tile::<1, F>(group, activations, first, out),
                2 => tile::<2, F>(group, activations, first, out),
                3 => tile::<3, F>(group, activations, first, out),
                4 => tile::<4, F>(group, activations, first, out),
                5 => tile::<5, F>(group, activations, first, out),
                6 => tile::<6, F>(group, activations, first, out),
                7 => tile::<7, F>(group, activations, first, out),
                _ => tile::<8, F>(group, activations, first, out),
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
pub(super) unsafe fn two_quads<F: Form>(at: *const u8) -> [__m512i; 2] {
    // SAFETY: the caller guarantees 128 weights: 64 bytes for 4 bits, 128 for 8.
    unsafe {
        let first = _mm512_loadu_si512(at.cast());
        if F::FOUR {
            let low = _mm512_set1_epi8(15);
            [_mm512_and_si512(first, low), _mm512_and_si512(_mm512_srli_epi16::<4>(first), low)]
        } else {
            [first, _mm512_loadu_si512(at.add(4 * LANES).cast())]
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
pub(super) unsafe fn numbers<F: Form>(at: *const F::Number) -> (__m512, __m512) {
    // SAFETY: the caller guarantees a whole block: 32 f16 values for 4 bits, 16 f32 values for 8.
    unsafe {
        if F::FOUR {
            let half = |at: *const F::Number| _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()));
            (half(at), half(at.add(LANES)))
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
unsafe fn tile<const N: usize, F: Form>(
    group: Group<'_, F>,
    activations: &Activations,
    first: usize,
    out: &mut [f32],
) {
    let blocks = activations.blocks;
    let quads_per_row = blocks * QUADS;
    assert!(
        out.len() == N * LANES
            && group.weights.len() == blocks * F::BYTES
            && group.numbers.len() == blocks * F::NUMBERS
    );
    let quads = &activations.quads[first * quads_per_row..][..N * quads_per_row];
    let row_scales = &activations.scales[first * blocks..][..N * blocks];
    let offsets = &activations.offsets[first * blocks..][..N * blocks];
    let row_sums = &activations.sums[first * blocks..][..N * blocks];
    let mut totals = [_mm512_setzero_ps(); N];
    for block in 0..blocks {
        let mut sums = [_mm512_set1_epi32(0); N];
        if !F::FOUR {
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_set1_epi32(offsets[row * blocks + block]);
            }
        }
        for step in (0..QUADS).step_by(2) {
            // SAFETY: the assertion above keeps the address within the group.
            let weights = unsafe {
                let at = group.weights.as_ptr().add(block * F::BYTES + step * (F::BYTES / QUADS));
                if N == 1 {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                    if !F::FOUR {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + 4 * LANES).cast());
                    }
                }
                two_quads::<F>(at)
            };
            for (row, sum) in sums.iter_mut().enumerate() {
                for (at, weights) in weights.into_iter().enumerate() {
                    // SAFETY: the index lies within `quads`, which holds N rows of `quads_per_row`.
                    let quad =
                        unsafe { *quads.get_unchecked(row * quads_per_row + block * QUADS + step + at) };
                    *sum = _mm512_dpbusd_epi32(*sum, weights, _mm512_set1_epi32(quad));
                }
            }
        }
        // SAFETY: the assertion above keeps the address within the group.
        let (weight_scale, least) = unsafe { numbers::<F>(group.numbers.as_ptr().add(block * F::NUMBERS)) };
        for (row, (sum, total)) in sums.iter().zip(&mut totals).enumerate() {
            let at = row * blocks + block;
            if F::FOUR {
                *total = _mm512_fmadd_ps(_mm512_set1_ps(row_sums[at]), least, *total);
            }
            let scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(row_scales[at]));
            *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*sum), scale, *total);
        }
    }
    for (row, total) in totals.iter().enumerate() {
        // SAFETY: the assertion above guarantees that `out` holds N rows of 16.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(row * LANES), *total) };
    }
}
