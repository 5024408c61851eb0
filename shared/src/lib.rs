//! What both halves of Potstill use: OpenAI wire types, the SSE codec, the HTTP client with its deadlines, the
//! split of thinking from answer, durable files, redaction, content identities and log set-up.
//!
//! Deliberately absent: axum (only servers need it) and candle (only engine and learn may touch tensors).
#![forbid(unsafe_code)]

pub mod client;
pub mod durable;
pub mod id;
pub mod openai;
pub mod reasoning;
pub mod redact;
pub mod repetition;
pub mod sse;
pub mod telemetry;
