//! Requests to the engine and the updates that the engine sends back.

use crate::grammar::Constraint;
use crate::sampler::Sampling;

/// Kind of result that a request asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Goal {
    /// A completion.
    #[default]
    Complete,
    /// An embedding of the prompt, scaled to Euclidean length 1.
    Embed(Pooling),
}

/// Hidden states from which an embedding is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The hidden state of the last token.
    Last,
    /// The mean over all tokens.
    Mean,
}

/// Token budget for the reasoning of a completion.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThinkingLimit {
    /// Maximum number of completion tokens before the engine closes the reasoning.
    pub tokens: usize,
    /// Token ids that the engine forces at the limit to close the reasoning.
    pub ending: Vec<u32>,
    /// Token ids with which the model closes the reasoning by itself. The budget has no effect afterwards.
    pub mark: Vec<u32>,
}

/// One prompt with the parameters of its completion, embedding or scoring.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// Kind of result.
    pub goal: Goal,
    /// Maximum number of completion tokens. 0 is valid for an embedding or for prompt logprobs only.
    pub max_tokens: usize,
    /// Sampling parameters.
    pub sampling: Sampling,
    /// Stop strings. The completion ends before the first one.
    pub stop: Vec<String>,
    /// Continues after end tokens until `max_tokens`.
    pub ignore_end: bool,
    /// Number of most likely alternatives to report per completion token; `None` reports no logprobs.
    pub log_probs: Option<usize>,
    /// Number of alternatives to report per prompt token, from the second token on; `None` reports no
    /// prompt logprobs.
    pub prompt_log_probs: Option<usize>,
    /// Token budget of the reasoning.
    pub thinking: Option<ThinkingLimit>,
    /// Structured output: a compiled grammar for the completion.
    pub constraint: Option<Constraint>,
    /// Token ids after which `constraint` applies: the end of the reasoning. If empty, the grammar applies
    /// from the first token.
    pub free_until: Vec<u32>,
}

/// A token with its logprobs under the model's own distribution, before penalties, temperature, filters and
/// grammar.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of the token's probability.
    pub log_prob: f32,
    /// Most likely tokens with their logprobs, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Reason for the end of a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The completion reached an end token, a stop string or the end of its grammar.
    Stop,
    /// The completion reached `max_tokens`.
    Length,
}

impl FinishReason {
    /// Returns the value of OpenAI's `finish_reason`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Updates that the engine sends for a request, in order. The last one is `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// Logprobs of a prompt token given the tokens before, from the second token on.
    Prompt(Sampled),
    /// Logprobs of a completion token, sent only if the request sets `log_probs`. The text follows in this
    /// or a later `Text`.
    Sampled(Sampled),
    /// A piece of the completion's text.
    Text(String),
    /// The embedding, one value per hidden dimension.
    Embedding(Vec<f32>),
    /// The request is complete.
    Finished {
        /// Reason for the end.
        reason: FinishReason,
        /// Number of completion tokens, including the end token.
        completion_tokens: usize,
        /// Number of prompt tokens that came from the prefix cache.
        cached_tokens: usize,
    },
    /// The request failed; the completion is truncated. Holds the error message.
    Failed(String),
}
