//! The kernel for tiles of bytes (AMX-INT8): sixteen activation rows at once, the sums of a block in one instruction.

use std::arch::x86_64::{
    _mm512_add_epi32, _mm512_cvtepi32_ps, _mm512_fmadd_ps, _mm512_load_si512, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_storeu_si512,
};
use std::cell::Cell;
use std::mem::MaybeUninit;

use super::activations::Activations;
use super::form::{Form, Group};
use super::{AMX_ROWS, BLOCK, LANES, avx512};
use crate::ops::amx::{BYTES, ROWS, Tiles, tile};

/// Blocks whose sums are under way: a tile takes long to reach memory, so others are begun meanwhile.
const AHEAD: usize = 4;

/// Sums of one block: 16 rows of 16.
#[repr(C, align(64))]
struct Sums([i32; ROWS * LANES]);

// Weights of four bits, one byte each: kept between groups.
thread_local! {
    static WIDE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// All activation rows with one group of weights: each 16 of them, or the rest, go to `write` with their first.
///
/// # Safety
///
/// The processor must have AMX-INT8 and what [`avx512::rows`] needs, and this process the permission.
pub(super) unsafe fn group<F: Form>(
    group: Group<'_, F>,
    activations: &Activations,
    n: usize,
    write: impl Fn(usize, &[f32]),
) {
    let (sums, rows, columns) = ((ROWS, BYTES), (ROWS, BLOCK), (BLOCK / 4, BYTES));
    // SAFETY: the caller's word.
    let _tiles = unsafe { Tiles::new([sums, sums, sums, sums, rows, rows, columns, columns]) };
    let mut room = WIDE.take();
    let bytes = if F::FOUR {
        room.resize(2 * group.weights.len(), 0);
        // SAFETY: the caller's word.
        unsafe { widen(group, &mut room) };
        &room
    } else {
        group.weights
    };
    let mut out = [0f32; ROWS * LANES];
    for first in (0..n).step_by(ROWS) {
        let out = &mut out[..ROWS.min(n - first) * LANES];
        // SAFETY: the caller's word; the registers were shaped above.
        unsafe {
            if out.len() < AMX_ROWS * LANES {
                avx512::rows(group, activations, first, out);
            } else {
                tile(group, bytes, activations, first, out);
            }
        }
        write(first, out);
    }
    WIDE.set(room);
}

/// Writes the weights of four bits of a group one byte each, quad by quad.
///
/// # Safety
///
/// The processor must have the features named below.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn widen<F: Form>(group: Group<'_, F>, into: &mut [u8]) {
    assert!(F::FOUR && into.len() == 2 * group.weights.len());
    for (from, into) in group.weights.chunks_exact(4 * LANES).zip(into.chunks_exact_mut(8 * LANES)) {
        // SAFETY: 64 bytes of weights, and room for 128.
        unsafe {
            let [low, high] = avx512::two_quads::<F>(from.as_ptr());
            _mm512_storeu_si512(into.as_mut_ptr().cast(), low);
            _mm512_storeu_si512(into.as_mut_ptr().add(4 * LANES).cast(), high);
        }
    }
}

/// Up to sixteen activation rows, as many as `out` has room for; the others of them are there and count for nothing.
///
/// # Safety
///
/// The processor must have the features named below, and this thread the registers in [`group`]'s shapes; the
/// activations hold at least `first + 16` rows.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn tile<F: Form>(
    group: Group<'_, F>,
    weights: &[u8],
    activations: &Activations,
    first: usize,
    out: &mut [f32],
) {
    let blocks = activations.blocks;
    let row_bytes = blocks * BLOCK;
    assert!(
        out.len() <= ROWS * LANES
            && weights.len() == blocks * LANES * BLOCK
            && group.numbers.len() == blocks * F::NUMBERS
    );
    let quads = &activations.quads[first * row_bytes / 4..][..ROWS * row_bytes / 4];
    let row_scales = &activations.scales[first * blocks..][..ROWS * blocks];
    let offsets = &activations.offsets[first * blocks..][..ROWS * blocks];
    let row_sums = &activations.sums[first * blocks..][..ROWS * blocks];
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
        // SAFETY: within the group, by the assertion above.
        let (weight_scale, least) =
            unsafe { avx512::numbers::<F>(group.numbers.as_ptr().add(block * F::NUMBERS)) };
        for (row, total) in totals.iter_mut().enumerate() {
            let at = row * blocks + block;
            // SAFETY: 16 aligned rows of 16 sums, which the tile was stored to; the numbers of activations are 16 rows of `blocks`.
            let (mut sum, scale) =
                unsafe { (_mm512_load_si512(sums.add(row * LANES).cast()), *row_scales.get_unchecked(at)) };
            if F::FOUR {
                // SAFETY: as above.
                let row_sum = unsafe { *row_sums.get_unchecked(at) };
                *total = _mm512_fmadd_ps(_mm512_set1_ps(row_sum), least, *total);
            } else {
                // SAFETY: as above.
                let offset = unsafe { *offsets.get_unchecked(at) };
                sum = _mm512_add_epi32(sum, _mm512_set1_epi32(offset));
            }
            let scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scale));
            *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
        }
    }
    for (total, out) in totals.iter().zip(out.chunks_exact_mut(LANES)) {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *total) };
    }
}
