//! Prefill with quantized matrices: weights are converted to bf16 tiles and activations are rounded to bf16
//! ([`crate::ops::bf16`]).
//!
//! Sums stay in a tile along the whole row. With byte tiles they leave the tile after each block of 32,
//! because each block has a scale, and this dominates the time. Converting a weight costs as much as a few
//! tens of rows, so the path needs many rows. bf16 also rounds activations less than 8 bits do.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_fmadd_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32,
    _mm512_srli_epi32, _mm512_storeu_si512, _mm512_sub_ps,
};

use super::avx512;
use super::form::{QuantBlocks, QuantFormat};
use super::layout::{BLOCK_WEIGHTS, GROUP_ROWS};
use super::matrix::{QuantizedMatrix, Storage};
use crate::ops::Precision;
use crate::ops::bf16::{self, RightOperand, interleave_bf16};
use crate::ops::product::{Matmul, MatrixView};

/// Values per tile: one block of 16 rows.
const TILE_VALUES: usize = GROUP_ROWS * BLOCK_WEIGHTS;

/// Computes the product of `n` rows of `values` with `matrix`. Returns `None` if the CPU has no bf16
/// products.
pub(super) fn bf16_product(matrix: &QuantizedMatrix, values: &[f32], n: usize) -> Option<Vec<f32>> {
    let rows = MatrixView::new(values, n, matrix.columns);
    let how = Matmul::multi_threaded(Precision::Bf16);
    match &matrix.held {
        Storage::Eight(all) => bf16::matmul_with(&how, rows, &Bf16Tiles { matrix, all }, matrix.rows),
        Storage::Four(all) => bf16::matmul_with(&how, rows, &Bf16Tiles { matrix, all }, matrix.rows),
    }
}

/// A quantized matrix as the right side of a bf16 product.
struct Bf16Tiles<'a, F: QuantFormat> {
    matrix: &'a QuantizedMatrix,
    all: &'a QuantBlocks<F>,
}

impl<F: QuantFormat> RightOperand for Bf16Tiles<'_, F> {
    unsafe fn pack_panel(&self, first: usize, begin: usize, sum: usize, room: &mut [u16]) {
        assert!(
            first.is_multiple_of(GROUP_ROWS)
                && begin.is_multiple_of(BLOCK_WEIGHTS)
                && sum.is_multiple_of(BLOCK_WEIGHTS)
        );
        let from = self.matrix.group_blocks(first / GROUP_ROWS).start + begin / BLOCK_WEIGHTS;
        assert!(room.len() == sum / BLOCK_WEIGHTS * TILE_VALUES);
        let blocks = self.all.block_range(from..from + sum / BLOCK_WEIGHTS).blocks();
        for (block, room) in blocks.zip(room.chunks_exact_mut(TILE_VALUES)) {
            // SAFETY: the caller guarantees the CPU features, and all slices have the size of a block.
            unsafe {
                let (scales, least) = avx512::load_scales::<F>(block.numbers.as_ptr());
                if F::IS_INT4 {
                    convert_int4(block.weights, scales, least, room);
                } else {
                    convert_int8(block.weights, scales, room);
                }
            }
        }
    }
}

/// Converts one 8-bit block of 16 rows to a bf16 tile of 16 pairs along the sum.
///
/// # Safety
///
/// The CPU must have the features named below.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn convert_int8(weights: &[u8], scales: __m512, room: &mut [u16]) {
    for (four, room) in weights.chunks_exact(4 * GROUP_ROWS).zip(room.chunks_exact_mut(4 * GROUP_ROWS)) {
        // SAFETY: the chunk has 64 bytes.
        let four = unsafe { _mm512_loadu_si512(four.as_ptr().cast()) };
        // Shifts each byte to the mantissa bits that count in ones between 256 and 512.
        let columns = [
            _mm512_slli_epi32::<15>(four),
            _mm512_slli_epi32::<7>(four),
            _mm512_srli_epi32::<1>(four),
            _mm512_srli_epi32::<9>(four),
        ]
        .map(|moved| int8_value(moved, scales));
        for (pair, room) in columns.chunks_exact(2).zip(room.chunks_exact_mut(2 * GROUP_ROWS)) {
            // SAFETY: the chunk has room for 32 values.
            unsafe { _mm512_storeu_si512(room.as_mut_ptr().cast(), interleave_bf16(pair[0], pair[1])) };
        }
    }
}

