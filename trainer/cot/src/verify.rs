//! Verify stage: checks traces by program tests where the problem has some, else by rules against the reference
//! answer. A judge decides only where rules cannot.
//!
//! Incorrect and unverifiable traces are dropped. If a rewrite is not correct, its original is verified instead.
//! Deliberately absent: the rules and the sandbox themselves (`potstill_verify`).

use potstill_data::records::{Dropped, ProgramTest, Trace, Verdict, VerdictMethod};
use potstill_verify::verifier::{Example, Reference, Verifier};
use tokio::sync::Semaphore;

use crate::difficulty::{Judge, truncation_reason};
use crate::executor::{Stage, StageError, StageOutcome};
use crate::prompts::PromptRole;
use crate::rewrite::RewriteCandidate;

/// Stage that sets the verdict of a trace and keeps correct ones.
pub struct VerifyStage {
    /// Rules and sandbox, shared with rewards and evaluation.
    pub verifier: Verifier,
    /// Permits for programs that run concurrently in the sandbox.
    pub programs: Semaphore,
    /// Judge for traces that rules cannot decide. Without a judge, these traces are dropped as `undecided`.
    pub judge: Option<Judge>,
}

impl VerifyStage {
    async fn verify_trace(&self, cot: &Trace) -> Result<Verdict, StageError> {
        let stop = |problem| StageError { stage: "verify", reason: problem };
        if !cot.problem.tests.is_empty() {
            let examples = cot
                .problem
                .tests
                .iter()
                .cloned()
                .map(|ProgramTest { input, output }| Example { input, output });
            let (verifier, gold, completion) =
                (self.verifier.clone(), Reference::Prints(examples.collect()), cot.completion());
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
                .verify(&Reference::Answer(answer.clone()), &cot.completion())
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
        // Two separate requests: does the answer equal the reference answer (if there is one), and is the reasoning
        // valid?
        let completion = cot.completion();
        let ask = |role| judge.decide_binary("verify", role, &cot.problem, &completion);
        let solution = match &cot.problem.answer {
            Some(_) => ask(PromptRole::Solution).await?,
            None => Some(true),
        };
        let process = if solution == Some(true) { ask(PromptRole::Process).await? } else { None };
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

impl Stage for VerifyStage {
    type In = RewriteCandidate;
    type Out = Trace;

    fn name(&self) -> &'static str {
        "verify"
    }

    async fn process(&self, candidate: RewriteCandidate) -> Result<StageOutcome<Trace>, StageError> {
        // Dropped traces keep their verdict, because preference pairs are made of them.
        let mut dropped = Vec::new();
        for mut cot in std::iter::once(candidate.cot).chain(candidate.original) {
            if cot.finish_reason != "stop" {
                // A truncated trace is never trained on, even with a correct answer.
                dropped.push(Dropped::trace(truncation_reason(&cot), cot));
                continue;
            }
            let verdict = self.verify_trace(&cot).await?;
            let correct = verdict.correct;
            cot.verdict = Some(verdict);
            let reason = match correct {
                Some(true) => return Ok(StageOutcome { kept: vec![cot], dropped }),
                Some(false) => "wrong_answer",
                None => "undecided",
            };
            dropped.push(Dropped::trace(reason, cot));
        }
        Ok(StageOutcome { kept: Vec::new(), dropped })
    }
}
