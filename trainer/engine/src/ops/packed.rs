//! Quantized matrices for serving on the CPU: weights of 8 or 4 bits in blocks of 32 along a row, with
//! scales per block. Activations are rounded to 8 bits in blocks of 32; sums within a block are exact
//! integers.
//!
//! The layout follows the kernels: 16 rows side by side, four columns at a time. One AVX-512 VNNI
//! instruction multiplies 64 weights with four activations, and a loaded weight serves a tile of activation
//! rows. 8-bit weights are stored plus 128 (unsigned); the block's sum of activations corrects this. 4-bit
//! weights ([`Four`]) halve the memory traffic that limits decoding. All kernels give the same bits; the
//! best is chosen at run time.
#![expect(unsafe_code, reason = "instructions that only some processors have")]

mod activations;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod form;
mod kernel;
mod layout;
#[cfg(target_arch = "x86_64")]
mod long;
mod matrix;
mod quantize_activations;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use self::activations::QuantizedActivations;
use self::form::{GroupView, Int4, Int8, K4_PER_BLOCK, QuantBlocks, QuantFormat, quantize_int8_rows};
use super::with_values;

pub use self::form::Int4Block;
use self::kernel::{Kernel, KernelChoice};
pub use self::layout::BLOCK_WEIGHTS;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use self::layout::MIN_AMX_ROWS;
use self::layout::{GROUP_ROWS, TILE_ROWS};
pub use self::matrix::QuantizedMatrix;
use self::matrix::Storage;
/// Groups per quantization task.
const BAND_GROUPS: usize = 16;
/// Minimum number of activation rows for which converting the weights to bf16 pays. Decode steps rarely
/// have as many.
const MIN_PREFILL_ROWS: usize = 96;
/// Minimum number of multiplications (weights times activation rows) per task.
const MIN_TASK_PRODUCTS: usize = 1 << 16;
/// Minimum number of multiplications for more than one thread.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 18;

/// Returns whether quantized products are faster than f32 products on this CPU.
pub fn has_fast_kernel() -> bool {
    Kernel::fastest() > Kernel::Portable
}

impl QuantizedMatrix {
    /// Quantizes a CPU matrix to 8 bits. Returns `None` unless the columns divide into blocks.
    pub fn quantize_int8(weight: &Tensor) -> Result<Option<Self>> {
        let (rows, columns) = weight.dims2()?;
        Self::quantize_int8_rows(rows, columns, |some| {
            weight.narrow(0, some.start, some.len())?.to_dtype(DType::F32)
        })
    }

    /// Quantizes a matrix to 8 bits in bands of rows. `some` returns the rows of a range as f32. Each
    /// thread holds one band in f32. Returns `None` unless the columns divide into blocks.
    pub fn quantize_int8_rows(
        rows: usize,
        columns: usize,
        some: impl Fn(Range<usize>) -> Result<Tensor> + Sync,
    ) -> Result<Option<Self>> {
        if rows == 0 || columns == 0 || !columns.is_multiple_of(BLOCK_WEIGHTS) {
            return Ok(None);
        }
        let mut all =
            QuantBlocks::<Int8>::filled(rows.div_ceil(GROUP_ROWS) * (columns / BLOCK_WEIGHTS), 128, 0.0);
        for_each_band(&mut all, rows, columns, |band, weights, scales| {
            let (count, tensor) = (band.len(), some(band)?);
            if tensor.dims() != [count, columns] {
                candle_core::bail!("{:?} in place of {count} rows of {columns}", tensor.dims());
            }
            with_values([&tensor], |[values]| {
                quantize_int8_rows(values, columns / BLOCK_WEIGHTS, weights, scales)
            })
        })?;
        Ok(Some(Self { rows, columns, held: Storage::Eight(all) }))
    }

