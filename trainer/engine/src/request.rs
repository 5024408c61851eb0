//! What is asked of the engine, and what comes back.

use crate::grammar::Constraint;
use crate::sampler::Sampling;

/// What a request wants to know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Goal {
    /// A completion.
    #[default]
    Complete,
    /// The last hidden state of the prompt, or the mean of all, of length 1.
    Embed(Pooling),
}

/// Which hidden states an embedding is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// That of the last token.
    Last,
    /// The mean over all tokens.
    Mean,
}

/// When thinking has to end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThinkingLimit {
    /// Most tokens before the end of the thinking.
    pub tokens: usize,
    /// What is written then, whatever the model would write.
    pub ending: Vec<u32>,
    /// The tokens that end the thinking, as the model writes them.
    pub mark: Vec<u32>,
}

/// One completion to make, or something to find out about a prompt.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// What for.
    pub goal: Goal,
    /// At most so many new tokens; 0 only to look at the prompt.
    pub max_tokens: usize,
    /// How to pick tokens.
    pub sampling: Sampling,
    /// Strings that end the completion; they are left out of it.
    pub stop: Vec<String>,
    /// Go on behind end tokens.
    pub ignore_end: bool,
    /// Report every token with its log-probability and so many of the likeliest alternatives.
    pub log_probs: Option<usize>,
    /// The same for the tokens of the prompt behind the first.
    pub prompt_log_probs: Option<usize>,
    /// When thinking has to end.
    pub thinking: Option<ThinkingLimit>,
    /// The form of the answer.
    pub constraint: Option<Constraint>,
    /// The form holds behind these tokens only: the end of the thinking.
    pub free_until: Vec<u32>,
}

/// A token with the distribution that it was picked from, before temperature and filters.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub log_prob: f32,
    /// The likeliest tokens with theirs, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// The limit on new tokens.
    Length,
}

impl FinishReason {
    /// OpenAI's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What a request's receiver gets, in order; the last is `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// How likely a token of the prompt is behind those before it: from the second on, in order.
    Prompt(Sampled),
    /// A token was picked; its text follows, now or with a later one. Only where the request asks for it.
    Sampled(Sampled),
    /// More text.
    Text(String),
    /// The embedding.
    Embedding(Vec<f32>),
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens written, the end token included.
        completion_tokens: usize,
        /// Tokens of the prompt that were at hand from requests before.
        cached_tokens: usize,
    },
    /// The engine failed; the completion is not whole.
    Failed(String),
}
