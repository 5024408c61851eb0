//! The quantized kernel for AMX-INT8: 16 activation rows at once, and the sums of a block in one
//! instruction.

use std::arch::x86_64::{
    _mm512_add_epi32, _mm512_cvtepi32_ps, _mm512_fmadd_ps, _mm512_load_si512, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_storeu_si512,
};
use std::cell::Cell;
use std::mem::MaybeUninit;

use super::activations::QuantizedActivations;
use super::avx512;
use super::form::{GroupView, QuantFormat};
use super::layout::{BLOCK_WEIGHTS, GROUP_ROWS, MIN_AMX_ROWS};
use crate::ops::amx::{TILE_ROW_BYTES, TILE_ROWS, TileRegisters, tile};

/// Number of blocks in flight. A stored tile takes long to reach memory, so the next blocks start
/// meanwhile.
const BLOCKS_IN_FLIGHT: usize = 4;

/// Integer sums of one block: 16 activation rows of 16 weight rows.
#[repr(C, align(64))]
struct BlockSums([i32; TILE_ROWS * GROUP_ROWS]);

// 4-bit weights widened to bytes; the buffer is kept between groups.
thread_local! {
    static WIDENED_WEIGHTS: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Multiplies all activation rows with one group of weights. Calls `write` with each 16 rows, or the rest,
/// and their first row.
///
/// # Safety
///
/// The CPU must have AMX-INT8 and the features of [`avx512::rows`]. The process must have the permission to
/// use tiles.
pub(super) unsafe fn multiply_group<F: QuantFormat>(
    group: GroupView<'_, F>,
    activations: &QuantizedActivations,
    n: usize,
    write: impl Fn(usize, &[f32]),
) {
    let (sums, rows, columns) =
        ((TILE_ROWS, TILE_ROW_BYTES), (TILE_ROWS, BLOCK_WEIGHTS), (BLOCK_WEIGHTS / 4, TILE_ROW_BYTES));
    // SAFETY: the caller guarantees CPU features and permission.
    let _tiles = unsafe { TileRegisters::configure([sums, sums, sums, sums, rows, rows, columns, columns]) };
    let mut room = WIDENED_WEIGHTS.take();
    let bytes = if F::IS_INT4 {
        room.resize(2 * group.weights.len(), 0);
        // SAFETY: the caller guarantees the CPU features.
        unsafe { widen_int4(group, &mut room) };
        &room
    } else {
        group.weights
    };
    let mut out = [0f32; TILE_ROWS * GROUP_ROWS];
    for first in (0..n).step_by(TILE_ROWS) {
        let out = &mut out[..TILE_ROWS.min(n - first) * GROUP_ROWS];
        // SAFETY: the caller guarantees the CPU features, and the tile registers were configured above.
        unsafe {
            if out.len() < MIN_AMX_ROWS * GROUP_ROWS {
                avx512::multiply_rows(group, activations, first, out);
            } else {
                multiply_tile(group, bytes, activations, first, out);
            }
        }
        write(first, out);
    }
    WIDENED_WEIGHTS.set(room);
}

/// Widens the 4-bit weights of a group to bytes, quad by quad.
///
/// # Safety
///
/// The CPU must have the features named below.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn widen_int4<F: QuantFormat>(group: GroupView<'_, F>, into: &mut [u8]) {
    assert!(F::IS_INT4 && into.len() == 2 * group.weights.len());
    for (from, into) in group.weights.chunks_exact(4 * GROUP_ROWS).zip(into.chunks_exact_mut(8 * GROUP_ROWS))
    {
        // SAFETY: the chunks hold 64 bytes of weights and have room for 128.
        unsafe {
            let [low, high] = avx512::load_two_k4::<F>(from.as_ptr());
            _mm512_storeu_si512(into.as_mut_ptr().cast(), low);
            _mm512_storeu_si512(into.as_mut_ptr().add(4 * GROUP_ROWS).cast(), high);
        }
    }
}

