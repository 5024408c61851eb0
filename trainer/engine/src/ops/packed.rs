//! Products with weights of eight bits: blocks of 32 along a row share a scale, activations are rounded to eight bits with a
//! scale for each block of 32 too, sums within a block are whole numbers.
//!
//! Weights lie as the kernels read them: 16 rows side by side, four columns at a time, so that one instruction multiplies 64
//! weights with four activations (AVX-512 VNNI) and one load of weights serves a tile of activation rows. Values are
//! stored plus 128 (unsigned); the 128 is taken back through the sum of the block's activations, which is one number for
//! all rows. Which kernel runs is found out when the program does; all give the same bits.
#![expect(unsafe_code, reason = "instructions that only some processors have")]

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod long;

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::with_values;

/// Weights that share a scale.
const BLOCK: usize = 32;
/// Rows that lie side by side.
const LANES: usize = 16;
/// Groups of as many rows that are packed at a time.
const BAND: usize = 16;
/// Activation rows that are multiplied in one go, at most.
const TILE: usize = 16;
/// Tiles that are rounded in one task, at least.
const TILES_PER_TASK: usize = 4;
/// The same for AVX-512.
#[cfg(target_arch = "x86_64")]
const AVX512_TILE: usize = 8;
/// So many activation rows are worth a tile of AMX; fewer go to AVX-512.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const AMX_ROWS: usize = 6;
/// The same for AVX2.
#[cfg(target_arch = "x86_64")]
const AVX2_TILE: usize = 3;
/// So many activation rows are worth laying the weights out in bf16: more than answers that are written at once as a rule.
const LONG_ROWS: usize = 96;
/// Bytes of weights, times rows of activations, that are worth a task of their own.
const TASK_BYTES: usize = 1 << 16;
/// And from which on more than one thread is worth it.
const PARALLEL_BYTES: usize = 1 << 18;

/// A matrix `[rows, columns]` in blocks of eight bits.
#[derive(Debug)]
pub struct Packed {
    rows: usize,
    columns: usize,
    /// For each 16 rows, for each block: 8 times 16 rows of four columns.
    weights: Vec<u8>,
    /// For each 16 rows, for each block: 16 scales.
    scales: Vec<f32>,
}

/// Activation rows in blocks of eight bits.
struct Activations {
    blocks: usize,
    /// Four columns as they are broadcast, row by row.
    quads: Vec<i32>,
    scales: Vec<f32>,
    /// -128 times the sum of each block.
    offsets: Vec<i32>,
}

/// Some rows of [`Activations`].
struct Rounded<'a> {
    quads: &'a mut [i32],
    scales: &'a mut [f32],
    offsets: &'a mut [i32],
}

/// The instructions that products are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kernel {
    /// Any processor.
    Plain,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 with VNNI.
    Avx512,
    /// The same, and tiles of bytes.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx,
}

impl Kernel {
    /// The best that this processor has.
    fn best() -> Self {
        Choice::here().kernel
    }

    fn has_tiles(self) -> bool {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        return self == Self::Amx;
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        false
    }

    /// Those that this processor can run.
    fn all() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "only x86 has others"))]
        let mut all = vec![Self::Plain];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
            {
                all.push(Self::Avx512);
                #[cfg(target_os = "linux")]
                if super::amx::available() {
                    all.push(Self::Amx);
                }
            }
        }
        all
    }
}

/// How products are taken.
#[derive(Debug, Clone, Copy)]
struct Choice {
    kernel: Kernel,
    /// Many rows go through tiles of bf16.
    long: bool,
}

impl Choice {
    /// The best that this processor has, or what `POTSTILL_KERNEL` names, to compare them: a lesser kernel (`plain`, `avx2`,
    /// `avx512`), or `bf16` for the way that long prompts go where there is AMX, without its tiles.
    fn here() -> Self {
        static HERE: OnceLock<Choice> = OnceLock::new();
        *HERE.get_or_init(|| {
            let named = std::env::var("POTSTILL_KERNEL").unwrap_or_default();
            let most = match named.as_str() {
                "plain" => Some(Kernel::Plain),
                "avx2" => Some(Kernel::Avx2),
                "avx512" => Some(Kernel::Avx512),
                _ => None,
            };
            let usable = |kernel: &Kernel| most.is_none_or(|most| *kernel <= most);
            let kernel = Kernel::all().into_iter().filter(usable).max().unwrap_or(Kernel::Plain);
            Self { kernel, long: kernel.has_tiles() || named == "bf16" }
        })
    }
}

