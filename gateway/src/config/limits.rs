//! Bounds on clients: connections, heads, bodies, bytes in flight.

use serde::{Deserialize, Serialize};

/// Bounds on connections and requests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections.
    pub connections: usize,
    /// Open connections of one address.
    pub connections_per_address: usize,
    /// Until the first byte of a connection.
    pub first_byte_ms: u64,
    /// Until a request head is whole once its first byte came, and between requests of a connection.
    pub head_ms: u64,
    /// Between two pieces of a request body.
    pub body_idle_ms: u64,
    /// A body slower than 1 KiB/s is given up after so long.
    pub body_slow_ms: u64,
    /// A client that takes nothing of its answer for so long is given up.
    pub write_idle_ms: u64,
    /// Largest request body.
    pub body_bytes: usize,
    /// Bytes of request and answer bodies held at once: above 80 % bulk requests are refused, above 95 % all are.
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
