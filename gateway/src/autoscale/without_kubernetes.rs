//! What stands in for the Kubernetes scaler in programs that are built without it, such as `potstill`, which embeds a gateway
//! for one machine. Configurations that ask for it are refused before anything of this is reached.

use std::sync::Arc;

use super::policy::Windows;
use super::scaler::{Scaler, Supply};
use crate::config::KubernetesConfig;
use crate::gateway::Shared;
use crate::pool::ModelPool;

/// What another gateway would say of a pool; there is none.
pub(crate) struct PoolReport {
    pub(crate) active: usize,
    pub(crate) queued: usize,
    pub(crate) arrivals: Windows,
    pub(crate) departed_60: u64,
}

/// This gateway alone.
#[derive(Default)]
pub(crate) struct Cluster;

impl Cluster {
    pub(crate) fn leads(&self) -> bool {
        true
    }

    pub(crate) fn leader(&self) -> String {
        String::new()
    }

    pub(crate) fn others(&self, _model: &str) -> Vec<PoolReport> {
        Vec::new()
    }

    pub(crate) fn take_part(self: &Arc<Self>, _shared: &Arc<Shared>) {}
}

/// No scaler.
pub(crate) struct KubernetesScaler;

impl KubernetesScaler {
    pub(crate) fn new(_pool: Arc<ModelPool>, _shared: Arc<Shared>, _config: KubernetesConfig) -> Self {
        Self
    }
}

impl Scaler for KubernetesScaler {
    async fn step(&mut self, _wanted: Option<usize>) {}

    fn supply(&mut self) -> Option<Supply> {
        None
    }

    async fn stop(&mut self) {}
}
