//! Chooses and keeps the number of nodes of every scaled pool.
//!
//! ```text
//! every interval, or when a request finds no node:
//!   pools + plans -> Observation -> scaling_policy::decide -> target per pool -> one actuator per pool
//! ```
//!
//! [`autoscaler`] is the control loop, [`observe`] its input, [`plans`] what runs announce, [`actuator`] what starts and stops
//! nodes.

pub mod actuator;
pub mod actuators;
pub mod autoscaler;
pub mod context;
pub mod coordination;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod observe;
pub mod plans;
mod scaled_pool;
mod start;

pub(crate) use self::autoscaler::Autoscaler;
