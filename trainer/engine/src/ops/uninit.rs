//! Uninitialized memory for kernels that write all of their output. Zeroing first would write the memory
//! twice.
#![expect(unsafe_code, reason = "memory that holds nothing yet")]

use std::mem::MaybeUninit;

/// Returns `len` values written by `fill`.
///
/// # Safety
///
/// `fill` must write every value.
pub(super) unsafe fn fill_uninit(len: usize, fill: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    fill(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and the caller guarantees that `fill` has written all values.
    unsafe { values.set_len(len) };
    values
}
