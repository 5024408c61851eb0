//! Products of values rounded to bf16 with sums in f32, as PyTorch's autocast computes them: tiles where the processor has
//! them (AMX-BF16), else dot products of pairs (AVX512-BF16).
//!
//! Both sides are first laid out in panels of 16 rows (or columns), cut into tiles of 32 along the sum: a left tile is 16
//! rows of 32 values, a right tile 16 rows of 16 pairs, so that a pair of one column lies together. The loops around follow
//! Goto and van de Geijn (2008): a block of the right side is shared by all threads, each of which lays out its own rows of
//! the left. Sums run in the same order whatever the number of threads.
#![expect(unsafe_code, reason = "instructions that only some processors have")]

#[cfg(target_os = "linux")]
mod amx;
mod avx512;
mod layout;

pub(super) use layout::pairs;

use std::cell::Cell;
use std::sync::OnceLock;
use std::thread::LocalKey;

use rayon::prelude::*;

use super::product::{Matrix, Product};

/// Rows of a panel.
const LANES: usize = 16;
/// Values of a tile along the sum.
const DEPTH: usize = 32;
/// Values of a tile.
const TILE: usize = LANES * DEPTH;
/// Left rows that one task lays out and multiplies, at most.
const LEFT: usize = 256;
/// Right columns that are laid out at a time.
const RIGHT: usize = 4096;
/// Length of the sums that are taken at a time.
const SUM: usize = 1024;

/// The instructions that products are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// AVX512-BF16.
    Avx512,
    /// AMX-BF16.
    #[cfg(target_os = "linux")]
    Amx,
}

impl Kernel {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
        {
            all.push(Self::Avx512);
            #[cfg(target_os = "linux")]
            if super::amx::available() {
                all.push(Self::Amx);
            }
        }
        all
    }

    fn best() -> Option<Self> {
        static BEST: OnceLock<Option<Kernel>> = OnceLock::new();
        *BEST.get_or_init(|| Self::all().pop())
    }
}

/// Whether this processor has such a product.
pub(super) fn available() -> bool {
    Kernel::best().is_some()
}

/// The right side of a product, wherever its values come from.
pub(super) trait Right: Sync {
    /// Lays out the panel of 16 columns from `first` on, `sum` values from `begin` on, rounded to bf16: tiles of 16 pairs along
    /// the sum, each pair of 16 columns. Columns and values beyond the matrix are zero.
    ///
    /// # Safety
    ///
    /// The processor must have AVX512-BF16.
    unsafe fn panel(&self, first: usize, begin: usize, sum: usize, room: &mut [u16]);
}

/// One side of a product: how many values there are, and how far apart, along the result and along the sum.
#[derive(Clone, Copy)]
struct Side<'a> {
    values: &'a [f32],
    outer: usize,
    sum: usize,
    outer_stride: usize,
    sum_stride: usize,
}

impl<'a> From<Matrix<'a>> for Side<'a> {
    fn from(left: Matrix<'a>) -> Self {
        Self {
            values: left.values,
            outer: left.rows,
            sum: left.columns,
            outer_stride: left.row_stride,
            sum_stride: left.column_stride,
        }
    }
}

impl Right for Side<'_> {
    unsafe fn panel(&self, first: usize, begin: usize, sum: usize, room: &mut [u16]) {
        // SAFETY: the caller's word.
        unsafe { layout::panel(*self, layout::Order::Pairs, first, begin, sum, 1.0, room) };
    }
}

// Room for tiles, kept between products: a fresh allocation of this size costs page faults. One for each side, as the thread
// that lays out the right side also takes a share of the left.
thread_local! {
    static LEFT_ROOM: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
    static RIGHT_ROOM: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
}

/// Room for `values` values, aligned to a line of the cache, for as long as `work` runs.
fn with_room<R>(
    kept: &'static LocalKey<Cell<Vec<u16>>>,
    values: usize,
    work: impl FnOnce(&mut [u16]) -> R,
) -> R {
    const LINE: usize = 32;
    let mut room = kept.take();
    if room.len() < values + LINE {
        room.resize(values + LINE, 0);
    }
    let skip = room.as_ptr().align_offset(64).min(LINE);
    let result = work(&mut room[skip..skip + values]);
    kept.set(room);
    result
}

/// `dst = scale * lhs * rhs (+ dst)`, where there are instructions for the way in which the matrices lie; `false` when there
/// are none and nothing was done.
///
/// # Safety
///
/// `dst` must have room for all rows, be nobody else's, and hold values where they are added to.
pub(super) unsafe fn run(
    product: &Product,
    dst: *mut f32,
    stride: usize,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
) -> bool {
    let Some(kernel) = Kernel::best() else { return false };
    let (left, right) = (Side::from(lhs), Side::from(rhs.t()));
    let laid_out = |side: &Side<'_>| side.outer_stride == 1 || side.sum_stride == 1;
    if !laid_out(&left) || !laid_out(&right) {
        return false;
    }
    multiply(product, &Target { start: dst, stride }, left, (&right, right.outer), kernel);
    true
}

/// `lhs * right` for a right side of `columns`, in memory of its own; none where the processor has no such product.
pub(super) fn product_with(
    product: &Product,
    lhs: Matrix<'_>,
    right: &impl Right,
    columns: usize,
) -> Option<Vec<f32>> {
    let kernel = Kernel::best()?;
    assert!(lhs.columns > 0, "product: sums of nothing");
    let mut out = Vec::with_capacity(lhs.rows * columns);
    let target = Target { start: out.as_mut_ptr(), stride: columns };
    multiply(&product.adding(false), &target, lhs.into(), (right, columns), kernel);
    // SAFETY: there is room for as many, and every value of the result was written.
    unsafe { out.set_len(lhs.rows * columns) };
    Some(out)
}

