//! Top log probabilities of a teacher at every position of a given text, for logit distillation over HTTP.
//!
//! The request is `POST /completions` with `echo`, `logprobs` and `return_tokens_as_token_ids`. vLLM and
//! `potstill serve` support these fields. Token ids are needed because two tokens can have the same text.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::json;

use super::{CallError, Client, check_status, temporary_error, transport_error};
use crate::openai::Usage;

/// Prompt to score.
#[derive(Debug, Clone, Copy)]
pub enum ScoreInput<'a> {
    /// Token ids of a vocabulary that both sides share.
    Tokens(&'a [u32]),
    /// Text, which the endpoint tokenizes.
    Text(&'a str),
}

/// Scored prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PromptLogprobs {
    /// Token ids of the prompt, one per position.
    pub tokens: Vec<u32>,
    /// For each position the `k` most likely tokens with natural log probabilities, most likely first.
    ///
    /// The row of the first position is empty, because the model predicts no first token.
    pub rows: Vec<Vec<(u32, f32)>>,
    /// Token counts as reported by the endpoint.
    pub usage: Usage,
}

/// Response of the completions endpoint, reduced to the fields in use.
#[derive(Deserialize)]
struct CompletionsResponse {
    choices: Vec<CompletionsChoice>,
    usage: Option<Usage>,
}

/// Choice of the response.
#[derive(Deserialize)]
struct CompletionsChoice {
    logprobs: Option<ChoiceLogprobs>,
}

/// Log probabilities of a choice.
#[derive(Deserialize)]
struct ChoiceLogprobs {
    /// Tokens in the form `token_id:<id>`.
    tokens: Vec<String>,
    /// For each position the log probabilities by token; null for the first.
    top_logprobs: Vec<Option<HashMap<String, f64>>>,
}

/// Returns a permanent error without an HTTP status.
fn permanent_error(message: impl Into<String>) -> CallError {
    CallError::Permanent { message: message.into(), status: 0, code: None }
}

/// Parses a token of the form `token_id:<id>`.
fn parse_token_id(token: &str) -> Result<u32, CallError> {
    token.strip_prefix("token_id:").and_then(|id| id.parse().ok()).ok_or_else(|| {
        permanent_error(format!(
            "the endpoint names token {token:?} by its text; it must know `return_tokens_as_token_ids`, as vLLM and `potstill serve` do"
        ))
    })
}

impl Client {
    /// Scores `given` with `model` and returns the `k` most likely tokens at every position.
    ///
    /// `headers` are added to the request unchanged. Fails with [`CallError::Refused`] if the endpoint lacks
    /// one of the fields, truncates the rows, or echoes other tokens.
    pub async fn prompt_logprobs(
        &self,
        model: &str,
        given: ScoreInput<'_>,
        k: usize,
        headers: &[(&str, &str)],
    ) -> Result<PromptLogprobs, CallError> {
        let url = format!("{}/completions", self.endpoint.url);
        let prompt = match given {
            ScoreInput::Tokens(tokens) => json!(tokens),
            ScoreInput::Text(text) => json!(text),
        };
        // Some engines reject `max_tokens: 0`; one token is generated and dropped.
        let body = json!({
            "model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": k,
            "return_tokens_as_token_ids": true,
        });
        let mut builder = self.with_authorization(self.http.post(&url)).json(&body);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let response = builder.send().await.map_err(|error| transport_error(&url, &error))?;
        let answer: CompletionsResponse =
            check_status(response).await?.json().await.map_err(|error| transport_error(&url, &error))?;
        parse_response(answer, given, k)
    }
}

