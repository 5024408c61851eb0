//! Verifier: tests where there are some, else rules; a judge only where rules say `unknown`. Wrong traces are dropped. A rewrite that is not right
//! falls back to its original, if that one is.

use potstill_data::records::{Cot, Dropped, Test, Verdict, VerdictMethod};
use potstill_verify::verifier::{Example, Gold, Verifier};
use tokio::sync::Semaphore;

use crate::difficulty::{Judge, unfinished};
use crate::executor::{Outcome, Stage, StageError};
use crate::prompts::Role;
use crate::rewrite::Candidate;

/// The stage.
pub struct Verify {
    /// The rules and tests, the same as in rewards and evaluations.
    pub verifier: Verifier,
    /// Programs that run at once.
    pub programs: Semaphore,
    /// Who is asked where rules cannot decide; without one such traces are dropped.
    pub judge: Option<Judge>,
}

impl Verify {
    async fn verdict(&self, cot: &Cot) -> Result<Verdict, StageError> {
        let stop = |problem| StageError { stage: "verify", problem };
        if !cot.problem.tests.is_empty() {
            let examples =
                cot.problem.tests.iter().cloned().map(|Test { input, output }| Example { input, output });
            let (verifier, gold, completion) =
                (self.verifier.clone(), Gold::Prints(examples.collect()), cot.completion());
            let _turn = self.programs.acquire().await.map_err(|error| stop(error.to_string()))?;
            let finding = tokio::task::spawn_blocking(move || verifier.verify(&gold, &completion))
                .await
                .map_err(|error| stop(error.to_string()))?
                .map_err(|error| stop(error.to_string()))?;
            let method =
                if finding.correct.is_some() { VerdictMethod::Tests } else { VerdictMethod::Unknown };
            return Ok(Verdict { correct: finding.correct, method, evidence: finding.evidence });
        }
        if let Some(answer) = &cot.problem.answer {
            let finding = self
                .verifier
                .verify(&Gold::Answer(answer.clone()), &cot.completion())
                .map_err(|error| stop(error.to_string()))?;
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
        // Two questions apart: whether the answer is the known one (where one is known), and whether the reasoning holds.
        let completion = cot.completion();
        let ask = |role| judge.decide("verify", role, &cot.problem, &completion);
        let solution = match &cot.problem.answer {
            Some(_) => ask(Role::Solution).await?,
            None => Some(true),
        };
        let process = if solution == Some(true) { ask(Role::Process).await? } else { None };
        let correct = if solution == Some(true) { process } else { solution };
        let word = |said: Option<bool>| said.map_or("nothing readable", |said| if said { "1" } else { "0" });
        let mut said = Vec::new();
        if cot.problem.answer.is_some() {
            said.push(format!("solution {}", word(solution)));
        }
        if solution == Some(true) {
            said.push(format!("process {}", word(process)));
        }
        let method = if correct.is_some() { VerdictMethod::Judge } else { VerdictMethod::Unknown };
        let evidence = format!("`{}` says {}", judge.model, said.join(", "));
        Ok(Verdict { correct, method, evidence })
    }
}

impl Stage for Verify {
    type In = Candidate;
    type Out = Cot;

    fn name(&self) -> &'static str {
        "verify"
    }

    async fn process(&self, candidate: Candidate) -> Result<Outcome<Cot>, StageError> {
        // What was looked at and not kept, with its verdict: pairs of better and worse are made of it.
        let mut dropped = Vec::new();
        for mut cot in std::iter::once(candidate.cot).chain(candidate.original) {
            if cot.finish_reason != "stop" {
                // Nothing truncated is trained on, whatever its answer.
                dropped.push(Dropped::trace(unfinished(&cot), cot));
                continue;
            }
            let verdict = self.verdict(&cot).await?;
            let correct = verdict.correct;
            cot.verdict = Some(verdict);
            let reason = match correct {
                Some(true) => return Ok(Outcome { kept: vec![cot], dropped }),
                Some(false) => "wrong_answer",
                None => "undecided",
            };
            dropped.push(Dropped::trace(reason, cot));
        }
        Ok(Outcome { kept: Vec::new(), dropped })
    }
}
