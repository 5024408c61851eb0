//! The crate's one error type.

use std::path::PathBuf;

/// What can stop a training run.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// The data cannot be trained on; nothing was changed.
    #[error("{0}")]
    Data(String),
    /// A trainable tensor got no gradient: a defect of the model definition.
    #[error("tensor `{0}` got no gradient")]
    NoGradient(String),
    /// The loss or the gradient is not a number; the last checkpoint is kept.
    #[error(
        "step {step} of phase `{phase}`: {what} is not finite; the last checkpoint is kept, try a lower learning rate"
    )]
    NotFinite {
        /// Which phase.
        phase: String,
        /// Which step of it.
        step: usize,
        /// Loss or gradient.
        what: &'static str,
    },
    /// Most completions do not end within the limit: their rewards say nothing.
    #[error(
        "{:.0} % of the completions of the last ten steps were cut off at {limit} tokens; the last checkpoint is kept, \
         raise `max_tokens`, or `max_truncated` to go on all the same", share * 100.0
    )]
    Truncated {
        /// Share of them.
        share: f64,
        /// The limit.
        limit: usize,
    },
    /// A teacher behind an endpoint did not say what it would have written.
    #[error("asking the teacher: {0}")]
    Teacher(String),
    /// The engine that writes completions failed.
    #[error("writing completions: {0}")]
    Rollout(String),
    /// The newest checkpoint belongs to other data or settings.
    #[error("`{path}` belongs to other data or settings; remove it, or choose another output folder")]
    OtherRun {
        /// The folder.
        path: PathBuf,
    },
    /// A checkpoint cannot be used.
    #[error("checkpoint `{path}`: {problem}")]
    Checkpoint {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The run was asked to stop; its last step is saved.
    #[error("stopped after step {step} of phase `{phase}`; the same command goes on from there")]
    Stopped {
        /// Which phase.
        phase: String,
        /// Which step of it.
        step: usize,
    },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] potstill_engine::EngineError),
    /// A file could not be written.
    #[error(transparent)]
    Durable(#[from] potstill_shared::durable::DurableError),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}
