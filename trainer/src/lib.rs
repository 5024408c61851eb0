//! Library of the `potstill` program: command line, recipes, runs, evaluation, export, serving node and demonstration.
//! It joins the crates for data, training, verification and the engine.
//!
//! The trainer reaches every model over HTTP, through a gateway. [`local`] starts a gateway in this process if the
//! recipe names none.
#![forbid(unsafe_code)]

pub mod alignment;
pub mod announce;
pub mod bench;
pub mod calibrate;
pub mod card;
pub mod cli;
pub mod compress;
pub mod dataset;
pub mod demo;
pub mod distributions;
pub mod eval;
pub mod evaluate;
pub mod export;
pub mod import;
pub mod lineage;
pub mod local;
pub mod pairs;
pub mod pipeline;
pub mod progress;
pub mod quantize_report;
pub mod recipe;
pub mod report;
pub mod run;
mod run_recipe;
pub mod selection;
pub mod serve;
pub mod stage_id;
pub mod status;
pub mod students;
pub mod training_view;
pub mod variant;
