//! Actuators other than Kubernetes.

pub mod process;
pub mod webhook;
