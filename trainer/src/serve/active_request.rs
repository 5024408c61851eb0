//! A request in progress.

use std::sync::Arc;
use std::time::Instant;

use futures_util::stream::SelectAll;
use potstill_engine::request::RequestUpdate;
use potstill_shared::openai::Usage;

use super::ServedModel;
use super::choice::{ChoiceBuilder, ResponseKind};

/// A request in progress, with its choices.
pub(super) struct ActiveRequest {
    pub(super) node: Arc<ServedModel>,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) started: Instant,
    pub(super) shape: ResponseKind,
    pub(super) choices: Vec<ChoiceBuilder>,
    /// Text before the completion of each choice: the prompt if `echo` is set, else empty.
    pub(super) prefixes: Vec<String>,
    pub(super) include_usage: bool,
    pub(super) counts: TokenCounts,
    pub(super) updates: SelectAll<futures_util::stream::BoxStream<'static, (u32, RequestUpdate)>>,
}

/// Token counts over all choices of a request.
#[derive(Default)]
pub(super) struct TokenCounts {
    pub(super) prompt: u64,
    pub(super) cached: u64,
    pub(super) written: u64,
}

impl TokenCounts {
    /// Adds a finished choice.
    pub(super) fn add_finished(&mut self, completion_tokens: usize, cached_tokens: usize) {
        self.written += completion_tokens as u64;
        // Further samples of a prompt always hit the prefix cache. The first sample, with the smallest hit, tells what
        // was cached before the request.
        self.cached = self.cached.min(cached_tokens as u64);
    }

    /// Returns the usage in OpenAI's form.
    pub(super) fn usage(&self) -> Usage {
        Usage::new(self.prompt, self.written).with_cached(self.cached.min(self.prompt))
    }
}
