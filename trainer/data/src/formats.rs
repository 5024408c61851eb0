//! Row formats of published datasets: where a row holds the problem, the reference answer, the traces and the scores.
//!
//! Deliberately absent: opening files (`rows`) and the metadata of a row (`jsonl`).

use potstill_shared::reasoning;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::records::{ProgramTest, Scores, SourceTrace};

/// Largest number of tests per problem; further tests are discarded.
const MAX_TESTS: usize = 32;

/// Format of a published dataset, or a row format that many datasets share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DatasetFormat {
    /// `openai/gsm8k`: the reference answer follows `####` in `answer`.
    Gsm8k,
    /// MATH (Hendrycks et al.): the reference answer is in the last `\boxed{}` of `solution`.
    Math,
    /// `AI-MO/NuminaMath-CoT` and `-1.5`: the reference answer is `answer`, else the last `\boxed{}` of `solution`.
    NuminaMath,
    /// `zwhe99/DeepMath-103K`: `question` and `final_answer`, with up to three traces of DeepSeek-R1.
    #[serde(rename = "deepmath-103k")]
    DeepMath103k,
    /// `nvidia/OpenCodeReasoning`: `input`, without a reference answer; the trace is `output`.
    OpenCodeReasoning,
    /// `open-thoughts/OpenThoughts-114k`, in the configurations `default` (conversations) and `metadata`.
    #[serde(rename = "openthoughts-114k")]
    OpenThoughts114k,
    /// `open-thoughts/OpenThoughts2-1M` and `OpenThoughts3-1.2M`: conversations with one trace.
    #[serde(rename = "openthoughts")]
    OpenThoughts,
    /// `alibaba-pai/OmniThought`: one problem per row, with several traces and their RV and CD.
    #[serde(rename = "omnithought")]
    OmniThought,
    /// ShareGPT: `conversations` with turns of `from` and `value`.
    #[serde(rename = "sharegpt")]
    ShareGpt,
    /// OpenAI chat: `messages` with `role` and `content`.
    Messages,
    /// Alpaca: `instruction`, an optional `input`, and `output`.
    Alpaca,
    /// EasyDistill 1.x and 2.0: `instruction`, with the trace in `thought` and `solution`, or in `response` or
    /// `output`.
    #[serde(rename = "easydistill")]
    EasyDistill,
}

type Fields = Map<String, Value>;

impl DatasetFormat {
    /// Returns the problem text and the reference answer of a row.
    ///
    /// # Errors
    ///
    /// Returns a message that names the missing or invalid field.
    pub fn parse_problem(self, row: &Fields) -> Result<(String, Option<String>), String> {
        let text = |name: &str| required_text(row, name);
        let optional = |name: &str| row.get(name).and_then(as_text).filter(|text| !text.trim().is_empty());
        match self {
            Self::Gsm8k => {
                let answer = text("answer")?;
                let last = answer.rsplit_once("####").ok_or("`answer` holds no `####`")?.1;
                Ok((text("question")?, Some(last.trim().replace(',', ""))))
            }
            Self::Math => Ok((text("problem")?, last_boxed(&text("solution")?))),
            Self::NuminaMath => {
                // For proofs, `answer` holds one of these placeholders.
                let given = optional("answer").filter(|answer| answer != "proof" && answer != "notfound");
                let answer = given.or_else(|| optional("solution").as_deref().and_then(last_boxed));
                Ok((text("problem")?, answer))
            }
            Self::DeepMath103k => Ok((text("question")?, optional("final_answer"))),
            Self::OpenCodeReasoning => match text("input")? {
                // The second split refers to problems of other datasets and writes `-` here.
                dash if dash.trim() == "-" => Err("`input` is not in this split".to_owned()),
                input => Ok((input, None)),
            },
            Self::OpenThoughts114k if row.contains_key("problem") => {
                Ok((text("problem")?, optional("ground_truth_solution").as_deref().and_then(last_boxed)))
            }
            Self::OpenThoughts114k | Self::OpenThoughts | Self::ShareGpt => {
                let asked = first_user_turn(row, "conversations", "from", "value", &["human", "user"])?;
                Ok((asked, None))
            }
            Self::Messages => Ok((first_user_turn(row, "messages", "role", "content", &["user"])?, None)),
            Self::OmniThought => Ok((text("question")?, optional("answer"))),
            Self::Alpaca => {
                let instruction = text("instruction")?;
                Ok((
                    optional("input")
                        .map_or(instruction.clone(), |input| format!("{instruction}\n\n{input}")),
                    None,
                ))
            }
            Self::EasyDistill => Ok((text("instruction")?, optional("answer"))),
        }
    }

