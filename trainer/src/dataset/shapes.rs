//! Columns of published dataset formats, and the conversion of traces to rows. Writing files is left to [`super`].

use potstill_data::columns::ColumnType;
use potstill_data::records::Trace;
use serde_json::{Value, json};

/// Dataset formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DatasetFormat {
    /// `messages` with `role` and `content` (TRL, OpenAI).
    Messages,
    /// `conversations` with `from` and `value` (ShareGPT).
    Sharegpt,
    /// `instruction`, `input`, `output` (Alpaca).
    Alpaca,
    /// OpenThoughts-114k: `problem`, `deepseek_reasoning`, `deepseek_solution` and more.
    Openthoughts,
    /// OmniThought: one row per problem, with all its traces and their RV and CD.
    Omnithought,
    /// EasyDistill 2.0: `instruction`, `response`, `thought`, `solution` and scores.
    Easydistill,
    /// Preference pairs: `prompt`, `chosen`, `rejected`.
    Dpo,
    /// Preference pairs with a `beta` each, by the gap between the traces.
    Cogpo,
}

impl DatasetFormat {
    /// Returns the name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Sharegpt => "sharegpt",
            Self::Alpaca => "alpaca",
            Self::Openthoughts => "openthoughts",
            Self::Omnithought => "omnithought",
            Self::Easydistill => "easydistill",
            Self::Dpo => "dpo",
            Self::Cogpo => "cogpo",
        }
    }

    /// Returns names and types of the columns.
    pub(super) fn columns(self) -> Vec<(&'static str, ColumnType)> {
        let texts =
            |names: &[&'static str]| names.iter().map(|name| (*name, ColumnType::Text)).collect::<Vec<_>>();
        let turns = |who, what| ColumnType::Fields(texts(&[who, what])).into_list();
        let from = ColumnType::Fields(texts(&["id", "problem_id", "source", "teacher"]));
        match self {
            Self::Messages => vec![("messages", turns("role", "content")), ("metadata", from)],
            Self::Sharegpt => vec![("conversations", turns("from", "value")), ("system", ColumnType::Text)],
            Self::Alpaca => texts(&["instruction", "input", "output"]),
            Self::Openthoughts => texts(&[
                "problem",
                "deepseek_reasoning",
                "deepseek_solution",
                "ground_truth_solution",
                "domain",
                "source",
                "test_cases",
                "starter_code",
            ]),
            Self::Omnithought => {
                let judged =
                    || ColumnType::Fields(vec![("level", ColumnType::Int), ("judge", ColumnType::Text)]);
                let mut trace = texts(&["thought", "solution", "full_response", "teacher"]);
                trace.extend([
                    ("thought_correctness_verify", ColumnType::Bool),
                    ("Reasoning_Verbosity", judged()),
                    ("Cognitive_Difficulty", judged()),
                ]);
                vec![
                    ("question", ColumnType::Text),
                    ("answer", ColumnType::Text),
                    ("reasoning", ColumnType::Fields(trace).into_list()),
                ]
            }
            Self::Easydistill => {
                let mut columns = texts(&["instruction", "response", "thought", "solution"]);
                columns.extend([
                    ("reasoning_verbosity", ColumnType::Int),
                    ("cognitive_difficulty", ColumnType::Int),
                    ("logical_correctness", ColumnType::Bool),
                ]);
                columns
            }
            Self::Dpo | Self::Cogpo => {
                let side = || turns("role", "content");
                let mut columns = vec![("prompt", side()), ("chosen", side()), ("rejected", side())];
                if self == Self::Cogpo {
                    columns.extend([("beta", ColumnType::Double), ("gap", ColumnType::Text)]);
                }
                columns
            }
        }
    }

    /// Converts a trace to a row. Pairs and OmniThought rows are built elsewhere.
    pub(super) fn row(self, trace: &Trace, prompt: &str) -> Value {
        let (asked, problem) = (student_prompt(prompt, trace), &trace.problem);
        let scores = trace.scores.unwrap_or_default();
        match self {
            Self::Sharegpt => json!({
                "conversations": [{ "from": "human", "value": asked }, { "from": "gpt", "value": trace.completion() }],
                "system": "",
            }),
            Self::Alpaca => json!({ "instruction": asked, "input": "", "output": trace.completion() }),
            Self::Openthoughts => json!({
                "problem": problem.problem,
                "deepseek_reasoning": trace.thinking,
                "deepseek_solution": trace.answer,
                "ground_truth_solution": problem.answer,
                "domain": problem.metadata.get("domain").cloned().unwrap_or_else(|| json!(problem.task)),
                "source": problem.source,
                "test_cases": problem.metadata.get("test_cases"),
                "starter_code": problem.metadata.get("starter_code"),
            }),
            Self::Easydistill => json!({
                "instruction": asked,
                "response": trace.completion(),
                "thought": trace.thinking,
                "solution": trace.answer,
                "reasoning_verbosity": scores.rv,
                "cognitive_difficulty": scores.cd,
                "logical_correctness": is_correct(trace),
            }),
            _ => json!({
                "messages": [message("user", &asked), message("assistant", &trace.completion())],
                "metadata": {
                    "id": trace.id, "problem_id": problem.id, "source": problem.source, "teacher": trace.origin.teacher,
                },
            }),
        }
    }

    /// Returns the entry for LLaMA-Factory's `dataset_info.json`, or `None` if LLaMA-Factory does not read the format.
    pub(super) fn llama_factory(self, file: &str) -> Option<Value> {
        let tags = json!({
            "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
        });
        Some(match self {
            Self::Messages => json!({
                "file_name": file, "formatting": "sharegpt", "columns": { "messages": "messages" }, "tags": tags,
            }),
            Self::Sharegpt => json!({
                "file_name": file, "formatting": "sharegpt", "columns": { "messages": "conversations", "system": "system" },
            }),
            Self::Alpaca => json!({
                "file_name": file, "columns": { "prompt": "instruction", "query": "input", "response": "output" },
            }),
            Self::Easydistill => json!({
                "file_name": file, "columns": { "prompt": "instruction", "response": "response" },
            }),
            Self::Openthoughts | Self::Omnithought | Self::Dpo | Self::Cogpo => return None,
        })
    }
}

/// Returns a chat message.
pub(super) fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// Returns the student's prompt for the problem of `trace`.
pub(super) fn student_prompt(prompt: &str, trace: &Trace) -> String {
    prompt.replace("{{ problem }}", &trace.problem.problem)
}

/// Returns whether the verdict on `trace` is correct; `None` if unverifiable or without a verdict.
fn is_correct(trace: &Trace) -> Option<bool> {
    trace.verdict.as_ref().and_then(|verdict| verdict.correct)
}

/// Returns an OmniThought row of all traces of one problem.
pub(super) fn omnithought_row(traces: &[Trace]) -> Value {
    let reasoning: Vec<Value> = traces
        .iter()
        .map(|trace| {
            let scores = trace.scores.unwrap_or_default();
            let level = |level: Option<u8>| level.map(|level| json!({ "level": level, "judge": null }));
            json!({
                "thought": trace.thinking,
                "solution": trace.answer,
                "full_response": trace.completion(),
                "teacher": trace.origin.teacher,
                "thought_correctness_verify": is_correct(trace),
                "Reasoning_Verbosity": level(scores.rv),
                "Cognitive_Difficulty": level(scores.cd),
            })
        })
        .collect();
    let first = traces.first().map(|trace| &trace.problem);
    json!({
        "question": first.map(|problem| &problem.problem),
        "answer": first.and_then(|problem| problem.answer.as_ref()),
        "reasoning": reasoning,
    })
}
