//! The bf16 kernel for AMX: 32 x 32 sums in four tile registers, with two left and two right tiles in the
//! others.

use super::tile::{OutputRect, PANEL_ROWS, TILE_VALUES};
use crate::ops::amx::{TILE_ROW_BYTES, TILE_ROWS, TileRegisters, tile};

/// Sums of one tile at the edge of the result.
#[repr(C, align(64))]
struct TileSums([f32; PANEL_ROWS * PANEL_ROWS]);

/// Computes all products of the left panels with the right panels.
///
/// # Safety
///
/// The CPU must have AMX-BF16, and the process the permission to use tiles. `part` must lie within a matrix
/// that no other thread accesses. Panels must hold whole tiles.
pub(super) unsafe fn multiply_panels(
    part: &OutputRect,
    left: &[u16],
    right: &[u16],
    panel: usize,
    add: bool,
) {
    // SAFETY: the caller guarantees CPU features and permission.
    let _tiles = unsafe { TileRegisters::configure([(TILE_ROWS, TILE_ROW_BYTES); 8]) };
    let tiles = panel / TILE_VALUES;
    let right_panels = part.columns.div_ceil(PANEL_ROWS);
    let left_panels = part.rows.div_ceil(PANEL_ROWS);
    assert!(left.len() >= left_panels * panel && right.len() >= right_panels * panel);
    for r in (0..right_panels).step_by(2) {
        for l in (0..left_panels).step_by(2) {
            let (a, b) = (&left[l * panel..], &right[r * panel..]);
            let (two_left, two_right) = (l + 1 < left_panels, r + 1 < right_panels);
            let place = TilePosition { part, row: l * PANEL_ROWS, column: r * PANEL_ROWS, add };
            // SAFETY: the assertion above guarantees that each panel holds `tiles` tiles.
            unsafe {
                match (two_left, two_right) {
                    (true, true) => multiply_two_by_two(&place, tiles, a, &a[panel..], b, &b[panel..]),
                    (true, false) => multiply_two_by_one(&place, tiles, a, &a[panel..], b),
                    (false, true) => {
                        multiply_one_by_one(&place, tiles, a, b);
                        multiply_one_by_one(
                            &TilePosition { column: place.column + PANEL_ROWS, ..place },
                            tiles,
                            a,
                            &b[panel..],
                        );
                    }
                    (false, false) => multiply_one_by_one(&place, tiles, a, b),
                }
            }
        }
    }
}

/// Position of up to four tiles of sums in the result.
#[derive(Clone, Copy)]
struct TilePosition<'a> {
    part: &'a OutputRect,
    row: usize,
    column: usize,
    add: bool,
}

/// Loads a tile register with the result, or with zeros.
macro_rules! start {
    ($corner:expr, $t:literal, $down:expr, $right:expr) => {
        match $corner.interior_tile($down, $right) {
            Some(at) if $corner.add => tile!(load $t, at, $corner.part.stride * 4),
            _ => tile!(zero $t),
        }
    };
}

/// Stores a tile register to the result.
macro_rules! finish {
    ($corner:expr, $t:literal, $down:expr, $right:expr) => {
        match $corner.interior_tile($down, $right) {
            Some(at) => tile!(store $t, at, $corner.part.stride * 4),
            None => {
                let mut sums = TileSums([0.0; PANEL_ROWS * PANEL_ROWS]);
                tile!(store $t, sums.0.as_mut_ptr(), TILE_ROW_BYTES);
                $corner.part.store_tile($corner.row + $down, $corner.column + $right, &sums.0, $corner.add);
            }
        }
    };
}

impl TilePosition<'_> {
    /// Returns the address of a tile that lies completely within the result.
    #[inline(always)]
    fn interior_tile(&self, down: usize, right: usize) -> Option<*mut f32> {
        let (row, column) = (self.row + down, self.column + right);
        let whole = row + PANEL_ROWS <= self.part.rows && column + PANEL_ROWS <= self.part.columns;
        whole.then(|| self.part.start.wrapping_add(row * self.part.stride + column))
    }
}

/// Multiplies two left panels with two right panels.
unsafe fn multiply_two_by_two(
    corner: &TilePosition<'_>,
    tiles: usize,
    a0: &[u16],
    a1: &[u16],
    b0: &[u16],
    b1: &[u16],
) {
    // SAFETY: each panel holds `tiles` tiles of 16 rows of 64 bytes, and `whole` or `put` bound the stores.
    unsafe {
        start!(corner, 0, 0, 0);
        start!(corner, 1, 0, PANEL_ROWS);
        start!(corner, 2, PANEL_ROWS, 0);
        start!(corner, 3, PANEL_ROWS, PANEL_ROWS);
        for at in (0..tiles * TILE_VALUES).step_by(TILE_VALUES) {
            tile!(load 4, a0.as_ptr().add(at), TILE_ROW_BYTES);
            tile!(load 6, b0.as_ptr().add(at), TILE_ROW_BYTES);
            tile!(dpbf16 0, 4, 6);
            tile!(load 7, b1.as_ptr().add(at), TILE_ROW_BYTES);
            tile!(dpbf16 1, 4, 7);
            tile!(load 5, a1.as_ptr().add(at), TILE_ROW_BYTES);
            tile!(dpbf16 2, 5, 6);
            tile!(dpbf16 3, 5, 7);
        }
        finish!(corner, 0, 0, 0);
        finish!(corner, 1, 0, PANEL_ROWS);
        finish!(corner, 2, PANEL_ROWS, 0);
        finish!(corner, 3, PANEL_ROWS, PANEL_ROWS);
    }
}

/// Multiplies two left panels with one right panel.
unsafe fn multiply_two_by_one(corner: &TilePosition<'_>, tiles: usize, a0: &[u16], a1: &[u16], b: &[u16]) {
    // SAFETY: as in `square`.
    unsafe {
        start!(corner, 0, 0, 0);
        start!(corner, 2, PANEL_ROWS, 0);
        for at in (0..tiles * TILE_VALUES).step_by(TILE_VALUES) {
            tile!(load 4, a0.as_ptr().add(at), TILE_ROW_BYTES);
            tile!(load 6, b.as_ptr().add(at), TILE_ROW_BYTES);
            tile!(dpbf16 0, 4, 6);
            tile!(load 5, a1.as_ptr().add(at), TILE_ROW_BYTES);
            tile!(dpbf16 2, 5, 6);
        }
        finish!(corner, 0, 0, 0);
        finish!(corner, 2, PANEL_ROWS, 0);
    }
}

/// Multiplies one left panel with one right panel.
unsafe fn multiply_one_by_one(corner: &TilePosition<'_>, tiles: usize, a: &[u16], b: &[u16]) {
    // SAFETY: as in `square`.
    unsafe {
        start!(corner, 0, 0, 0);
        for at in (0..tiles * TILE_VALUES).step_by(TILE_VALUES) {
            tile!(load 4, a.as_ptr().add(at), TILE_ROW_BYTES);
            tile!(load 6, b.as_ptr().add(at), TILE_ROW_BYTES);
            tile!(dpbf16 0, 4, 6);
        }
        finish!(corner, 0, 0, 0);
    }
}
