//! Translates a stream of chat completion chunks to the events of the Responses API. Every item is added, filled and
//! closed, and `sequence_number` rises by one per event. The last event is `response.completed`, `response.incomplete`
//! or `response.failed`.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use potstill_shared::id::unique_id;
use serde_json::{Value, json};

use super::request::ResponsesRequest;
use super::{
    call_item, convert_usage, message_item, reasoning_item, response_object, status_and_details, text_part,
};

/// The output item that is being streamed.
enum OpenItem {
    Reasoning { id: String, text: String },
    Message { id: String, text: String },
    Call { id: String, call: String, name: String, arguments: String, index: u64 },
}

/// Translates chunks to events. Does no I/O.
struct EventTranslator {
    request: ResponsesRequest,
    model: String,
    sequence: u64,
    output: Vec<Value>,
    open: Option<OpenItem>,
    finish: Option<String>,
    usage: Value,
    begun: bool,
    ended: bool,
    out: BytesMut,
}

impl EventTranslator {
    fn new(request: ResponsesRequest) -> Self {
        Self {
            model: request.model.clone(),
            request,
            sequence: 0,
            output: Vec::new(),
            open: None,
            finish: None,
            usage: Value::Null,
            begun: false,
            ended: false,
            out: BytesMut::new(),
        }
    }

    fn emit(&mut self, kind: &str, mut event: Value) {
        event["type"] = kind.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        self.out.extend_from_slice(format!("event: {kind}\ndata: {event}\n\n").as_bytes());
    }

    fn response_object(&self, status: &str, details: Value) -> Value {
        response_object(&self.request, &self.model, status, details, &self.output, self.usage.clone())
    }

    /// Translates the data of one chat stream event.
    fn translate(&mut self, data: &[u8]) {
        if self.ended {
            return;
        }
        if data == b"[DONE]" {
            return self.complete();
        }
        let Ok(chunk) = serde_json::from_slice::<Value>(data) else { return };
        if let Some(error) = chunk.get("error") {
            return self.fail(error["message"].as_str().unwrap_or("the answer broke off"));
        }
        if let Some(model) = chunk["model"].as_str() {
            model.clone_into(&mut self.model);
        }
        self.emit_created();
        if chunk["usage"].is_object() {
            self.usage = convert_usage(&chunk["usage"]);
        }
        let choice = &chunk["choices"][0];
        let delta = &choice["delta"];
        if let Some(text) =
            delta["reasoning_content"].as_str().or(delta["reasoning"].as_str()).filter(|t| !t.is_empty())
        {
            self.push_reasoning(text);
        }
        if let Some(text) = delta["content"].as_str().filter(|text| !text.is_empty()) {
            self.push_text(text);
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            self.push_tool_call(call);
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish = Some(reason.to_owned());
        }
    }

    fn emit_created(&mut self) {
        if !std::mem::replace(&mut self.begun, true) {
            let response = self.response_object("in_progress", Value::Null);
            self.emit("response.created", json!({"response": response.clone()}));
            self.emit("response.in_progress", json!({"response": response}));
        }
    }

    fn emit_item_added(&mut self, item: Value) {
        let index = self.output.len();
        self.emit("response.output_item.added", json!({"output_index": index, "item": item}));
    }

    fn push_reasoning(&mut self, text: &str) {
        if !matches!(self.open, Some(OpenItem::Reasoning { .. })) {
            self.close_item();
            let id = unique_id("rs");
            self.emit_item_added(reasoning_item(&id, "in_progress", None));
            let part = json!({"type": "reasoning_text", "text": ""});
            self.emit(
                "response.content_part.added",
                json!({"item_id": id, "output_index": self.output.len(), "content_index": 0, "part": part}),
            );
            self.open = Some(OpenItem::Reasoning { id, text: String::new() });
        }
        if let Some(OpenItem::Reasoning { id, text: all }) = &mut self.open {
            all.push_str(text);
            let id = id.clone();
            self.emit(
                "response.reasoning_text.delta",
                json!({"item_id": id, "output_index": self.output.len(), "content_index": 0, "delta": text}),
            );
        }
    }

