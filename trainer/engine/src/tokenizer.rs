//! Tokenization and detokenization, including an incremental decoder that never splits a character.

use std::path::Path;

use tokenizers::{DecoderWrapper, Tokenizer as Inner};

use crate::error::EngineError;

/// A tokenizer, read from `tokenizer.json` or built from GGUF metadata.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Inner,
    encoding: VocabularyEncoding,
}

/// Encoding of bytes in the entries of a vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VocabularyEncoding {
    /// GPT-2: one character per byte.
    Bytes,
    /// SentencePiece: `▁` for a space and `<0x0A>` for bytes of incomplete characters.
    Pieces,
    /// Plain text.
    Text,
}

/// Returns the vocabulary's encoding, derived from the decoder of the tokenizer.
fn vocabulary_encoding(decoder: Option<&DecoderWrapper>) -> VocabularyEncoding {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => VocabularyEncoding::Bytes,
        Some(DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_)) => VocabularyEncoding::Pieces,
        Some(DecoderWrapper::Sequence(parts)) => {
            let parts = parts.get_decoders().iter().map(|part| vocabulary_encoding(Some(part)));
            parts
                .into_iter()
                .find(|found| *found != VocabularyEncoding::Text)
                .unwrap_or(VocabularyEncoding::Text)
        }
        _ => VocabularyEncoding::Text,
    }
}

/// Returns the byte of a character in GPT-2's alphabet. Printable bytes stand for themselves; the others
/// follow in order from code point 256.
fn gpt2_byte(character: char) -> Option<u8> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let code = u32::from(character);
    if code < 256 {
        return printable(code).then_some(code as u8);
    }
    (0..=255u32).filter(|byte| !printable(*byte)).nth((code - 256) as usize).map(|byte| byte as u8)
}

fn tokenizer_error(error: impl std::fmt::Display) -> EngineError {
    EngineError::Tokenizer(error.to_string())
}

impl Tokenizer {
    /// Wraps a tokenizer; switches truncation and padding off.
    pub fn new(mut inner: Inner) -> Result<Self, EngineError> {
        inner.with_padding(None).with_truncation(None).map_err(tokenizer_error)?;
        let spelling = vocabulary_encoding(inner.get_decoder());
        Ok(Self { inner, encoding: spelling })
    }

    /// Parses the text of a `tokenizer.json`. `path` appears in errors only.
    pub fn from_json(text: &str, path: &Path) -> Result<Self, EngineError> {
        let malformed = |error: &dyn std::fmt::Display| EngineError::malformed(path, error.to_string());
        // The tokenizers library panics on invalid JSON, so the text is checked first.
        serde_json::from_str::<serde_json::Value>(text).map_err(|error| malformed(&error))?;
        let inner = text.parse::<Inner>().map_err(|error| malformed(&error))?;
        Self::new(inner)
    }

    /// Returns the tokenizer as `tokenizer.json`.
    pub fn to_json(&self) -> Result<String, EngineError> {
        self.inner.to_string(false).map_err(tokenizer_error)
    }

    /// Encodes `text` to token ids. Special tokens in the text are recognized; none are added, because chat
    /// templates write them.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        Ok(self.inner.encode_fast(text, false).map_err(tokenizer_error)?.get_ids().to_vec())
    }

    /// Decodes `ids` to text without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, EngineError> {
        self.inner.decode(ids, true).map_err(tokenizer_error)
    }

    /// Returns the id of a token by its exact text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns the exact text of a token.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Returns the bytes of a token. Special tokens give their text; ids outside the vocabulary give no
    /// bytes.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(text) = self.inner.id_to_token(id) else { return Vec::new() };
        if self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id) {
            return text.into_bytes();
        }
        match self.encoding {
            VocabularyEncoding::Text => text.into_bytes(),
            VocabularyEncoding::Bytes => {
                let bytes: Option<Vec<u8>> = text.chars().map(gpt2_byte).collect();
                bytes.unwrap_or_else(|| text.into_bytes())
            }
            VocabularyEncoding::Pieces => {
                let byte = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => text.replace('\u{2581}', " ").into_bytes(),
                }
            }
        }
    }

    /// Returns whether a token is a control token that ordinary text never encodes to.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// Returns the size of the vocabulary, including added tokens.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Returns whether the vocabulary is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Decodes a completion token by token. Text that ends in an incomplete character is held back.
#[derive(Debug, Default)]
pub struct StreamDecoder {
    ids: Vec<u32>,
    /// Start of the tokens that are decoded together: `context..read` is context of the next text.
    context: usize,
    /// Number of tokens whose text has been returned.
    emitted: usize,
}

impl StreamDecoder {
    /// Adds a token and returns the text that is now final.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, EngineError> {
        self.ids.push(id);
        let before = tokenizer.decode(&self.ids[self.context..self.emitted])?;
        let after = tokenizer.decode(&self.ids[self.context..])?;
        if after.len() <= before.len() || after.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.context = self.emitted;
        self.emitted = self.ids.len();
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }

    /// Returns the held text at the end of the completion.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, EngineError> {
        let before = tokenizer.decode(&self.ids[self.context..self.emitted])?;
        let after = tokenizer.decode(&self.ids[self.context..])?;
        self.emitted = self.ids.len();
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
    fn decodes_tokens_to_bytes_in_all_vocabulary_encodings() {
        let level =
            r#"{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}"#;
        let gpt2 = tokenizer(level, r#"{"<|é|>": 0, "Ġa": 1, "Ã": 2, "?": 3, "Ċ": 4}"#);
        assert_eq!([0, 1, 2, 4].map(|id| gpt2.token_bytes(id)), ["<|é|>".as_bytes(), b" a", b"\xc3", b"\n"]);
        let pieces = r#"{"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}"#;
        let llama = tokenizer(pieces, r#"{"<|é|>": 0, "▁a": 1, "<0xC3>": 2, "?": 3}"#);
        assert_eq!([1, 2].map(|id| llama.token_bytes(id)), [b" a".as_slice(), b"\xc3"]);
        assert!(llama.token_bytes(99).is_empty());
        let all: std::collections::BTreeSet<u8> =
            (0..512).filter_map(char::from_u32).filter_map(gpt2_byte).collect();
        assert_eq!(all.len(), 256);
    }
}
