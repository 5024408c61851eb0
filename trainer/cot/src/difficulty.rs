//! Difficulty stage: grades whether a trace is too terse, fitting or too convoluted for the student. Also holds
//! [`Judge`], the model that this and other stages ask for short assessments.
//!
//! A completion that cannot be parsed is requested again; without success, the trace counts as unscored.
//! Deliberately absent: prompts (`prompts`), RV and CD (`rv_cd`).

use potstill_data::records::{Difficulty, Dropped, Problem, Trace};

use potstill_shared::client::REPETITION_LOOP;

use crate::executor::{Stage, StageError, StageOutcome};
use crate::prompts::{PromptRole, PromptTemplates};
use crate::teacher::{CompletionRequest, TeacherClient, TeacherError};

/// Model that assesses traces in short completions.
#[derive(Clone)]
pub struct Judge {
    /// Name of the model at the gateway.
    pub model: String,
    /// Largest number of completion tokens.
    pub max_tokens: u32,
    /// Number of further requests if a completion cannot be parsed.
    pub parse_retries: u32,
    /// 0 for greedy decoding; any other number samples at temperature 0.7 with a seed derived from this number.
    pub repetition: u32,
    /// Client for teachers, with journal and budget.
    pub client: TeacherClient,
    /// Prompt templates.
    pub prompts: PromptTemplates,
}

impl Judge {
    /// Requests an assessment of a trace with the prompt of `role` and parses the completion with `read`. Returns
    /// `None` if no completion could be parsed or the request failed.
    ///
    /// # Errors
    ///
    /// Returns [`StageError`] if the run must stop.
    pub async fn assess_trace<T>(
        &self,
        stage: &'static str,
        role: PromptRole,
        cot: &Trace,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, StageError> {
        self.assess_completion(stage, role, &cot.problem, &cot.completion(), read).await
    }

    /// Requests an assessment of a problem and a completion, like [`Judge::ask`].
    pub async fn assess_completion<T>(
        &self,
        stage: &'static str,
        role: PromptRole,
        problem: &Problem,
        completion: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, StageError> {
        let stop = |problem| StageError { stage, reason: problem };
        let question = CompletionRequest {
            stage,
            model: self.model.clone(),
            prompt: self.prompts.render_for_completion(role, problem, completion).map_err(stop)?,
            temperature: if self.repetition == 0 { 0.0 } else { 0.7 },
            top_p: 1.0,
            max_tokens: self.max_tokens,
            // Repeated requests add their number to the seed; the factor keeps both ranges apart.
            seed: i64::from(self.repetition) * 1000,
            revision: None,
        };
        match self.client.complete_parsed(&question, self.parse_retries, read).await {
            Ok(value) => Ok(value),
            Err(TeacherError::Run(error)) => Err(error),
            Err(TeacherError::Row(reason)) => {
                tracing::warn!(problem = %problem.id, stage, reason, "a judge gave no answer");
                Ok(None)
            }
        }
    }

    /// Requests a yes-or-no decision: `1` is true, `0` is false. Returns `None` if no completion could be parsed.
    pub async fn decide_binary(
        &self,
        stage: &'static str,
        role: PromptRole,
        problem: &Problem,
        completion: &str,
    ) -> Result<Option<bool>, StageError> {
        let words = [("1", true), ("0", false)];
        self.assess_completion(stage, role, problem, completion, |answer| last_matching_word(answer, &words))
            .await
    }
}

/// Returns the value of the last word in `answer` that is one of `words`, ignoring ASCII case.
pub fn last_matching_word<T: Copy>(answer: &str, words: &[(&str, T)]) -> Option<T> {
    answer.split(|c: char| !c.is_alphanumeric()).rev().find_map(|word| {
        words.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|(_, value)| *value)
    })
}

/// Returns the drop reason of a trace whose finish reason is not `stop`.
pub(crate) fn truncation_reason(cot: &Trace) -> &'static str {
    if cot.finish_reason == REPETITION_LOOP { "loop" } else { "truncated" }
}

/// Stage that sets the difficulty of a trace. Drops traces whose finish reason is not `stop`.
pub struct DifficultyStage {
    /// Model that grades the traces.
    pub judge: Judge,
}

impl Stage for DifficultyStage {
    type In = Trace;
    type Out = Trace;

    fn name(&self) -> &'static str {
        "difficulty"
    }

    async fn process(&self, mut cot: Trace) -> Result<StageOutcome<Trace>, StageError> {
        if cot.finish_reason != "stop" {
            return Ok(StageOutcome::drop(Dropped::trace(truncation_reason(&cot), cot)));
        }
        let words = [("easy", Difficulty::Easy), ("medium", Difficulty::Medium), ("hard", Difficulty::Hard)];
        let read = |answer: &str| last_matching_word(answer, &words);
        let grade = self.judge.assess_trace("difficulty", PromptRole::Difficulty, &cot, read).await?;
        cot.difficulty = Some(grade.unwrap_or(Difficulty::Unscored));
        Ok(StageOutcome::keep(vec![cot]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_known_word_decides() {
        let words = [("easy", 1), ("hard", 3)];
        assert_eq!(last_matching_word("Not hard at all: Easy.", &words), Some(1));
        assert_eq!(last_matching_word("uneasy", &words), None);
        assert_eq!(last_matching_word("", &words), None);
    }
}
