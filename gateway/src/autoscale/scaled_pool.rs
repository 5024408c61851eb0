//! A pool with its actuator.

use std::sync::Arc;

use super::actuator::ActuatorHandle;
use crate::pool::ModelPool;

/// A scaled pool.
pub(crate) struct ScaledPool {
    pub(crate) pool: Arc<ModelPool>,
    pub(crate) actuator: ActuatorHandle,
    /// Number of nodes that was requested last.
    pub(crate) last_target: usize,
    /// Node-hours times cost per hour so far.
    pub(crate) cost: f64,
}
