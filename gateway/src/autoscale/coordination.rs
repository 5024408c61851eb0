//! How several gateways that share the nodes of a pool agree on who decides.

use serde::{Deserialize, Serialize};

use crate::scaling_policy::RequestCounts;

/// Demand that another gateway sees on a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeerDemand {
    /// Requests on nodes.
    pub(crate) active: usize,
    /// Requests waiting for a slot.
    pub(crate) queued: usize,
    /// Arrivals.
    pub(crate) arrivals: RequestCounts,
    /// Requests that left in the last 60 seconds.
    pub(crate) departed_60: u64,
}

impl std::ops::Add for PeerDemand {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            active: self.active + other.active,
            queued: self.queued + other.queued,
            arrivals: self.arrivals + other.arrivals,
            departed_60: self.departed_60 + other.departed_60,
        }
    }
}

/// The gateways that share a pool's nodes.
pub(crate) trait Coordinator: Send + Sync {
    /// Returns whether this gateway decides.
    fn is_leader(&self) -> bool;

    /// Name of the gateway that decides; empty before there is one.
    fn leader_name(&self) -> String;

    /// Demand that each of the other gateways reported for `model`.
    fn peer_demand(&self, model: &str) -> Vec<PeerDemand>;
}

/// A gateway that shares its nodes with no other.
pub(crate) struct SingleGateway;

impl Coordinator for SingleGateway {
    fn is_leader(&self) -> bool {
        true
    }

    fn leader_name(&self) -> String {
        String::new()
    }

    fn peer_demand(&self, _model: &str) -> Vec<PeerDemand> {
        Vec::new()
    }
}