/// Multiplies up to 16 activation rows, for all rows of `out`. The kernel reads 16 rows in any case;
/// surplus sums are dropped.
///
/// # Safety
///
/// The CPU must have the features named below, and the tile registers of this thread must have the shapes
/// of [`group`]. The activations must hold at least `first + 16` rows.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn multiply_tile<F: QuantFormat>(
    group: GroupView<'_, F>,
    weights: &[u8],
    activations: &QuantizedActivations,
    first: usize,
    out: &mut [f32],
) {
    let blocks = activations.blocks;
    let row_bytes = blocks * BLOCK_WEIGHTS;
    assert!(
        out.len() <= TILE_ROWS * GROUP_ROWS
            && weights.len() == blocks * GROUP_ROWS * BLOCK_WEIGHTS
            && group.numbers.len() == blocks * F::BLOCK_SCALES
    );
    let quads = &activations.quads[first * row_bytes / 4..][..TILE_ROWS * row_bytes / 4];
    let row_scales = &activations.scales[first * blocks..][..TILE_ROWS * blocks];
    let offsets = &activations.offsets[first * blocks..][..TILE_ROWS * blocks];
    let row_sums = &activations.sums[first * blocks..][..TILE_ROWS * blocks];
    let mut totals = [_mm512_setzero_ps(); TILE_ROWS];
    // Zeroing this memory would take as long as computing the sums.
    let mut sums = [const { MaybeUninit::<BlockSums>::uninit() }; BLOCKS_IN_FLIGHT];
    macro_rules! start {
        ($block:expr, $sums:literal, $activations:literal, $weights:literal) => {
            // SAFETY: by the assertion above, 16 rows of 32 bytes, `row_bytes` apart, lie within `quads`,
            // and the 512 bytes of a block within `weights`. `sums` holds 16 rows of 64 bytes.
            unsafe {
                tile!(zero $sums);
                tile!(load $activations, quads.as_ptr().cast::<u8>().add($block * BLOCK_WEIGHTS), row_bytes);
                tile!(load $weights, weights.as_ptr().add($block * GROUP_ROWS * BLOCK_WEIGHTS), TILE_ROW_BYTES);
                tile!(dpbsud $sums, $activations, $weights);
                tile!(store $sums, sums[$block % BLOCKS_IN_FLIGHT].as_mut_ptr(), TILE_ROW_BYTES);
            }
        };
    }
    macro_rules! start_any {
        ($block:expr) => {
            match $block % BLOCKS_IN_FLIGHT {
                0 => start!($block, 0, 4, 6),
                1 => start!($block, 1, 5, 7),
                2 => start!($block, 2, 4, 6),
                _ => start!($block, 3, 5, 7),
            }
        };
    }
    for block in 0..blocks.min(BLOCKS_IN_FLIGHT - 1) {
        start_any!(block);
    }
    for block in 0..blocks {
        let next = block + BLOCKS_IN_FLIGHT - 1;
        if next < blocks {
            start_any!(next);
        }
        let sums: *const i32 = sums[block % BLOCKS_IN_FLIGHT].as_ptr().cast();
        // SAFETY: the assertion above keeps the address within the group.
        let (weight_scale, least) =
            unsafe { avx512::load_scales::<F>(group.numbers.as_ptr().add(block * F::BLOCK_SCALES)) };
        for (row, total) in totals.iter_mut().enumerate() {
            let at = row * blocks + block;
            // SAFETY: the tile was stored to 16 aligned rows of 16 sums. `row_scales` holds 16 rows of
            // `blocks` values.
            let (mut sum, scale) = unsafe {
                (_mm512_load_si512(sums.add(row * GROUP_ROWS).cast()), *row_scales.get_unchecked(at))
            };
            if F::IS_INT4 {
                // SAFETY: `row_sums` has the size of `row_scales`.
                let row_sum = unsafe { *row_sums.get_unchecked(at) };
                *total = _mm512_fmadd_ps(_mm512_set1_ps(row_sum), least, *total);
            } else {
                // SAFETY: `offsets` has the size of `row_scales`.
                let offset = unsafe { *offsets.get_unchecked(at) };
                sum = _mm512_add_epi32(sum, _mm512_set1_epi32(offset));
            }
            let scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scale));
            *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
        }
    }
    for (total, out) in totals.iter().zip(out.chunks_exact_mut(GROUP_ROWS)) {
        // SAFETY: the chunk has room for 16 values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *total) };
    }
}