    /// Builds a matrix from 4-bit blocks; `row` returns the blocks of a row. Returns `None` unless the
    /// columns divide into blocks and f16 can hold all scales and minimums.
    pub fn from_int4_blocks<R: Iterator<Item = Int4Block>>(
        rows: usize,
        columns: usize,
        row: impl Fn(usize) -> R + Sync,
    ) -> Result<Option<Self>> {
        if rows == 0 || columns == 0 || !columns.is_multiple_of(BLOCK_WEIGHTS) {
            return Ok(None);
        }
        let blocks = columns / BLOCK_WEIGHTS;
        let mut all = QuantBlocks::<Int4>::filled(rows.div_ceil(GROUP_ROWS) * blocks, 0, 0);
        let held = AtomicBool::new(true);
        for_each_band(&mut all, rows, columns, |band, weights, numbers| {
            for (at, row) in band.map(&row).enumerate() {
                let mut count = 0;
                for four in row {
                    if count == blocks {
                        candle_core::bail!("a row of more than {blocks} blocks");
                    }
                    let block = at / GROUP_ROWS * blocks + count;
                    let weights = &mut weights[block * Int4::BLOCK_BYTES..][..Int4::BLOCK_BYTES];
                    let numbers = &mut numbers[block * Int4::BLOCK_SCALES..][..Int4::BLOCK_SCALES];
                    if !four.write_lane(at % GROUP_ROWS, weights, numbers) {
                        held.store(false, Ordering::Relaxed);
                    }
                    count += 1;
                }
                if count != blocks {
                    candle_core::bail!("a row of {count} blocks in place of {blocks}");
                }
            }
            Ok(())
        })?;
        Ok(held.into_inner().then_some(Self { rows, columns, held: Storage::Four(all) }))
    }

    /// Returns the given rows in f32, `[rows.len(), columns]`: an embedding lookup.
    pub fn lookup_rows(&self, rows: &[u32]) -> Result<Tensor> {
        let mut values = Vec::with_capacity(rows.len() * self.columns);
        for &row in rows {
            let row = row as usize;
            if row >= self.rows {
                candle_core::bail!("row {row} of a matrix of {}", self.rows);
            }
            match &self.held {
                Storage::Eight(all) => self.append_row(all, row, &mut values),
                Storage::Four(all) => self.append_row(all, row, &mut values),
            }
        }
        Tensor::from_vec(values, (rows.len(), self.columns), &Device::Cpu)
    }

    /// Returns the numbers of rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Returns the size in bytes.
    pub fn size_bytes(&self) -> usize {
        match &self.held {
            Storage::Eight(all) => all.size_bytes(),
            Storage::Four(all) => all.size_bytes(),
        }
    }

    fn append_row<F: QuantFormat>(&self, all: &QuantBlocks<F>, row: usize, values: &mut Vec<f32>) {
        let of = self.group_blocks(row / GROUP_ROWS);
        all.block_range(of).blocks().for_each(|block| values.extend(block.dequantize_row(row % GROUP_ROWS)));
    }

    /// Returns the blocks of a group.
    fn group_blocks(&self, group: usize) -> Range<usize> {
        let blocks = self.columns / BLOCK_WEIGHTS;
        group * blocks..(group + 1) * blocks
    }

    /// Computes `x Wᵀ`, `[n, rows]`, for `x`: `[n, columns]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Self::forward_all(&[self], x)?.pop().ok_or_else(|| candle_core::Error::Msg("no product".to_owned()))
    }

    /// Computes the products of one `x` with several matrices. `x` is rounded once, and all products share
    /// one parallel loop.
    pub fn forward_all(matrices: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let (n, columns) = x.dims2()?;
        for matrix in matrices {
            if columns != matrix.columns {
                candle_core::bail!("a product of {columns} columns with a matrix of {}", matrix.columns);
            }
        }
        let outs = with_values([x], |[values]| {
            prefill_products(matrices, values, n)
                .unwrap_or_else(|| decode_products(matrices, values, n, Kernel::fastest()))
        })?;
        let shaped = outs.into_iter().zip(matrices).map(|(out, matrix)| (out, (n, matrix.rows)));
        shaped.map(|(out, shape)| Tensor::from_vec(out, shape, x.device())).collect()
    }

    /// Returns one dequantized weight.
    #[cfg(test)]
    fn dequantized_weight(&self, row: usize, column: usize) -> f32 {
        let mut values = Vec::new();
        match &self.held {
            Storage::Eight(all) => self.append_row(all, row, &mut values),
            Storage::Four(all) => self.append_row(all, row, &mut values),
        }
        values[column]
    }

    /// Returns the number of groups of 16 rows.
    fn group_count(&self) -> usize {
        self.rows.div_ceil(GROUP_ROWS)
    }
}

