//! Translates a request of the Responses API to a chat request. Fields with the same name and meaning in both APIs, and
//! unknown fields, are passed on unchanged.

use bytes::Bytes;
use potstill_shared::id::unique_id;
use potstill_shared::openai::unix_time_s;
use serde_json::{Map, Value, json};

use crate::error::GatewayError;

/// The parts of the request that its response needs.
#[derive(Debug, Clone)]
pub struct ResponsesRequest {
    /// Id of the response.
    pub id: String,
    /// Time of creation, in seconds since 1970.
    pub created: u64,
    /// Model that the client requested.
    pub model: String,
    /// Fields of the request that the response repeats.
    pub echo: Map<String, Value>,
}

const ECHOED_FIELDS: [&str; 12] = [
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "reasoning",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
];

/// Fields of the Responses API that have no counterpart in a chat request and are dropped.
const DROPPED_FIELDS: [&str; 7] = [
    "store",
    "include",
    "truncation",
    "background",
    "prompt_cache_key",
    "safety_identifier",
    "stream_options",
];

fn invalid(message: impl Into<String>, param: &'static str) -> GatewayError {
    GatewayError::InvalidRequest {
        message: message.into(),
        param: Some(param),
        code: "unsupported_parameter",
    }
}

/// Translates a request body.
///
/// Returns [`GatewayError::Invalid`] with the parameter at fault for invalid JSON, a missing `input`, and features that
/// need stored responses or hosted tools.
pub fn to_chat(body: &Bytes) -> Result<(Bytes, ResponsesRequest), GatewayError> {
    let mut fields: Map<String, Value> =
        serde_json::from_slice(body).map_err(|error| GatewayError::InvalidRequest {
            message: format!("the request body is not valid: {error}"),
            param: None,
            code: "invalid_json",
        })?;
    for param in ["previous_response_id", "conversation", "prompt"] {
        if fields.get(param).is_some_and(|value| !value.is_null()) {
            return Err(invalid(
                format!("`{param}` is not supported: nothing is stored here; send the whole input"),
                param,
            ));
        }
    }
    if fields.get("background").and_then(Value::as_bool) == Some(true) {
        return Err(invalid("`background` is not supported; use `stream`", "background"));
    }
    let mut echo = Map::new();
    for name in ECHOED_FIELDS {
        if let Some(value) = fields.get(name).filter(|value| !value.is_null()) {
            echo.insert(name.to_owned(), value.clone());
        }
    }
    let model = fields.get("model").and_then(Value::as_str).unwrap_or_default().to_owned();
    let request = ResponsesRequest { id: unique_id("resp"), created: unix_time_s(), model, echo };
    let mut messages = Vec::new();
    if let Some(Value::String(instructions)) = fields.remove("instructions") {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    match fields.remove("input") {
        Some(Value::String(text)) => messages.push(json!({"role": "user", "content": text})),
        Some(Value::Array(items)) => {
            for item in items {
                add_item(&mut messages, item)?;
            }
        }
        _ => {
            return Err(GatewayError::InvalidRequest {
                message: "`input` must be a text or a list of items".to_owned(),
                param: Some("input"),
                code: "missing_required_parameter",
            });
        }
    }
    let mut chat = Map::new();
    for (name, value) in fields {
        match name.as_str() {
            _ if value.is_null() || DROPPED_FIELDS.contains(&name.as_str()) => {}
            "max_output_tokens" => drop(chat.insert("max_completion_tokens".into(), value)),
            "reasoning" => {
                if let Some(effort) = value.get("effort").filter(|effort| !effort.is_null()) {
                    chat.insert("reasoning_effort".into(), effort.clone());
                }
            }
            "text" => {
                if let Some(format) = value.get("format").and_then(response_format) {
                    chat.insert("response_format".into(), format);
                }
            }
            "tools" => drop(chat.insert("tools".into(), convert_tools(value)?)),
            "tool_choice" => drop(chat.insert("tool_choice".into(), convert_tool_choice(value))),
            "top_logprobs" => {
                if value.as_u64().unwrap_or(0) > 0 {
                    chat.insert("logprobs".into(), true.into());
                    chat.insert("top_logprobs".into(), value);
                }
            }
            "metadata" => {}
            _ => drop(chat.insert(name, value)),
        }
    }
    chat.insert("messages".into(), messages.into());
    if chat.get("stream").and_then(Value::as_bool) == Some(true) {
        chat.insert("stream_options".into(), json!({"include_usage": true}));
    }
    Ok((serde_json::to_vec(&chat).unwrap_or_default().into(), request))
}

fn add_item(messages: &mut Vec<Value>, mut item: Value) -> Result<(), GatewayError> {
    let field =
        |item: &Value, name: &str| item.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let kind = match item.get("type").and_then(Value::as_str) {
        Some(kind) => kind.to_owned(),
        None if item.get("role").is_some() => "message".to_owned(),
        None => return Err(invalid("an item of `input` has neither `type` nor `role`", "input")),
    };
    match kind.as_str() {
        "message" => {
            let role = match field(&item, "role").as_str() {
                "developer" => "system".to_owned(),
                role => role.to_owned(),
            };
            let content = match item.get_mut("content").map(Value::take) {
                Some(Value::Array(parts)) => convert_content(parts)?,
                Some(content) => content,
                None => return Err(invalid("a message of `input` has no `content`", "input")),
            };
            messages.push(json!({"role": role, "content": content}));
        }
        "function_call" => {
            let call = json!({"id": field(&item, "call_id"), "type": "function",
                "function": {"name": field(&item, "name"), "arguments": field(&item, "arguments")}});
            // Chat Completions expects all tool calls of a turn in one assistant message.
            match messages.last_mut().filter(|last| last["role"] == "assistant") {
                Some(last) => match last.get_mut("tool_calls").and_then(Value::as_array_mut) {
                    Some(calls) => calls.push(call),
                    None => last["tool_calls"] = json!([call]),
                },
                None => messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
            }
        }
        "function_call_output" => {
            let output = match item.get("output") {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Array(parts)) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
                other => other.map(Value::to_string).unwrap_or_default(),
            };
            messages
                .push(json!({"role": "tool", "tool_call_id": field(&item, "call_id"), "content": output}));
        }
        // Chat templates expect no reasoning from earlier turns.
        "reasoning" => {}
        other => return Err(invalid(format!("items of type `{other}` are not supported"), "input")),
    }
    Ok(())
}

