//! What a model would have written at every place of a given text: the rows from which a student learns a teacher's
//! distributions.
//!
//! `POST /completions` with `echo`, `logprobs` and `return_tokens_as_token_ids`, which vLLM and `potstill serve` know: texts of
//! tokens are not always told apart.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::json;

use super::{CallError, Client, checked, retry, transport};
use crate::openai::Usage;

/// The text to look at.
#[derive(Debug, Clone, Copy)]
pub enum Given<'a> {
    /// Token ids, which are the same to both sides.
    Tokens(&'a [u32]),
    /// A text, which the endpoint cuts into its own tokens.
    Text(&'a str),
}

/// A text as the endpoint sees it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Likeliest {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// For each of them the likeliest tokens in its place, likeliest first, with natural log-probabilities; none for the first.
    pub rows: Vec<Vec<(u32, f32)>>,
    /// Token counts.
    pub usage: Usage,
}

#[derive(Deserialize)]
struct Answer {
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    logprobs: Option<LogProbs>,
}

#[derive(Deserialize)]
struct LogProbs {
    tokens: Vec<String>,
    top_logprobs: Vec<Option<HashMap<String, f64>>>,
}

fn refused(message: impl Into<String>) -> CallError {
    CallError::Refused { message: message.into(), status: 0, code: None }
}

fn id(token: &str) -> Result<u32, CallError> {
    token.strip_prefix("token_id:").and_then(|id| id.parse().ok()).ok_or_else(|| {
        refused(format!(
            "the endpoint names token {token:?} by its text; it must know `return_tokens_as_token_ids`, as vLLM and `potstill serve` do"
        ))
    })
}

impl Client {
    /// The `k` likeliest tokens at every place of `given`. `headers` go out as they are.
    pub async fn likeliest(
        &self,
        model: &str,
        given: Given<'_>,
        k: usize,
        headers: &[(&str, &str)],
    ) -> Result<Likeliest, CallError> {
        let url = format!("{}/completions", self.endpoint.url);
        let prompt = match given {
            Given::Tokens(tokens) => json!(tokens),
            Given::Text(text) => json!(text),
        };
        // Not every engine writes no token at all, so one is asked for and left out.
        let body = json!({
            "model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": k,
            "return_tokens_as_token_ids": true,
        });
        let mut builder = self.authorised(self.http.post(&url)).json(&body);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let response = builder.send().await.map_err(|error| transport(&url, &error))?;
        let answer: Answer =
            checked(response).await?.json().await.map_err(|error| transport(&url, &error))?;
        read(answer, given, k)
    }
}

fn read(answer: Answer, given: Given<'_>, k: usize) -> Result<Likeliest, CallError> {
    let usage = answer.usage.unwrap_or_default();
    let choice =
        answer.choices.into_iter().next().ok_or_else(|| retry("the answer holds no choice".into()))?;
    let Some(found) = choice.logprobs else {
        return Err(refused("the endpoint gives no log-probabilities of a prompt (`echo` with `logprobs`)"));
    };
    let length = match given {
        Given::Tokens(tokens) => tokens.len(),
        Given::Text(_) => usage.prompt_tokens as usize,
    };
    if found.tokens.len() < length || found.top_logprobs.len() < length {
        return Err(refused(format!(
            "the endpoint gives log-probabilities of {} tokens, the prompt has {length}; does it know `echo`?",
            found.top_logprobs.len().min(found.tokens.len())
        )));
    }
    let tokens = found.tokens[..length].iter().map(|token| id(token)).collect::<Result<Vec<_>, _>>()?;
    if let Given::Tokens(asked) = given
        && tokens != asked
    {
        return Err(refused("the endpoint echoes other tokens than it was given"));
    }
    let mut rows = vec![Vec::new()];
    for (at, row) in found.top_logprobs.into_iter().enumerate().take(length).skip(1) {
        let mut row = row
            .unwrap_or_default()
            .into_iter()
            .map(|(token, log_prob)| Ok((id(&token)?, log_prob as f32)))
            .collect::<Result<Vec<_>, CallError>>()?;
        // The token that stands there comes along, however unlikely.
        row.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        row.truncate(k);
        if row.len() < k || row.iter().any(|(_, log_prob)| !log_prob.is_finite() || *log_prob > 1e-3) {
            return Err(refused(format!(
                "the endpoint gives {} usable log-probabilities at token {at}, not {k}; ask for fewer, or raise its limit (`--max-logprobs` of vLLM)",
                row.len()
            )));
        }
        rows.push(row);
    }
    rows.truncate(length);
    Ok(Likeliest { tokens, rows, usage })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn answer(tokens: Value, top: Value) -> Answer {
        let usage = json!({"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4});
        let logprobs = json!({"tokens": tokens, "top_logprobs": top});
        serde_json::from_value(json!({"choices": [{"logprobs": logprobs}], "usage": usage})).unwrap()
    }

    fn whole() -> (Value, Value) {
        let row = json!({"token_id:9": -3.0, "token_id:7": -0.1, "token_id:8": -2.5});
        (json!(["token_id:5", "token_id:9", "token_id:7", "token_id:1"]), json!([null, row, row, row]))
    }

    #[test]
    fn rows_are_sorted_cut_and_without_what_was_written() {
        let (tokens, top) = whole();
        for given in [Given::Tokens(&[5, 9, 7]), Given::Text("abc")] {
            let found = read(answer(tokens.clone(), top.clone()), given, 2).unwrap();
            assert_eq!(found.tokens, [5, 9, 7]);
            assert_eq!(found.rows, [vec![], vec![(7, -0.1), (8, -2.5)], vec![(7, -0.1), (8, -2.5)]]);
        }
    }

    #[test]
    fn what_an_endpoint_cannot_do_is_named() {
        let (tokens, top) = whole();
        let problem = |answer: Answer, given: &[u32], k: usize| {
            read(answer, Given::Tokens(given), k).unwrap_err().to_string()
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
