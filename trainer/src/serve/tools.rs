//! Extracts tool calls from completions, in the format that the model's chat template teaches. Formats: `<tool_call>`
//! around JSON (Hermes, Qwen), `[TOOL_CALLS]` before a list (Mistral), or only JSON with `name` and `parameters` (Llama
//! 3). Calls are not executed.

use potstill_shared::id::unique_id;
use serde_json::{Value, json};

const CALL_OPEN: &str = "<tool_call>";
const CALL_CLOSE: &str = "</tool_call>";
const LIST_MARK: &str = "[TOOL_CALLS]";
const PYTHON_MARK: &str = "<|python_tag|>";

/// Formats of tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToolFormat {
    /// Each call is enclosed in tags.
    Tagged,
    /// A list of calls follows a mark.
    MarkedList,
    /// The whole answer is a call.
    BareJson,
}

impl ToolFormat {
    /// Returns the format that the source of a chat template uses, or `None` if the template has no tools.
    pub(super) fn detect(template: &str) -> Option<Self> {
        if template.contains(CALL_OPEN) {
            Some(Self::Tagged)
        } else if template.contains(LIST_MARK) {
            Some(Self::MarkedList)
        } else if template.contains("parameters") && template.contains("tools") {
            Some(Self::BareJson)
        } else {
            None
        }
    }

    /// Returns the mark before a call.
    fn start_mark(self) -> &'static str {
        match self {
            Self::Tagged => CALL_OPEN,
            Self::MarkedList => LIST_MARK,
            Self::BareJson => "",
        }
    }
}

/// Part of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum AnswerPart {
    /// Text of the answer.
    Text(String),
    /// An entry of OpenAI's `tool_calls`, without its index.
    Call(Value),
}

/// Incremental parser of tool calls. Text that may start a call is held back. Held text that turns out to be no call is
/// returned as text.
#[derive(Debug)]
pub(super) struct ToolParser {
    format: ToolFormat,
    buffer: String,
    in_call: bool,
    calls: usize,
}

impl ToolParser {
    /// Creates a parser.
    pub(super) fn new(format: ToolFormat) -> Self {
        Self { format, buffer: String::new(), in_call: format == ToolFormat::BareJson, calls: 0 }
    }

    /// Returns the number of calls so far.
    pub(super) fn num_calls(&self) -> usize {
        self.calls
    }

    /// Takes more text and returns the completed parts.
    pub(super) fn push(&mut self, text: &str) -> Vec<AnswerPart> {
        self.buffer.push_str(text);
        let mut parts = Vec::new();
        loop {
            if !self.in_call {
                let mark = self.format.start_mark();
                match self.buffer.find(mark) {
                    Some(at) => {
                        let before: String = self.buffer.drain(..at).collect();
                        self.add_text(&mut parts, before);
                        self.in_call = true;
                    }
                    None => {
                        let keep =
                            (1..mark.len()).rev().find(|&n| self.buffer.ends_with(&mark[..n])).unwrap_or(0);
                        let ready = self.buffer.len() - keep;
                        let before: String = self.buffer.drain(..ready).collect();
                        self.add_text(&mut parts, before);
                        return parts;
                    }
                }
            }
            if self.format != ToolFormat::Tagged {
                return parts;
            }
            let Some(end) = self.buffer.find(CALL_CLOSE) else { return parts };
            let block: String = self.buffer.drain(..end + CALL_CLOSE.len()).collect();
            self.in_call = false;
            match parse_call(&block[CALL_OPEN.len()..end]) {
                Some(call) => self.add_call(&mut parts, call),
                None => parts.push(AnswerPart::Text(block)),
            }
        }
    }

    /// Returns the remaining parts at the end of the answer.
    pub(super) fn finish(&mut self) -> Vec<AnswerPart> {
        let rest = std::mem::take(&mut self.buffer);
        let mut parts = Vec::new();
        let body = match self.format {
            _ if !self.in_call => rest.as_str(),
            // The end of the answer also closes the last call.
            ToolFormat::Tagged => rest.strip_prefix(CALL_OPEN).unwrap_or(&rest),
            ToolFormat::MarkedList => rest.strip_prefix(LIST_MARK).unwrap_or(&rest),
            ToolFormat::BareJson => rest.trim().strip_prefix(PYTHON_MARK).unwrap_or(rest.trim()),
        };
        let calls = if self.in_call { parse_calls(body) } else { None };
        match calls {
            Some(calls) => calls.into_iter().for_each(|call| self.add_call(&mut parts, call)),
            None => self.add_text(&mut parts, rest),
        }
        parts
    }

    /// Adds a call.
    fn add_call(&mut self, parts: &mut Vec<AnswerPart>, call: Value) {
        self.calls += 1;
        parts.push(AnswerPart::Call(call));
    }

