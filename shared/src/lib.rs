//! Code that the gateway and the trainer share: OpenAI wire types, the codec for server-sent events, and the
//! HTTP client. Also here: separation of reasoning from answer, durable files, redaction, ids and logging.
//!
//! Deliberately absent: axum, which only servers need, and candle, which only the engine and the training
//! code use.
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
