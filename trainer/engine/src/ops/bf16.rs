//! Products of values rounded to bf16 with f32 sums, as in PyTorch's autocast: AMX-BF16 tiles if the CPU
//! has them, else AVX512-BF16 dot products.
//!
//! Both sides are packed into panels of 16 rows (or columns), cut into tiles of 32 values along the sum. A
//! left tile is 16 rows of 32 values; a right tile is 16 rows of 16 pairs, which keeps a column's pairs
//! together. The loops follow Goto and van de Geijn (2008): all threads share a block of the right side,
//! and each packs its own rows of the left. The order of sums does not depend on the number of threads.
#![expect(unsafe_code, reason = "instructions that only some processors have")]

#[cfg(target_os = "linux")]
mod amx;
mod avx512;
mod layout;
mod tile;

pub(super) use layout::interleave_bf16;

use std::cell::Cell;
use std::sync::OnceLock;
use std::thread::LocalKey;

use rayon::prelude::*;

use self::tile::{OperandView, OutputRect, PANEL_ROWS, TILE_DEPTH, TILE_VALUES};
use super::cpu_features;
use super::matrix::{Matmul, MatrixView};
/// Maximum number of left rows per task.
const MAX_LEFT_ROWS: usize = 256;
/// Number of right columns packed at a time.
const RIGHT_BLOCK_COLUMNS: usize = 4096;
/// Length of the sums computed at a time.
const SUM_BLOCK_LENGTH: usize = 1024;

/// Instruction sets of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// Dot products of pairs (AVX512-BF16).
    Avx512,
    /// Tiles (AMX-BF16).
    #[cfg(target_os = "linux")]
    Amx,
}

impl Kernel {
    /// Returns the kernels that this CPU supports, fastest last.
    fn supported() -> Vec<Self> {
        let mut all = Vec::new();
        if cpu_features::has_bf16() {
            all.push(Self::Avx512);
            #[cfg(target_os = "linux")]
            if super::amx::is_available() {
                all.push(Self::Amx);
            }
        }
        all
    }

    /// Returns the fastest kernel of this CPU.
    fn fastest() -> Option<Self> {
        static BEST: OnceLock<Option<Kernel>> = OnceLock::new();
        *BEST.get_or_init(|| Self::supported().pop())
    }
}

/// The right side of a product, which packs its own values.
pub(super) trait RightOperand: Sync {
    /// Packs a panel of 16 columns from `first` on, with `sum` values from `begin` on, rounded to bf16.
    /// Each tile holds 16 pairs along the sum, with 16 columns per pair. Columns and values beyond the
    /// matrix are zero.
    ///
    /// # Safety
    ///
    /// The CPU must have AVX512-BF16.
    unsafe fn pack_panel(&self, first: usize, begin: usize, sum: usize, room: &mut [u16]);
}

impl RightOperand for OperandView<'_> {
    unsafe fn pack_panel(&self, first: usize, begin: usize, sum: usize, room: &mut [u16]) {
        // SAFETY: the caller guarantees the CPU features.
        unsafe { layout::pack_panel(*self, layout::TileOrder::Pairs, first, begin, sum, 1.0, room) };
    }
}

// Buffers for tiles, kept between products, because fresh allocations of this size cost page faults. Each
// side has a buffer, because the thread that packs the right side also packs left rows.
thread_local! {
    static LEFT_BUFFER: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
    static RIGHT_BUFFER: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
}

/// Calls `work` with a buffer of `values` values, aligned to a cache line.
fn with_buffer<R>(
    kept: &'static LocalKey<Cell<Vec<u16>>>,
    values: usize,
    work: impl FnOnce(&mut [u16]) -> R,
) -> R {
    const CACHE_LINE_VALUES: usize = 32;
    let mut room = kept.take();
    if room.len() < values + CACHE_LINE_VALUES {
        room.resize(values + CACHE_LINE_VALUES, 0);
    }
    let skip = room.as_ptr().align_offset(64).min(CACHE_LINE_VALUES);
    let result = work(&mut room[skip..skip + values]);
    kept.set(room);
    result
}