/// Whether products of eight bits are faster than those of f32 here.
pub fn is_fast() -> bool {
    Kernel::best() > Kernel::Plain
}

impl Packed {
    /// Packs a matrix on the CPU; none when its columns do not fill blocks.
    pub fn new(weight: &Tensor) -> Result<Option<Self>> {
        let (rows, columns) = weight.dims2()?;
        Self::from_rows(rows, columns, |some| weight.narrow(0, some.start, some.len())?.to_dtype(DType::F32))
    }

    /// Packs a matrix that is given in f32, some rows at a time, by several threads at once: each holds a
    /// band of it in f32.
    pub fn from_rows(
        rows: usize,
        columns: usize,
        some: impl Fn(Range<usize>) -> Result<Tensor> + Sync,
    ) -> Result<Option<Self>> {
        if rows == 0 || columns == 0 || !columns.is_multiple_of(BLOCK) {
            return Ok(None);
        }
        let (groups, blocks) = (rows.div_ceil(LANES), columns / BLOCK);
        let mut packed = Self {
            rows,
            columns,
            weights: vec![128; groups * blocks * LANES * BLOCK],
            scales: vec![0.0; groups * blocks * LANES],
        };
        let weights = packed.weights.par_chunks_mut(BAND * blocks * LANES * BLOCK);
        let bands = weights.zip(packed.scales.par_chunks_mut(BAND * blocks * LANES));
        bands.enumerate().try_for_each(|(at, (weights, scales))| {
            let first = at * BAND * LANES;
            let band = first..rows.min(first + BAND * LANES);
            let (count, tensor) = (band.len(), some(band)?);
            if tensor.dims() != [count, columns] {
                candle_core::bail!("{:?} in place of {count} rows of {columns}", tensor.dims());
            }
            with_values([&tensor], |[values]| pack(values, blocks, weights, scales))
        })?;
        Ok(Some(packed))
    }

    /// Rows of the matrix itself, `[rows.len(), columns]`: what an embedding gives for tokens.
    pub fn select(&self, rows: &[u32]) -> Result<Tensor> {
        let mut values = Vec::with_capacity(rows.len() * self.columns);
        for &row in rows {
            let row = row as usize;
            if row >= self.rows {
                candle_core::bail!("row {row} of a matrix of {}", self.rows);
            }
            let (group, lane, blocks) = (row / LANES, row % LANES, self.columns / BLOCK);
            for block in group * blocks..(group + 1) * blocks {
                let scale = self.scales[block * LANES + lane];
                let quads = self.weights[block * LANES * BLOCK..][..LANES * BLOCK].chunks_exact(4 * LANES);
                let bytes = quads.flat_map(|quad| &quad[lane * 4..][..4]);
                values.extend(bytes.map(|byte| (f32::from(*byte) - 128.0) * scale));
            }
        }
        Tensor::from_vec(values, (rows.len(), self.columns), &Device::Cpu)
    }

    /// Rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.weights.len() + self.scales.len() * 4
    }

    /// `x W^T` for `x` of `[n, columns]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Self::forward_all(&[self], x)?.pop().ok_or_else(|| candle_core::Error::Msg("no product".to_owned()))
    }

    /// The products of the same `x` with several matrices: it is rounded once, and threads share one piece of work.
    pub fn forward_all(matrices: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let (n, columns) = x.dims2()?;
        for matrix in matrices {
            if columns != matrix.columns {
                candle_core::bail!("a product of {columns} columns with a matrix of {}", matrix.columns);
            }
        }
        let outs = with_values([x], |[values]| {
            long_products(matrices, values, n)
                .unwrap_or_else(|| products(matrices, values, n, Kernel::best()))
        })?;
        let shaped = outs.into_iter().zip(matrices).map(|(out, matrix)| (out, (n, matrix.rows)));
        shaped.map(|(out, shape)| Tensor::from_vec(out, shape, x.device())).collect()
    }

    /// A weight as it was packed.
    #[cfg(test)]
    fn weight(&self, row: usize, column: usize) -> f32 {
        let block = row / LANES * (self.columns / BLOCK) + column / BLOCK;
        let (lane, at) = (row % LANES, column % BLOCK);
        let byte = self.weights[block * LANES * BLOCK + (at / 4) * 4 * LANES + lane * 4 + at % 4];
        (f32::from(byte) - 128.0) * self.scales[block * LANES + lane]
    }

    /// Groups of rows that lie side by side.
    fn groups(&self) -> usize {
        self.rows.div_ceil(LANES)
    }
}

