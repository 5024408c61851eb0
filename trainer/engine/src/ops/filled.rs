//! Memory that a kernel writes in full: zeroed first, it would be written twice.
#![expect(unsafe_code, reason = "memory that holds nothing yet")]

use std::mem::MaybeUninit;

/// `len` values that `fill` writes.
///
/// # Safety
///
/// `fill` must write every value.
pub(super) unsafe fn filled(len: usize, fill: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    fill(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: there is room for as many, and all were written, by the caller's word.
    unsafe { values.set_len(len) };
    values
}