/// Computes `dst = scale * lhs * rhs (+ dst)`. Returns false, without any effect, if the CPU has no bf16
/// products or both strides of a side differ from 1.
///
/// # Safety
///
/// `dst` must have room for all rows, must not be accessed by others, and must be initialized if the
/// product is added.
pub(super) unsafe fn try_matmul(
    product: &Matmul,
    dst: *mut f32,
    stride: usize,
    lhs: MatrixView<'_>,
    rhs: MatrixView<'_>,
) -> bool {
    let Some(kernel) = Kernel::fastest() else { return false };
    let (left, right) = (OperandView::from(lhs), OperandView::from(rhs.transposed()));
    let laid_out = |side: &OperandView<'_>| side.outer_stride == 1 || side.sum_stride == 1;
    if !laid_out(&left) || !laid_out(&right) {
        return false;
    }
    blocked_matmul(product, &OutputMatrix { start: dst, stride }, left, (&right, right.outer), kernel);
    true
}

/// Returns `lhs * right` as a new row-major matrix, for a right side of `columns` columns. Returns `None`
/// if the CPU has no bf16 products.
pub(super) fn matmul_with(
    product: &Matmul,
    lhs: MatrixView<'_>,
    right: &impl RightOperand,
    columns: usize,
) -> Option<Vec<f32>> {
    let kernel = Kernel::fastest()?;
    assert!(lhs.columns > 0, "product: sums of nothing");
    let mut out = Vec::with_capacity(lhs.rows * columns);
    let target = OutputMatrix { start: out.as_mut_ptr(), stride: columns };
    blocked_matmul(&product.with_accumulate(false), &target, lhs.into(), (right, columns), kernel);
    // SAFETY: the capacity suffices, and the product has written every value.
    unsafe { out.set_len(lhs.rows * columns) };
    Some(out)
}

/// Computes a product with `n` right columns by blocks of columns and of the sum.
fn blocked_matmul<R: RightOperand>(
    product: &Matmul,
    target: &OutputMatrix,
    left: OperandView<'_>,
    (right, n): (&R, usize),
    kernel: Kernel,
) {
    let (m, k) = (left.outer, left.sum);
    let task = rows_per_task(m, product.threads);
    for from in (0..n).step_by(RIGHT_BLOCK_COLUMNS) {
        let columns = RIGHT_BLOCK_COLUMNS.min(n - from);
        for begin in (0..k).step_by(SUM_BLOCK_LENGTH) {
            let sum = SUM_BLOCK_LENGTH.min(k - begin);
            let add = product.add || begin > 0;
            let panel = sum.div_ceil(TILE_DEPTH) * TILE_VALUES;
            with_buffer(&RIGHT_BUFFER, columns.div_ceil(PANEL_ROWS) * panel, |room| {
                let lay = |(at, room): (usize, &mut [u16])| {
                    let first = from + at * PANEL_ROWS;
                    // SAFETY: `Kernel::all` offers a kernel only on CPUs that support its instructions.
                    unsafe { right.pack_panel(first, begin, sum, room) };
                };
                let rows = |at: usize, right_panels: &[u16]| {
                    let first = at * task;
                    let rows = task.min(m - first);
                    with_buffer(&LEFT_BUFFER, rows.div_ceil(PANEL_ROWS) * panel, |room| {
                        for (at, room) in room.chunks_exact_mut(panel).enumerate() {
                            let first = first + at * PANEL_ROWS;
                            // SAFETY: as above.
                            unsafe {
                                layout::pack_panel(
                                    left,
                                    layout::TileOrder::Rows,
                                    first,
                                    begin,
                                    sum,
                                    product.scale,
                                    room,
                                )
                            };
                        }
                        let place = ResultRect { row: first, column: from, rows, columns };
                        multiply_panels(target, place, room, right_panels, panel, add, kernel);
                    });
                };
                let tasks = m.div_ceil(task);
                if product.threads > 1 {
                    room.par_chunks_exact_mut(panel).enumerate().for_each(lay);
                    (0..tasks).into_par_iter().for_each(|at| rows(at, room));
                } else {
                    room.chunks_exact_mut(panel).enumerate().for_each(lay);
                    (0..tasks).for_each(|at| rows(at, room));
                }
            });
        }
    }
}

/// Returns the left rows per task: few enough to occupy all threads, and whole pairs of panels.
fn rows_per_task(rows: usize, threads: usize) -> usize {
    rows.div_ceil(2 * threads.max(1)).next_multiple_of(2 * PANEL_ROWS).min(MAX_LEFT_ROWS)
}

/// A rectangle of the result.
#[derive(Clone, Copy)]
struct ResultRect {
    row: usize,
    column: usize,
    rows: usize,
    columns: usize,
}

/// Raw output matrix. Several tasks write, each its own rows.
struct OutputMatrix {
    start: *mut f32,
    stride: usize,
}

