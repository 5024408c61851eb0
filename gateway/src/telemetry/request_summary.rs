//! What is reported about a request when it is over.

use std::time::Duration;

use potstill_shared::openai::Usage;
use tokio::time::Instant;

/// How a request ended; the value of the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The client received the whole response.
    Complete,
    /// The node broke off within the response.
    Truncated,
    /// The gateway or the node rejected the request.
    Rejected,
    /// The client disconnected before the end.
    ClientDisconnected,
}

impl Outcome {
    /// Returns the label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Truncated => "truncated",
            Self::Rejected => "rejected",
            Self::ClientDisconnected => "client_disconnected",
        }
    }
}

/// What a request waits for; the value of the label `phase`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A slot on a node.
    Queue,
    /// The response head, or a response that is not streamed.
    Head,
    /// The rest of a stream.
    Stream,
}

impl Phase {
    /// Returns the label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Head => "head",
            Self::Stream => "stream",
        }
    }
}

/// A finished request. Holds no prompt, no completion and no key.
#[derive(Debug, Clone)]
pub struct RequestSummary<'a> {
    /// Id of the request.
    pub request_id: &'a str,
    /// Name of the key.
    pub key: &'a str,
    /// Stage of the distillation run, if the client named one.
    pub stage: Option<&'a str>,
    /// Model that the client asked for.
    pub requested_model: &'a str,
    /// Model of the pool that served the request.
    pub served_model: &'a str,
    /// Node of the last attempt.
    pub node: Option<&'a str>,
    /// The client's `traceparent` header (W3C Trace Context).
    pub traceparent: Option<&'a str>,
    /// HTTP status of the response.
    pub status: u16,
    /// How the request ended.
    pub outcome: Outcome,
    /// What the request waited for when it ended.
    pub phase: Phase,
    /// Attempts on nodes.
    pub attempts: u32,
    /// Arrival of the request.
    pub started: Instant,
    /// Time from arrival to the end of the response.
    pub duration: Duration,
    /// Time from arrival to the first piece of the response.
    pub time_to_first_token: Option<Duration>,
    /// Time spent waiting for slots.
    pub queue_time: Duration,
    /// Tokens, as reported by the node.
    pub usage: Usage,
    /// Price of the tokens, in the currency of the pool's prices.
    pub cost: f64,
}
