//! Strided views of matrices, and the parameters of their product.

use super::Precision;

/// A strided view of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct MatrixView<'a> {
    pub(super) values: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a> MatrixView<'a> {
    /// Creates a row-major view without gaps.
    pub(crate) fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Creates a row-major view whose rows begin `stride` values apart.
    pub(crate) fn strided(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        Self { values, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// Returns the transposed view.
    pub(crate) fn transposed(self) -> Self {
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
    pub(super) fn assert_in_bounds(&self, what: &str) {
        let last = (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride;
        assert!(last < self.values.len(), "product: the {what} side is too small");
    }
}

/// Parameters of a matrix product.
#[derive(Clone, Copy)]
pub(crate) struct Matmul {
    /// Factor on the product.
    pub(crate) scale: f32,
    /// Whether the product is added to the destination.
    pub(crate) add: bool,
    /// Number of threads of the rayon pool.
    pub(crate) threads: usize,
    /// Rounding of both sides.
    pub(crate) precision: Precision,
}
