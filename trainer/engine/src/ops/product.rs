//! Matrix products over strided slices: `gemm` in f32, or our own in bf16.
#![expect(unsafe_code, reason = "gemm takes raw pointers")]

use super::{Precision, filled};

/// A matrix as it lies in memory.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(super) values: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after the other.
    pub(crate) fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Rows that begin `stride` values apart.
    pub(crate) fn strided(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        Self { values, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// The same values as the transposed matrix.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// One row of a matrix that is not transposed.
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.row_stride..row * self.row_stride + self.columns]
    }

    fn check(&self, what: &str) {
        let last = (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride;
        assert!(last < self.values.len(), "product: the {what} side is too small");
    }
}

/// How a product is taken.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub(crate) scale: f32,
    /// To what is there already.
    pub(crate) add: bool,
    /// Threads of the pool that share it.
    pub(crate) threads: usize,
    /// What both sides are rounded to.
    pub(crate) precision: Precision,
}

impl Product {
    /// On the calling thread.
    pub(crate) fn alone(precision: Precision) -> Self {
        Self { scale: 1.0, add: false, threads: 1, precision }
    }

    /// On all threads of the pool.
    pub(crate) fn shared(precision: Precision) -> Self {
        Self { threads: rayon::current_num_threads(), ..Self::alone(precision) }
    }

    pub(crate) fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    pub(crate) fn adding(self, add: bool) -> Self {
        Self { add, ..self }
    }

    /// `dst = scale * lhs * rhs (+ dst)`, rows of `dst` beginning `stride` values apart.
    pub(crate) fn run(&self, dst: &mut [f32], stride: usize, lhs: Matrix<'_>, rhs: Matrix<'_>) {
        assert!((lhs.rows - 1) * stride + rhs.columns - 1 < dst.len(), "product: the result is too small");
        // SAFETY: the result was just found to have room, all of it holds values, and `dst` is borrowed mutably, so it
        // overlaps neither side.
        unsafe { self.write(dst.as_mut_ptr(), stride, lhs, rhs) };
    }

    /// `scale * lhs * rhs` in memory of its own.
    pub(crate) fn of(&self, lhs: Matrix<'_>, rhs: Matrix<'_>) -> Vec<f32> {
        // SAFETY: there is room for all values, and a product that adds to nothing writes every one without a look at it.
        unsafe {
            filled(lhs.rows * rhs.columns, |out| {
                self.adding(false).write(out.as_mut_ptr().cast(), rhs.columns, lhs, rhs);
            })
        }
    }

    /// # Safety
    ///
    /// `dst` must have room for all rows, be nobody else's, and hold values where they are added to.
    unsafe fn write(&self, dst: *mut f32, stride: usize, lhs: Matrix<'_>, rhs: Matrix<'_>) {
        let (m, n, k) = (lhs.rows, rhs.columns, lhs.columns);
        assert_eq!(k, rhs.rows, "product: sides that do not fit");
        lhs.check("left");
        rhs.check("right");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's word.
        if self.precision == Precision::Bf16 && unsafe { super::bf16::run(self, dst, stride, lhs, rhs) } {
            return;
        }
        // SAFETY: the largest offset that each side touches was just checked against its slice, strides are non-negative, and
        // for the result the caller vouches.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                dst,
                1,
                stride as isize,
                self.add,
                lhs.values.as_ptr(),
                lhs.column_stride as isize,
                lhs.row_stride as isize,
                rhs.values.as_ptr(),
                rhs.column_stride as isize,
                rhs.row_stride as isize,
                if self.add { 1.0 } else { 0.0 },
                self.scale,
                false,
                false,
                false,
                match self.threads {
                    0 | 1 => gemm::Parallelism::None,
                    threads => gemm::Parallelism::Rayon(threads),
                },
            );
        }
    }
}
