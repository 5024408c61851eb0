//! Builds the gateway out of its parts and runs it. Only this module knows the whole state.

pub mod admin;
pub mod autoscale_stdio;
mod builtin_endpoints;
pub mod gateway;
mod state;