/// Checks a response and keeps the positions of the prompt with `k` tokens per row.
fn parse_response(
    answer: CompletionsResponse,
    given: ScoreInput<'_>,
    k: usize,
) -> Result<PromptLogprobs, CallError> {
    let usage = answer.usage.unwrap_or_default();
    let choice = answer
        .choices
        .into_iter()
        .next()
        .ok_or_else(|| temporary_error("the answer holds no choice".into()))?;
    let Some(found) = choice.logprobs else {
        return Err(permanent_error(
            "the endpoint gives no log-probabilities of a prompt (`echo` with `logprobs`)",
        ));
    };
    let length = match given {
        ScoreInput::Tokens(tokens) => tokens.len(),
        ScoreInput::Text(_) => usage.prompt_tokens as usize,
    };
    if found.tokens.len() < length || found.top_logprobs.len() < length {
        return Err(permanent_error(format!(
            "the endpoint gives log-probabilities of {} tokens, the prompt has {length}; does it know `echo`?",
            found.top_logprobs.len().min(found.tokens.len())
        )));
    }
    let tokens =
        found.tokens[..length].iter().map(|token| parse_token_id(token)).collect::<Result<Vec<_>, _>>()?;
    if let ScoreInput::Tokens(asked) = given
        && tokens != asked
    {
        return Err(permanent_error("the endpoint echoes other tokens than it was given"));
    }
    let mut rows = vec![Vec::new()];
    for (at, row) in found.top_logprobs.into_iter().enumerate().take(length).skip(1) {
        let mut row = row
            .unwrap_or_default()
            .into_iter()
            .map(|(token, log_prob)| Ok((parse_token_id(&token)?, log_prob as f32)))
            .collect::<Result<Vec<_>, CallError>>()?;
        // The row also contains the actual token of the position, however unlikely; `truncate` drops it
        // beyond rank `k`.
        row.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        row.truncate(k);
        if row.len() < k || row.iter().any(|(_, log_prob)| !log_prob.is_finite() || *log_prob > 1e-3) {
            return Err(permanent_error(format!(
                "the endpoint gives {} usable log-probabilities at token {at}, not {k}; ask for fewer, or raise its limit (`--max-logprobs` of vLLM)",
                row.len()
            )));
        }
        rows.push(row);
    }
    rows.truncate(length);
    Ok(PromptLogprobs { tokens, rows, usage })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn answer(tokens: Value, top: Value) -> CompletionsResponse {
        let usage = json!({"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4});
        let logprobs = json!({"tokens": tokens, "top_logprobs": top});
        serde_json::from_value(json!({"choices": [{"logprobs": logprobs}], "usage": usage})).unwrap()
    }

    fn whole() -> (Value, Value) {
        let row = json!({"token_id:9": -3.0, "token_id:7": -0.1, "token_id:8": -2.5});
        (json!(["token_id:5", "token_id:9", "token_id:7", "token_id:1"]), json!([null, row, row, row]))
    }

    #[test]
    fn sorts_rows_truncates_to_k_and_drops_the_generated_token() {
        let (tokens, top) = whole();
        for given in [ScoreInput::Tokens(&[5, 9, 7]), ScoreInput::Text("abc")] {
            let found = parse_response(answer(tokens.clone(), top.clone()), given, 2).unwrap();
            assert_eq!(found.tokens, [5, 9, 7]);
            assert_eq!(found.rows, [vec![], vec![(7, -0.1), (8, -2.5)], vec![(7, -0.1), (8, -2.5)]]);
        }
    }

    #[test]
    fn reports_missing_endpoint_features() {
        let (tokens, top) = whole();
        let problem = |answer: CompletionsResponse, given: &[u32], k: usize| {
            parse_response(answer, ScoreInput::Tokens(given), k).unwrap_err().to_string()
        };
        let found = problem(answer(tokens.clone(), top.clone()), &[5, 9, 7], 5);
        assert!(found.contains("gives 3 usable log-probabilities at token 1, not 5"), "{found}");
        let found = problem(answer(tokens.clone(), top.clone()), &[5, 9, 8], 2);
        assert!(found.contains("echoes other tokens"), "{found}");
        let found = problem(answer(json!(["a", "b", "c"]), top.clone()), &[5, 9, 7], 2);
        assert!(found.contains("names token \"a\" by its text"), "{found}");
        let found = problem(answer(json!(["token_id:1"]), json!([null])), &[5, 9, 7], 2);
        assert!(found.contains("of 1 tokens, the prompt has 3"), "{found}");
    }
}
