//! Structured output: `response_format`, vLLM's `structured_outputs` and `guided_*`, and forced tool calls
//! (`tool_choice`). Translates request fields to a [`Grammar`]; the engine applies it.

use std::sync::Arc;

use potstill_engine::EngineError;
use potstill_engine::grammar::{Grammar, GrammarCompiler, GrammarMatcher, with_bounded_whitespace};
use potstill_shared::openai::Extra;
use serde_json::{Value, json};

use super::ServedModel;
use super::error::NodeError;
use super::options::invalid_field;
use super::tools::ToolFormat;

/// Compiles a grammar on a blocking thread. The first call also creates the compiler.
pub(super) async fn compile_grammar(
    node: &Arc<ServedModel>,
    form: Grammar,
) -> Result<GrammarMatcher, NodeError> {
    let node = Arc::clone(node);
    let compiled = tokio::task::spawn_blocking(move || {
        let (size, eos) = &node.vocabulary;
        let made = || GrammarCompiler::new(&node.tokenizer, *size, eos).map_err(|error| error.to_string());
        let grammars = node.grammars.get_or_init(made);
        grammars.as_ref().map_err(|problem| EngineError::Grammar(problem.clone()))?.compile(&form)
    });
    Ok(compiled.await.map_err(|error| EngineError::Stopped(error.to_string()))??)
}

/// Returns the grammar of a chat request, or `None` for free text. A forced tool call takes precedence over
/// `response_format`, and that over vLLM's fields.
pub(super) fn chat_grammar(extra: &Extra, tools: Option<ToolFormat>) -> Result<Option<Grammar>, NodeError> {
    if let Some(form) = forced_call_grammar(extra, tools)? {
        return Ok(Some(form));
    }
    let wrong = |problem: &str| invalid_field("response_format", problem);
    let Some(format) = extra.get("response_format").filter(|format| !format.is_null()) else {
        return text_grammar(extra);
    };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => text_grammar(extra),
        Some("json_object") => Ok(Some(Grammar::Json(json!({"type": "object"})))),
        Some("json_schema") => {
            let inner = format
                .get("json_schema")
                .ok_or_else(|| wrong("of type `json_schema` needs `json_schema`"))?;
            match inner.get("schema") {
                Some(schema @ Value::Object(_)) => Ok(Some(Grammar::Json(schema.clone()))),
                _ => Err(wrong("needs a schema in `json_schema.schema`")),
            }
        }
        _ => Err(wrong("must have the type `text`, `json_object` or `json_schema`")),
    }
}

/// Returns the grammar of vLLM's fields, or `None` without them. `structured_outputs` takes precedence over `guided_*`.
pub(super) fn text_grammar(extra: &Extra) -> Result<Option<Grammar>, NodeError> {
    let newer = extra.get("structured_outputs").filter(|value| value.is_object());
    let field = |new: &str, old: &str| newer.and_then(|outputs| outputs.get(new)).or_else(|| extra.get(old));
    let of = |new, old| field(new, old).filter(|value| !value.is_null());
    let string = |value: &Value, name| match value {
        Value::String(text) => Ok(text.clone()),
        _ => Err(invalid_field(name, "must be a text")),
    };
    if let Some(schema) = of("json", "guided_json") {
        let schema = match schema {
            Value::String(text) => serde_json::from_str(text)
                .map_err(|error| invalid_field("guided_json", format!("is no JSON schema: {error}")))?,
            schema => schema.clone(),
        };
        return Ok(Some(Grammar::Json(schema)));
    }
    if let Some(pattern) = of("regex", "guided_regex") {
        return Ok(Some(Grammar::Regex(string(pattern, "guided_regex")?)));
    }
    if let Some(choices) = of("choice", "guided_choice") {
        let texts = choices.as_array().filter(|choices| !choices.is_empty());
        let texts = texts.ok_or_else(|| invalid_field("guided_choice", "must be a list of texts"))?;
        let texts = texts.iter().map(|text| string(text, "guided_choice")).collect::<Result<_, _>>()?;
        return Ok(Some(Grammar::Choice(texts)));
    }
    of("grammar", "guided_grammar").map(|text| Ok(Grammar::Lark(string(text, "guided_grammar")?))).transpose()
}