/// Calls `pack` in parallel for bands of whole groups, with the memory of each band.
fn for_each_band<F: QuantFormat>(
    all: &mut QuantBlocks<F>,
    rows: usize,
    columns: usize,
    pack: impl Fn(Range<usize>, &mut [u8], &mut [F::Scale]) -> Result<()> + Sync,
) -> Result<()> {
    let blocks = BAND_GROUPS * columns / BLOCK_WEIGHTS;
    let weights = all.weights.par_chunks_mut(blocks * F::BLOCK_BYTES);
    let bands = weights.zip(all.numbers.par_chunks_mut(blocks * F::BLOCK_SCALES));
    bands.enumerate().try_for_each(|(at, (weights, numbers))| {
        let first = at * BAND_GROUPS * GROUP_ROWS;
        pack(first..rows.min(first + BAND_GROUPS * GROUP_ROWS), weights, numbers)
    })
}

/// Computes the products through bf16 tiles (prefill). Returns `None` if there are too few rows or this
/// path is off.
fn prefill_products(matrices: &[&QuantizedMatrix], values: &[f32], n: usize) -> Option<Vec<Vec<f32>>> {
    if !KernelChoice::detect().long || n < MIN_PREFILL_ROWS {
        return None;
    }
    #[cfg(target_arch = "x86_64")]
    let all = matrices.iter().map(|matrix| long::bf16_product(matrix, values, n)).collect();
    #[cfg(not(target_arch = "x86_64"))]
    let all = None;
    all
}

/// Computes the products of `n` rows with all matrices, by integer kernels.
fn decode_products(matrices: &[&QuantizedMatrix], values: &[f32], n: usize, kernel: Kernel) -> Vec<Vec<f32>> {
    let blocks = matrices.first().map_or(0, |matrix| matrix.columns / BLOCK_WEIGHTS);
    let activations = QuantizedActivations::new(values, n, blocks, kernel);
    let mut outs: Vec<Vec<f32>> = matrices.iter().map(|matrix| Vec::with_capacity(n * matrix.rows)).collect();
    let target = |(out, matrix): (&mut Vec<f32>, &&QuantizedMatrix)| OutputColumns {
        start: out.as_mut_ptr(),
        rows: matrix.rows,
        n,
    };
    let targets: Vec<OutputColumns> = outs.iter_mut().zip(matrices).map(target).collect();
    let group_weights = blocks * GROUP_ROWS * BLOCK_WEIGHTS;
    let work = |mut group: usize| {
        for (matrix, target) in matrices.iter().zip(&targets) {
            if group < matrix.group_count() {
                let of = matrix.group_blocks(group);
                return match &matrix.held {
                    Storage::Eight(all) => {
                        group_product(all.block_range(of), &activations, n, group, target, kernel)
                    }
                    Storage::Four(all) => {
                        group_product(all.block_range(of), &activations, n, group, target, kernel)
                    }
                };
            }
            group -= matrix.group_count();
        }
    };
    let groups: usize = matrices.iter().map(|matrix| matrix.group_count()).sum();
    // Waking another thread takes longer than a small product.
    if rayon::current_num_threads() == 1 || groups * group_weights * n < MIN_PARALLEL_PRODUCTS {
        (0..groups).for_each(work);
    } else {
        let per_task = (MIN_TASK_PRODUCTS / (group_weights * n.min(TILE_ROWS)).max(1)).max(1);
        (0..groups).into_par_iter().with_min_len(per_task).for_each(work);
    }
    for (out, matrix) in outs.iter_mut().zip(matrices) {
        // SAFETY: the capacity suffices, and each group has written its columns in all rows.
        unsafe { out.set_len(n * matrix.rows) };
    }
    outs
}

/// Computes the columns of one group of weight rows, for all activation rows.
fn group_product<F: QuantFormat>(
    group: GroupView<'_, F>,
    activations: &QuantizedActivations,
    n: usize,
    at: usize,
    target: &OutputColumns,
    kernel: Kernel,
) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if kernel == Kernel::Amx && n >= MIN_AMX_ROWS {
        // SAFETY: `Kernel::all` offers a kernel only on CPUs that support its instructions.
        return unsafe {
            amx::multiply_group(group, activations, n, |first, values| {
                target.write_tile(first, at * GROUP_ROWS, values)
            })
        };
    }
    let mut tile = [0f32; TILE_ROWS * GROUP_ROWS];
    for first in (0..n).step_by(TILE_ROWS) {
        let count = TILE_ROWS.min(n - first);
        let tile = &mut tile[..count * GROUP_ROWS];
        tile_product(group, activations, first, tile, kernel);
        target.write_tile(first, at * GROUP_ROWS, tile);
    }
}

/// Raw output matrix. Several tasks write, each its own columns.
struct OutputColumns {
    start: *mut f32,
    rows: usize,
    n: usize,
}

