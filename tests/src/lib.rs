//! Test harness: mock nodes with scripted faults, a gateway in this process, and the real programs as processes.
#![forbid(unsafe_code)]
#![expect(clippy::disallowed_methods, reason = "files of a test need not outlive a crash")]
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test harness")]

pub mod canary;
pub mod cloud;
pub mod gateway;
pub mod hub;
pub mod kubernetes;
pub mod mock;
pub mod modelscope;
pub mod postgres;
pub mod programs;
pub mod raw;
pub mod started;
pub mod teacher;
