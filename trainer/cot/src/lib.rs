//! Processors for chain-of-thought data: teachers write, grade, rewrite, judge and score traces. Records stream from
//! stage to stage. Every request goes through the journal, so a resumed run repeats no finished request.
//!
//! Teachers are reached over HTTP only. Deliberately absent: tensors, servers, files other than the journal.
#![forbid(unsafe_code)]

pub mod classify;
pub mod difficulty;
pub mod executor;
pub mod gate;
pub mod generate;
pub mod ledger;
pub mod prompts;
pub mod rewrite;
pub mod rv_cd;
pub mod teacher;
pub mod verify;

pub use executor::{Stage, StageError, StageOutcome};
