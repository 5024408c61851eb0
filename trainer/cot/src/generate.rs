//! CoT generator: several teachers, temperatures and samples per problem.

use potstill_data::journal::Entry;
use potstill_data::records::{Asked, Cot, Dropped, Origin, Problem};
use potstill_shared::id::ContentId;
use potstill_shared::reasoning;
use serde::{Deserialize, Serialize};

use crate::executor::{Outcome, Stage, StageError};
use crate::prompts::{Prompts, Role};
use crate::teacher::{AskError, Question, Teachers};

/// One teacher and how often it is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherConfig {
    /// Model behind the gateway.
    pub model: String,
    /// Temperatures; each gives its own samples.
    #[serde(default = "default_temperatures")]
    pub temperatures: Vec<f64>,
    /// Samples per temperature.
    #[serde(default = "default_samples")]
    pub samples: u32,
    /// Nucleus sampling.
    #[serde(default = "default_top_p")]
    pub top_p: f64,
    /// Where its chain of thought stands.
    #[serde(default)]
    pub thinking: Thinking,
    /// Limit on new tokens. What is cut off by it is kept and flagged, never trained on.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: u32,
    /// Ask again with this limit where the first one cut the answer off; not at all if left out.
    #[serde(default)]
    pub retry_max_tokens: Option<u32>,
    /// Which prompt asks.
    #[serde(default)]
    pub style: Style,
}

/// How a teacher is asked to think (section 3.1 of the paper).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// At length, with checks and second thoughts (`generate.jinja`).
    #[default]
    Slow,
    /// As long as the problem needs (`adaptive.jinja`).
    Adaptive,
}

impl Style {
    fn role(self) -> Role {
        match self {
            Self::Slow => Role::Generate,
            Self::Adaptive => Role::Adaptive,
        }
    }
}

/// Where a teacher's chain of thought stands in what it writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thinking {
    /// Between think tags, in OpenThoughts' sections, or apart as `reasoning_content`.
    #[default]
    Tags,
    /// The whole text: a model that does not think apart. Its final answer is found by the verifier's rules.
    Whole,
}

fn default_temperatures() -> Vec<f64> {
    vec![0.6, 0.7, 0.8, 1.0]
}

fn default_samples() -> u32 {
    1
}

fn default_top_p() -> f64 {
    0.95
}

fn default_max_tokens() -> u32 {
    32_768
}

/// The stage.
pub struct Generate {
    /// Who is asked for problems whose source brings no trace along; nobody, if empty.
    pub teachers: Vec<TeacherConfig>,
    /// Through what.
    pub calls: Teachers,
    /// With which prompts.
    pub prompts: Prompts,
    /// Seed of the run.
    pub seed: u64,
}

/// Thinking and answer of what a teacher wrote, however it was sent.
pub(crate) fn read_completion(entry: &Entry) -> (Option<String>, String) {
    match &entry.reasoning {
        Some(thinking) => (Some(thinking.trim().to_owned()), entry.content.trim().to_owned()),
        None => reasoning::read(&entry.content),
    }
}

impl Thinking {
    /// Thinking and answer; no thinking where there is none to learn from.
    fn read(self, entry: &Entry) -> (Option<String>, String) {
        let (thinking, answer) = match self {
            Self::Tags => read_completion(entry),
            Self::Whole => {
                let answer = potstill_verify::extract::final_answer(&entry.content);
                let boxed = answer.map(|answer| format!("\\boxed{{{answer}}}"));
                (Some(entry.content.trim().to_owned()), boxed.unwrap_or_default())
            }
        };
        (thinking.filter(|text| !text.is_empty()), answer)
    }
}

/// One sample that is asked for.
struct Sample<'a> {
    teacher: &'a TeacherConfig,
    temperature: f64,
    number: u32,
}

