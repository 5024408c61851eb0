//! CoT processors: teachers write, grade, rewrite, judge and score chains of thought. Records stream from stage to stage;
//! every call goes through the journal, so a run that is started again asks nothing twice.
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

pub use executor::{Outcome, Stage, StageError};
