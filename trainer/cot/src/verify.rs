//! Verifier: rules first; a judge only where rules say `unknown`. Wrong traces are dropped. A rewrite that is not right
//! falls back to its original, if that one is.

use potstill_data::records::{Cot, Verdict, VerdictMethod};

use crate::difficulty::{Judge, last_word};
use crate::executor::{Outcome, Stage, StageError};
use crate::prompts::Role;
use crate::rewrite::Candidate;

/// The stage.
pub struct Verify {
    /// Who is asked where rules cannot decide; without one such traces are dropped.
    pub judge: Option<Judge>,
}

impl Verify {
    async fn verdict(&self, cot: &Cot) -> Result<Verdict, StageError> {
        if let Some(answer) = &cot.problem.answer {
            let finding = potstill_verify::check(answer, &cot.completion());
            if finding.correct.is_some() {
                return Ok(Verdict {
                    correct: finding.correct,
                    method: VerdictMethod::Rule,
                    evidence: finding.evidence,
                });
            }
        }
        let Some(judge) = &self.judge else {
            let evidence = "no rule applies and no judge is configured".to_owned();
            return Ok(Verdict { correct: None, method: VerdictMethod::Unknown, evidence });
        };
        let words = [("1", true), ("0", false)];
        let said = judge.ask("verify", Role::Verify, cot, |answer| last_word(answer, &words)).await?;
        Ok(match said {
            Some(correct) => Verdict {
                correct: Some(correct),
                method: VerdictMethod::Judge,
                evidence: format!("`{}` says {}", judge.model, u8::from(correct)),
            },
            None => Verdict {
                correct: None,
                method: VerdictMethod::Unknown,
                evidence: format!("`{}` gave no readable answer", judge.model),
            },
        })
    }
}

impl Stage for Verify {
    type In = Candidate;
    type Out = Cot;

    fn name(&self) -> &'static str {
        "verify"
    }

    async fn process(&self, candidate: Candidate) -> Result<Outcome<Cot>, StageError> {
        if candidate.cot.finish_reason != "stop" && candidate.original.is_none() {
            return Ok(Outcome::Drop("truncated"));
        }
        let mut last = None;
        for mut cot in std::iter::once(candidate.cot).chain(candidate.original) {
            if cot.finish_reason != "stop" {
                // Nothing truncated is trained on, whatever its answer.
                continue;
            }
            let verdict = self.verdict(&cot).await?;
            let correct = verdict.correct;
            cot.verdict = Some(verdict);
            if correct == Some(true) {
                return Ok(Outcome::Keep(vec![cot]));
            }
            last = last.or(correct);
        }
        Ok(Outcome::Drop(if last == Some(false) { "wrong_answer" } else { "undecided" }))
    }
}