fn multiply<R: Right>(
    product: &Product,
    target: &Target,
    left: Side<'_>,
    (right, n): (&R, usize),
    kernel: Kernel,
) {
    let (m, k) = (left.outer, left.sum);
    let task = task_rows(m, product.threads);
    for from in (0..n).step_by(RIGHT) {
        let columns = RIGHT.min(n - from);
        for begin in (0..k).step_by(SUM) {
            let sum = SUM.min(k - begin);
            let add = product.add || begin > 0;
            let panel = sum.div_ceil(DEPTH) * TILE;
            with_room(&RIGHT_ROOM, columns.div_ceil(LANES) * panel, |room| {
                let lay = |(at, room): (usize, &mut [u16])| {
                    let first = from + at * LANES;
                    // SAFETY: the kernel was chosen because the processor has these instructions.
                    unsafe { right.panel(first, begin, sum, room) };
                };
                let rows = |at: usize, right_panels: &[u16]| {
                    let first = at * task;
                    let rows = task.min(m - first);
                    with_room(&LEFT_ROOM, rows.div_ceil(LANES) * panel, |room| {
                        for (at, room) in room.chunks_exact_mut(panel).enumerate() {
                            let first = first + at * LANES;
                            // SAFETY: the same.
                            unsafe {
                                layout::panel(
                                    left,
                                    layout::Order::Rows,
                                    first,
                                    begin,
                                    sum,
                                    product.scale,
                                    room,
                                )
                            };
                        }
                        let place = Place { row: first, column: from, rows, columns };
                        panels(target, place, room, right_panels, panel, add, kernel);
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

/// Left rows of a task: so few that every thread gets some, and whole squares of panels.
fn task_rows(rows: usize, threads: usize) -> usize {
    rows.div_ceil(2 * threads.max(1)).next_multiple_of(2 * LANES).min(LEFT)
}

/// A part of the result.
#[derive(Clone, Copy)]
struct Place {
    row: usize,
    column: usize,
    rows: usize,
    columns: usize,
}

/// The result, written by several tasks, each its own rows.
struct Target {
    start: *mut f32,
    stride: usize,
}

// SAFETY: tasks write disjoint rows; nobody reads before all are done.
unsafe impl Sync for Target {}

/// All products of the left panels with the right ones.
fn panels(
    target: &Target,
    place: Place,
    left: &[u16],
    right: &[u16],
    panel: usize,
    add: bool,
    kernel: Kernel,
) {
    // SAFETY: the part lies within the result, for which the caller vouches, no other task has these rows, and panels are whole tiles.
    unsafe {
        let part = Part {
            start: target.start.add(place.row * target.stride + place.column),
            stride: target.stride,
            rows: place.rows,
            columns: place.columns,
        };
        match kernel {
            #[cfg(target_os = "linux")]
            Kernel::Amx => amx::panels(&part, left, right, panel, add),
            Kernel::Avx512 => avx512::panels(&part, left, right, panel, add),
        }
    }
}

/// Where a task writes.
struct Part {
    start: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
}

impl Part {
    /// Adds or copies a tile of 16 x 16 sums to `row`, `column`; what lies beyond the part is padding and dropped.
    ///
    /// # Safety
    ///
    /// The part must lie within a matrix that nobody else uses.
    unsafe fn put(&self, row: usize, column: usize, sums: &[f32; LANES * LANES], add: bool) {
        let columns = LANES.min(self.columns - column);
        for (at, sums) in sums.chunks_exact(LANES).take(self.rows - row).enumerate() {
            // SAFETY: the row and the columns are within the part, which holds values where they are added to.
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

    use super::super::noise;
    use super::*;
    use crate::ops::Precision;

    fn rounded(x: f32) -> f64 {
        let bits = x.to_bits();
        f64::from(f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        /// Each kernel computes the product of the rounded values, for every way in which either side may lie, and writes
        /// nowhere else.
        #[test]
        fn the_kernels_are_the_product(
            (m, n, k) in prop_oneof![
                (1usize..70, 1usize..70, 1usize..100),
                (250usize..300, 1usize..40, 1000usize..1100),
                (1usize..40, 4090usize..4130, 1usize..40),
            ],
            (left_turned, right_turned, add) in any::<(bool, bool, bool)>(),
            scale in prop_oneof![Just(1.0f32), Just(0.125), Just(0.3)],
            seed in any::<u64>(),
        ) {
            let mut next = noise(seed);
            let gap = 3;
            let left: Vec<f32> = (0..m * k).map(|_| next()).collect();
            let right: Vec<f32> = (0..k * n).map(|_| next()).collect();
            let before: Vec<f32> = (0..m * (n + gap)).map(|_| next()).collect();
            let lhs = if left_turned { Matrix::new(&left, k, m).t() } else { Matrix::new(&left, m, k) };
            let rhs = if right_turned { Matrix::new(&right, n, k).t() } else { Matrix::new(&right, k, n) };
            let product = |threads| Product { scale, add, threads, precision: Precision::Bf16 };
            for kernel in Kernel::all() {
                let [found, shared] = [1, 2].map(|threads| {
                    let mut found = before.clone();
                    let target = Target { start: found.as_mut_ptr(), stride: n + gap };
                    multiply(&product(threads), &target, lhs.into(), (&Side::from(rhs.t()), n), kernel);
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
