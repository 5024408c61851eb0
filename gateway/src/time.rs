//! Durations from configured numbers.

use std::time::Duration;

/// Converts milliseconds to a [`Duration`].
pub(crate) fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}
