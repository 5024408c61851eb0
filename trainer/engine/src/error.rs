//! The error type of the engine. Each variant tells the caller which action can fix the error.

use std::path::PathBuf;

/// Errors of the engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A file of a model folder cannot be read.
    #[error("cannot read `{path}`: {source}")]
    ReadFile {
        /// Path of the file.
        path: PathBuf,
        /// Cause reported by the operating system.
        source: std::io::Error,
    },
    /// A file of a model folder has invalid content.
    #[error("`{path}`: {problem}")]
    Malformed {
        /// Path of the file.
        path: PathBuf,
        /// The defect, with the expected content.
        problem: String,
    },
    /// The architecture has no decoder in this crate.
    #[error("`{path}`: architecture `{found}` is not supported; supported are {supported}")]
    UnsupportedArchitecture {
        /// File that names the architecture.
        path: PathBuf,
        /// Architecture named in the file.
        found: String,
        /// Supported architectures, quoted and separated by commas.
        supported: String,
    },
    /// A candle family (decoder from candle-transformers) does not support the requested use.
    #[error("a model of the family `{family}`: {problem}")]
    CandleFamily {
        /// `model_type` of the family.
        family: &'static str,
        /// Reason for the rejection.
        problem: String,
    },
    /// A tensor is missing.
    #[error("tensor `{name}` is missing; expected shape {expected:?}")]
    MissingTensor {
        /// Name of the tensor.
        name: String,
        /// Shape given by the configuration; empty when unknown.
        expected: Vec<usize>,
    },
    /// The shape of a tensor differs from the configuration.
    #[error("tensor `{name}` has shape {found:?}, but the configuration asks for {expected:?}")]
    ShapeMismatch {
        /// Name of the tensor.
        name: String,
        /// Shape given by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// Encoding or decoding of text failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A grammar of a structured output is invalid, or no token can continue the completion.
    #[error("form of the answer: {0}")]
    Grammar(String),
    /// The chat template is invalid, or rendering failed.
    #[error("chat template: {0}")]
    Template(String),
    /// Prompt plus `max_tokens` exceed the context length.
    #[error(
        "this model's maximum context length is {limit} tokens. However, you requested {requested} tokens ({prompt} in the prompt)"
    )]
    ContextTooLong {
        /// Context length in tokens.
        limit: usize,
        /// Prompt tokens plus `max_tokens`.
        requested: usize,
        /// Prompt tokens.
        prompt: usize,
    },
    /// A parameter is out of range.
    #[error("`{name}` must be {expected}, not {found}")]
    InvalidParameter {
        /// Name of the parameter.
        name: &'static str,
        /// Permitted range.
        expected: &'static str,
        /// Rejected value.
        found: String,
    },
    /// The waiting queue is full.
    #[error("{waiting} requests are waiting already; try again later")]
    QueueFull {
        /// Number of waiting requests.
        waiting: usize,
    },
    /// The step loop has ended.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
    /// A file cannot be written.
    #[error(transparent)]
    WriteFile(#[from] potstill_shared::durable::DurableError),
    /// A device cannot be used.
    #[error(
        "the device `{name}` cannot be used: {problem}; `nvidia-smi` shows the devices of the driver, and the program must be built with `--features cuda`"
    )]
    Device {
        /// Device name given by the caller.
        name: String,
        /// Message of the driver or the library.
        problem: String,
    },
    /// A tensor operation failed: a defect in the engine, or memory is exhausted.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl EngineError {
    /// Returns [`EngineError::Malformed`] for `path`.
    pub fn malformed(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Self::Malformed { path: path.into(), problem: problem.into() }
    }
}
