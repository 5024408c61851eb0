//! Converts sampling parameters of a request to the engine's form, and checks those that the engine does not check.

use potstill_engine::sampler::SamplingParams;
use potstill_engine::scheduler::{Request, ThinkingBudget};
use potstill_shared::openai::{Extra, GenerationParams, Stop};
use potstill_shared::reasoning::CLOSE_TAG;
use rand::Rng;
use serde_json::Value;

use super::ServedModel;
use super::error::NodeError;

/// Maximum number of stop strings.
const MAX_STOPS: usize = 16;
/// Maximum number of alternatives per token (`top_logprobs`).
const MAX_TOP_LOGPROBS: u64 = 20;
/// Maximum number of entries in `logit_bias`.
const MAX_LOGIT_BIAS: usize = 1024;

/// Returns the error for an invalid field.
pub(super) fn invalid_field(param: &'static str, problem: impl Into<String>) -> NodeError {
    NodeError::InvalidField { param, problem: problem.into() }
}

/// Returns an engine request with sampling parameters and stop strings, but without a prompt. Without a seed in the
/// request, a random one is chosen.
pub(super) fn engine_request(options: &GenerationParams, extra: &Extra) -> Result<Request, NodeError> {
    let stop = options.stop.clone().map(Stop::into_vec).unwrap_or_default();
    if stop.len() > MAX_STOPS {
        return Err(invalid_field("stop", format!("must hold at most {MAX_STOPS} strings")));
    }
    let number = |value: Option<f64>, default: f32| value.map_or(default, |value| value as f32);
    let sampling = SamplingParams {
        temperature: number(options.temperature, 1.0),
        top_p: number(options.top_p, 1.0),
        top_k: options.top_k.filter(|k| *k > 0).map_or(0, |k| k as usize),
        min_p: number(options.min_p, 0.0),
        repetition_penalty: number(options.repetition_penalty, 1.0),
        presence_penalty: number(options.presence_penalty, 0.0),
        frequency_penalty: number(options.frequency_penalty, 0.0),
        logit_bias: logit_bias(extra)?,
        seed: options.seed.map_or_else(|| rand::rng().random(), |seed| seed as u64),
    };
    let ignore_end = extra.get("ignore_eos").and_then(Value::as_bool).unwrap_or(false);
    Ok(Request { sampling, stop_strings: stop, ignore_eos: ignore_end, ..Request::default() })
}

/// Parses `logit_bias` into pairs of token id and bias.
fn logit_bias(extra: &Extra) -> Result<Vec<(u32, f32)>, NodeError> {
    let wrong =
        || invalid_field("logit_bias", "must be an object of token ids with numbers from -100 to 100");
    match extra.get("logit_bias") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Object(map)) if map.len() <= MAX_LOGIT_BIAS => map
            .iter()
            .map(|(token, bias)| {
                let token = token.parse().map_err(|_| wrong())?;
                Ok((token, bias.as_f64().ok_or_else(wrong)? as f32))
            })
            .collect(),
        Some(Value::Object(_)) => {
            Err(invalid_field("logit_bias", format!("must hold at most {MAX_LOGIT_BIAS} tokens")))
        }
        Some(_) => Err(wrong()),
    }
}

/// Returns the number of alternatives for a chat request (`logprobs: true` with `top_logprobs`), or `None` without
/// logprobs.
pub(super) fn chat_logprobs(extra: &Extra) -> Result<Option<usize>, NodeError> {
    let top = parse_count(extra, "top_logprobs")?;
    match (extra.get("logprobs"), top) {
        (Some(Value::Bool(true)), top) => Ok(Some(top.unwrap_or(0))),
        (None | Some(Value::Null | Value::Bool(false)), None | Some(0)) => Ok(None),
        (None | Some(Value::Null | Value::Bool(false)), Some(_)) => {
            Err(invalid_field("top_logprobs", "needs `logprobs` to be true"))
        }
        (Some(_), _) => Err(invalid_field("logprobs", "must be true or false")),
    }
}

/// Returns the number of alternatives for a text completion (`logprobs: N`), or `None` without logprobs.
pub(super) fn text_logprobs(extra: &Extra) -> Result<Option<usize>, NodeError> {
    parse_count(extra, "logprobs")
}

/// Parses a number from 0 to 20.
fn parse_count(extra: &Extra, name: &'static str) -> Result<Option<usize>, NodeError> {
    match extra.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(count) if count <= MAX_TOP_LOGPROBS => Ok(Some(count as usize)),
            _ => Err(invalid_field(name, format!("must be a number from 0 to {MAX_TOP_LOGPROBS}"))),
        },
    }
}

/// Parses `thinking_budget`, in the request or in `chat_template_kwargs`: the number of reasoning tokens after which
/// the node closes the reasoning.
pub(super) fn thinking_budget(
    node: &ServedModel,
    extra: &Extra,
) -> Result<Option<ThinkingBudget>, NodeError> {
    let inner = extra.get("chat_template_kwargs").and_then(|inner| inner.get("thinking_budget"));
    let Some(budget) = extra.get("thinking_budget").or(inner).filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let Some(tokens) = budget.as_u64() else {
        return Err(invalid_field("thinking_budget", "must be a number of tokens"));
    };
    Ok(Some(ThinkingBudget {
        tokens: tokens as usize,
        ending: node.tokenizer.encode(&format!("\n{CLOSE_TAG}\n\n"))?,
        mark: node.tokenizer.encode(CLOSE_TAG)?,
    }))
}
