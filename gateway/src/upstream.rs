//! HTTP/1.1 client for upstream nodes: addresses, connections, and exchanges of a request and a response. Transport
//! only: this module depends neither on pools nor on OpenAI's API.

pub mod address;
pub mod connect;
pub mod connection;
pub mod endpoint;
pub mod error;
pub mod exchange;
pub mod framing;
pub mod idle_connections;
pub mod read_body;
pub mod request;
pub mod response_head;
pub mod target;
