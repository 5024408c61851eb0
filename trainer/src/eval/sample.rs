//! Sample of an evaluation.

use potstill_verify::verifier::VerdictSource;
use serde::{Deserialize, Serialize};

/// One completion for one problem, with its verdict.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalSample {
    /// Id of the problem in its benchmark.
    pub problem: String,
    /// Index of the sample, from 0.
    pub sample: u32,
    /// Level of the problem, if its source has one.
    pub level: Option<String>,
    /// Reasoning of the model.
    pub thinking: String,
    /// Text after the reasoning.
    pub text: String,
    /// Final answer extracted from the text.
    pub answer: Option<String>,
    /// Verdict: correct, incorrect, or `None` for unverifiable.
    pub correct: Option<bool>,
    /// Method of the verdict.
    pub method: Option<VerdictSource>,
    /// Justification of the verdict.
    pub evidence: String,
    /// Number of generated tokens.
    pub tokens: u64,
    /// Whether the completion ended at the token limit.
    pub truncated: bool,
    /// Whether the endpoint returned no completion.
    pub failed: bool,
}