/// Packs rows of so many blocks.
fn pack(values: &[f32], blocks: usize, weights: &mut [u8], scales: &mut [f32]) {
    for (row, values) in values.chunks_exact(blocks * BLOCK).enumerate() {
        let (group, lane) = (row / LANES, row % LANES);
        for (block, values) in values.chunks_exact(BLOCK).enumerate() {
            let block = group * blocks + block;
            let most = values.iter().fold(0f32, |most, value| most.max(value.abs()));
            let scale = most / 127.0;
            scales[block * LANES + lane] = scale;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let quads = weights[block * LANES * BLOCK..][..LANES * BLOCK].chunks_exact_mut(4 * LANES);
            for (quad, four) in quads.zip(values.chunks_exact(4)) {
                for (byte, value) in quad[lane * 4..][..4].iter_mut().zip(four) {
                    // To the nearest whole number, as what is cut off is positive.
                    *byte = (value * inverse + 128.5) as u8;
                }
            }
        }
    }
}

/// The products of many rows, where there are enough and a faster way for them.
fn long_products(matrices: &[&Packed], values: &[f32], n: usize) -> Option<Vec<Vec<f32>>> {
    if !Choice::here().long || n < LONG_ROWS {
        return None;
    }
    #[cfg(target_arch = "x86_64")]
    let all = matrices.iter().map(|matrix| long::product(matrix, values, n)).collect();
    #[cfg(not(target_arch = "x86_64"))]
    let all = None;
    all
}

fn products(matrices: &[&Packed], values: &[f32], n: usize, kernel: Kernel) -> Vec<Vec<f32>> {
    let blocks = matrices.first().map_or(0, |matrix| matrix.columns / BLOCK);
    let activations = Activations::new(values, n, blocks, kernel);
    let mut outs: Vec<Vec<f32>> = matrices.iter().map(|matrix| Vec::with_capacity(n * matrix.rows)).collect();
    let target =
        |(out, matrix): (&mut Vec<f32>, &&Packed)| Columns { start: out.as_mut_ptr(), rows: matrix.rows, n };
    let targets: Vec<Columns> = outs.iter_mut().zip(matrices).map(target).collect();
    let group_bytes = blocks * LANES * BLOCK;
    let work = |mut group: usize| {
        for (matrix, target) in matrices.iter().zip(&targets) {
            if group < matrix.groups() {
                return group_product(matrix, &activations, n, group, target, kernel);
            }
            group -= matrix.groups();
        }
    };
    let groups: usize = matrices.iter().map(|matrix| matrix.groups()).sum();
    // A small product is done before another thread has woken up.
    if rayon::current_num_threads() == 1 || groups * group_bytes * n < PARALLEL_BYTES {
        (0..groups).for_each(work);
    } else {
        let per_task = (TASK_BYTES / (group_bytes * n.min(TILE)).max(1)).max(1);
        (0..groups).into_par_iter().with_min_len(per_task).for_each(work);
    }
    for (out, matrix) in outs.iter_mut().zip(matrices) {
        // SAFETY: there is room for as many, and each group has written its columns of all rows.
        unsafe { out.set_len(n * matrix.rows) };
    }
    outs
}

/// The products of one group of rows.
fn group_product(
    matrix: &Packed,
    activations: &Activations,
    n: usize,
    group: usize,
    target: &Columns,
    kernel: Kernel,
) {
    let blocks = activations.blocks;
    let bytes = blocks * LANES * BLOCK;
    let weights = &matrix.weights[group * bytes..][..bytes];
    let scales = &matrix.scales[group * blocks * LANES..][..blocks * LANES];
    // SAFETY: a kernel is only chosen where the processor has what it is compiled for.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let _tiles = (kernel == Kernel::Amx && n >= AMX_ROWS).then(|| unsafe { amx::tiles() });
    let mut tile = [0f32; TILE * LANES];
    for first in (0..n).step_by(TILE) {
        let count = TILE.min(n - first);
        tile_product(weights, scales, activations, first, count, &mut tile, kernel);
        for (row, values) in tile[..count * LANES].chunks_exact(LANES).enumerate() {
            target.write(first + row, group * LANES, values);
        }
    }
}

/// The columns of a result, written by several tasks, each its own.
struct Columns {
    start: *mut f32,
    rows: usize,
    n: usize,
}

// SAFETY: tasks write disjoint columns; nobody reads before all are done.
unsafe impl Sync for Columns {}

impl Columns {
    /// Writes up to 16 values of a row, from `column` on; what lies beyond the last column is padding and dropped.
    fn write(&self, row: usize, column: usize, values: &[f32]) {
        let count = values.len().min(self.rows - column);
        assert!(row < self.n && column < self.rows);
        // SAFETY: the row and the columns are within the result, by the assertion and the cut above.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(row * self.rows + column), count);
        }
    }
}

