//! OpenAI's Responses API (create and stream), translated to and from Chat Completions. Responses are not stored.
//! Therefore `previous_response_id`, background responses and hosted tools are rejected.

pub mod request;
pub mod stream;
pub mod whole;

use bytes::Bytes;
use potstill_shared::openai::ErrorBody;
use serde_json::{Value, json};

use self::request::ResponsesRequest;

/// Converts the `usage` object of a chat completion.
fn convert_usage(chat: &Value) -> Value {
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    let (input, output) = (count(&chat["prompt_tokens"]), count(&chat["completion_tokens"]));
    json!({
        "input_tokens": input,
        "input_tokens_details": {"cached_tokens": count(&chat["prompt_tokens_details"]["cached_tokens"])},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": count(&chat["completion_tokens_details"]["reasoning_tokens"])},
        "total_tokens": input + output,
    })
}

/// Returns `status` and `incomplete_details` for a finish reason.
fn status_and_details(finish_reason: Option<&str>) -> (&'static str, Value) {
    match finish_reason {
        Some("length") => ("incomplete", json!({"reason": "max_output_tokens"})),
        Some("content_filter") => ("incomplete", json!({"reason": "content_filter"})),
        _ => ("completed", Value::Null),
    }
}

/// Builds the response object. Fields that the client set are echoed; all others have OpenAI's defaults.
fn response_object(
    request: &ResponsesRequest,
    model: &str,
    status: &str,
    details: Value,
    output: &[Value],
    usage: Value,
) -> Value {
    let echo = |name: &str, usual: Value| request.echo.get(name).cloned().unwrap_or(usual);
    json!({
        "id": request.id, "object": "response", "created_at": request.created, "status": status,
        "background": false, "error": null, "incomplete_details": details, "model": model, "output": output,
        "usage": usage, "store": false, "previous_response_id": null,
        "instructions": echo("instructions", Value::Null),
        "max_output_tokens": echo("max_output_tokens", Value::Null),
        "max_tool_calls": null,
        "metadata": echo("metadata", json!({})),
        "parallel_tool_calls": echo("parallel_tool_calls", json!(true)),
        "reasoning": echo("reasoning", json!({"effort": null, "summary": null})),
        "service_tier": "default",
        "temperature": echo("temperature", json!(1.0)),
        "text": echo("text", json!({"format": {"type": "text"}})),
        "tool_choice": echo("tool_choice", json!("auto")),
        "tools": echo("tools", json!([])),
        "top_logprobs": echo("top_logprobs", json!(0)),
        "top_p": echo("top_p", json!(1.0)),
        "truncation": "disabled",
        "user": echo("user", Value::Null),
    })
}

fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn message_item(id: &str, status: &str, text: Option<&str>) -> Value {
    let content: Vec<Value> = text.map(text_part).into_iter().collect();
    json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
}

fn reasoning_item(id: &str, status: &str, text: Option<&str>) -> Value {
    let content: Vec<Value> =
        text.map(|text| json!({"type": "reasoning_text", "text": text})).into_iter().collect();
    json!({"id": id, "type": "reasoning", "status": status, "summary": [], "content": content})
}

fn call_item(id: &str, status: &str, call: &str, name: &str, arguments: &str) -> Value {
    json!({"id": id, "type": "function_call", "status": status, "call_id": call, "name": name, "arguments": arguments})
}

/// Renders an error as an SSE event of the Responses API.
pub fn error_event(_body: &ErrorBody, code: &str, message: &str) -> Bytes {
    let event =
        json!({"type": "error", "code": code, "message": message, "param": null, "sequence_number": 0});
    format!("event: error\ndata: {event}\n\n").into()
}