    fn push_text(&mut self, text: &str) {
        if !matches!(self.open, Some(OpenItem::Message { .. })) {
            self.close_item();
            let id = unique_id("msg");
            self.emit_item_added(message_item(&id, "in_progress", None));
            self.emit("response.content_part.added", json!({"item_id": id, "output_index": self.output.len(), "content_index": 0, "part": text_part("")}));
            self.open = Some(OpenItem::Message { id, text: String::new() });
        }
        if let Some(OpenItem::Message { id, text: all }) = &mut self.open {
            all.push_str(text);
            let id = id.clone();
            self.emit("response.output_text.delta", json!({"item_id": id, "output_index": self.output.len(), "content_index": 0, "delta": text, "logprobs": []}));
        }
    }

    fn push_tool_call(&mut self, call: &Value) {
        let number = call["index"].as_u64().unwrap_or(0);
        if !matches!(&self.open, Some(OpenItem::Call { index, .. }) if *index == number) {
            self.close_item();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (id, name, call) = (unique_id("fc"), text(&call["function"]["name"]), text(&call["id"]));
            self.emit_item_added(call_item(&id, "in_progress", &call, &name, ""));
            self.open = Some(OpenItem::Call { id, call, name, arguments: String::new(), index: number });
        }
        let Some(piece) = call["function"]["arguments"].as_str().filter(|piece| !piece.is_empty()) else {
            return;
        };
        if let Some(OpenItem::Call { id, arguments, .. }) = &mut self.open {
            arguments.push_str(piece);
            let id = id.clone();
            self.emit(
                "response.function_call_arguments.delta",
                json!({"item_id": id, "output_index": self.output.len(), "delta": piece}),
            );
        }
    }

    /// Emits the closing events of the open item and adds the item to the output.
    fn close_item(&mut self) {
        let Some(open) = self.open.take() else { return };
        let index = self.output.len();
        let cut = matches!(self.finish.as_deref(), Some("length" | "content_filter"));
        let status = if cut { "incomplete" } else { "completed" };
        let item = match open {
            OpenItem::Reasoning { id, text } => {
                let part = json!({"type": "reasoning_text", "text": text});
                self.emit(
                    "response.reasoning_text.done",
                    json!({"item_id": id, "output_index": index, "content_index": 0, "text": text}),
                );
                self.emit(
                    "response.content_part.done",
                    json!({"item_id": id, "output_index": index, "content_index": 0, "part": part}),
                );
                reasoning_item(&id, status, Some(&text))
            }
            OpenItem::Message { id, text } => {
                self.emit("response.output_text.done", json!({"item_id": id, "output_index": index, "content_index": 0, "text": text, "logprobs": []}));
                self.emit("response.content_part.done", json!({"item_id": id, "output_index": index, "content_index": 0, "part": text_part(&text)}));
                message_item(&id, status, Some(&text))
            }
            OpenItem::Call { id, call, name, arguments, .. } => {
                self.emit(
                    "response.function_call_arguments.done",
                    json!({"item_id": id, "output_index": index, "name": name, "arguments": arguments}),
                );
                call_item(&id, status, &call, &name, &arguments)
            }
        };
        self.emit("response.output_item.done", json!({"output_index": index, "item": item}));
        self.output.push(item);
    }

    fn complete(&mut self) {
        self.emit_created();
        self.close_item();
        let (status, details) = status_and_details(self.finish.as_deref());
        let response = self.response_object(status, details);
        self.emit(&format!("response.{status}"), json!({"response": response}));
        self.ended = true;
    }

    fn fail(&mut self, message: &str) {
        self.emit_created();
        self.open = None;
        let mut response = self.response_object("failed", Value::Null);
        response["error"] = json!({"code": "server_error", "message": message});
        self.emit("response.failed", json!({"response": response}));
        self.ended = true;
    }
}

/// Body of a streamed response of the Responses API.
pub struct ResponsesStream<B> {
    inner: B,
    writer: EventTranslator,
}

