//! CoT generator: several teachers, temperatures and samples per problem.

use potstill_data::journal::Entry;
use potstill_data::records::{Cot, Origin, Problem};
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
}

/// Where a teacher's chain of thought stands in what it writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thinking {
    /// Between think tags, or apart as `reasoning_content`.
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
    /// Who is asked.
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
        // A text that closes the tag without opening it began inside: the template had opened it.
        None => reasoning::split(
            &entry.content,
            !entry.content.trim_start().starts_with(reasoning::OPEN)
                && entry.content.contains(reasoning::CLOSE),
        ),
    }
}

impl Stage for Generate {
    type In = Problem;
    type Out = Cot;

    fn name(&self) -> &'static str {
        "generate"
    }

    async fn process(&self, problem: Problem) -> Result<Outcome<Cot>, StageError> {
        let stop = |problem| StageError { stage: "generate", problem };
        let prompt = self.prompts.for_problem(&problem).map_err(stop)?;
        let mut traces: Vec<Cot> = Vec::new();
        let mut failed = None;
        for teacher in &self.teachers {
            for &temperature in &teacher.temperatures {
                for sample in 0..teacher.samples {
                    let seed = ContentId::of(&[
                        problem.id.as_str(),
                        &teacher.model,
                        &temperature.to_string(),
                        &sample.to_string(),
                        &self.seed.to_string(),
                    ]);
                    let question = Question {
                        stage: "generate",
                        model: teacher.model.clone(),
                        prompt: prompt.clone(),
                        temperature,
                        top_p: teacher.top_p,
                        max_tokens: teacher.max_tokens,
                        seed: (seed.seed() >> 2) as i64,
                        revision: None,
                    };
                    let entry = match self.calls.ask(&question).await {
                        Ok(entry) => entry,
                        Err(AskError::Run(error)) => return Err(error),
                        Err(AskError::Row(reason)) => {
                            tracing::warn!(problem = %problem.id, reason, "a problem got no answer; it is asked again in the next run");
                            failed = Some("teacher_failed");
                            continue;
                        }
                    };
                    let (thinking, answer) = match teacher.thinking {
                        Thinking::Tags => read_completion(&entry),
                        Thinking::Whole => {
                            let answer = potstill_verify::extract::final_answer(&entry.content);
                            let boxed = answer.map(|answer| format!("\\boxed{{{answer}}}"));
                            (Some(entry.content.trim().to_owned()), boxed.unwrap_or_default())
                        }
                    };
                    let Some(thinking) = thinking.filter(|text| !text.is_empty()) else {
                        failed = failed.or(Some("no_thinking"));
                        continue;
                    };
                    let cot = Cot {
                        id: Cot::content_id(&problem, &thinking, &answer),
                        problem: problem.clone(),
                        thinking,
                        answer,
                        origin: Origin {
                            teacher: teacher.model.clone(),
                            prompt_hash: self.prompts.hash(Role::Generate),
                            temperature,
                            sample,
                            seed: question.seed,
                        },
                        finish_reason: entry.finish_reason.clone(),
                        completion_tokens: entry.completion_tokens,
                        parent: None,
                        difficulty: None,
                        verdict: None,
                        scores: None,
                    };
                    // Two samples with the same text are one trace.
                    if traces.iter().all(|other| other.id != cot.id) {
                        traces.push(cot);
                    }
                }
            }
        }
        Ok(if traces.is_empty() {
            Outcome::Drop(failed.unwrap_or("no_thinking"))
        } else {
            Outcome::Keep(traces)
        })
    }
}
