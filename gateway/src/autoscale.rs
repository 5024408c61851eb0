//! The right number of nodes for the demand: a pure policy, and the hand that applies it to local processes.

pub mod policy;
pub mod process;
