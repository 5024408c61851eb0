//! Sizes of blocks, groups and tiles.

/// Weights per block, which share a scale.
pub const BLOCK_WEIGHTS: usize = 32;

/// Rows side by side in a group.
pub(super) const GROUP_ROWS: usize = 16;

/// Maximum number of activation rows per kernel call.
pub(super) const TILE_ROWS: usize = 16;

/// Minimum number of activation rows for AMX; fewer rows use AVX-512.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) const MIN_AMX_ROWS: usize = 6;
