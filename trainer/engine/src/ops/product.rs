//! Matrix products over strided slices: the `gemm` crate in f32, or our own kernels in bf16.
#![expect(unsafe_code, reason = "gemm takes raw pointers")]

use super::{Precision, filled};

/// A strided view of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(super) values: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Creates a row-major view without gaps.
    pub(crate) fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Creates a row-major view whose rows begin `stride` values apart.
    pub(crate) fn strided(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        Self { values, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// Returns the transposed view.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Returns one row; valid for untransposed views only.
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.row_stride..row * self.row_stride + self.columns]
    }

    /// Panics if the view exceeds its slice; `what` names the side.
    fn check(&self, what: &str) {
        let last = (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride;
        assert!(last < self.values.len(), "product: the {what} side is too small");
    }
}

/// Parameters of a matrix product.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    /// Factor on the product.
    pub(crate) scale: f32,
    /// Whether the product is added to the destination.
    pub(crate) add: bool,
    /// Number of threads of the rayon pool.
    pub(crate) threads: usize,
    /// Rounding of both sides.
    pub(crate) precision: Precision,
}

impl Product {
    /// A product on the calling thread.
    pub(crate) fn alone(precision: Precision) -> Self {
        Self { scale: 1.0, add: false, threads: 1, precision }
    }

    /// A product on all threads of the pool.
    pub(crate) fn shared(precision: Precision) -> Self {
        Self { threads: rayon::current_num_threads(), ..Self::alone(precision) }
    }

    pub(crate) fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    pub(crate) fn adding(self, add: bool) -> Self {
        Self { add, ..self }
    }

    /// Computes `dst = scale * lhs * rhs (+ dst)`. Rows of `dst` begin `stride` values apart. Panics if
    /// shapes or slices do not match.
    pub(crate) fn run(&self, dst: &mut [f32], stride: usize, lhs: Matrix<'_>, rhs: Matrix<'_>) {
        assert!((lhs.rows - 1) * stride + rhs.columns - 1 < dst.len(), "product: the result is too small");
        // SAFETY: the assertion above bounds all writes to `dst`, whose values are initialized. The mutable
        // borrow excludes an overlap with either side.
        unsafe { self.write(dst.as_mut_ptr(), stride, lhs, rhs) };
    }

    /// Returns `scale * lhs * rhs` as a new row-major matrix.
    pub(crate) fn of(&self, lhs: Matrix<'_>, rhs: Matrix<'_>) -> Vec<f32> {
        // SAFETY: the memory has room for all values. A product without addition writes every value and
        // reads none.
        unsafe {
            filled(lhs.rows * rhs.columns, |out| {
                self.adding(false).write(out.as_mut_ptr().cast(), rhs.columns, lhs, rhs);
            })
        }
    }

    /// Computes the product into raw memory.
    ///
    /// # Safety
    ///
    /// `dst` must have room for all rows, must not be accessed by others, and must be initialized if the
    /// product is added.
    unsafe fn write(&self, dst: *mut f32, stride: usize, lhs: Matrix<'_>, rhs: Matrix<'_>) {
        let (m, n, k) = (lhs.rows, rhs.columns, lhs.columns);
        assert_eq!(k, rhs.rows, "product: sides that do not fit");
        lhs.check("left");
        rhs.check("right");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller guarantees the validity of `dst`.
        if self.precision == Precision::Bf16 && unsafe { super::bf16::run(self, dst, stride, lhs, rhs) } {
            return;
        }
        // SAFETY: `check` has compared the largest offset of each side with its slice, and all strides are
        // non-negative. The caller guarantees the validity of `dst`.
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