    /// Returns the traces of a row. Texts without separate reasoning, and traces marked as incorrect, are skipped.
    pub fn parse_traces(self, row: &Fields) -> Vec<SourceTrace> {
        let text = |name: &str| row.get(name).and_then(as_text);
        let whole = |teacher: &str, text: Option<String>| {
            text.and_then(|text| parse_trace(teacher, &text)).into_iter().collect::<Vec<_>>()
        };
        match self {
            Self::Gsm8k | Self::Math | Self::NuminaMath => Vec::new(),
            Self::DeepMath103k => {
                let solutions = ["r1_solution_1", "r1_solution_2", "r1_solution_3"];
                solutions.iter().flat_map(|name| whole("DeepSeek-R1", text(name))).collect()
            }
            Self::OpenCodeReasoning => whole("DeepSeek-R1", text("output")),
            Self::OpenThoughts114k if row.contains_key("deepseek_reasoning") => {
                let (thinking, answer) = (text("deepseek_reasoning"), text("deepseek_solution"));
                source_trace("DeepSeek-R1", thinking, answer, None).into_iter().collect()
            }
            Self::OpenThoughts114k => whole("DeepSeek-R1", first_model_turn(row)),
            // Only OpenThoughts3 has the column `difficulty`; its teacher is QwQ-32B.
            Self::OpenThoughts => {
                let third = row.contains_key("difficulty");
                whole(if third { "QwQ-32B" } else { "DeepSeek-R1" }, first_model_turn(row))
            }
            Self::ShareGpt => whole("unknown", first_model_turn(row)),
            Self::Messages => first_assistant_trace(row),
            Self::OmniThought => {
                let rows = row.get("reasoning").and_then(Value::as_array);
                rows.into_iter()
                    .flatten()
                    .filter_map(|trace| parse_omnithought_trace(trace.as_object()?))
                    .collect()
            }
            Self::Alpaca => whole("unknown", text("output")),
            Self::EasyDistill => {
                let scores = parse_scores(row, "reasoning_verbosity", "cognitive_difficulty");
                let apart = source_trace("unknown", text("thought"), text("solution"), scores);
                let joined = || parse_trace("unknown", &text("response").or_else(|| text("output"))?);
                apart.or_else(joined).into_iter().collect()
            }
        }
    }
}

/// Parses program tests in the form of OpenThoughts: equally long lists `inputs` and `outputs`, as JSON or as a
/// string with JSON. Returns at most `MAX_TESTS` pairs. Returns `None` for other forms and for tests of functions
/// (`fn_name`).
pub fn parse_program_tests(value: &Value) -> Option<Vec<ProgramTest>> {
    let parsed: Value;
    let value = match value {
        Value::String(text) => {
            parsed = serde_json::from_str(text).ok()?;
            &parsed
        }
        other => other,
    };
    if value.get("fn_name").is_some_and(|name| !name.is_null()) {
        return None;
    }
    let texts = |name: &str| -> Option<Vec<String>> {
        value.get(name)?.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
    };
    let (inputs, outputs) = (texts("inputs")?, texts("outputs")?);
    let tests = inputs.into_iter().zip(outputs).map(|(input, output)| ProgramTest { input, output });
    let tests: Vec<ProgramTest> = tests.take(MAX_TESTS).collect();
    (!tests.is_empty()).then_some(tests)
}

