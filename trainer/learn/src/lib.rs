//! Training algorithms over the model definition of `potstill-engine`.
//!
//! Algorithms: SFT with a curriculum, DPO, reward models, GRPO and logit distillation. Shared parts: the training loop,
//! AdamW, LoRA, learning rate schedule, and checkpoints that resume bit for bit.
//!
//! Each algorithm is one function in one file. Deliberately absent: a `Trainer` class, HTTP, and knowledge of where
//! examples come from.
#![forbid(unsafe_code)]

pub mod adamw;
pub mod adamw_config;
pub mod checkpoint;
pub mod curriculum;
pub mod divergence;
pub mod dpo;
mod eight_bits;
pub mod error;
pub mod examples;
pub mod grpo;
pub mod kd;
pub mod learner;
pub mod lora;
pub mod packing;
pub mod reward_model;
pub mod rewards;
pub mod rollouts;
pub mod run;
pub mod run_config;
pub mod schedule;
pub mod sft;
mod step_constants;
pub mod tensorboard;

pub use error::LearnError;