impl<B> ResponsesStream<B> {
    /// Wraps `inner`, a stream of chat completion chunks.
    pub fn new(inner: B, request: ResponsesRequest) -> Self {
        Self { inner, writer: EventTranslator::new(request) }
    }
}

impl<B: Body<Data = Bytes, Error = std::io::Error> + Unpin> Body for ResponsesStream<B> {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        loop {
            let frame = match Pin::new(&mut self.inner).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => frame,
                other => return other,
            };
            let Ok(data) = frame.into_data() else { continue };
            // The inner body yields whole events only, with one `data` line each. Comments (heartbeats) are passed on.
            for block in data.split_inclusive(|byte| *byte == b'\n') {
                if let Some(data) = block.strip_prefix(b"data: ") {
                    self.writer.translate(data.trim_ascii_end());
                } else if block.starts_with(b": ") {
                    self.writer.out.extend_from_slice(block);
                    self.writer.out.extend_from_slice(b"\n");
                }
            }
            if !self.writer.out.is_empty() {
                let out = self.writer.out.split().freeze();
                return Poll::Ready(Some(Ok(Frame::data(out))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(events: &[&str]) -> Vec<Value> {
        let (_, request) =
            super::super::request::to_chat(&Bytes::from_static(br#"{"model":"m","input":"x"}"#)).unwrap();
        let mut writer = EventTranslator::new(request);
        events.iter().for_each(|event| writer.translate(event.as_bytes()));
        let text = String::from_utf8(writer.out.to_vec()).unwrap();
        text.lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(|data| serde_json::from_str(data).unwrap())
            .collect()
    }

    #[test]
    fn emits_added_delta_and_done_for_every_item() {
        let events = run(&[
            r#"{"model":"m","choices":[{"delta":{"role":"assistant","reasoning_content":"hm"}}]}"#,
            r#"{"model":"m","choices":[{"delta":{"content":"a"}}]}"#,
            r#"{"model":"m","choices":[{"delta":{"content":"b"}}]}"#,
            r#"{"model":"m","choices":[{"delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":"{"}}]}}]}"#,
            r#"{"model":"m","choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"}"}}]},"finish_reason":"tool_calls"}]}"#,
            r#"{"model":"m","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":5}}"#,
            "[DONE]",
        ]);
        let kinds: Vec<_> = events
            .iter()
            .map(|event| event["type"].as_str().unwrap()["response.".len()..].to_owned())
            .collect();
        assert_eq!(
            kinds,
            [
                "created",
                "in_progress",
                "output_item.added",
                "content_part.added",
                "reasoning_text.delta",
                "reasoning_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "content_part.added",
                "output_text.delta",
                "output_text.delta",
                "output_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
                "completed"
            ]
        );
        assert!(events.iter().enumerate().all(|(at, event)| event["sequence_number"] == at));
        let last = &events.last().unwrap()["response"];
        assert_eq!(last["output"][1]["content"][0]["text"], "ab");
        assert_eq!(last["output"][2]["arguments"], "{}");
        assert_eq!(
            (last["usage"]["output_tokens"].as_u64(), last["usage"]["total_tokens"].as_u64()),
            (Some(5), Some(6))
        );
    }

    #[test]
    fn truncated_or_failed_stream_is_never_completed() {
        let length = run(&[
            r#"{"model":"m","choices":[{"delta":{"content":"a"},"finish_reason":"length"}]}"#,
            "[DONE]",
        ]);
        let last = length.last().unwrap();
        assert_eq!(
            (last["type"].as_str(), last["response"]["incomplete_details"]["reason"].as_str()),
            (Some("response.incomplete"), Some("max_output_tokens"))
        );
        let broken = run(&[
            r#"{"model":"m","choices":[{"delta":{"content":"a"}}]}"#,
            r#"{"error":{"message":"gone"}}"#,
            "[DONE]",
        ]);
        let last = broken.last().unwrap();
        assert_eq!(
            (last["type"].as_str(), last["response"]["error"]["message"].as_str()),
            (Some("response.failed"), Some("gone"))
        );
    }
}
