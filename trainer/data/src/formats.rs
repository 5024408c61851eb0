//! Where published datasets keep a problem and its answer. Everything else of a row goes along as metadata.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A dataset, or a shape that many share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `openai/gsm8k`: the answer behind `####`.
    Gsm8k,
    /// MATH (Hendrycks et al.): the answer in the last box of `solution`.
    Math,
    /// `AI-MO/NuminaMath-CoT` and `-1.5`: `answer`, else the last box of `solution`.
    NuminaMath,
    /// `zwhe99/DeepMath-103K`: `question` and `final_answer`.
    #[serde(rename = "deepmath-103k")]
    DeepMath103k,
    /// `nvidia/OpenCodeReasoning`: `input`, without answers.
    OpenCodeReasoning,
    /// `open-thoughts/OpenThoughts-114k`, both configurations.
    #[serde(rename = "openthoughts-114k")]
    OpenThoughts114k,
    /// `open-thoughts/OpenThoughts2-1M` and `OpenThoughts3-1.2M`: conversations.
    #[serde(rename = "openthoughts")]
    OpenThoughts,
    /// `alibaba-pai/OmniThought`: a row is a problem with many traces.
    #[serde(rename = "omnithought")]
    OmniThought,
    /// `conversations` of `from` and `value`.
    #[serde(rename = "sharegpt")]
    ShareGpt,
    /// `messages` of `role` and `content`.
    Messages,
    /// `instruction` and `input`.
    Alpaca,
    /// EasyDistill's rows, 1.x and 2.0: `instruction`.
    #[serde(rename = "easydistill")]
    EasyDistill,
}

type Fields = Map<String, Value>;

impl Format {
    /// Problem and answer of a row. The error says what is missing.
    pub fn read(self, row: &Fields) -> Result<(String, Option<String>), String> {
        let text = |name: &str| text(row, name);
        let optional = |name: &str| row.get(name).and_then(as_text).filter(|text| !text.trim().is_empty());
        match self {
            Self::Gsm8k => {
                let answer = text("answer")?;
                let last = answer.rsplit_once("####").ok_or("`answer` holds no `####`")?.1;
                Ok((text("question")?, Some(last.trim().replace(',', ""))))
            }
            Self::Math => Ok((text("problem")?, last_box(&text("solution")?))),
            Self::NuminaMath => {
                // Proofs have words there that are no answers.
                let given = optional("answer").filter(|answer| answer != "proof" && answer != "notfound");
                let answer = given.or_else(|| optional("solution").as_deref().and_then(last_box));
                Ok((text("problem")?, answer))
            }
            Self::DeepMath103k => Ok((text("question")?, optional("final_answer"))),
            Self::OpenCodeReasoning => match text("input")? {
                // A second split only names the problem of another dataset.
                dash if dash.trim() == "-" => Err("`input` is not in this split".to_owned()),
                input => Ok((input, None)),
            },
            Self::OpenThoughts114k if row.contains_key("problem") => {
                Ok((text("problem")?, optional("ground_truth_solution").as_deref().and_then(last_box)))
            }
            Self::OpenThoughts114k | Self::OpenThoughts | Self::ShareGpt => {
                let asked = first_turn(row, "conversations", "from", "value", &["human", "user"])?;
                Ok((asked, None))
            }
            Self::Messages => Ok((first_turn(row, "messages", "role", "content", &["user"])?, None)),
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
}

fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn text(row: &Fields, name: &str) -> Result<String, String> {
    match row.get(name).and_then(as_text) {
        Some(text) if !text.trim().is_empty() => Ok(text),
        Some(_) => Err(format!("field `{name}` is empty")),
        None if row.contains_key(name) => Err(format!("field `{name}` is neither text nor a number")),
        None => Err(format!("field `{name}` is missing")),
    }
}

/// What the first turn of a user says.
fn first_turn(row: &Fields, list: &str, who: &str, what: &str, users: &[&str]) -> Result<String, String> {
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

/// What stands in the last `\boxed{…}`, braces balanced.
fn last_box(text: &str) -> Option<String> {
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
        let format: Format = serde_json::from_value(json!(format)).unwrap();
        format.read(row.as_object().unwrap())
    }

    #[test]
    fn rows_are_read_as_they_are_published() {
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
    fn what_is_missing_is_named() {
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
