//! Towards the nodes: the client, one forwarded request, and the relay of its answer.

pub mod client;
pub mod relay;
pub mod watch;
