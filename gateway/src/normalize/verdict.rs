//! What becomes of one event of a stream.

/// Result of normalizing one event.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    /// The event is forwarded as it came.
    Unchanged,
    /// These events take its place, each one line of JSON.
    Changed(Vec<Vec<u8>>),
    /// The stream is complete: `[DONE]`.
    Done,
    /// The node reported an error within its stream; the event to forward.
    Error(Vec<u8>),
    /// The endpoint never sends such an event; the reason.
    Invalid(&'static str),
}
