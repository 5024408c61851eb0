//! Training over the engine's one model definition: supervised fine-tuning with a curriculum, preferences (DPO), reward
//! models, GRPO, distillation of distributions; AdamW, LoRA, schedules, checkpoints that resume bit for bit.
//!
//! Each algorithm is a function in one file, read from top to bottom. Deliberately absent: a Trainer class, HTTP, and
//! any knowledge of where the examples came from.
#![forbid(unsafe_code)]

pub mod adamw;
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
pub mod schedule;
pub mod sft;
pub mod tensorboard;

pub use error::LearnError;