fn source_trace(
    teacher: &str,
    thinking: Option<String>,
    answer: Option<String>,
    scores: Option<Scores>,
) -> Option<SourceTrace> {
    let (thinking, answer) = (thinking?.trim().to_owned(), answer?.trim().to_owned());
    let whole = !thinking.is_empty() && !answer.is_empty();
    whole.then(|| SourceTrace { teacher: teacher.to_owned(), thinking, answer, scores })
}

/// Parses a text with reasoning and answer. Think tags or OpenThoughts' sections mark the reasoning. Returns `None`
/// if either part is empty.
pub fn parse_trace(teacher: &str, text: &str) -> Option<SourceTrace> {
    let (thinking, answer) = reasoning::split_any_format(text);
    source_trace(teacher, thinking, Some(answer), None)
}

/// Returns the scores in the fields `rv` and `cd`, each a number, a numeric string, or an object with a `level`.
/// Values that are not integers from 0 to 9 count as missing.
fn parse_scores(row: &Fields, rv: &str, cd: &str) -> Option<Scores> {
    let level = |name: &str| {
        let value = row.get(name)?;
        let number = value.get("level").unwrap_or(value);
        let number = number.as_f64().or_else(|| number.as_str()?.trim().parse().ok())?;
        (number.fract() == 0.0 && (0.0..=9.0).contains(&number)).then_some(number as u8)
    };
    let scores = Scores { rv: level(rv), cd: level(cd) };
    (scores != Scores::default()).then_some(scores)
}

fn parse_omnithought_trace(row: &Fields) -> Option<SourceTrace> {
    let text = |name: &str| row.get(name).and_then(as_text);
    // The authors of the dataset verified this trace as incorrect.
    let wrong = match row.get("thought_correctness_verify") {
        Some(Value::Bool(right)) => !right,
        Some(value) => value.as_f64() == Some(0.0),
        None => false,
    };
    if wrong {
        return None;
    }
    let teacher = text("teacher").unwrap_or_else(|| "unknown".to_owned());
    let scores = parse_scores(row, "Reasoning_Verbosity", "Cognitive_Difficulty");
    source_trace(&teacher, text("thought"), text("solution"), scores).or_else(|| {
        let whole = parse_trace(&teacher, &text("full_response")?)?;
        Some(SourceTrace { scores, ..whole })
    })
}

/// Returns the text of the model's first turn in `conversations`.
fn first_model_turn(row: &Fields) -> Option<String> {
    let turns = row.get("conversations")?.as_array()?;
    let models = ["gpt", "assistant", "model"];
    let turn = turns.iter().find(|turn| turn["from"].as_str().is_some_and(|from| models.contains(&from)))?;
    turn.get("value").and_then(as_text)
}

fn first_assistant_trace(row: &Fields) -> Vec<SourceTrace> {
    let turns = row.get("messages").and_then(Value::as_array);
    let Some(turn) = turns.into_iter().flatten().find(|turn| turn["role"] == "assistant") else {
        return Vec::new();
    };
    let content = turn.get("content").and_then(as_text);
    let apart = turn.get("reasoning_content").or_else(|| turn.get("thinking")).and_then(as_text);
    let trace = match apart {
        Some(thinking) => source_trace("unknown", Some(thinking), content, None),
        None => content.and_then(|text| parse_trace("unknown", &text)),
    };
    trace.into_iter().collect()
}

fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn required_text(row: &Fields, name: &str) -> Result<String, String> {
    match row.get(name).and_then(as_text) {
        Some(text) if !text.trim().is_empty() => Ok(text),
        Some(_) => Err(format!("field `{name}` is empty")),
        None if row.contains_key(name) => Err(format!("field `{name}` is neither text nor a number")),
        None => Err(format!("field `{name}` is missing")),
    }
}

