//! Tokenizes conversations into training examples with a loss mask. Only the assistant's turns count in the loss,
//! including their end-of-turn token (TRL: `assistant_only_loss`).

use potstill_engine::loader::LoadedModel;
use serde_json::{Value, json};

use crate::error::LearnError;

/// One tokenized training example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids of the whole conversation.
    pub tokens: Vec<u32>,
    /// Loss mask, one entry per token: true where the token counts in the loss. The first entry is always false.
    pub loss_mask: Vec<bool>,
}

impl Example {
    /// Returns the number of tokens that count in the loss.
    pub fn num_targets(&self) -> usize {
        self.loss_mask.iter().filter(|learnt| **learnt).count()
    }
}

/// Renders `messages` with the model's chat template and tokenizes the result.
///
/// The text before an assistant turn is the template's rendering of all earlier turns with the generation prompt. A
/// served model sees exactly this text.
///
/// Fails if there is no assistant turn, if the template rewrites earlier turns, or if a token lies outside the model's
/// vocabulary.
pub fn tokenize_conversation(model: &LoadedModel, messages: &[Value]) -> Result<Example, LearnError> {
    let (mut tokens, mut learnt) = (Vec::new(), Vec::new());
    let mut done = String::new();
    for (index, message) in messages.iter().enumerate() {
        if message.get("role").and_then(Value::as_str) != Some("assistant") {
            continue;
        }
        let render = |count: usize, generate: bool| {
            model.chat_template.render(&json!(messages[..count]), generate, &json!({}))
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
    Ok(Example { tokens, loss_mask: learnt })
}
