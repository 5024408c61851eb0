//! Actuators for local processes and for webhooks. The Kubernetes actuator is in `autoscale::kubernetes`.

pub mod process;
pub mod webhook;