/// Returns a byte that was stored plus 128, times its scale. The byte becomes the mantissa of a float from
/// 256 to 512, so no conversion is needed.
#[inline]
#[target_feature(enable = "avx512f")]
fn int8_value(moved: __m512i, scales: __m512) -> __m512 {
    const FRACTION: i32 = 0xff << 15;
    let bits = _mm512_and_si512(moved, _mm512_set1_epi32(FRACTION));
    let from_256 = _mm512_castsi512_ps(_mm512_or_si512(bits, _mm512_set1_epi32(256f32.to_bits() as i32)));
    _mm512_mul_ps(_mm512_sub_ps(from_256, _mm512_set1_ps(256.0 + 128.0)), scales)
}

/// Converts one 4-bit block of 16 rows to a bf16 tile of 16 pairs along the sum.
///
/// # Safety
///
/// The CPU must have the features named below.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn convert_int4(weights: &[u8], scales: __m512, least: __m512, room: &mut [u16]) {
    let low = _mm512_set1_epi32(15);
    let worth =
        |whole: __m512i| _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_and_si512(whole, low)), scales, least);
    for (two, room) in weights.chunks_exact(4 * GROUP_ROWS).zip(room.chunks_exact_mut(8 * GROUP_ROWS)) {
        // SAFETY: the chunk has 64 bytes.
        let two = unsafe { _mm512_loadu_si512(two.as_ptr().cast()) };
        let columns = [
            [two, _mm512_srli_epi32::<8>(two)],
            [_mm512_srli_epi32::<16>(two), _mm512_srli_epi32::<24>(two)],
            [_mm512_srli_epi32::<4>(two), _mm512_srli_epi32::<12>(two)],
            [_mm512_srli_epi32::<20>(two), _mm512_srli_epi32::<28>(two)],
        ];
        for (pair, room) in columns.into_iter().zip(room.chunks_exact_mut(2 * GROUP_ROWS)) {
            let [first, second] = pair.map(worth);
            // SAFETY: the chunk has room for 32 values.
            unsafe { _mm512_storeu_si512(room.as_mut_ptr().cast(), interleave_bf16(first, second)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::test_noise;
    use super::super::tests::both;
    use super::*;

    fn rounded(x: f32) -> f64 {
        f64::from(half::bf16::from_f32(x).to_f32())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The product equals that of weights and rows rounded to bf16, for all shapes.
        #[test]
        fn bf16_product_matches_rounded_factors(
            (rows, blocks, n) in prop_oneof![(1usize..70, 1usize..6, 1usize..80), (1usize..20, 31usize..35, 1usize..5)],
            seed in any::<u64>(),
        ) {
            let columns = blocks * BLOCK_WEIGHTS;
            let mut next = test_noise(seed);
            let matrices = both(rows, columns, &mut next);
            let x: Vec<f32> = (0..n * columns).map(|_| next() * 3.0).collect();
            for packed in &matrices {
                let Some(found) = bf16_product(packed, &x, n) else { return Ok(()) };
                prop_assert_eq!(found.len(), n * rows);
                for (row, out) in found.chunks_exact(rows).enumerate() {
                    for (column, found) in out.iter().enumerate() {
                        let exact: f64 = (0..columns)
                            .map(|at| rounded(packed.dequantized_weight(column, at)) * rounded(x[row * columns + at]))
                            .sum();
                        let off = (f64::from(*found) - exact).abs();
                        prop_assert!(off < 1e-4 * (columns as f64).sqrt(), "{row} {column}: {found} {exact}");
                    }
                }
            }
        }
    }
}