impl Generate {
    async fn sample(
        &self,
        problem: &Problem,
        sample: Sample<'_>,
    ) -> Result<Result<Cot, Dropped>, StageError> {
        let Sample { teacher, temperature, number } = sample;
        let role = teacher.style.role();
        let stop = |problem| StageError { stage: "generate", problem };
        let seed = ContentId::of(&[
            problem.id.as_str(),
            &teacher.model,
            &temperature.to_string(),
            &number.to_string(),
            &self.seed.to_string(),
        ]);
        let mut question = Question {
            stage: "generate",
            model: teacher.model.clone(),
            prompt: self.prompts.for_problem(role, problem).map_err(stop)?,
            temperature,
            top_p: teacher.top_p,
            max_tokens: teacher.max_tokens,
            seed: (seed.seed() >> 2) as i64,
            revision: None,
        };
        let failed = |reason: &str| Ok(Err(Dropped::problem(reason, problem.clone())));
        let mut larger = teacher.retry_max_tokens;
        let entry = loop {
            let entry = match self.calls.ask(&question).await {
                Ok(entry) => entry,
                Err(AskError::Run(error)) => return Err(error),
                Err(AskError::Row(reason)) => {
                    tracing::warn!(problem = %problem.id, reason, "a problem got no answer; it is asked again in the next run");
                    return failed("teacher_failed");
                }
            };
            match larger.take().filter(|_| entry.finish_reason == "length") {
                Some(limit) => question.max_tokens = limit,
                None => break entry,
            }
        };
        let (thinking, answer) = teacher.thinking.read(&entry);
        let thinking = match thinking {
            Some(thinking) => thinking,
            None if entry.finish_reason == "stop" => return failed("no_thinking"),
            // Cut off inside the thinking: what there is of it is kept, flagged.
            None => entry.reasoning.clone().unwrap_or_else(|| entry.content.clone()),
        };
        Ok(Ok(Cot {
            id: Cot::content_id(problem, &thinking, &answer),
            problem: Problem { traces: Vec::new(), ..problem.clone() },
            thinking,
            answer,
            origin: Origin {
                teacher: teacher.model.clone(),
                sample: number,
                asked: Some(Asked {
                    request: entry.id.clone(),
                    prompt_hash: self.prompts.hash(role),
                    temperature,
                    seed: question.seed,
                }),
            },
            finish_reason: entry.finish_reason.clone(),
            completion_tokens: entry.completion_tokens,
            parent: None,
            difficulty: None,
            verdict: None,
            scores: None,
        }))
    }

    fn samples<'a>(&'a self, problem: &Problem) -> impl Iterator<Item = Sample<'a>> {
        let copies = problem.copies;
        self.teachers.iter().flat_map(move |teacher| {
            teacher.temperatures.iter().flat_map(move |&temperature| {
                (0..teacher.samples * copies).map(move |number| Sample { teacher, temperature, number })
            })
        })
    }
}

/// The traces that the problem's source brought along.
fn given(problem: &Problem) -> Vec<Cot> {
    let traces = problem.traces.iter().zip(0..).map(|(trace, number)| Cot {
        id: Cot::content_id(problem, &trace.thinking, &trace.answer),
        problem: Problem { traces: Vec::new(), ..problem.clone() },
        thinking: trace.thinking.clone(),
        answer: trace.answer.clone(),
        origin: Origin { teacher: trace.teacher.clone(), sample: number, asked: None },
        finish_reason: "stop".to_owned(),
        // Nobody counted them; a token is about four bytes.
        completion_tokens: ((trace.thinking.len() + trace.answer.len()) / 4) as u64,
        parent: None,
        difficulty: None,
        verdict: None,
        scores: trace.scores,
    });
    traces.collect()
}

impl Stage for Generate {
    type In = Problem;
    type Out = Cot;

    fn name(&self) -> &'static str {
        "generate"
    }

    async fn process(&self, problem: Problem) -> Result<Outcome<Cot>, StageError> {
        let mut outcome = Outcome { kept: given(&problem), dropped: Vec::new() };
        if !outcome.kept.is_empty() {
            return Ok(outcome);
        }
        if self.teachers.is_empty() {
            return Ok(Outcome::drop(Dropped::problem("no_trace", problem)));
        }
        // All at once: how many of them are open is up to the gate of their model.
        let asked = self.samples(&problem).map(|sample| self.sample(&problem, sample));
        for sample in futures_util::future::try_join_all(asked).await? {
            match sample {
                // Two samples with the same text are one trace.
                Ok(cot) if outcome.kept.iter().any(|other| other.id == cot.id) => {
                    outcome.dropped.push(Dropped::trace("same_text", cot));
                }
                Ok(cot) => outcome.kept.push(cot),
                Err(dropped) => outcome.dropped.push(dropped),
            }
        }
        Ok(outcome)
    }
}
