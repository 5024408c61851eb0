//! Record types of the stage files: problems, traces, verdicts, scores and dropped records.
//!
//! The hash of its content identifies a record. The position in a file never does, so stages may reorder and resume.
//! Deliberately absent: reading and writing of files (`jsonl`, `spool`).

use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::spool::SortKey;

/// A question for teachers, with its reference answer where the source has one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Hash of the problem text.
    pub id: ContentId,
    /// Problem text, unchanged from the source.
    pub problem: String,
    /// Reference answer. Without one, only tests or a judge can verify a trace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Origin of the problem; for files `PATH:ROW`, with a file path or a hub address.
    pub source: String,
    /// One of [`crate::tasks::TASKS`]. The classify stage sets this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// Number of times the resample stage drew this problem. Each teacher writes `copies` times its configured number
    /// of samples.
    #[serde(default = "default_copies", skip_serializing_if = "is_default_copies")]
    pub copies: u32,
    /// Traces that the source row contains.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub traces: Vec<SourceTrace>,
    /// Input and output pairs for a program. If there are tests, the verifier ignores `answer`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tests: Vec<ProgramTest>,
    /// Other fields of the source row, up to 1024 bytes each.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metadata: Map<String, Value>,
}

fn default_copies() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_default_copies(copies: &u32) -> bool {
    *copies == 1
}

/// One run of a program, with its expected output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramTest {
    /// Standard input of the program.
    pub input: String,
    /// Expected standard output.
    pub output: String,
}

/// Trace from a published dataset, with the scores that its authors publish.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceTrace {
    /// Model that wrote the trace; `unknown` where neither the row nor the recipe names one.
    pub teacher: String,
    /// Reasoning, without its tags. Never empty.
    pub thinking: String,
    /// Answer after the reasoning. Never empty.
    pub answer: String,
    /// RV and CD, where the dataset has at least one of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Scores>,
}

impl Problem {
    /// Creates a problem and computes its id from the text alone.
    pub fn new(problem: impl Into<String>, answer: Option<String>, source: impl Into<String>) -> Self {
        let problem = problem.into();
        let id = ContentId::from_parts(&["problem", &problem]);
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

/// Difficulty of a *trace* (not of its problem) from the student's point of view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Difficulty {
    /// Too terse: steps that the student needs are missing.
    Easy,
    /// Fitting: enough guidance, no superfluous steps.
    Medium,
    /// Too convoluted: complex or superfluous steps that the student cannot follow.
    Hard,
    /// No completion of the judge could be parsed.
    Unscored,
}

/// Method that produced a [`Verdict`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictMethod {
    /// The verifier's rules compared the answer with the reference answer.
    Rule,
    /// The sandbox ran the program of the trace on the problem's tests.
    Tests,
    /// A judge model graded the trace.
    Judge,
    /// No method reached a decision.
    Unknown,
}

/// Result of verifying a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// `Some(true)` for correct, `Some(false)` for incorrect, `None` for unverifiable.
    pub correct: Option<bool>,
    /// Method that reached this result.
    pub method: VerdictMethod,
    /// Human-readable reason, for example the two answers that were compared.
    pub evidence: String,
}

/// Reasoning verbosity and cognitive difficulty of a trace (OmniThought). `None` if the judge's completion had no
/// valid score.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scores {
    /// Reasoning verbosity, 0 to 9.
    pub rv: Option<u8>,
    /// Cognitive difficulty, 0 to 9.
    pub cd: Option<u8>,
}

/// Provenance of a trace: a request to a teacher, or a source dataset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Model that wrote the trace.
    pub teacher: String,
    /// Index of the sample, from 0: per teacher and temperature, or within the source row.
    pub sample: u32,
    /// Parameters of the request; `None` if the trace comes from a source dataset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<GenerationParams>,
}

/// Parameters of the request that produced a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerationParams {
    /// Id of the request, and of its entry in the journal.
    pub request: ContentId,
    /// Hash of the prompt template.
    pub prompt_hash: ContentId,
    /// Sampling temperature.
    pub temperature: f64,
    /// Seed sent with the request.
    pub seed: i64,
}

