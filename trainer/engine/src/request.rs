//! Requests to the engine and the updates that the engine sends back.

use crate::grammar::GrammarMatcher;
use crate::sampler::SamplingParams;

/// Kind of result that a request asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OutputKind {
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
pub struct ThinkingBudget {
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
    pub output: OutputKind,
    /// Maximum number of completion tokens. 0 is valid for an embedding or for prompt logprobs only.
    pub max_tokens: usize,
    /// Sampling parameters.
    pub sampling: SamplingParams,
    /// Stop strings. The completion ends before the first one.
    pub stop_strings: Vec<String>,
    /// Continues after end tokens until `max_tokens`.
    pub ignore_eos: bool,
    /// Number of most likely alternatives to report per completion token; `None` reports no logprobs.
    pub logprobs: Option<usize>,
    /// Number of alternatives to report per prompt token, from the second token on; `None` reports no
    /// prompt logprobs.
    pub prompt_logprobs: Option<usize>,
    /// Token budget of the reasoning.
    pub thinking_budget: Option<ThinkingBudget>,
    /// Structured output: a compiled grammar for the completion.
    pub grammar: Option<GrammarMatcher>,
    /// Token ids after which `constraint` applies: the end of the reasoning. If empty, the grammar applies
    /// from the first token.
    pub grammar_start_tokens: Vec<u32>,
}

/// A token with its logprobs under the model's own distribution, before penalties, temperature, filters and
/// grammar.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
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
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Updates that the engine sends for a request, in order. The last one is `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum RequestUpdate {
    /// Logprobs of a prompt token given the tokens before, from the second token on.
    Prompt(TokenLogprobs),
    /// Logprobs of a completion token, sent only if the request sets `log_probs`. The text follows in this
    /// or a later `Text`.
    Sampled(TokenLogprobs),
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