// SAFETY: tasks write disjoint rows, and the matrix is read only after all tasks have ended.
unsafe impl Sync for OutputMatrix {}

/// Computes all products of the left panels with the right panels.
fn multiply_panels(
    target: &OutputMatrix,
    place: ResultRect,
    left: &[u16],
    right: &[u16],
    panel: usize,
    add: bool,
    kernel: Kernel,
) {
    // SAFETY: the caller of `run` guarantees the result, `place` lies within, no other task has these rows,
    // and panels are whole tiles.
    unsafe {
        let part = OutputRect {
            start: target.start.add(place.row * target.stride + place.column),
            stride: target.stride,
            rows: place.rows,
            columns: place.columns,
        };
        match kernel {
            #[cfg(target_os = "linux")]
            Kernel::Amx => amx::multiply_panels(&part, left, right, panel, add),
            Kernel::Avx512 => avx512::multiply_panels(&part, left, right, panel, add),
        }
    }
}

impl OutputRect {
    /// Stores or adds a tile of 16 x 16 sums at `row`, `column`. Sums beyond the rectangle are padding and
    /// are dropped.
    ///
    /// # Safety
    ///
    /// The rectangle must lie within a matrix that no other thread accesses.
    unsafe fn store_tile(&self, row: usize, column: usize, sums: &[f32; PANEL_ROWS * PANEL_ROWS], add: bool) {
        let columns = PANEL_ROWS.min(self.columns - column);
        for (at, sums) in sums.chunks_exact(PANEL_ROWS).take(self.rows - row).enumerate() {
            // SAFETY: row and columns lie within the rectangle, which is initialized if the sums are added.
            unsafe {
                let to = self.start.add((row + at) * self.stride + column);
                if add {
                    let to = std::slice::from_raw_parts_mut(to, columns);
                    to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
                } else {
                    std::ptr::copy_nonoverlapping(sums.as_ptr(), to, columns);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::test_noise;
    use super::*;
    use crate::ops::Precision;

    fn rounded(x: f32) -> f64 {
        let bits = x.to_bits();
        f64::from(f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        /// Each kernel computes the product of the rounded values, for all strides of both sides, and
        /// writes nothing outside the result.
        #[test]
        fn kernels_match_the_product_of_rounded_values(
            (m, n, k) in prop_oneof![
                (1usize..70, 1usize..70, 1usize..100),
                (250usize..300, 1usize..40, 1000usize..1100),
                (1usize..40, 4090usize..4130, 1usize..40),
            ],
            (left_turned, right_turned, add) in any::<(bool, bool, bool)>(),
            scale in prop_oneof![Just(1.0f32), Just(0.125), Just(0.3)],
            seed in any::<u64>(),
        ) {
            let mut next = test_noise(seed);
            let gap = 3;
            let left: Vec<f32> = (0..m * k).map(|_| next()).collect();
            let right: Vec<f32> = (0..k * n).map(|_| next()).collect();
            let before: Vec<f32> = (0..m * (n + gap)).map(|_| next()).collect();
            let lhs = if left_turned { MatrixView::new(&left, k, m).transposed() } else { MatrixView::new(&left, m, k) };
            let rhs = if right_turned { MatrixView::new(&right, n, k).transposed() } else { MatrixView::new(&right, k, n) };
            let product = |threads| Matmul { scale, add, threads, precision: Precision::Bf16 };
            for kernel in Kernel::supported() {
                let [found, shared] = [1, 2].map(|threads| {
                    let mut found = before.clone();
                    let target = OutputMatrix { start: found.as_mut_ptr(), stride: n + gap };
                    blocked_matmul(&product(threads), &target, lhs.into(), (&OperandView::from(rhs.transposed()), n), kernel);
                    found
                });
                prop_assert!(found == shared, "threads change the bits");
                for row in 0..m {
                    for column in 0..n + gap {
                        let at = row * (n + gap) + column;
                        if column >= n {
                            prop_assert_eq!(found[at], before[at]);
                            continue;
                        }
                        let mut expected = if add { f64::from(before[at]) } else { 0.0 };
                        for i in 0..k {
                            let l = lhs.values[row * lhs.row_stride + i * lhs.column_stride];
                            let r = rhs.values[i * rhs.row_stride + column * rhs.column_stride];
                            expected += rounded(scale * l) * rounded(r);
                        }
                        let off = (f64::from(found[at]) - expected).abs();
                        prop_assert!(off < 1e-4, "{kernel:?} {row} {column}: {} {expected}", found[at]);
                    }
                }
            }
        }
    }
}
