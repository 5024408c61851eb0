//! Tokenizer and chat template of the demonstration. Every digit, sign and word is one token, so that small models see
//! the structure of the task. Decoding returns the exact text.

use std::collections::BTreeSet;

use potstill_data::arithmetic::{ITEMS, NAMES};
use potstill_engine::tokenizer::Tokenizer;
use potstill_engine::{EngineError, template::ChatTemplate};
use serde_json::json;

/// Token before the user's turn.
const USER: &str = "<|user|>";
/// Token before the assistant's turn.
const ASSISTANT: &str = "<|assistant|>";
/// Token after the assistant's turn.
pub const END: &str = "<|end|>";

/// Words of problems and prompts, besides names and items.
const WORDS: &str = "has gets buys finds gives loses sells more away times as many now How no check grade extend simplify \
                     verbosity complexity easy medium hard";

/// Returns the tokenizer. Special tokens have the lowest ids.
pub fn tokenizer() -> Result<Tokenizer, EngineError> {
    let special = [END, USER, ASSISTANT];
    let marks = ["<think>", "</think>", "\\boxed{", "<score>", "</score>"];
    let letters: Vec<String> = ('A'..='F').map(String::from).collect();
    let mut words = BTreeSet::new();
    let named = NAMES.into_iter().chain(ITEMS).chain(WORDS.split_whitespace());
    for word in named.chain(letters.iter().map(String::as_str)) {
        words.insert(word.to_owned());
        words.insert(format!(" {word}"));
    }
    words.extend((0..10).map(|digit| digit.to_string()));
    words.extend("+-*=|,;:.?} \n".chars().map(String::from));
    let tokens: Vec<String> = special
        .iter()
        .chain(&marks)
        .map(|token| (*token).to_owned())
        .chain(["<unk>".to_owned()])
        .chain(words)
        .collect();
    let added: Vec<_> = special
        .iter()
        .chain(&marks)
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": id < special.len()})
        })
        .collect();
    let vocabulary: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": " ?[A-Za-z]+|[0-9]|[^A-Za-z0-9]"},
                          "behavior": "Isolated", "invert": false},
        "post_processor": null,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    Tokenizer::from_json(&file.to_string(), std::path::Path::new("the demonstration's tokenizer"))
}

/// Returns the chat template: one token before each turn, and one after the assistant's.
pub fn template() -> Result<ChatTemplate, EngineError> {
    let source = format!(
        "{{% for message in messages %}}{{% if message.role == 'assistant' %}}{ASSISTANT}{{{{ message.content }}}}{END}\
         {{% else %}}{USER}{{{{ message.content }}}}{{% endif %}}{{% endfor %}}\
         {{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
    );
    ChatTemplate::new(&source, "", END)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::demo::roles::conversations;

    #[test]
    fn decoding_restores_every_training_conversation() {
        let tokenizer = tokenizer().unwrap();
        let unknown = tokenizer.token_id("<unk>").unwrap();
        for conversation in conversations(300, 3, &HashSet::new()) {
            for message in conversation {
                let text = message["content"].as_str().unwrap();
                let ids = tokenizer.encode(text).unwrap();
                assert!(!ids.contains(&unknown), "{text}");
                assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            }
        }
    }
}
