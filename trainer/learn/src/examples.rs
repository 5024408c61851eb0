//! Conversations to token rows with a mask: only what the assistant wrote is learnt, its end-of-turn token included.

use potstill_engine::loader::LoadedModel;
use serde_json::{Value, json};

use crate::error::LearnError;

/// One training example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids of the whole conversation.
    pub tokens: Vec<u32>,
    /// Which of them are learnt; never the first.
    pub learnt: Vec<bool>,
}

impl Example {
    /// Tokens that count in the loss.
    pub fn targets(&self) -> usize {
        self.learnt.iter().filter(|learnt| **learnt).count()
    }
}

/// Renders `messages` with the model's own template. The text before each assistant turn is the template's rendering of
/// the turns before it with the generation prompt, exactly what the model sees when it is served.
pub fn encode(model: &LoadedModel, messages: &[Value]) -> Result<Example, LearnError> {
    let (mut tokens, mut learnt) = (Vec::new(), Vec::new());
    let mut done = String::new();
    for (index, message) in messages.iter().enumerate() {
        if message.get("role").and_then(Value::as_str) != Some("assistant") {
            continue;
        }
        let render = |count: usize, generate: bool| {
            model.template.render(&json!(messages[..count]), generate, &json!({}))
        };
        let prompt = render(index, true)?;
        let whole = render(index + 1, false)?;
        let (Some(asked), Some(answered)) = (prompt.strip_prefix(&done), whole.strip_prefix(&prompt)) else {
            return Err(LearnError::Data(
                "the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart; \
                 train on single-turn conversations with it"
                    .to_owned(),
            ));
        };
        for (text, is_learnt) in [(asked, false), (answered, true)] {
            let ids = model.tokenizer.encode(text)?;
            learnt.extend(std::iter::repeat_n(is_learnt, ids.len()));
            tokens.extend(ids);
        }
        done = whole;
    }
    if !learnt.contains(&true) {
        return Err(LearnError::Data("the conversation holds no assistant turn".to_owned()));
    }
    if let Some(first) = learnt.first_mut() {
        *first = false;
    }
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= model.config.vocab_size) {
        return Err(LearnError::Data(format!(
            "token {id} is outside the model's vocabulary of {}; tokenizer and model do not match",
            model.config.vocab_size
        )));
    }
    Ok(Example { tokens, learnt })
}