// SAFETY: tasks write disjoint columns, and the matrix is read only after all tasks have ended.
unsafe impl Sync for OutputColumns {}

impl OutputColumns {
    /// Writes rows of 16 values from `first` and `column` on. Values beyond the last column are padding and
    /// are dropped.
    fn write_tile(&self, first: usize, column: usize, values: &[f32]) {
        assert!(column < self.rows && first + values.len() / GROUP_ROWS <= self.n);
        let count = GROUP_ROWS.min(self.rows - column);
        for (row, values) in values.chunks_exact(GROUP_ROWS).enumerate() {
            // SAFETY: the assertion and the limit of `count` keep row and columns within the result.
            unsafe {
                let to = self.start.add((first + row) * self.rows + column);
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, count);
            }
        }
    }
}

/// Multiplies 16 rows of weights with the activation rows from `first` on, for all rows of `out`.
fn tile_product<F: QuantFormat>(
    group: GroupView<'_, F>,
    activations: &QuantizedActivations,
    first: usize,
    out: &mut [f32],
    kernel: Kernel,
) {
    match kernel {
        // SAFETY: `Kernel::all` offers a kernel only on CPUs that support its instructions.
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Kernel::Amx => unsafe { avx512::multiply_rows(group, activations, first, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512 => unsafe { avx512::multiply_rows(group, activations, first, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => unsafe { avx2::multiply_rows(group, activations, first, out) },
        Kernel::Portable => portable_tile(group, activations, first, out),
    }
}

/// The portable kernel: the same sums in the same order as the other kernels.
fn portable_tile<F: QuantFormat>(
    group: GroupView<'_, F>,
    activations: &QuantizedActivations,
    first: usize,
    out: &mut [f32],
) {
    for (row, out) in out.chunks_exact_mut(GROUP_ROWS).enumerate() {
        let row = first + row;
        out.fill(0.0);
        for (at, block) in (row * activations.blocks..).zip(group.blocks()) {
            let quads = &activations.quads[at * K4_PER_BLOCK..][..K4_PER_BLOCK];
            let (scale, sum) = (activations.scales[at], activations.sums[at]);
            for (lane, out) in out.iter_mut().enumerate() {
                let mut product = if F::IS_INT4 { 0 } else { activations.offsets[at] };
                for (step, quad) in quads.iter().enumerate() {
                    let weights = F::k4(block.weights, step, lane);
                    for (weight, byte) in weights.into_iter().zip(quad.to_le_bytes()) {
                        product += i32::from(weight) * i32::from(byte as i8);
                    }
                }
                let (weight_scale, least) = F::scale_and_min(block.numbers, lane);
                if F::IS_INT4 {
                    *out = sum.mul_add(least, *out);
                }
                *out = (product as f32).mul_add(weight_scale * scale, *out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::test_noise;
    use super::*;

    /// Returns a random 8-bit and a random 4-bit matrix.
    pub(super) fn both(rows: usize, columns: usize, next: &mut impl FnMut() -> f32) -> [QuantizedMatrix; 2] {
        let weight: Vec<f32> = (0..rows * columns).map(|_| next()).collect();
        let eight = QuantizedMatrix::quantize_int8(
            &Tensor::from_slice(&weight, (rows, columns), &Device::Cpu).unwrap(),
        )
        .unwrap();
        let four: Vec<Int4Block> = weight
            .chunks_exact(BLOCK_WEIGHTS)
            .map(|block| Int4Block {
                scale: 0.06 * block[0],
                least: 0.5 * block[1],
                values: std::array::from_fn(|at| (block[at].abs() * 1000.0) as u8 % 16),
            })
            .collect();
        let blocks = columns / BLOCK_WEIGHTS;
        let four = QuantizedMatrix::from_int4_blocks(rows, columns, |row| {
            four[row * blocks..][..blocks].iter().copied()
        });
        [eight, four.unwrap()].map(Option::unwrap)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Selected rows equal the rounded rows of the matrix.
        #[test]
        fn select_returns_rounded_rows(rows in 1usize..70, blocks in 1usize..6, seed in any::<u64>()) {
            let columns = blocks * BLOCK_WEIGHTS;
            let mut next = test_noise(seed);
            let weight: Vec<f32> = (0..rows * columns).map(|_| next()).collect();
            let packed = QuantizedMatrix::quantize_int8(&Tensor::from_slice(&weight, (rows, columns), &Device::Cpu).unwrap()).unwrap().unwrap();
            let wanted: Vec<u32> = (0..rows as u32).rev().collect();
            let found = packed.lookup_rows(&wanted).unwrap().to_vec2::<f32>().unwrap();
            for (row, values) in wanted.iter().zip(found) {
                for (column, value) in values.into_iter().enumerate() {
                    prop_assert_eq!(value, packed.dequantized_weight(*row as usize, column));
                    prop_assert!((value - weight[*row as usize * columns + column]).abs() < 0.005);
                }
            }
            prop_assert!(packed.lookup_rows(&[rows as u32]).is_err());
        }

        /// 4-bit weights are stored without further rounding.
        #[test]
        fn four_bit_weights_are_stored_exactly(rows in 1usize..70, blocks in 1usize..6, seed in any::<u64>()) {
            let mut next = test_noise(seed);
            let half = |x: f32| half::f16::from_f32(x).to_f32();
            let given: Vec<Int4Block> = (0..rows * blocks)
                .map(|_| Int4Block {
                    scale: half(next()),
                    least: half(next()),
                    values: std::array::from_fn(|_| (next().abs() * 1000.0) as u8 % 16),
                })
                .collect();
            let row = |row: usize| given[row * blocks..][..blocks].iter().copied();
            let packed = QuantizedMatrix::from_int4_blocks(rows, blocks * BLOCK_WEIGHTS, row).unwrap().unwrap();
            prop_assert!(matches!(packed.held, Storage::Four(_)));
            for row in 0..rows {
                let found = packed.lookup_rows(&[row as u32]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let blocks = given[row * blocks..][..blocks].iter();
                let worth = |block: &Int4Block| block.values.map(|value| f32::from(value).mul_add(block.scale, block.least));
                prop_assert_eq!(found, blocks.flat_map(worth).collect::<Vec<f32>>());
            }
        }

        /// Every kernel gives the bits of the portable one, close to the exact product of the stored
        /// weights.
        #[test]
        fn all_kernels_match_the_portable_kernel(rows in 1usize..70, blocks in 1usize..6, n in 1usize..40, seed in any::<u64>()) {
            let columns = blocks * BLOCK_WEIGHTS;
            let mut next = test_noise(seed);
            let matrices = both(rows, columns, &mut next);
            let x: Vec<f32> = (0..n * columns).map(|_| next() * 3.0).collect();
            let slow = decode_products(&[&matrices[0], &matrices[1]], &x, n, Kernel::Portable);
            for kernel in Kernel::supported() {
                let found = decode_products(&[&matrices[0], &matrices[1]], &x, n, kernel);
                prop_assert!(found == slow, "{kernel:?} has other bits");
            }
            for (matrix, slow) in matrices.iter().zip(&slow) {
                for (row, out) in slow.chunks_exact(rows).enumerate() {
                    for (column, found) in out.iter().enumerate() {
                        let (mut exact, mut bound) = (0f32, 1e-3);
                        for (block, x) in x[row * columns..][..columns].chunks_exact(BLOCK_WEIGHTS).enumerate() {
                            // The rounding error of an activation is at most half a step; a step is the
                            // block's maximum divided by 127.
                            let half_a_step = x.iter().fold(0f32, |most, x| most.max(x.abs())) / 254.0;
                            for (at, x) in x.iter().enumerate() {
                                let weight = matrix.dequantized_weight(column, block * BLOCK_WEIGHTS + at);
                                exact += weight * x;
                                bound += weight.abs() * half_a_step;
                            }
                        }
                        prop_assert!((found - exact).abs() < bound, "{found} {exact} {bound}");
                    }
                }
            }
        }
    }

    #[test]
    fn rejects_matrices_that_cannot_be_quantized() {
        let weight = Tensor::zeros((4, 33), DType::F32, &Device::Cpu).unwrap();
        assert!(QuantizedMatrix::quantize_int8(&weight).unwrap().is_none());
        let block = Int4Block { scale: 1e6, least: 0.0, values: [1; BLOCK_WEIGHTS] };
        assert!(QuantizedMatrix::from_int4_blocks(4, 32, |_| [block].into_iter()).unwrap().is_none());
        assert!(QuantizedMatrix::from_int4_blocks(4, 33, |_| [block].into_iter()).unwrap().is_none());
        assert!(QuantizedMatrix::from_int4_blocks(4, 64, |_| [block].into_iter()).is_err());
    }
}
