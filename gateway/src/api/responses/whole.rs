//! Translates a chat completion that is not streamed to a response object.

use bytes::Bytes;
use potstill_shared::id::unique_id;
use serde_json::Value;

use super::request::ResponsesRequest;
use super::{call_item, convert_usage, message_item, reasoning_item, response_object, status_and_details};

/// Translates a normalized chat completion. A body that is not JSON is returned unchanged.
pub fn from_chat(body: &Bytes, request: &ResponsesRequest) -> Bytes {
    let Ok(chat) = serde_json::from_slice::<Value>(body) else { return body.clone() };
    let choice = &chat["choices"][0];
    let message = &choice["message"];
    let (status, details) = status_and_details(choice["finish_reason"].as_str());
    let mut output = Vec::new();
    let thinking = message["reasoning_content"].as_str().or(message["reasoning"].as_str());
    if let Some(text) = thinking.filter(|text| !text.is_empty()) {
        output.push(reasoning_item(&unique_id("rs"), "completed", Some(text)));
    }
    let calls = message["tool_calls"].as_array().map_or(&[][..], Vec::as_slice);
    let text = message["content"].as_str().unwrap_or_default();
    if !text.is_empty() || calls.is_empty() {
        output.push(message_item(&unique_id("msg"), status, Some(text)));
    }
    for call in calls {
        let part = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (name, arguments) = (part(&call["function"]["name"]), part(&call["function"]["arguments"]));
        output.push(call_item(&unique_id("fc"), "completed", &part(&call["id"]), &name, &arguments));
    }
    let model = chat["model"].as_str().unwrap_or(&request.model);
    let response = response_object(request, model, status, details, &output, convert_usage(&chat["usage"]));
    serde_json::to_vec(&response).unwrap_or_default().into()
}
