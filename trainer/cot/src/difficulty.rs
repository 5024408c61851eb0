//! Difficulty scorer: is the trace too terse, fitting or too convoluted for the student? An unreadable answer is asked
//! again twice, then the trace counts as unscored.

use potstill_data::records::{Cot, Difficulty, Dropped, Problem};

use potstill_shared::client::LOOP;

use crate::executor::{Outcome, Stage, StageError};
use crate::prompts::{Prompts, Role};
use crate::teacher::{AskError, Question, Teachers};

/// A model that answers short questions about traces.
#[derive(Clone)]
pub struct Judge {
    /// Model behind the gateway.
    pub model: String,
    /// Limit on new tokens.
    pub max_tokens: u32,
    /// How often an unreadable answer is asked again.
    pub reasks: u32,
    /// 0 asks for the likeliest answer; any other number draws one, with that seed.
    pub variation: u32,
    /// Through what.
    pub calls: Teachers,
    /// With which prompts.
    pub prompts: Prompts,
}

impl Judge {
    /// Asks `role`'s question about `cot`; `None` when no answer was readable.
    pub async fn ask<T>(
        &self,
        stage: &'static str,
        role: Role,
        cot: &Cot,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, StageError> {
        self.ask_about(stage, role, &cot.problem, &cot.completion(), read).await
    }

    /// The same about a completion.
    pub async fn ask_about<T>(
        &self,
        stage: &'static str,
        role: Role,
        problem: &Problem,
        completion: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, StageError> {
        let stop = |problem| StageError { stage, problem };
        let question = Question {
            stage,
            model: self.model.clone(),
            prompt: self.prompts.for_completion(role, problem, completion).map_err(stop)?,
            temperature: if self.variation == 0 { 0.0 } else { 0.7 },
            top_p: 1.0,
            max_tokens: self.max_tokens,
            // Apart from the seeds of answers that are asked again.
            seed: i64::from(self.variation) * 1000,
            revision: None,
        };
        match self.calls.ask_for(&question, self.reasks, read).await {
            Ok(value) => Ok(value),
            Err(AskError::Run(error)) => Err(error),
            Err(AskError::Row(reason)) => {
                tracing::warn!(problem = %problem.id, stage, reason, "a judge gave no answer");
                Ok(None)
            }
        }
    }

    /// A question that is answered by 1 or 0.
    pub async fn decide(
        &self,
        stage: &'static str,
        role: Role,
        problem: &Problem,
        completion: &str,
    ) -> Result<Option<bool>, StageError> {
        let words = [("1", true), ("0", false)];
        self.ask_about(stage, role, problem, completion, |answer| last_word(answer, &words)).await
    }
}

/// The last word of an answer that is one of `words`, case aside.
pub fn last_word<T: Copy>(answer: &str, words: &[(&str, T)]) -> Option<T> {
    answer.split(|c: char| !c.is_alphanumeric()).rev().find_map(|word| {
        words.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|(_, value)| *value)
    })
}

/// Why a trace that did not end by itself is left out.
pub(crate) fn unfinished(cot: &Cot) -> &'static str {
    if cot.finish_reason == LOOP { "loop" } else { "truncated" }
}

/// The stage.
pub struct Grade {
    /// Who grades.
    pub judge: Judge,
}

impl Stage for Grade {
    type In = Cot;
    type Out = Cot;

    fn name(&self) -> &'static str {
        "difficulty"
    }

    async fn process(&self, mut cot: Cot) -> Result<Outcome<Cot>, StageError> {
        if cot.finish_reason != "stop" {
            return Ok(Outcome::drop(Dropped::trace(unfinished(&cot), cot)));
        }
        let words = [("easy", Difficulty::Easy), ("medium", Difficulty::Medium), ("hard", Difficulty::Hard)];
        let read = |answer: &str| last_word(answer, &words);
        let grade = self.judge.ask("difficulty", Role::Difficulty, &cot, read).await?;
        cot.difficulty = Some(grade.unwrap_or(Difficulty::Unscored));
        Ok(Outcome::keep(vec![cot]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts() {
        let words = [("easy", 1), ("hard", 3)];
        assert_eq!(last_word("Not hard at all: Easy.", &words), Some(1));
        assert_eq!(last_word("uneasy", &words), None);
        assert_eq!(last_word("", &words), None);
    }
}
