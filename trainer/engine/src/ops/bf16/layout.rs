//! Packs one side of a product into tiles of bf16, rounded to nearest, ties to even.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_castps_si512, _mm512_cvtne2ps_pbh, _mm512_maskz_loadu_ps,
    _mm512_mul_ps, _mm512_permutexvar_epi16, _mm512_set_epi16, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_shuffle_i32x4, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::tile::{OperandView, PANEL_ROWS, TILE_DEPTH, TILE_VALUES};

/// Order of the values in a tile.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum TileOrder {
    /// 16 rows of 32 values.
    Rows,
    /// 16 pairs along the sum, of 16 columns each.
    Pairs,
}

/// Packs a panel of 16 rows from `first` on, with `sum` values from `begin` on, times `scale`. Rows and
/// values beyond the matrix are zero.
///
/// # Safety
///
/// The CPU must have the features named below. One of the strides of `side` must be 1.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn pack_panel(
    side: OperandView<'_>,
    order: TileOrder,
    first: usize,
    begin: usize,
    sum: usize,
    scale: f32,
    room: &mut [u16],
) {
    let rows = PANEL_ROWS.min(side.outer - first);
    assert!(room.len() == sum.div_ceil(TILE_DEPTH) * TILE_VALUES);
    let last = (first + rows - 1) * side.outer_stride + (begin + sum - 1) * side.sum_stride;
    assert!(last < side.values.len(), "product: an input is too small");
    for (tile, room) in room.chunks_exact_mut(TILE_VALUES).enumerate() {
        let from = begin + tile * TILE_DEPTH;
        let depth = TILE_DEPTH.min(begin + sum - from);
        // SAFETY: the assertion above keeps all rows and values within the matrix, and no others are read.
        let mut lines = unsafe {
            let at = side.values.as_ptr().add(first * side.outer_stride + from * side.sum_stride);
            if side.sum_stride == 1 {
                load_row_major(at, side.outer_stride, rows, depth, scale)
            } else {
                load_column_major(at, side.sum_stride, rows, depth, scale)
            }
        };
        if (side.sum_stride == 1) != (order == TileOrder::Rows) {
            lines = transpose_pairs(lines);
        }
        for (line, room) in lines.iter().zip(room.chunks_exact_mut(TILE_DEPTH)) {
            // SAFETY: the chunk has room for 64 bytes.
            unsafe { _mm512_storeu_si512(room.as_mut_ptr().cast(), *line) };
        }
    }
}

/// Returns a mask of the low `count` bits, at most 16.
fn low_mask(count: usize) -> u16 {
    ((1u32 << count.min(PANEL_ROWS)) - 1) as u16
}

#[inline]
#[target_feature(enable = "avx512f")]
fn scale_values(values: __m512, scale: f32) -> __m512 {
    if scale == 1.0 { values } else { _mm512_mul_ps(values, _mm512_set1_ps(scale)) }
}

/// Loads 16 rows of 32 values, for values of a row that are adjacent in memory.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn load_row_major(
    at: *const f32,
    stride: usize,
    rows: usize,
    depth: usize,
    scale: f32,
) -> [__m512i; PANEL_ROWS] {
    let (low, high) = (low_mask(depth), low_mask(depth.saturating_sub(PANEL_ROWS)));
    let mut lines = [_mm512_castps_si512(_mm512_setzero_ps()); PANEL_ROWS];
    for (row, line) in lines.iter_mut().enumerate().take(rows) {
        // SAFETY: only values in the masks are read, and these lie within the matrix.
        *line = unsafe {
            let at = at.add(row * stride);
            let low = _mm512_maskz_loadu_ps(low, at);
            let high = _mm512_maskz_loadu_ps(high, at.wrapping_add(PANEL_ROWS));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(
                scale_values(high, scale),
                scale_values(low, scale),
            ))
        };
    }
    lines
}

/// Loads 16 pairs along the sum, of 16 rows each, for values of a column that are adjacent in memory.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn load_column_major(
    at: *const f32,
    stride: usize,
    rows: usize,
    depth: usize,
    scale: f32,
) -> [__m512i; PANEL_ROWS] {
    let mask = low_mask(rows);
    let mut lines = [_mm512_castps_si512(_mm512_setzero_ps()); PANEL_ROWS];
    for (pair, line) in lines.iter_mut().enumerate().take(depth.div_ceil(2)) {
        // SAFETY: only values in the mask are read, and their rows lie within the matrix.
        let (low, high) = unsafe {
            let low = _mm512_maskz_loadu_ps(mask, at.add(2 * pair * stride));
            let other = if 2 * pair + 1 < depth { mask } else { 0 };
            (low, _mm512_maskz_loadu_ps(other, at.wrapping_add((2 * pair + 1) * stride)))
        };
        *line = interleave_bf16(scale_values(low, scale), scale_values(high, scale));
    }
    lines
}

/// Rounds both to bf16 and interleaves: each value of `low` is followed by one of `high`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(in crate::ops) fn interleave_bf16(low: __m512, high: __m512) -> __m512i {
    // Interleaves words: word `i` of the first 16, then word `i` of the last 16.
    let woven = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18,
        2, 17, 1, 16, 0,
    );
    // SAFETY: both types are 64 bytes, and every bit pattern is valid.
    let both = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) };
    _mm512_permutexvar_epi16(woven, both)
}

/// Transposes a matrix of 16 x 16 pairs.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_pairs(lines: [__m512i; PANEL_ROWS]) -> [__m512i; PANEL_ROWS] {
    let mut a = lines;
    for pair in 0..8 {
        a[2 * pair] = _mm512_unpacklo_epi32(lines[2 * pair], lines[2 * pair + 1]);
        a[2 * pair + 1] = _mm512_unpackhi_epi32(lines[2 * pair], lines[2 * pair + 1]);
    }
    let mut b = a;
    for four in 0..4 {
        let at = 4 * four;
        b[at] = _mm512_unpacklo_epi64(a[at], a[at + 2]);
        b[at + 1] = _mm512_unpackhi_epi64(a[at], a[at + 2]);
        b[at + 2] = _mm512_unpacklo_epi64(a[at + 1], a[at + 3]);
        b[at + 3] = _mm512_unpackhi_epi64(a[at + 1], a[at + 3]);
    }
    // Quarter q of `b[4 i + j]` holds column 4 q + j of lines 4 i .. 4 i + 4.
    let mut out = b;
    for j in 0..4 {
        let low_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[j], b[4 + j]);
        let low_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[j], b[4 + j]);
        let high_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[8 + j], b[12 + j]);
        let high_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[8 + j], b[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(low_even, high_even);
        out[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(low_even, high_even);
        out[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(low_odd, high_odd);
        out[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(low_odd, high_odd);
    }
    out
}
