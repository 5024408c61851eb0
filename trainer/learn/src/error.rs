//! The error type of this crate. One enum covers every algorithm, because all of them run the same training loop.

use std::path::PathBuf;

/// Reasons why a training run ends early or does not start.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// The data or settings cannot be used for training; no weight was changed. Holds the message.
    #[error("{0}")]
    Data(String),
    /// A trainable tensor has no gradient after the backward pass, which is a defect of the model definition. Holds the
    /// tensor's name.
    #[error("tensor `{0}` got no gradient")]
    NoGradient(String),
    /// The loss or the gradient norm is NaN or infinite. The last checkpoint is kept.
    #[error(
        "step {step} of phase `{phase}`: {what} is not finite; the last checkpoint is kept, try a lower learning rate"
    )]
    NotFinite {
        /// Name of the phase.
        phase: String,
        /// Index of the step within the phase, from 0.
        step: usize,
        /// The value that is not finite: `the loss` or `the gradient`.
        what: &'static str,
    },
    /// GRPO: too many completions were cut off at the token limit, so their rewards carry no information.
    #[error(
        "{:.0} % of the completions of the last ten steps were cut off at {limit} tokens; the last checkpoint is kept, \
         raise `max_tokens`, or `max_truncated` to go on all the same", share * 100.0
    )]
    Truncated {
        /// Mean fraction of truncated completions over the last ten steps, 0 to 1.
        share: f64,
        /// Limit on new tokens per completion.
        limit: usize,
    },
    /// A remote teacher did not return its token distributions. Holds the message.
    #[error("asking the teacher: {0}")]
    Teacher(String),
    /// The engine that samples completions failed. Holds the message.
    #[error("writing completions: {0}")]
    Rollout(String),
    /// The newest checkpoint was written by a run with other data, settings or base model.
    #[error("`{path}` belongs to other data or settings; remove it, or choose another output folder")]
    RunMismatch {
        /// Folder of the checkpoint.
        path: PathBuf,
    },
    /// A checkpoint cannot be read or lacks a tensor.
    #[error("checkpoint `{path}`: {problem}")]
    Checkpoint {
        /// Folder of the checkpoint.
        path: PathBuf,
        /// Description of the defect.
        problem: String,
    },
    /// The observer stopped the run. The last step is saved, and the same call resumes after it.
    #[error("stopped after step {step} of phase `{phase}`; the same command goes on from there")]
    Stopped {
        /// Name of the phase.
        phase: String,
        /// Steps done in the phase.
        step: usize,
    },
    /// The engine returned an error.
    #[error(transparent)]
    Engine(#[from] potstill_engine::EngineError),
    /// A file or folder could not be written durably.
    #[error(transparent)]
    Durable(#[from] potstill_shared::durable::DurableError),
    /// A tensor operation of candle failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}