impl Activations {
    fn new(values: &[f32], n: usize, blocks: usize, kernel: Kernel) -> Self {
        // The largest kernel reads whole tiles; rows that nobody asked for are zero.
        let padded = n.next_multiple_of(TILE);
        let mut all = Self {
            blocks,
            quads: vec![0; padded * blocks * BLOCK / 4],
            scales: vec![0.0; padded * blocks],
            offsets: vec![0; padded * blocks],
        };
        // Blocks of a tile, at least one, as there are no pieces of nothing.
        let piece = TILE * blocks.max(1);
        let (quads, scales) = (all.quads.par_chunks_mut(piece * BLOCK / 4), all.scales.par_chunks_mut(piece));
        let tasks = quads.zip(scales).zip(all.offsets.par_chunks_mut(piece));
        tasks.zip(values.par_chunks(piece * BLOCK)).with_min_len(TILES_PER_TASK).for_each(
            |(((quads, scales), offsets), values)| {
                let into = Rounded { quads, scales, offsets };
                match kernel {
                    // SAFETY: a kernel is only chosen where the processor has what it is compiled for.
                    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                    Kernel::Amx => unsafe { avx512::quantise(values, into) },
                    // SAFETY: the same.
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => unsafe { avx512::quantise(values, into) },
                    // SAFETY: the same.
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx2 => unsafe { avx2::quantise(values, into) },
                    Kernel::Plain => quantise(values, into),
                }
            },
        );
        all
    }
}

/// Rounds activations to eight bits, block by block.
#[inline(always)]
fn quantise(values: &[f32], into: Rounded<'_>) {
    let numbers = into.scales.iter_mut().zip(into.offsets);
    for ((block, quads), (scale, offset)) in
        values.chunks_exact(BLOCK).zip(into.quads.chunks_exact_mut(BLOCK / 4)).zip(numbers)
    {
        let mut most = [0f32; 8];
        for eight in block.chunks_exact(8) {
            for (most, value) in most.iter_mut().zip(eight) {
                *most = most.max(value.abs());
            }
        }
        let most = most.iter().fold(0f32, |a, b| a.max(*b));
        *scale = most / 127.0;
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        let mut whole = [0i32; BLOCK];
        for (whole, value) in whole.iter_mut().zip(block) {
            *whole = (value * inverse).round_ties_even() as i32;
        }
        *offset = -128 * whole.iter().sum::<i32>();
        for (quad, four) in quads.iter_mut().zip(whole.chunks_exact(4)) {
            *quad = (four[0] & 255) | ((four[1] & 255) << 8) | ((four[2] & 255) << 16) | (four[3] << 24);
        }
    }
}

/// 16 rows of weights times `count` activation rows from `first` on: the first `count` rows of `out`.
fn tile_product(
    weights: &[u8],
    scales: &[f32],
    activations: &Activations,
    first: usize,
    count: usize,
    out: &mut [f32; TILE * LANES],
    kernel: Kernel,
) {
    #[cfg(target_arch = "x86_64")]
    let wide = |first: usize, out: &mut [f32]| {
        for (part, out) in out.chunks_mut(AVX512_TILE * LANES).enumerate() {
            let first = first + part * AVX512_TILE;
            // SAFETY: a kernel is only chosen where the processor has what it is compiled for.
            unsafe {
                match out.len() / LANES {
                    1 => avx512::tile::<1>(weights, scales, activations, first, out),
                    2 => avx512::tile::<2>(weights, scales, activations, first, out),
                    3 => avx512::tile::<3>(weights, scales, activations, first, out),
                    4 => avx512::tile::<4>(weights, scales, activations, first, out),
                    5 => avx512::tile::<5>(weights, scales, activations, first, out),
                    6 => avx512::tile::<6>(weights, scales, activations, first, out),
                    7 => avx512::tile::<7>(weights, scales, activations, first, out),
                    _ => avx512::tile::<8>(weights, scales, activations, first, out),
                }
            }
        }
    };
    match kernel {
        // SAFETY: the same; this thread has the tiles wherever a product has so many rows.
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Kernel::Amx if count >= AMX_ROWS => unsafe { amx::tile(weights, scales, activations, first, out) },
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Kernel::Amx => wide(first, &mut out[..count * LANES]),
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512 => wide(first, &mut out[..count * LANES]),
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => {
            // It has half as many registers, of half the width.
            for (part, out) in out[..count * LANES].chunks_mut(AVX2_TILE * LANES).enumerate() {
                let first = first + part * AVX2_TILE;
                // SAFETY: the same.
                unsafe {
                    match out.len() / LANES {
                        1 => avx2::tile::<1>(weights, scales, activations, first, out),
                        2 => avx2::tile::<2>(weights, scales, activations, first, out),
                        _ => avx2::tile::<3>(weights, scales, activations, first, out),
                    }
                }
            }
        }
        Kernel::Plain => plain(weights, scales, activations, first, &mut out[..count * LANES]),
    }
}

