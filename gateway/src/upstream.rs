//! The side towards the nodes: addresses, connections, sending, and the way of an answer back.

pub mod address;
pub mod connect;
pub mod connection;
pub mod events;
pub mod fault;
pub mod framing;
pub mod head;
pub mod idle;
pub mod mend;
pub mod relay;
pub mod send;
pub mod whole;
