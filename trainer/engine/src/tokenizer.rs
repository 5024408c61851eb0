//! Text to tokens and back, and the incremental decoder that never splits a character.

use std::path::Path;

use tokenizers::{DecoderWrapper, Tokenizer as Inner};

use crate::error::EngineError;

/// A `tokenizer.json`, or the same built from GGUF metadata.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Inner,
    spelling: Spelling,
}

/// How the entries of a vocabulary spell bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// A character for every byte, as GPT-2 chose them.
    Bytes,
    /// Text with `▁` for a space, and `<0x0A>` for bytes that are no whole character (SentencePiece).
    Pieces,
    /// The text itself.
    Text,
}

fn spelling(decoder: Option<&DecoderWrapper>) -> Spelling {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => Spelling::Bytes,
        Some(DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_)) => Spelling::Pieces,
        Some(DecoderWrapper::Sequence(parts)) => {
            let parts = parts.get_decoders().iter().map(|part| spelling(Some(part)));
            parts.into_iter().find(|found| *found != Spelling::Text).unwrap_or(Spelling::Text)
        }
        _ => Spelling::Text,
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable ones for themselves, the others in order from 256 on.
fn byte_of(character: char) -> Option<u8> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let code = u32::from(character);
    if code < 256 {
        return printable(code).then_some(code as u8);
    }
    (0..=255u32).filter(|byte| !printable(*byte)).nth((code - 256) as usize).map(|byte| byte as u8)
}

fn failed(error: impl std::fmt::Display) -> EngineError {
    EngineError::Tokenizer(error.to_string())
}

impl Tokenizer {
    /// Wraps a tokenizer; truncation and padding are switched off.
    pub fn new(mut inner: Inner) -> Result<Self, EngineError> {
        inner.with_padding(None).with_truncation(None).map_err(failed)?;
        let spelling = spelling(inner.get_decoder());
        Ok(Self { inner, spelling })
    }

    /// Reads the text of a `tokenizer.json`.
    pub fn from_json(text: &str, path: &Path) -> Result<Self, EngineError> {
        let malformed = |error: &dyn std::fmt::Display| EngineError::malformed(path, error.to_string());
        // The library panics over JSON that is none.
        serde_json::from_str::<serde_json::Value>(text).map_err(|error| malformed(&error))?;
        let inner = text.parse::<Inner>().map_err(|error| malformed(&error))?;
        Self::new(inner)
    }

    /// As `tokenizer.json`.
    pub fn to_json(&self) -> Result<String, EngineError> {
        self.inner.to_string(false).map_err(failed)
    }

    /// Token ids of `text`. Special tokens written in the text count as such; none is added: templates write them.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        Ok(self.inner.encode_fast(text, false).map_err(failed)?.get_ids().to_vec())
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, EngineError> {
        self.inner.decode(ids, true).map_err(failed)
    }

    /// Id of a token by its exact text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Exact text of a token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The bytes that a token stands for, special tokens by their text. Nothing for ids outside the vocabulary.
    pub fn bytes(&self, id: u32) -> Vec<u8> {
        let Some(text) = self.inner.id_to_token(id) else { return Vec::new() };
        if self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id) {
            return text.into_bytes();
        }
        match self.spelling {
            Spelling::Text => text.into_bytes(),
            Spelling::Bytes => {
                let bytes: Option<Vec<u8>> = text.chars().map(byte_of).collect();
                bytes.unwrap_or_else(|| text.into_bytes())
            }
            Spelling::Pieces => {
                let byte = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => text.replace('\u{2581}', " ").into_bytes(),
                }
            }
        }
    }

    /// Whether a token is a mark that no text spells.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// Number of entries, added tokens included.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Decodes token by token. Text is held back while it ends in an incomplete character.
#[derive(Debug, Default)]
pub struct StreamDecoder {
    ids: Vec<u32>,
    /// Tokens before this are decoded only as context.
    context: usize,
    /// Tokens before this have been given out.
    read: usize,
}

impl StreamDecoder {
    /// Adds a token and returns the text that became certain.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, EngineError> {
        self.ids.push(id);
        let before = tokenizer.decode(&self.ids[self.context..self.read])?;
        let after = tokenizer.decode(&self.ids[self.context..])?;
        if after.len() <= before.len() || after.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.context = self.read;
        self.read = self.ids.len();
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }

    /// What was held back at the end.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, EngineError> {
        let before = tokenizer.decode(&self.ids[self.context..self.read])?;
        let after = tokenizer.decode(&self.ids[self.context..])?;
        self.read = self.ids.len();
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(decoder: &str, vocabulary: &str) -> Tokenizer {
        let json = format!(
            r#"{{"version": "1.0", "added_tokens": [{{"id": 0, "content": "<|é|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}}], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {decoder}, "model": {{"type": "WordLevel", "vocab": {vocabulary}, "unk_token": "?"}}}}"#
        );
        Tokenizer::from_json(&json, Path::new("tokenizer.json")).unwrap()
    }

    #[test]
    fn tokens_are_bytes_in_every_spelling() {
        let level =
            r#"{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}"#;
        let gpt2 = tokenizer(level, r#"{"<|é|>": 0, "Ġa": 1, "Ã": 2, "?": 3, "Ċ": 4}"#);
        assert_eq!([0, 1, 2, 4].map(|id| gpt2.bytes(id)), ["<|é|>".as_bytes(), b" a", b"\xc3", b"\n"]);
        let pieces = r#"{"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}"#;
        let llama = tokenizer(pieces, r#"{"<|é|>": 0, "▁a": 1, "<0xC3>": 2, "?": 3}"#);
        assert_eq!([1, 2].map(|id| llama.bytes(id)), [b" a".as_slice(), b"\xc3"]);
        assert!(llama.bytes(99).is_empty());
        let all: std::collections::BTreeSet<u8> =
            (0..512).filter_map(char::from_u32).filter_map(byte_of).collect();
        assert_eq!(all.len(), 256);
    }
}
