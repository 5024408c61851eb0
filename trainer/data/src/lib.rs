//! Records of a distillation run and what is done with them without a model: reading sources, journalling calls,
//! removing duplicates and test problems, choosing what a given student can learn.
//!
//! Deliberately absent: tensors, servers, teachers.
#![forbid(unsafe_code)]

pub mod arithmetic;
pub mod columns;
pub mod decontaminate;
pub mod dedup;
pub mod formats;
pub mod hub;
pub mod journal;
pub mod jsonl;
pub mod modelscope;
pub mod near;
pub mod postgres;
pub mod records;
pub mod rows;
pub mod sampler;
pub mod spool;
pub mod store;
pub mod tasks;
