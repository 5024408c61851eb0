//! Structured output: completions bound to a JSON schema, a regular expression, a list of choices or a
//! grammar. Before each token llguidance computes the permitted tokens; the engine masks all others.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use crate::error::EngineError;
use crate::tokenizer::Tokenizer;

/// Grammar of a structured output.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// JSON that satisfies this schema.
    Json(Value),
    /// A regular expression that matches the whole completion.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
}

/// Returns the schema with bounded whitespace: one space, or a line break with up to 16 spaces, between two
/// parts. Without the bound small models can generate endless whitespace.
pub fn with_bounded_whitespace(mut schema: Value) -> Value {
    let options =
        schema.as_object_mut().map(|fields| fields.entry("x-guidance").or_insert_with(|| json!({})));
    if let Some(Value::Object(options)) = options
        && !options.contains_key("whitespace_flexible")
    {
        options.entry("whitespace_pattern").or_insert_with(|| json!(" |\n {0,16}"));
    }
    schema
}

/// Compiler of grammars for one vocabulary.
pub struct GrammarCompiler {
    factory: ParserFactory,
}

fn grammar_error(error: impl std::fmt::Display) -> EngineError {
    // The library appends its internal state after the first line.
    let text = error.to_string();
    EngineError::Grammar(match text.lines().next().unwrap_or_default() {
        "NoExtensionBias" => "no token of this model's vocabulary can go on from here".to_owned(),
        first => first.to_owned(),
    })
}

impl GrammarCompiler {
    /// Creates a compiler for a model with `vocabulary` logits. The first token of `eos` ends a completion.
    /// Fails if `eos` is empty.
    pub fn new(tokenizer: &Tokenizer, vocabulary: usize, eos: &[u32]) -> Result<Self, EngineError> {
        let words: Vec<Vec<u8>> = (0..vocabulary as u32)
            .map(|id| {
                let mut bytes = tokenizer.token_bytes(id);
                if tokenizer.is_special(id) {
                    // The marker keeps special tokens from matching ordinary text.
                    bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
                }
                bytes
            })
            .collect();
        let end = *eos.first().ok_or_else(|| grammar_error("the model has no end token"))?;
        let info = TokRxInfo::new(vocabulary as u32, end);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(grammar_error)?;
        factory.quiet();
        Ok(Self { factory })
    }

    /// Compiles a grammar. Fails with [`EngineError::Grammar`] if the grammar is invalid.
    pub fn compile(&self, grammar: &Grammar) -> Result<GrammarMatcher, EngineError> {
        let form = match grammar {
            Grammar::Json(schema) => {
                TopLevelGrammar::from_json_schema(with_bounded_whitespace(schema.clone()))
            }
            Grammar::Regex(pattern) => TopLevelGrammar::from_regex(pattern),
            Grammar::Choice(texts) => {
                let texts = texts.iter().map(|text| Value::from(text.as_str()).to_string());
                TopLevelGrammar::from_lark(format!("start: {}", texts.collect::<Vec<_>>().join(" | ")))
            }
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let mut matcher = Matcher::new(self.factory.create_parser(form));
        match matcher.get_error() {
            Some(error) => Err(grammar_error(error)),
            None => {
                matcher.compute_mask().map_err(grammar_error)?;
                Ok(GrammarMatcher(matcher))
            }
        }
    }
}

/// State of a completion in its grammar.
pub struct GrammarMatcher(Matcher);

impl Clone for GrammarMatcher {
    fn clone(&self) -> Self {
        Self(self.0.deep_clone())
    }
}

impl std::fmt::Debug for GrammarMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Constraint")
    }
}

impl GrammarMatcher {
    /// Sets the logits of forbidden tokens to negative infinity.
    pub(crate) fn mask_logits(&mut self, logits: &mut [f32]) -> Result<(), EngineError> {
        let allowed = self.0.compute_mask_or_eos().map_err(grammar_error)?;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= allowed.len() || !allowed.is_allowed(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Advances the grammar by `token`. Returns whether the completion is complete and cannot continue.
    pub(crate) fn accept_token(&mut self, token: u32) -> Result<bool, EngineError> {
        self.0.consume_token(token).map_err(grammar_error)?;
        Ok(self.0.is_stopped())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::SamplingParams;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    /// A tokenizer with one token per printable byte, some longer tokens and an end token.
    fn tokenizer() -> Tokenizer {
        let mut words: Vec<String> = vec!["<end>".to_owned()];
        words.extend((32u8..127).map(|byte| char::from(byte).to_string()));
        words.extend(["true", "\": ", "12", "red", "gre"].map(str::to_owned));
        let vocabulary: serde_json::Map<String, Value> =
            words.iter().enumerate().map(|(id, word)| (word.clone(), json!(id))).collect();
        let file = json!({"version": "1.0", "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
            "added_tokens": [{"id": 0, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": " "}});
        Tokenizer::from_json(&file.to_string(), std::path::Path::new("tokenizer.json")).unwrap()
    }

    /// Samples a completion from uniform logits under a grammar. Returns `None` after 400 tokens.
    fn written(grammar: &Grammar, seed: u64) -> Option<String> {
        let tokenizer = tokenizer();
        let grammars = GrammarCompiler::new(&tokenizer, 110, &[0]).unwrap();
        let mut constraint = grammars.compile(grammar).unwrap().clone();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut text = Vec::new();
        for _ in 0..400 {
            let mut logits = vec![0f32; 110];
            constraint.mask_logits(&mut logits).unwrap();
            let token = SamplingParams::default().sample(&mut logits, &[], &[], &mut rng);
            if token == 0 {
                return String::from_utf8(text).ok();
            }
            text.extend(tokenizer.token_bytes(token));
            if constraint.accept_token(token).unwrap() {
                return String::from_utf8(text).ok();
            }
        }
        None
    }

    #[test]
    fn sampled_completions_satisfy_the_grammar() {
        let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"$ref": "#/$defs/digit"}},
            "required": ["ok", "n"], "additionalProperties": false, "$defs": {"digit": {"type": "integer", "minimum": 3, "maximum": 40}}});
        let mut whole = 0;
        for seed in 0..30 {
            if let Some(text) = written(&Grammar::Json(schema.clone()), seed) {
                let value: Value = serde_json::from_str(&text).unwrap();
                assert!(
                    value["ok"].is_boolean() && (3..=40).contains(&value["n"].as_i64().unwrap()),
                    "{text}"
                );
                whole += 1;
            }
            let text = written(&Grammar::Regex("[a-c]{2}-[0-9]+x".to_owned()), seed);
            if let Some(text) = text {
                assert!(text.len() >= 5 && text.ends_with('x') && text.as_bytes()[2] == b'-', "{text}");
            }
            let choice = Grammar::Choice(vec!["red".to_owned(), "gre\"y".to_owned()]);
            assert!(["red", "gre\"y"].contains(&written(&choice, seed).unwrap().as_str()));
        }
        assert_eq!(whole, 30, "blanks are bounded, so each comes to its end");
    }

    #[test]
    fn rejects_invalid_grammars() {
        let grammars = GrammarCompiler::new(&tokenizer(), 110, &[0]).unwrap();
        for grammar in [
            Grammar::Regex("(".to_owned()),
            Grammar::Json(json!({"type": "nothing"})),
            Grammar::Lark("start: x".to_owned()),
        ] {
            assert!(matches!(grammars.compile(&grammar), Err(EngineError::Grammar(_))), "{grammar:?}");
        }
    }
}
