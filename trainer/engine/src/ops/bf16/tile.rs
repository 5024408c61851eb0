//! Sizes of the tiles, and views of operands and results that the kernels share.

use super::super::matrix::MatrixView;

/// Rows per panel.
pub(super) const PANEL_ROWS: usize = 16;

/// Values of a tile along the sum.
pub(super) const TILE_DEPTH: usize = 32;

/// Values per tile.
pub(super) const TILE_VALUES: usize = PANEL_ROWS * TILE_DEPTH;

/// One side of a product: sizes and strides along the result (`outer`) and along the sum.
#[derive(Clone, Copy)]
pub(super) struct OperandView<'a> {
    pub(super) values: &'a [f32],
    pub(super) outer: usize,
    pub(super) sum: usize,
    pub(super) outer_stride: usize,
    pub(super) sum_stride: usize,
}

impl<'a> From<MatrixView<'a>> for OperandView<'a> {
    fn from(left: MatrixView<'a>) -> Self {
        Self {
            values: left.values,
            outer: left.rows,
            sum: left.columns,
            outer_stride: left.row_stride,
            sum_stride: left.column_stride,
        }
    }
}

/// A rectangle of the result as raw memory.
pub(super) struct OutputRect {
    pub(super) start: *mut f32,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
}