/// Returns the grammar of a forced tool call, for `tool_choice` `required` or a named function. Fails for functions
/// that are not in `tools`.
fn forced_call_grammar(extra: &Extra, tools: Option<ToolFormat>) -> Result<Option<Grammar>, NodeError> {
    let wrong = |problem: &str| invalid_field("tool_choice", problem);
    let name = match extra.get("tool_choice") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" | "none" => return Ok(None),
            "required" => None,
            _ => return Err(wrong("must be `none`, `auto`, `required` or a function")),
        },
        Some(choice) => match choice.pointer("/function/name").and_then(Value::as_str) {
            Some(name) => Some(name),
            None => return Err(wrong("must be `none`, `auto`, `required` or a function")),
        },
    };
    let Some(format) = tools else { return Err(wrong("needs `tools`")) };
    let parameters = if format == ToolFormat::BareJson { "parameters" } else { "arguments" };
    let functions = extra.get("tools").and_then(Value::as_array).into_iter().flatten();
    let calls: Vec<Value> = functions
        .filter_map(|tool| tool.get("function"))
        .filter(|function| name.is_none_or(|name| function.get("name").is_some_and(|own| own == name)))
        .map(|function| {
            let schema = function.get("parameters").cloned().unwrap_or_else(|| json!({"type": "object"}));
            json!({"type": "object", "required": ["name", parameters], "additionalProperties": false,
                "properties": {"name": {"const": function["name"]}, parameters: schema}})
        })
        .collect();
    if calls.is_empty() {
        return Err(wrong("names none of `tools`"));
    }
    let call = with_bounded_whitespace(json!({"anyOf": calls}));
    Ok(Some(match format {
        ToolFormat::BareJson => Grammar::Json(call),
        // The mark before the list is a special token, which a grammar over text cannot produce.
        ToolFormat::MarkedList => return Err(wrong("cannot be forced with this model's chat template")),
        ToolFormat::Tagged => {
            Grammar::Lark(format!("start: \"<tool_call>\\n\" call \"\\n</tool_call>\"\ncall: %json {call}\n"))
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extra(value: Value) -> Extra {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn parses_structured_output_fields_of_openai_and_vllm() {
        let schema = json!({"type": "object"});
        for (asked, form) in [
            (json!({}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(Grammar::Json(schema.clone()))),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}),
                Some(Grammar::Json(schema.clone())),
            ),
            (json!({"guided_json": "{\"type\": \"object\"}"}), Some(Grammar::Json(schema.clone()))),
            (json!({"structured_outputs": {"regex": "a+"}}), Some(Grammar::Regex("a+".into()))),
            (json!({"guided_choice": ["a", "b"]}), Some(Grammar::Choice(vec!["a".into(), "b".into()]))),
            (json!({"guided_grammar": "start: \"a\""}), Some(Grammar::Lark("start: \"a\"".into()))),
            (json!({"tool_choice": "auto"}), None),
        ] {
            assert_eq!(chat_grammar(&extra(asked.clone()), None).unwrap(), form, "{asked}");
        }
        for asked in [
            json!({"response_format": {"type": "xml"}}),
            json!({"response_format": {"type": "json_schema"}}),
            json!({"guided_choice": []}),
            json!({"guided_regex": 1}),
            json!({"tool_choice": "required"}),
            json!({"tool_choice": "always"}),
        ] {
            assert!(chat_grammar(&extra(asked.clone()), None).is_err(), "{asked}");
        }
    }

    #[test]
    fn forced_call_allows_only_the_named_function() {
        let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}, {"type": "function", "function": {"name": "g"}}]);
        let named =
            extra(json!({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "g"}}}));
        match chat_grammar(&named, Some(ToolFormat::Tagged)).unwrap() {
            Some(Grammar::Lark(text)) => {
                assert!(text.contains("<tool_call>") && text.contains("\"g\"") && !text.contains("\"f\""))
            }
            other => panic!("{other:?}"),
        }
        let unknown =
            extra(json!({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "h"}}}));
        assert!(chat_grammar(&unknown, Some(ToolFormat::BareJson)).is_err());
    }
}
