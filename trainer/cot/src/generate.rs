//! Generate stage: requests traces from several teachers, at several temperatures, with several samples each.
//!
//! Traces that a source dataset contains are taken without requests. Deliberately absent: retries, journal and budget
//! (`teacher`), and verification of the answers (`verify`).

use potstill_data::journal::Entry;
use potstill_data::records::{Dropped, GenerationParams, Origin, Problem, Trace};
use potstill_shared::id::ContentId;
use potstill_shared::reasoning;
use serde::{Deserialize, Serialize};

use crate::executor::{Stage, StageError, StageOutcome};
use crate::prompts::{PromptRole, PromptTemplates};
use crate::teacher::{CompletionRequest, TeacherClient, TeacherError};

/// Teacher with its sampling parameters: one entry of `generate.teachers` in a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherConfig {
    /// Name of the model at the gateway.
    pub model: String,
    /// Sampling temperatures. Each gives its own samples.
    #[serde(default = "default_temperatures")]
    pub temperatures: Vec<f64>,
    /// Samples per problem and temperature.
    #[serde(default = "default_samples")]
    pub samples: u32,
    /// Probability mass of nucleus sampling (`top_p`).
    #[serde(default = "default_top_p")]
    pub top_p: f64,
    /// Place of the reasoning in a completion.
    #[serde(default)]
    pub thinking: ReasoningFormat,
    /// Largest number of completion tokens. Truncated completions are kept with finish reason `length` and never
    /// trained on.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: u32,
    /// Larger limit for one further request after truncation; none if absent.
    #[serde(default)]
    pub retry_max_tokens: Option<u32>,
    /// Style of reasoning, which selects the prompt.
    #[serde(default)]
    pub style: ReasoningStyle,
}

/// Style of reasoning that the prompt requests ("Thinking with DistilQwen", section 3.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningStyle {
    /// Slow thinking: long reasoning with checks and revisions (`generate.jinja`).
    #[default]
    Slow,
    /// Adaptive thinking: as long as the problem requires (`adaptive.jinja`).
    Adaptive,
}

impl ReasoningStyle {
    fn role(self) -> PromptRole {
        match self {
            Self::Slow => PromptRole::Generate,
            Self::Adaptive => PromptRole::Adaptive,
        }
    }
}

/// Place of the reasoning in a teacher's completion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningFormat {
    /// Between think tags, in OpenThoughts' sections, or in the separate field `reasoning_content`.
    #[default]
    Tags,
    /// The whole text, for models without separate reasoning. The verifier's rules extract the final answer.
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

/// Stage that generates the traces of a problem.
pub struct GenerateStage {
    /// Teachers for problems whose source contains no trace. Without teachers, these problems are dropped as
    /// `no_trace`.
    pub teachers: Vec<TeacherConfig>,
    /// Client for teachers, with journal and budget.
    pub calls: TeacherClient,
    /// Prompt templates.
    pub prompts: PromptTemplates,
    /// Seed of the run, from which each request derives its own seed.
    pub seed: u64,
}

/// Splits a completion into reasoning and answer. The reasoning is `None` where the completion has none or leaves its
/// tag open.
pub(crate) fn split_completion(entry: &Entry) -> (Option<String>, String) {
    match &entry.reasoning {
        Some(thinking) => (Some(thinking.trim().to_owned()), entry.content.trim().to_owned()),
        None => reasoning::split_any_format(&entry.content),
    }
}

impl ReasoningFormat {
    /// Splits a completion into reasoning and answer. The reasoning is never an empty string.
    fn split_completion(self, entry: &Entry) -> (Option<String>, String) {
        let (thinking, answer) = match self {
            Self::Tags => split_completion(entry),
            Self::Whole => {
                let answer = potstill_verify::extract::final_answer(&entry.content);
                let boxed = answer.map(|answer| format!("\\boxed{{{answer}}}"));
                (Some(entry.content.trim().to_owned()), boxed.unwrap_or_default())
            }
        };
        (thinking.filter(|text| !text.is_empty()), answer)
    }
}

/// One sample to generate for a problem.
struct SampleSpec<'a> {
    teacher: &'a TeacherConfig,
    temperature: f64,
    number: u32,
}

