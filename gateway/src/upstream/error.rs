//! Errors on a connection to a node.

use std::io;

/// The reason why a response is not complete.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The node closed the connection before the first byte of its response.
    #[error("it closed the connection without an answer")]
    Closed,
    /// The node closed the connection within its response.
    #[error("it closed the connection within its answer")]
    Truncated,
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The response is not valid HTTP/1.1.
    #[error("its answer is not HTTP: {0}")]
    InvalidResponse(&'static str),
}
