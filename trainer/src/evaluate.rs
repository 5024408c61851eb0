//! Evaluation stage of a run: samples several completions of every student for the held-out problems, through the
//! gateway. All samples are stored. Metrics are computed in [`metrics`].

pub mod metrics;

use potstill_cot::executor::{Stage, StageError, StageOutcome};
use potstill_cot::teacher::{CompletionRequest, TeacherClient, TeacherError};
use potstill_data::records::Problem;
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};

use crate::recipe::EvaluateSection;

/// One completion for a held-out problem, with its verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StudentSample {
    /// Id of the problem.
    pub problem: ContentId,
    /// Level of the problem, if its source has one.
    pub level: Option<String>,
    /// Index of the sample, from 0.
    pub sample: u32,
    /// Completion with reasoning and answer.
    pub completion: String,
    /// Whether the answer is correct; unverifiable and truncated completions count as incorrect.
    pub correct: bool,
    /// Justification of the verdict.
    pub evidence: String,
    /// Number of generated tokens.
    pub tokens: u64,
    /// Whether generation ended without a stop token, usually at the token limit.
    pub truncated: bool,
}

/// Stage that samples and verifies completions of one model.
pub struct EvaluateStage {
    /// Name of the model behind the gateway.
    pub model: String,
    /// Hash of the weights, which distinguishes models of one name.
    pub revision: String,
    /// Client with journal.
    pub calls: TeacherClient,
    /// Sampling parameters and number of samples.
    pub settings: EvaluateSection,
    /// Prompt; `{{ problem }}` stands for the problem.
    pub prompt: String,
}

impl Stage for EvaluateStage {
    type In = Problem;
    type Out = StudentSample;

    fn name(&self) -> &'static str {
        "evaluate"
    }

    async fn process(&self, problem: Problem) -> Result<StageOutcome<StudentSample>, StageError> {
        let prompt = self.prompt.replace("{{ problem }}", &problem.problem);
        let mut samples = Vec::new();
        for sample in 0..self.settings.samples {
            let seed = ContentId::from_parts(&[problem.id.as_str(), "evaluate", &sample.to_string()]);
            let question = CompletionRequest {
                stage: "evaluate",
                model: self.model.clone(),
                prompt: prompt.clone(),
                temperature: self.settings.temperature,
                top_p: self.settings.top_p,
                max_tokens: self.settings.max_tokens,
                seed: (seed.seed() >> 2) as i64,
                revision: Some(self.revision.clone()),
            };
            let entry = match self.calls.complete(&question).await {
                Ok(entry) => entry,
                Err(TeacherError::Run(error)) => return Err(error),
                // A missing completion would distort the metrics, so the stage stops instead.
                Err(TeacherError::Row(problem)) => {
                    return Err(StageError { stage: "evaluate", reason: problem });
                }
            };
            let completion = match &entry.reasoning {
                Some(thinking) => format!("<think>{thinking}</think>{}", entry.content),
                None => entry.content.clone(),
            };
            let truncated = entry.finish_reason != "stop";
            let gold = problem.answer.as_deref().unwrap_or_default();
            let finding = potstill_verify::check_completion(gold, &completion);
            samples.push(StudentSample {
                problem: problem.id.clone(),
                level: problem.metadata.get("level").and_then(|level| level.as_str()).map(str::to_owned),
                sample,
                correct: finding.correct == Some(true) && !truncated,
                evidence: finding.evidence,
                completion,
                tokens: entry.completion_tokens,
                truncated,
            });
        }
        Ok(StageOutcome::keep(samples))
    }
}
