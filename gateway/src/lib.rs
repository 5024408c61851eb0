//! The gateway: an OpenAI-compatible server in front of pools of inference nodes. It routes requests by `model`, admits
//! and queues them, and chooses a node by expected time. It relays streams without buffering, checks the health of
//! nodes, and starts and stops nodes by demand.
//!
//! Start reading at [`proxy::handler`], which shows all steps of a request. Out of scope: tensors, and any dependency
//! on the trainer.
#![forbid(unsafe_code)]

pub mod admission;
pub mod api;
pub mod app;
pub mod auth;
pub mod autoscale;
pub mod config;
pub mod error;
mod hash;
pub mod normalize;
pub mod pool;
pub mod proxy;
pub mod scaling_policy;
pub mod server;
pub mod telemetry;
mod time;
pub mod upstream;

pub use app::gateway::{BuildError, Gateway};
pub use server::tls::certificates;
