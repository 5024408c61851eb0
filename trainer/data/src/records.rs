//! The records: a problem, a chain of thought with what was said of it. Identified by content, never by position.

use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A problem to be solved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Hash of the text.
    pub id: ContentId,
    /// The text.
    pub problem: String,
    /// The known answer; without one only a judge can tell right from wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Where it came from: the source and the line.
    pub source: String,
    /// Other fields of the source's row.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metadata: Map<String, Value>,
}

impl Problem {
    /// A problem with its id.
    pub fn new(problem: impl Into<String>, answer: Option<String>, source: impl Into<String>) -> Self {
        let problem = problem.into();
        let id = ContentId::of(&["problem", &problem]);
        Self { id, problem, answer, source: source.into(), metadata: Map::new() }
    }
}

/// Difficulty of a *trace* for the student (not of the problem): too terse, fitting, or too convoluted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Difficulty {
    /// Too terse: leaves out what the student needs.
    Easy,
    /// Enough guidance.
    Medium,
    /// Over-complex or superfluous steps.
    Hard,
    /// The grader gave no readable answer.
    Unscored,
}

/// Who decided whether an answer is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictMethod {
    /// A rule compared it with the known answer.
    Rule,
    /// A judge model was asked.
    Judge,
    /// Nobody could tell.
    Unknown,
}

/// Whether a chain of thought reaches the right answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Right, wrong, or not decided.
    pub correct: Option<bool>,
    /// Who decided.
    pub method: VerdictMethod,
    /// What the decision rests on.
    pub evidence: String,
}

/// Reasoning Verbosity and Cognitive Difficulty, 0 to 9 each; `None` when the judge's answer was not readable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scores {
    /// Reasoning Verbosity.
    pub rv: Option<u8>,
    /// Cognitive Difficulty.
    pub cd: Option<u8>,
}

/// How a text was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// The model.
    pub teacher: String,
    /// Hash of the prompt template.
    pub prompt_hash: ContentId,
    /// Sampling temperature.
    pub temperature: f64,
    /// Index among the samples of the problem.
    pub sample: u32,
    /// Seed sent with the request.
    pub seed: i64,
}

/// A chain of thought and everything that later stages found out about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cot {
    /// Hash of problem, thinking and answer.
    pub id: ContentId,
    /// The problem it solves.
    pub problem: Problem,
    /// The thinking, without its tags.
    pub thinking: String,
    /// The answer after the thinking.
    pub answer: String,
    /// How it was asked for.
    pub origin: Origin,
    /// The endpoint's word for why it ended; `length` is never trained on.
    pub finish_reason: String,
    /// Tokens written.
    pub completion_tokens: u64,
    /// The trace that this one was rewritten from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ContentId>,
    /// Set by the difficulty stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difficulty: Option<Difficulty>,
    /// Set by the verify stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// Set by the score stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Scores>,
}

impl Cot {
    /// The id that belongs to the content.
    pub fn content_id(problem: &Problem, thinking: &str, answer: &str) -> ContentId {
        ContentId::of(&["cot", problem.id.as_str(), thinking, answer])
    }

    /// The completion as the student shall write it.
    pub fn completion(&self) -> String {
        format!("<think>{}</think>{}", self.thinking, self.answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_its_text() {
        let first = Problem::new("1+1?", None, "a.jsonl:1");
        let second = Problem::new("1+1?", Some("2".into()), "b.jsonl:7");
        assert_eq!(first.id, second.id);
        assert_ne!(first.id, Problem::new("1+2?", None, "a.jsonl:1").id);
    }
}