/// Returns the text of the first user turn in `list`. `who` and `what` name the fields of role and text; `users`
/// lists the user roles.
fn first_user_turn(
    row: &Fields,
    list: &str,
    who: &str,
    what: &str,
    users: &[&str],
) -> Result<String, String> {
    let turns = row.get(list).and_then(Value::as_array).ok_or_else(|| format!("no list `{list}`"))?;
    let user =
        |turn: &&Value| turn.get(who).and_then(Value::as_str).is_some_and(|name| users.contains(&name));
    let turn =
        turns.iter().find(user).ok_or_else(|| format!("`{list}` holds no turn of {}", users.join(" or ")))?;
    match turn.get(what).and_then(as_text) {
        Some(text) if !text.trim().is_empty() => Ok(text),
        _ => Err(format!("the first turn of `{list}` has no `{what}`")),
    }
}

/// Returns the content of the last `\boxed{…}`, with balanced braces. `None` if the box is empty or unclosed.
fn last_boxed(text: &str) -> Option<String> {
    let start = text.rfind("\\boxed{")? + "\\boxed{".len();
    let mut depth = 1;
    for (at, c) in text[start..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(text[start..start + at].trim().to_owned()).filter(|inside| !inside.is_empty());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(format: &str, row: Value) -> Result<(String, Option<String>), String> {
        let format: DatasetFormat = serde_json::from_value(json!(format)).unwrap();
        format.parse_problem(row.as_object().unwrap())
    }

    #[test]
    fn reads_problem_and_answer_of_every_format() {
        for (format, row, problem, answer) in [
            ("gsm8k", json!({"question": "q", "answer": "1+1\n#### 1,200"}), "q", Some("1200")),
            (
                "math",
                json!({"problem": "q", "solution": "$\\boxed{1}$, no: $\\boxed{\\frac{1}{2}}$"}),
                "q",
                Some("\\frac{1}{2}"),
            ),
            (
                "numina-math",
                json!({"problem": "q", "solution": "\\boxed{3}", "answer": "proof"}),
                "q",
                Some("3"),
            ),
            ("numina-math", json!({"problem": "q", "solution": "no box"}), "q", None),
            ("deepmath-103k", json!({"question": "q", "final_answer": 7, "difficulty": 5.0}), "q", Some("7")),
            ("open-code-reasoning", json!({"input": "q", "output": "code"}), "q", None),
            (
                "openthoughts-114k",
                json!({"problem": "q", "ground_truth_solution": "\\boxed{5}", "domain": "math"}),
                "q",
                Some("5"),
            ),
            (
                "openthoughts-114k",
                json!({"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}),
                "q",
                None,
            ),
            ("openthoughts", json!({"conversations": [{"from": "human", "value": "q"}]}), "q", None),
            ("omnithought", json!({"question": "q", "reasoning": [{"thought": "t"}]}), "q", None),
            (
                "sharegpt",
                json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]}),
                "q",
                None,
            ),
            (
                "messages",
                json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}),
                "q",
                None,
            ),
            ("alpaca", json!({"instruction": "do", "input": "this", "output": "x"}), "do\n\nthis", None),
            ("alpaca", json!({"instruction": "do", "input": ""}), "do", None),
            ("easydistill", json!({"instruction": "q", "response": "r"}), "q", None),
        ] {
            assert_eq!(read(format, row), Ok((problem.to_owned(), answer.map(str::to_owned))), "{format}");
        }
    }

    #[test]
    fn reads_the_traces_of_every_format() {
        let sections = "<|begin_of_thought|>t<|end_of_thought|><|begin_of_solution|>a<|end_of_solution|>";
        let tags = "<think>t</think>a";
        let scored = Some(Scores { rv: Some(4), cd: Some(6) });
        for (format, row, expected) in [
            ("gsm8k", json!({"question": "q", "answer": "1\n#### 1"}), vec![]),
            (
                "openthoughts-114k",
                json!({"problem": "q", "deepseek_reasoning": "t", "deepseek_solution": "a"}),
                vec![("DeepSeek-R1", None)],
            ),
            (
                "openthoughts-114k",
                json!({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": sections}]}),
                vec![("DeepSeek-R1", None)],
            ),
            (
                "openthoughts",
                json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": tags}]}),
                vec![("DeepSeek-R1", None)],
            ),
            (
                "openthoughts",
                json!({"difficulty": 7, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": tags}]}),
                vec![("QwQ-32B", None)],
            ),
            (
                "deepmath-103k",
                json!({"question": "q", "r1_solution_1": tags, "r1_solution_2": "no tags", "r1_solution_3": tags}),
                vec![("DeepSeek-R1", None), ("DeepSeek-R1", None)],
            ),
            ("open-code-reasoning", json!({"input": "q", "output": tags}), vec![("DeepSeek-R1", None)]),
            (
                "omnithought",
                json!({"question": "q", "reasoning": [
                    {"thought": "t", "solution": "a", "teacher": "QwQ-32B", "thought_correctness_verify": true,
                     "Reasoning_Verbosity": {"level": 4, "judge": "QwQ-32B"}, "Cognitive_Difficulty": {"level": 6, "judge": "QwQ-32B"}},
                    {"full_response": tags, "teacher": "DeepSeek-R1", "Reasoning_Verbosity": 4, "Cognitive_Difficulty": "6"},
                    {"thought": "t", "solution": "a", "teacher": "QwQ-32B", "thought_correctness_verify": false},
                ]}),
                vec![("QwQ-32B", scored), ("DeepSeek-R1", scored)],
            ),
            (
                "messages",
                json!({"messages": [{"role": "assistant", "reasoning_content": "t", "content": "a"}]}),
                vec![("unknown", None)],
            ),
            ("sharegpt", json!({"conversations": [{"from": "gpt", "value": "no tags"}]}), vec![]),
            (
                "easydistill",
                json!({"instruction": "q", "thought": "t", "solution": "a", "reasoning_verbosity": 4, "cognitive_difficulty": 6}),
                vec![("unknown", scored)],
            ),
            ("easydistill", json!({"instruction": "q", "output": tags}), vec![("unknown", None)]),
        ] {
            let named: DatasetFormat = serde_json::from_value(json!(format)).unwrap();
            let found = named.parse_traces(row.as_object().unwrap());
            assert!(found.iter().all(|trace| trace.thinking == "t" && trace.answer == "a"), "{format}");
            let found: Vec<_> = found.iter().map(|trace| (trace.teacher.as_str(), trace.scores)).collect();
            assert_eq!(found, expected, "{format}: {row}");
        }
    }

    #[test]
    fn parses_program_tests_in_pairs() {
        let pairs = json!({"inputs": ["1\n", "2\n"], "outputs": ["2", "4"]});
        let found = parse_program_tests(&pairs).unwrap();
        assert_eq!((found.len(), found[1].input.as_str(), found[1].output.as_str()), (2, "2\n", "4"));
        assert_eq!(parse_program_tests(&json!(pairs.to_string())), Some(found));
        for none in [
            json!({"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}),
            json!("no JSON"),
            json!({"inputs": []}),
            json!(null),
        ] {
            assert_eq!(parse_program_tests(&none), None, "{none}");
        }
    }

    #[test]
    fn rejects_scores_outside_the_scale() {
        let row = json!({"rv": 10, "cd": 4.5});
        assert_eq!(parse_scores(row.as_object().unwrap(), "rv", "cd"), None);
    }

    #[test]
    fn error_names_the_missing_field() {
        for (format, row, word) in [
            ("gsm8k", json!({"question": "q", "answer": "7"}), "####"),
            ("math", json!({"problem": ""}), "empty"),
            ("open-code-reasoning", json!({"input": "-"}), "not in this split"),
            ("sharegpt", json!({"conversations": [{"from": "gpt", "value": "a"}]}), "human or user"),
            ("messages", json!({"messages": [{"role": "user", "content": [1]}]}), "`content`"),
            ("alpaca", json!({"instruction": {}}), "neither"),
        ] {
            let problem = read(format, row).unwrap_err();
            assert!(problem.contains(word), "{problem}");
        }
    }
}
