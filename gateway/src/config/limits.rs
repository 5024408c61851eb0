//! Bounds on clients: connections, request heads, request bodies and bytes in flight.

use serde::{Deserialize, Serialize};

/// Bounds on connections and requests of clients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Largest number of open connections; default 20,000.
    pub connections: usize,
    /// Largest number of open connections per client address; default 1,000,000.
    pub connections_per_address: usize,
    /// Milliseconds from the start of a connection to its first byte; default 60,000.
    pub first_byte_ms: u64,
    /// Milliseconds from the first byte of a request head to its end, and between two requests of a connection; default
    /// 65,000.
    pub head_ms: u64,
    /// Milliseconds between two frames of a request body; default 30,000.
    pub body_idle_ms: u64,
    /// Milliseconds after which a request body with an average rate below 1 KiB/s is rejected; default 30,000.
    pub body_slow_ms: u64,
    /// Milliseconds without progress in writing to a client after which the connection is closed; default 120,000.
    pub write_idle_ms: u64,
    /// Largest request body in bytes; default 32 MiB.
    pub body_bytes: usize,
    /// Bytes of request bodies in flight at which load shedding begins; default 1 GiB. Bulk requests are rejected above
    /// 80 % of this value, all others above 95 %.
    pub in_flight_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            connections_per_address: 1_000_000,
            first_byte_ms: 60_000,
            head_ms: 65_000,
            body_idle_ms: 30_000,
            body_slow_ms: 30_000,
            write_idle_ms: 120_000,
            body_bytes: 32 << 20,
            in_flight_bytes: 1 << 30,
        }
    }
}

impl Limits {
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.connections == 0 || self.connections_per_address == 0 {
            problems.push("`connections` and `connections_per_address` must be at least 1".to_owned());
        }
        if self.in_flight_bytes < self.body_bytes {
            problems.push("`in_flight_bytes` must not be smaller than `body_bytes`".to_owned());
        }
        problems
    }
}
