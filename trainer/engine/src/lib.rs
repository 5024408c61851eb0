//! The tensor crate of Potstill: kernels with backward passes, one model definition for training and
//! serving, and weights from safetensors folders and GGUF files. Further parts are the KV cache, sampler,
//! tokenizer, chat template and the engine that decodes many requests in one batch.
//!
//! Architecture invariants: this crate contains no HTTP and no pipeline records, and `unsafe` appears only
//! in the kernels under [`ops`].

pub mod batch;
pub mod candle_config;
pub mod checkpoint_files;
pub mod config;
pub mod device;
pub mod error;
pub mod foreign;
pub mod gguf;
mod gguf_blocks;
pub mod gguf_files;
pub mod grammar;
pub mod init;
pub mod kv;
pub mod loader;
pub mod model;
pub mod ops;
pub mod request;
mod request_queue;
pub mod rope_scaling;
pub mod sampler;
mod schedule;
pub mod scheduler;
mod shard;
pub mod sharded;
mod step_loop;
pub mod template;
mod text_end;
pub mod tokenizer;
pub mod training;
pub mod weights;

pub use error::EngineError;
