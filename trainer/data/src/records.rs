//! The records: a problem, a chain of thought with what was said of it. Identified by content, never by position.

use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::spool::Keyed;

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
    /// Its task among [`crate::tasks::TASKS`], set by the classify stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// How often it was drawn to fill the share of its task: so many times the usual number of traces are asked for.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub copies: u32,
    /// Chains of thought that its source brings along.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub traces: Vec<Given>,
    /// What a program that solves it has to print. With tests they decide, whatever `answer` says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tests: Vec<Test>,
    /// Other fields of the source's row.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metadata: Map<String, Value>,
}

fn one() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_one(copies: &u32) -> bool {
    *copies == 1
}

/// One run of a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Test {
    /// What it reads.
    pub input: String,
    /// What it has to print.
    pub output: String,
}

/// A chain of thought that a published dataset holds, with what its authors say of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Given {
    /// Who wrote it.
    pub teacher: String,
    /// The thinking.
    pub thinking: String,
    /// The answer behind it.
    pub answer: String,
    /// RV and CD, where they were scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Scores>,
}

impl Problem {
    /// A problem with its id.
    pub fn new(problem: impl Into<String>, answer: Option<String>, source: impl Into<String>) -> Self {
        let problem = problem.into();
        let id = ContentId::of(&["problem", &problem]);
        Self {
            id,
            problem,
            answer,
            source: source.into(),
            task: None,
            copies: 1,
            traces: Vec::new(),
            tests: Vec::new(),
            metadata: Map::new(),
        }
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
    /// Its program was run.
    Tests,
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

/// Where a text came from: how it was asked for, or that its dataset brought it along.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// The model.
    pub teacher: String,
    /// Index among the samples of the problem.
    pub sample: u32,
    /// How it was asked for; nothing where the source brought it along.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<Asked>,
}

/// How a text was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Id of the question; its answer stands in the journal.
    pub request: ContentId,
    /// Hash of the prompt template.
    pub prompt_hash: ContentId,
    /// Sampling temperature.
    pub temperature: f64,
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

    /// Copies of one text have one id, whoever wrote them; parents and samples decide their order.
    fn rest_of_key(&self) -> String {
        let seed = self.origin.asked.as_ref().map_or(0, |asked| asked.seed);
        let parent = self.parent.as_ref().map_or("", ContentId::as_str);
        format!("{parent} {seed:020} {:06} {}", self.origin.sample, self.origin.teacher)
    }

    /// The completion as the student shall write it.
    pub fn completion(&self) -> String {
        format!("<think>{}</think>{}", self.thinking, self.answer)
    }
}

impl Keyed for Problem {
    fn key(&self) -> (ContentId, String) {
        (self.id.clone(), String::new())
    }
}

impl Keyed for Cot {
    fn key(&self) -> (ContentId, String) {
        (self.id.clone(), self.rest_of_key())
    }
}

/// What a stage took and did not give on, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dropped {
    /// The reason, one of few per stage.
    pub reason: String,
    /// What it is like, where it was dropped for being like something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub like: Option<String>,
    /// What was dropped.
    #[serde(flatten)]
    pub subject: Subject,
}

/// What stages drop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// A problem.
    Problem(Box<Problem>),
    /// A chain of thought.
    Trace(Box<Cot>),
}

impl Dropped {
    /// A problem that ends here.
    pub fn problem(reason: &str, problem: Problem) -> Self {
        Self { reason: reason.to_owned(), like: None, subject: Subject::Problem(Box::new(problem)) }
    }

    /// A trace that ends here.
    pub fn trace(reason: &str, trace: Cot) -> Self {
        Self { reason: reason.to_owned(), like: None, subject: Subject::Trace(Box::new(trace)) }
    }
}

impl Keyed for Dropped {
    fn key(&self) -> (ContentId, String) {
        let (id, rest) = match &self.subject {
            Subject::Problem(problem) => problem.key(),
            Subject::Trace(trace) => trace.key(),
        };
        (id, format!("{} {rest} {}", self.reason, self.like.as_deref().unwrap_or_default()))
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
