//! One choice of a response under construction, collected or streamed. Separates reasoning, answer and tool calls, and
//! keeps logprobs until they are sent.

use potstill_engine::scheduler::{FinishReason, TokenLogprobs};
use potstill_engine::tokenizer::Tokenizer;
use potstill_shared::openai::Delta;
use potstill_shared::reasoning::{Piece, ReasoningSplitter};
use serde_json::{Value, json};

use super::log_probs::{self, TextLogprobs};
use super::tools::{AnswerPart, ToolFormat, ToolParser};

/// Kind of a response.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ResponseKind {
    /// Chat: reasoning is separated from the answer. `inside`: the prompt ends inside an open reasoning block. `tools`:
    /// format of tool calls, if the request has tools.
    Chat { inside: bool, tools: Option<ToolFormat> },
    /// Text completion without parsing. `by_id`: logprobs name tokens by id.
    Text { by_id: bool },
}

/// A choice under construction.
pub(super) struct ChoiceBuilder {
    splitter: Option<ReasoningSplitter>,
    tools: Option<ToolParser>,
    chat_log_probs: Vec<Value>,
    text_log_probs: TextLogprobs,
}

impl ChoiceBuilder {
    /// Creates an empty choice.
    pub(super) fn new(shape: ResponseKind) -> Self {
        let (splitter, tools, by_id) = match shape {
            ResponseKind::Chat { inside, tools } => {
                (Some(ReasoningSplitter::new(inside)), tools.map(ToolParser::new), false)
            }
            ResponseKind::Text { by_id } => (None, None, by_id),
        };
        Self { splitter, tools, chat_log_probs: Vec::new(), text_log_probs: TextLogprobs::new(by_id) }
    }

    /// Returns the deltas for more generated text.
    pub(super) fn push(&mut self, text: &str) -> Vec<Delta> {
        match &mut self.splitter {
            None => vec![content_delta(text.to_owned())],
            Some(splitter) => {
                let pieces = splitter.push(text);
                pieces.into_iter().flat_map(|piece| self.deltas(piece)).collect()
            }
        }
    }

    /// Returns the deltas for the rest, and OpenAI's finish reason.
    pub(super) fn finish(&mut self, reason: FinishReason) -> (Vec<Delta>, &'static str) {
        let last = self.splitter.as_mut().and_then(ReasoningSplitter::finish);
        let mut deltas: Vec<Delta> = last.into_iter().flat_map(|piece| self.deltas(piece)).collect();
        let mut called = false;
        if let Some(tools) = &mut self.tools {
            let mut calls = tools.num_calls();
            deltas.extend(tools.finish().into_iter().map(|part| part_delta(part, &mut calls)));
            called = tools.num_calls() > 0;
        }
        (deltas, if called && reason == FinishReason::Stop { "tool_calls" } else { reason.as_str() })
    }

    /// Converts a piece of reasoning or answer to deltas.
    fn deltas(&mut self, piece: Piece) -> Vec<Delta> {
        match (piece, &mut self.tools) {
            (Piece::Reasoning(text), _) => {
                vec![Delta { reasoning_content: Some(text), ..Delta::default() }]
            }
            (Piece::Answer(text), None) => vec![content_delta(text)],
            (Piece::Answer(text), Some(tools)) => {
                let mut calls = tools.num_calls();
                let parts = tools.push(&text);
                parts.into_iter().map(|part| part_delta(part, &mut calls)).collect()
            }
        }
    }

    /// Records the first token of an echoed prompt, which has no log probability.
    pub(super) fn push_first_prompt_token(&mut self, tokenizer: &Tokenizer, token: u32) {
        self.text_log_probs.push_first(tokenizer, token);
    }

    /// Records a token with its log probability.
    pub(super) fn push_token(&mut self, tokenizer: &Tokenizer, sampled: &TokenLogprobs) {
        if self.splitter.is_some() {
            self.chat_log_probs.push(log_probs::chat_entry(tokenizer, sampled));
        } else {
            self.text_log_probs.push(tokenizer, sampled);
        }
    }

    /// Returns the logprobs since the last call, or `None` if there are none.
    pub(super) fn take_logprobs(&mut self) -> Option<Value> {
        if self.splitter.is_none() {
            return self.text_log_probs.drain();
        }
        let entries = std::mem::take(&mut self.chat_log_probs);
        (!entries.is_empty()).then(|| log_probs::chat_logprobs(entries))
    }
}

/// Returns a delta with text.
fn content_delta(text: String) -> Delta {
    Delta { content: Some(text), ..Delta::default() }
}

/// Converts a part to a delta. Tool calls are numbered in their order.
fn part_delta(part: AnswerPart, calls: &mut usize) -> Delta {
    match part {
        AnswerPart::Text(text) => content_delta(text),
        AnswerPart::Call(mut call) => {
            call["index"] = json!(*calls);
            *calls += 1;
            let mut delta = Delta::default();
            delta.extra.insert("tool_calls".to_owned(), json!([call]));
            delta
        }
    }
}
