//! The engine's one error type; variants say what the caller can do.

use std::path::PathBuf;

/// What can go wrong in the engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A file of a model folder cannot be read.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file of a model folder does not hold what it should.
    #[error("`{path}`: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        problem: String,
    },
    /// The architecture has no definition here.
    #[error("`{path}`: architecture `{found}` is not supported; supported are {supported}")]
    UnknownArchitecture {
        /// Where it was named.
        path: PathBuf,
        /// The name found.
        found: String,
        /// The names we know.
        supported: String,
    },
    /// A model of a family that only candle-transformers defines cannot be built, or not for this.
    #[error("a model of the family `{family}`: {problem}")]
    Foreign {
        /// `model_type` of the family.
        family: &'static str,
        /// Why not.
        problem: String,
    },
    /// A tensor is missing.
    #[error("tensor `{name}` is missing; expected shape {expected:?}")]
    MissingTensor {
        /// Its name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor `{name}` has shape {found:?}, but the configuration asks for {expected:?}")]
    WrongShape {
        /// Its name.
        name: String,
        /// What the configuration asks for.
        expected: Vec<usize>,
        /// What the file holds.
        found: Vec<usize>,
    },
    /// Text could not be turned into tokens or back.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The form of an answer is none, or cannot be followed.
    #[error("form of the answer: {0}")]
    Grammar(String),
    /// The chat template failed.
    #[error("chat template: {0}")]
    Template(String),
    /// Prompt plus limit do not fit the model.
    #[error(
        "this model's maximum context length is {limit} tokens. However, you requested {requested} tokens ({prompt} in the prompt)"
    )]
    ContextTooLong {
        /// The model's limit.
        limit: usize,
        /// Prompt plus new tokens.
        requested: usize,
        /// The prompt alone.
        prompt: usize,
    },
    /// A sampling parameter is out of range.
    #[error("`{name}` must be {expected}, not {found}")]
    Parameter {
        /// Field of the request.
        name: &'static str,
        /// Its range.
        expected: &'static str,
        /// The value.
        found: String,
    },
    /// Too many requests wait already.
    #[error("{waiting} requests are waiting already; try again later")]
    Busy {
        /// How many wait.
        waiting: usize,
    },
    /// The step loop has ended.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
    /// A file could not be written.
    #[error(transparent)]
    Durable(#[from] potstill_shared::durable::DurableError),
    /// A device cannot be used.
    #[error(
        "the device `{name}` cannot be used: {problem}; `nvidia-smi` shows the devices of the driver, and the program must be built with `--features cuda`"
    )]
    Device {
        /// As it was asked for.
        name: String,
        /// What the driver or the library says.
        problem: String,
    },
    /// A tensor operation failed: a defect, or no memory.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl EngineError {
    /// A malformed file.
    pub fn malformed(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Self::Malformed { path: path.into(), problem: problem.into() }
    }
}