/// The plain twin: the same sums in the same order.
fn plain(weights: &[u8], scales: &[f32], activations: &Activations, first: usize, out: &mut [f32]) {
    for (row, out) in out.chunks_exact_mut(LANES).enumerate() {
        let row = first + row;
        out.fill(0.0);
        for block in 0..activations.blocks {
            let at = row * activations.blocks + block;
            let quads = &activations.quads[at * BLOCK / 4..][..BLOCK / 4];
            let weights = &weights[block * LANES * BLOCK..][..LANES * BLOCK];
            let mut sums = [activations.offsets[at]; LANES];
            for (quad, weights) in quads.iter().zip(weights.chunks_exact(4 * LANES)) {
                let bytes = quad.to_le_bytes();
                for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(4)) {
                    for (weight, byte) in weights.iter().zip(bytes) {
                        *sum += i32::from(*weight) * i32::from(byte as i8);
                    }
                }
            }
            let scale = activations.scales[at];
            for ((out, sum), weight_scale) in out.iter_mut().zip(sums).zip(&scales[block * LANES..]) {
                *out = (sum as f32).mul_add(weight_scale * scale, *out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::noise;
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Rows that are looked up are those that were packed, rounded.
        #[test]
        fn selected_rows_are_those_of_the_matrix(rows in 1usize..70, blocks in 1usize..6, seed in any::<u64>()) {
            let columns = blocks * BLOCK;
            let mut next = noise(seed);
            let weight: Vec<f32> = (0..rows * columns).map(|_| next()).collect();
            let packed = Packed::new(&Tensor::from_slice(&weight, (rows, columns), &Device::Cpu).unwrap()).unwrap().unwrap();
            let wanted: Vec<u32> = (0..rows as u32).rev().collect();
            let found = packed.select(&wanted).unwrap().to_vec2::<f32>().unwrap();
            for (row, values) in wanted.iter().zip(found) {
                for (column, value) in values.into_iter().enumerate() {
                    prop_assert_eq!(value, packed.weight(*row as usize, column));
                    prop_assert!((value - weight[*row as usize * columns + column]).abs() < 0.005);
                }
            }
            prop_assert!(packed.select(&[rows as u32]).is_err());
        }

        /// Every kernel is its plain twin, and all are near the product of what was packed.
        #[test]
        fn the_kernels_are_the_product(rows in 1usize..70, blocks in 1usize..6, n in 1usize..20, seed in any::<u64>()) {
            let columns = blocks * BLOCK;
            let mut next = noise(seed);
            let weight: Vec<f32> = (0..rows * columns).map(|_| next()).collect();
            let x: Vec<f32> = (0..n * columns).map(|_| next() * 3.0).collect();
            let packed = Packed::new(&Tensor::from_slice(&weight, (rows, columns), &Device::Cpu).unwrap()).unwrap().unwrap();
            let slow = products(&[&packed], &x, n, Kernel::Plain);
            for kernel in Kernel::all() {
                prop_assert_eq!(&products(&[&packed], &x, n, kernel), &slow);
                let twice = products(&[&packed, &packed], &x, n, kernel);
                prop_assert!(twice.iter().all(|one| *one == slow[0]));
            }
            for (row, out) in slow[0].chunks_exact(rows).enumerate() {
                for (column, found) in out.iter().enumerate() {
                    let (w, x) = (&weight[column * columns..][..columns], &x[row * columns..][..columns]);
                    let exact: f32 = w.iter().zip(x).map(|(a, b)| a * b).sum();
                    // Rounding of both sides to eight bits: about 1 in 250 of each factor, adding up like a random walk.
                    let bound = 3.0 * (columns as f32).sqrt() / 100.0 + 0.05;
                    prop_assert!((found - exact).abs() < bound, "{found} {exact} {bound}");
                }
            }
        }
    }

    #[test]
    fn columns_that_fill_no_block_are_refused() {
        let weight = Tensor::zeros((4, 33), DType::F32, &Device::Cpu).unwrap();
        assert!(Packed::new(&weight).unwrap().is_none());
    }
}