fn convert_content(parts: Vec<Value>) -> Result<Value, GatewayError> {
    let mut out = Vec::with_capacity(parts.len());
    let mut plain = true;
    for part in parts {
        match part["type"].as_str() {
            Some("input_text" | "output_text" | "text") => {
                out.push(json!({"type": "text", "text": part["text"]}))
            }
            Some("refusal") => out.push(json!({"type": "text", "text": part["refusal"]})),
            Some("input_image") => {
                plain = false;
                out.push(json!({"type": "image_url", "image_url": {"url": part["image_url"]}}));
            }
            other => {
                let text = format!("content parts of type `{}` are not supported", other.unwrap_or("?"));
                return Err(invalid(text, "input"));
            }
        }
    }
    // Text-only content is sent as a string, because not every chat template accepts parts.
    Ok(if plain {
        out.iter().filter_map(|part| part["text"].as_str()).collect::<String>().into()
    } else {
        out.into()
    })
}

fn response_format(format: &Value) -> Option<Value> {
    match format["type"].as_str()? {
        "json_object" => Some(json!({"type": "json_object"})),
        "json_schema" => {
            let mut schema = format.as_object()?.clone();
            schema.remove("type");
            Some(json!({"type": "json_schema", "json_schema": schema}))
        }
        _ => None,
    }
}

fn convert_tools(tools: Value) -> Result<Value, GatewayError> {
    let Value::Array(tools) = tools else { return Err(invalid("`tools` must be a list", "tools")) };
    let one = |tool: Value| match tool {
        Value::Object(mut tool) if tool.get("type").and_then(Value::as_str) == Some("function") => {
            tool.remove("type");
            Ok(json!({"type": "function", "function": tool}))
        }
        other => Err(invalid(
            format!(
                "tools of type `{}` are not supported; only functions are",
                other["type"].as_str().unwrap_or("?")
            ),
            "tools",
        )),
    };
    tools.into_iter().map(one).collect::<Result<Vec<_>, _>>().map(Value::from)
}

fn convert_tool_choice(choice: Value) -> Value {
    match choice.get("name") {
        Some(name) => json!({"type": "function", "function": {"name": name}}),
        None => choice,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(request: &Value) -> Value {
        let (body, _) = to_chat(&Bytes::from(request.to_string())).unwrap();
        serde_json::from_slice(&body).unwrap()
    }

    #[test]
    fn translates_every_supported_field() {
        let chat = chat(&json!({
            "model": "m", "instructions": "be short", "stream": true, "max_output_tokens": 9, "temperature": 0.5,
            "chat_template_kwargs": {"enable_thinking": true}, "store": false, "reasoning": {"effort": "low"},
            "text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "object"}}},
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "tool_choice": {"type": "function", "name": "f"},
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
                {"type": "reasoning", "summary": []},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "4"},
            ],
        }));
        assert_eq!(chat["messages"][0], json!({"role": "system", "content": "be short"}));
        assert_eq!(chat["messages"][1], json!({"role": "user", "content": "ab"}));
        assert_eq!(chat["messages"][2]["tool_calls"].as_array().unwrap().len(), 2);
        assert_eq!(chat["messages"][3], json!({"role": "tool", "tool_call_id": "c1", "content": "4"}));
        assert_eq!(
            (chat["max_completion_tokens"].as_u64(), chat["reasoning_effort"].as_str()),
            (Some(9), Some("low"))
        );
        assert_eq!(chat["response_format"]["json_schema"]["name"], "s");
        assert_eq!(chat["tools"][0]["function"]["name"], "f");
        assert_eq!(chat["tool_choice"]["function"]["name"], "f");
        assert_eq!(chat["chat_template_kwargs"]["enable_thinking"], true, "unknown fields reach the node");
        assert_eq!(chat["stream_options"]["include_usage"], true);
        assert!(chat.get("store").is_none() && chat.get("input").is_none());
    }

    #[test]
    fn rejects_unsupported_fields_by_name() {
        for (request, param) in [
            (json!({"model": "m", "input": "x", "previous_response_id": "r"}), "previous_response_id"),
            (json!({"model": "m", "input": "x", "background": true}), "background"),
            (json!({"model": "m", "input": "x", "tools": [{"type": "web_search"}]}), "tools"),
            (json!({"model": "m", "input": [{"type": "item_reference", "id": "x"}]}), "input"),
            (json!({"model": "m"}), "input"),
        ] {
            let error = to_chat(&Bytes::from(request.to_string())).unwrap_err();
            assert!(
                matches!(error, GatewayError::InvalidRequest { param: Some(found), .. } if found == param),
                "{error}"
            );
        }
    }
}
