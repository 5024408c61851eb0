//! The gateway: an OpenAI-compatible front door for pools of inference nodes. It routes by `model`, admits, balances by
//! outstanding tokens, relays streams without buffering them, watches its nodes, and starts and stops local nodes with
//! the demand.
//!
//! Read [`stack`] first: the whole way of a request on one screen. Deliberately absent: tensors, and any dependency on
//! the trainer half.
#![forbid(unsafe_code)]

mod admin;
pub mod api;
mod attempt;
pub mod autoscale;
pub mod balance;
pub mod config;
pub mod error;
mod gateway;
pub mod keys;
pub mod pool;
pub mod record;
pub mod server;
pub mod stack;
pub mod telemetry;
pub mod upstream;

pub use gateway::{BuildError, Gateway};
pub use server::tls::certificates;