impl GenerateStage {
    async fn generate_trace(
        &self,
        problem: &Problem,
        sample: SampleSpec<'_>,
    ) -> Result<Result<Trace, Dropped>, StageError> {
        let SampleSpec { teacher, temperature, number } = sample;
        let role = teacher.style.role();
        let stop = |problem| StageError { stage: "generate", reason: problem };
        let seed = ContentId::from_parts(&[
            problem.id.as_str(),
            &teacher.model,
            &temperature.to_string(),
            &number.to_string(),
            &self.seed.to_string(),
        ]);
        let mut question = CompletionRequest {
            stage: "generate",
            model: teacher.model.clone(),
            prompt: self.prompts.render_for_problem(role, problem).map_err(stop)?,
            temperature,
            top_p: teacher.top_p,
            max_tokens: teacher.max_tokens,
            seed: (seed.seed() >> 2) as i64,
            revision: None,
        };
        let failed = |reason: &str| Ok(Err(Dropped::problem(reason, problem.clone())));
        let mut larger = teacher.retry_max_tokens;
        let entry = loop {
            let entry = match self.calls.complete(&question).await {
                Ok(entry) => entry,
                Err(TeacherError::Run(error)) => return Err(error),
                Err(TeacherError::Row(reason)) => {
                    tracing::warn!(problem = %problem.id, reason, "a problem got no answer; it is asked again in the next run");
                    return failed("teacher_failed");
                }
            };
            match larger.take().filter(|_| entry.finish_reason == "length") {
                Some(limit) => question.max_tokens = limit,
                None => break entry,
            }
        };
        let (thinking, answer) = teacher.thinking.split_completion(&entry);
        let thinking = match thinking {
            Some(thinking) => thinking,
            None if entry.finish_reason == "stop" => return failed("no_thinking"),
            // Truncated inside the reasoning: the partial text is kept, marked by its finish reason.
            None => entry.reasoning.clone().unwrap_or_else(|| entry.content.clone()),
        };
        Ok(Ok(Trace {
            id: Trace::content_id(problem, &thinking, &answer),
            problem: Problem { traces: Vec::new(), ..problem.clone() },
            thinking,
            answer,
            origin: Origin {
                teacher: teacher.model.clone(),
                sample: number,
                asked: Some(GenerationParams {
                    request: entry.id.clone(),
                    prompt_hash: self.prompts.template_hash(role),
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

    fn sample_specs<'a>(&'a self, problem: &Problem) -> impl Iterator<Item = SampleSpec<'a>> {
        let copies = problem.copies;
        self.teachers.iter().flat_map(move |teacher| {
            teacher.temperatures.iter().flat_map(move |&temperature| {
                (0..teacher.samples * copies).map(move |number| SampleSpec { teacher, temperature, number })
            })
        })
    }
}

/// Returns the traces that the problem's source contains.
fn source_traces(problem: &Problem) -> Vec<Trace> {
    let traces = problem.traces.iter().zip(0..).map(|(trace, number)| Trace {
        id: Trace::content_id(problem, &trace.thinking, &trace.answer),
        problem: Problem { traces: Vec::new(), ..problem.clone() },
        thinking: trace.thinking.clone(),
        answer: trace.answer.clone(),
        origin: Origin { teacher: trace.teacher.clone(), sample: number, asked: None },
        finish_reason: "stop".to_owned(),
        // The source has no token counts. Estimate: four bytes per token.
        completion_tokens: ((trace.thinking.len() + trace.answer.len()) / 4) as u64,
        parent: None,
        difficulty: None,
        verdict: None,
        scores: trace.scores,
    });
    traces.collect()
}

impl Stage for GenerateStage {
    type In = Problem;
    type Out = Trace;

    fn name(&self) -> &'static str {
        "generate"
    }

    async fn process(&self, problem: Problem) -> Result<StageOutcome<Trace>, StageError> {
        let mut outcome = StageOutcome { kept: source_traces(&problem), dropped: Vec::new() };
        if !outcome.kept.is_empty() {
            return Ok(outcome);
        }
        if self.teachers.is_empty() {
            return Ok(StageOutcome::drop(Dropped::problem("no_trace", problem)));
        }
        // All requests start together; the concurrency limit of each model bounds the open ones.
        let asked = self.sample_specs(&problem).map(|sample| self.generate_trace(&problem, sample));
        for sample in futures_util::future::try_join_all(asked).await? {
            match sample {
                // Equal samples are one trace: the id is a hash of the content.
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
