//! Evaluation: every student answers the held-out problems through the gateway, several times each. Figures carry
//! intervals; every sample is kept.

pub mod metrics;

use potstill_cot::executor::{Outcome, Stage, StageError};
use potstill_cot::teacher::{AskError, Question, Teachers};
use potstill_data::records::Problem;
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};

use crate::recipe::EvaluateSection;

/// One answer to one problem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The problem.
    pub problem: ContentId,
    /// Its level, where the source says.
    pub level: Option<String>,
    /// Index of the sample.
    pub sample: u32,
    /// What was written, thinking and answer.
    pub completion: String,
    /// Whether it is right; what rules cannot decide counts as wrong.
    pub correct: bool,
    /// Why.
    pub evidence: String,
    /// Tokens written.
    pub tokens: u64,
    /// It was cut off by the limit.
    pub truncated: bool,
}

/// Asks one model all samples of one problem.
pub struct Evaluate {
    /// Model behind the gateway.
    pub model: String,
    /// Which weights it has.
    pub revision: String,
    /// Through what.
    pub calls: Teachers,
    /// How.
    pub settings: EvaluateSection,
    /// What it is asked; `{{ problem }}` stands for the problem.
    pub prompt: String,
}

impl Stage for Evaluate {
    type In = Problem;
    type Out = Sample;

    fn name(&self) -> &'static str {
        "evaluate"
    }

    async fn process(&self, problem: Problem) -> Result<Outcome<Sample>, StageError> {
        let prompt = self.prompt.replace("{{ problem }}", &problem.problem);
        let mut samples = Vec::new();
        for sample in 0..self.settings.samples {
            let seed = ContentId::of(&[problem.id.as_str(), "evaluate", &sample.to_string()]);
            let question = Question {
                stage: "evaluate",
                model: self.model.clone(),
                prompt: prompt.clone(),
                temperature: self.settings.temperature,
                top_p: self.settings.top_p,
                max_tokens: self.settings.max_tokens,
                seed: (seed.seed() >> 2) as i64,
                revision: Some(self.revision.clone()),
            };
            let entry = match self.calls.ask(&question).await {
                Ok(entry) => entry,
                Err(AskError::Run(error)) => return Err(error),
                // A missing answer would make the figures look better or worse than they are: no figures then.
                Err(AskError::Row(problem)) => return Err(StageError { stage: "evaluate", problem }),
            };
            let completion = match &entry.reasoning {
                Some(thinking) => format!("<think>{thinking}</think>{}", entry.content),
                None => entry.content.clone(),
            };
            let truncated = entry.finish_reason != "stop";
            let gold = problem.answer.as_deref().unwrap_or_default();
            let finding = potstill_verify::check(gold, &completion);
            samples.push(Sample {
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
        Ok(Outcome::keep(samples))
    }
}