/// Trace: reasoning and answer of a teacher for one problem, with the results of later stages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Hash of problem id, reasoning and answer; see [`Cot::content_id`].
    pub id: ContentId,
    /// Problem that the trace solves, without the source's own traces.
    pub problem: Problem,
    /// Reasoning, without its tags.
    pub thinking: String,
    /// Answer after the reasoning; empty for a truncated completion.
    pub answer: String,
    /// Teacher and request that produced the trace.
    pub origin: Origin,
    /// OpenAI's `finish_reason` of the completion, or `loop` for a repetition loop. Truncated traces (`length`) are
    /// never trained on.
    pub finish_reason: String,
    /// Completion tokens. For traces from a source dataset, an estimate of one token per four bytes.
    pub completion_tokens: u64,
    /// Id of the trace from which the rewrite stage made this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ContentId>,
    /// Grade from the difficulty stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difficulty: Option<Difficulty>,
    /// Verdict from the verify stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// RV and CD from the score stage or from the source dataset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Scores>,
}

impl Trace {
    /// Computes the id of a trace from its problem, reasoning and answer.
    pub fn content_id(problem: &Problem, thinking: &str, answer: &str) -> ContentId {
        ContentId::from_parts(&["cot", problem.id.as_str(), thinking, answer])
    }

    /// Returns the second part of the sort key. Traces with equal text share an id; parent, seed, sample index and
    /// teacher then decide their order.
    fn tie_breaker(&self) -> String {
        let seed = self.origin.asked.as_ref().map_or(0, |asked| asked.seed);
        let parent = self.parent.as_ref().map_or("", ContentId::as_str);
        format!("{parent} {seed:020} {:06} {}", self.origin.sample, self.origin.teacher)
    }

    /// Returns the text that the student learns: `<think>REASONING</think>ANSWER`.
    pub fn completion(&self) -> String {
        format!("<think>{}</think>{}", self.thinking, self.answer)
    }
}

impl SortKey for Problem {
    fn sort_key(&self) -> (ContentId, String) {
        (self.id.clone(), String::new())
    }
}

impl SortKey for Trace {
    fn sort_key(&self) -> (ContentId, String) {
        (self.id.clone(), self.tie_breaker())
    }
}

/// Record that a stage left out, with the reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dropped {
    /// Drop reason, for example `duplicate` or `truncated`. Each stage has a small fixed set.
    pub reason: String,
    /// Text of the similar problem, for the reasons `duplicate`, `near_duplicate` and `contaminated_*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub like: Option<String>,
    /// The dropped problem or trace, in full.
    #[serde(flatten)]
    pub subject: Subject,
}

/// Kind of a dropped record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// A problem.
    Problem(Box<Problem>),
    /// A trace.
    Trace(Box<Trace>),
}

impl Dropped {
    /// Creates a record for a dropped problem, without `like`.
    pub fn problem(reason: &str, problem: Problem) -> Self {
        Self { reason: reason.to_owned(), like: None, subject: Subject::Problem(Box::new(problem)) }
    }

    /// Creates a record for a dropped trace, without `like`.
    pub fn trace(reason: &str, trace: Trace) -> Self {
        Self { reason: reason.to_owned(), like: None, subject: Subject::Trace(Box::new(trace)) }
    }
}

impl SortKey for Dropped {
    fn sort_key(&self) -> (ContentId, String) {
        let (id, rest) = match &self.subject {
            Subject::Problem(problem) => problem.sort_key(),
            Subject::Trace(trace) => trace.sort_key(),
        };
        (id, format!("{} {rest} {}", self.reason, self.like.as_deref().unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problem_id_depends_on_the_text_alone() {
        let first = Problem::new("1+1?", None, "a.jsonl:1");
        let second = Problem::new("1+1?", Some("2".into()), "b.jsonl:7");
        assert_eq!(first.id, second.id);
        assert_ne!(first.id, Problem::new("1+2?", None, "a.jsonl:1").id);
    }
}
