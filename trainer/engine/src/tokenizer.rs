//! Text to tokens and back, and the incremental decoder that never splits a character.

use std::path::Path;

use tokenizers::Tokenizer as Inner;

use crate::error::EngineError;

/// A `tokenizer.json`, or the same built from GGUF metadata.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Inner,
}

fn failed(error: impl std::fmt::Display) -> EngineError {
    EngineError::Tokenizer(error.to_string())
}

impl Tokenizer {
    /// Wraps a tokenizer; truncation and padding are switched off.
    pub fn new(mut inner: Inner) -> Result<Self, EngineError> {
        inner.with_padding(None).with_truncation(None).map_err(failed)?;
        Ok(Self { inner })
    }

    /// Reads the text of a `tokenizer.json`.
    pub fn from_json(text: &str, path: &Path) -> Result<Self, EngineError> {
        let inner = text.parse::<Inner>().map_err(|error| EngineError::malformed(path, error.to_string()))?;
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
