//! Matrix products over strided slices: the `gemm` crate in f32, or our own kernels in bf16.
#![expect(unsafe_code, reason = "gemm takes raw pointers")]

use super::Precision;
pub(crate) use super::matrix::{Matmul, MatrixView};
use super::uninit::fill_uninit;

impl Matmul {
    /// A product on the calling thread.
    pub(crate) fn single_threaded(precision: Precision) -> Self {
        Self { scale: 1.0, add: false, threads: 1, precision }
    }

    /// A product on all threads of the pool.
    pub(crate) fn multi_threaded(precision: Precision) -> Self {
        Self { threads: rayon::current_num_threads(), ..Self::single_threaded(precision) }
    }

    pub(crate) fn with_scale(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    pub(crate) fn with_accumulate(self, add: bool) -> Self {
        Self { add, ..self }
    }

    /// Computes `dst = scale * lhs * rhs (+ dst)`. Rows of `dst` begin `stride` values apart. Panics if
    /// shapes or slices do not match.
    pub(crate) fn multiply_into(
        &self,
        dst: &mut [f32],
        stride: usize,
        lhs: MatrixView<'_>,
        rhs: MatrixView<'_>,
    ) {
        assert!((lhs.rows - 1) * stride + rhs.columns - 1 < dst.len(), "product: the result is too small");
        // SAFETY: the assertion above bounds all writes to `dst`, whose values are initialized. The mutable
        // borrow excludes an overlap with either side.
        unsafe { self.multiply_raw(dst.as_mut_ptr(), stride, lhs, rhs) };
    }

    /// Returns `scale * lhs * rhs` as a new row-major matrix.
    pub(crate) fn multiply(&self, lhs: MatrixView<'_>, rhs: MatrixView<'_>) -> Vec<f32> {
        // SAFETY: the memory has room for all values. A product without addition writes every value and
        // reads none.
        unsafe {
            fill_uninit(lhs.rows * rhs.columns, |out| {
                self.with_accumulate(false).multiply_raw(out.as_mut_ptr().cast(), rhs.columns, lhs, rhs);
            })
        }
    }

    /// Computes the product into raw memory.
    ///
    /// # Safety
    ///
    /// `dst` must have room for all rows, must not be accessed by others, and must be initialized if the
    /// product is added.
    unsafe fn multiply_raw(&self, dst: *mut f32, stride: usize, lhs: MatrixView<'_>, rhs: MatrixView<'_>) {
        let (m, n, k) = (lhs.rows, rhs.columns, lhs.columns);
        assert_eq!(k, rhs.rows, "product: sides that do not fit");
        lhs.assert_in_bounds("left");
        rhs.assert_in_bounds("right");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller guarantees the validity of `dst`.
        if self.precision == Precision::Bf16
            && unsafe { super::bf16::try_matmul(self, dst, stride, lhs, rhs) }
        {
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
