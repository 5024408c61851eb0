//! Nodes as pods of a Deployment, a StatefulSet or a LeaderWorkerSet. Several gateways may share the pods.
//!
//! ```text
//! watch pods -> one node each, which receives requests once it is ready and healthy
//! target     -> reconcile (pure): revive, drain, mark, then patch /scale
//! ```
//!
//! No pod with requests is deleted: the pods that Kubernetes would delete first are drained on every gateway, and only then is
//! `replicas` lowered. Where KEDA sets `replicas`, the gateway publishes the same number for KEDA instead ([`keda`]).

mod actuator;
mod api_server;
mod drain_mark;
pub mod keda;
pub(crate) mod lease;
mod pod_node;
mod pods;
mod reconcile;
mod replica_history;
mod workload;

pub(crate) use self::actuator::KubernetesActuator;
