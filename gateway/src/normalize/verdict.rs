//! Result of normalizing one event of a stream.

/// Result of normalizing one event.
#[derive(Debug, PartialEq)]
pub enum NormalizedEvent {
    /// The event is forwarded unchanged.
    Unchanged,
    /// Events that replace the event, each one line of JSON.
    Changed(Vec<Vec<u8>>),
    /// The stream is complete: `[DONE]`.
    Done,
    /// The node reported an error within its stream; with the event to forward.
    Error(Vec<u8>),
    /// The endpoint never sends such an event; with a description.
    Invalid(&'static str),
}
