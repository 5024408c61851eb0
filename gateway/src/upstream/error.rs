//! What goes wrong on a connection to a node.

use std::io;

/// Why an answer is not whole.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// It was closed before a byte of the answer.
    #[error("it closed the connection without an answer")]
    Closed,
    /// It was closed within the answer.
    #[error("it closed the connection within its answer")]
    Truncated,
    /// It broke.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What it sent is not HTTP/1.1.
    #[error("its answer is not HTTP: {0}")]
    Protocol(&'static str),
}