    /// Adds text.
    fn add_text(&self, parts: &mut Vec<AnswerPart>, text: String) {
        // Whitespace between calls is not part of the answer.
        if !text.is_empty() && (self.calls == 0 || !text.trim().is_empty()) {
            parts.push(AnswerPart::Text(text));
        }
    }
}

/// Parses one call or a list of calls. Returns `None` if the text is neither.
fn parse_calls(text: &str) -> Option<Vec<Value>> {
    match serde_json::from_str(text.trim()).ok()? {
        Value::Array(list) if !list.is_empty() => list.iter().map(openai_call).collect(),
        one => Some(vec![openai_call(&one)?]),
    }
}

/// Parses one call.
fn parse_call(text: &str) -> Option<Value> {
    openai_call(&serde_json::from_str(text.trim()).ok()?)
}

/// Converts a call to OpenAI's form with a new id.
fn openai_call(call: &Value) -> Option<Value> {
    let name = call.get("name")?.as_str()?;
    let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
        Some(Value::String(text)) => text.clone(),
        Some(arguments) => arguments.to_string(),
        None => "{}".to_owned(),
    };
    Some(
        json!({"id": unique_id("call"), "type": "function", "function": {"name": name, "arguments": arguments}}),
    )
}

/// Converts a message's `tool_calls` for templates, which expect arguments as an object instead of a JSON string.
pub(super) fn for_template(calls: &Value) -> Value {
    let mut calls = calls.clone();
    for call in calls.as_array_mut().into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Value::String(text) = arguments
            && let Ok(read) = serde_json::from_str::<Value>(text)
        {
            *arguments = read;
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Parses `text` in chunks of `cut` characters, and returns the remaining text and the calls with name and
    /// arguments.
    fn parse_in_chunks(format: ToolFormat, text: &str, cut: usize) -> (String, Vec<(String, String)>) {
        let mut parser = ToolParser::new(format);
        let characters: Vec<char> = text.chars().collect();
        let mut parts: Vec<AnswerPart> =
            characters.chunks(cut).flat_map(|chunk| parser.push(&chunk.iter().collect::<String>())).collect();
        parts.extend(parser.finish());
        let (mut text, mut calls) = (String::new(), Vec::new());
        for part in parts {
            match part {
                AnswerPart::Text(more) => text.push_str(&more),
                AnswerPart::Call(call) => {
                    let field = |name: &str| call["function"][name].as_str().unwrap().to_owned();
                    calls.push((field("name"), field("arguments")));
                }
            }
        }
        assert_eq!(calls.len(), parser.num_calls());
        (text, calls)
    }

    #[test]
    fn finds_calls_in_every_format_at_any_chunk_size() {
        let call = ("f".to_owned(), "{\"x\":1}".to_owned());
        for (format, text, rest, count) in [
            (
                ToolFormat::Tagged,
                "I look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>{\"name\":\"f\",\"arguments\":\"{\\\"x\\\":1}\"}</tool_call>",
                "I look.\n",
                2,
            ),
            (ToolFormat::Tagged, "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": 1}}", "", 1),
            (
                ToolFormat::Tagged,
                "a <tool_call>no json</tool_call> b",
                "a <tool_call>no json</tool_call> b",
                0,
            ),
            (ToolFormat::Tagged, "1 < 2 <tool", "1 < 2 <tool", 0),
            (ToolFormat::MarkedList, "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"x\": 1}}]", "", 1),
            (ToolFormat::BareJson, "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"x\": 1}}", "", 1),
            (ToolFormat::BareJson, "{\"name\": 7}", "{\"name\": 7}", 0),
            (ToolFormat::BareJson, "Hello.", "Hello.", 0),
        ] {
            for cut in [1, 3, 1000] {
                let (said, calls) = parse_in_chunks(format, text, cut);
                assert_eq!((said.as_str(), calls), (rest, vec![call.clone(); count]), "{text}");
            }
        }
    }

    proptest! {
        #[test]
        fn text_without_calls_is_unchanged(text in "[<tol_ca>/x é]{0,40}", cut in 1usize..7) {
            prop_assume!(!text.contains(CALL_OPEN));
            prop_assert_eq!(parse_in_chunks(ToolFormat::Tagged, &text, cut), (text, vec![]));
        }
    }

    #[test]
    fn templates_get_call_arguments_as_objects() {
        let calls = json!([{"function": {"name": "f", "arguments": "{\"x\": 1}"}}, {"function": {"arguments": "no"}}]);
        let read = for_template(&calls);
        assert_eq!(
            (&read[0]["function"]["arguments"]["x"], &read[1]["function"]["arguments"]),
            (&json!(1), &json!("no"))
        );
    }
}
