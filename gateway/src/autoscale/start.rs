//! Starts the actuator that a pool's configuration names.

use std::sync::Arc;

use super::actuator::{ActuatorHandle, NodeSupply, run_actuator};
use super::actuators::process::ProcessActuator;
use super::actuators::webhook::WebhookActuator;
use super::context::AutoscaleContext;
use super::coordination::SingleGateway;
#[cfg(feature = "kubernetes")]
use super::kubernetes::{KubernetesActuator, lease::LeaseCoordinator};
use crate::pool::ModelPool;

/// Starts and hands out actuators.
pub(super) struct ActuatorStarter {
    context: Arc<AutoscaleContext>,
    /// The gateways of this cluster.
    #[cfg(feature = "kubernetes")]
    pub(super) cluster: Arc<LeaseCoordinator>,
}

impl ActuatorStarter {
    pub(super) fn new(context: Arc<AutoscaleContext>) -> Self {
        Self {
            context,
            #[cfg(feature = "kubernetes")]
            cluster: Arc::default(),
        }
    }

    /// Starts the actuator of `pool` in a task of its own. `None` if the pool is not scaled.
    pub(super) fn start(&self, pool: &Arc<ModelPool>) -> Option<ActuatorHandle> {
        let scale = pool.config().scale.clone()?;
        let (context, pool) = (&self.context, Arc::clone(pool));
        if let Some(process) = scale.process {
            let (handle, link) =
                ActuatorHandle::new(Arc::new(SingleGateway), Some(NodeSupply::default()), false);
            let actuator = ProcessActuator::new(
                Arc::clone(&pool),
                context.connector.clone(),
                Arc::clone(&context.metrics),
                process,
            );
            context.tasks.spawn(run_actuator(actuator, pool, link));
            return Some(handle);
        }
        if let Some(webhook) = scale.webhook {
            let (handle, link) =
                ActuatorHandle::new(Arc::new(SingleGateway), Some(NodeSupply::default()), false);
            let actuator = WebhookActuator::new(
                Arc::clone(&pool),
                context.connector.clone(),
                Arc::clone(&context.metrics),
                &webhook,
            );
            match actuator {
                Ok(actuator) => drop(context.tasks.spawn(run_actuator(actuator, pool, link))),
                Err(problem) => tracing::error!(model = &*pool.model, problem, "the pool cannot be scaled"),
            }
            return Some(handle);
        }
        #[cfg(feature = "kubernetes")]
        if let Some(kubernetes) = scale.kubernetes {
            // Pods may exist already, so the supply is unknown at first.
            let (handle, link) = ActuatorHandle::new(Arc::clone(&self.cluster) as _, None, true);
            self.cluster.join(context);
            let actuator = KubernetesActuator::new(
                Arc::clone(&pool),
                Arc::clone(context),
                Arc::clone(&self.cluster),
                kubernetes,
            );
            context.tasks.spawn(run_actuator(actuator, pool, link));
            return Some(handle);
        }
        None
    }
}
