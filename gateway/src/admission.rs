//! Load shedding by the bytes of request bodies in flight.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::config::Priority;

/// Bytes of request bodies in flight.
#[derive(Debug, Default)]
pub struct InFlightBytes(AtomicUsize);

impl InFlightBytes {
    /// Returns the number of bytes.
    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts the body of a request that begins.
    pub fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Removes the body of a request that is over.
    pub fn remove(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Returns whether another `bytes` may be held: up to 80 % of `limit` for bulk requests, up to 95 % for all others.
    pub fn admits(&self, bytes: usize, class: Priority, limit: usize) -> bool {
        let percent = if class == Priority::Bulk { 80 } else { 95 };
        (self.get() + bytes) / 100 * 100 <= limit / 100 * percent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_requests_are_shed_first() {
        let held = InFlightBytes::default();
        held.add(8_000);
        assert!(held.admits(0, Priority::Bulk, 10_000) && !held.admits(100, Priority::Bulk, 10_000));
        assert!(held.admits(1_500, Priority::Default, 10_000));
        assert!(!held.admits(1_600, Priority::Interactive, 10_000));
        held.remove(8_000);
        assert_eq!(held.get(), 0);
    }
}
