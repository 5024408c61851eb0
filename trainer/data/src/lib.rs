//! Data side of a distillation run: sources, the journal of completions, deduplication, decontamination, and the
//! sampling of traces for a student of a given size.
//!
//! No code in this crate calls a model. Deliberately absent: tensors, servers, teachers.
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
mod remote;
pub mod rows;
pub mod sampler;
pub mod spool;
pub mod store;
pub mod tasks;
