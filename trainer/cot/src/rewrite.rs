//! Rewrite stage: extends easy traces and simplifies hard ones, once each.
//!
//! A rewrite travels with its original, because the verify stage falls back to the original if the rewrite is not
//! correct. Deliberately absent: the grades (`difficulty`) and that decision (`verify`).

use potstill_data::journal::Entry;
use potstill_data::records::{Difficulty, GenerationParams, Origin, Trace};
use potstill_data::spool::SortKey;
use potstill_shared::id::ContentId;
use potstill_shared::reasoning::{CLOSE_TAG, OPEN_TAG};
use serde::{Deserialize, Serialize};

use crate::executor::{Stage, StageError, StageOutcome};
use crate::generate::split_completion;
use crate::prompts::{PromptRole, PromptTemplates};
use crate::teacher::{CompletionRequest, TeacherClient, TeacherError};

/// Trace to verify, with its original if the trace is a rewrite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RewriteCandidate {
    /// Trace to verify first.
    pub cot: Trace,
    /// Trace before the rewrite; `None` for an unchanged trace.
    pub original: Option<Trace>,
}

impl SortKey for RewriteCandidate {
    fn sort_key(&self) -> (ContentId, String) {
        self.cot.sort_key()
    }
}

/// Stage that rewrites easy and hard traces.
pub struct RewriteStage {
    /// Name of the model at the gateway. `None` leaves all traces unchanged.
    pub model: Option<String>,
    /// Sampling temperature of the rewrites.
    pub temperature: f64,
    /// Largest number of completion tokens.
    pub max_tokens: u32,
    /// Client for teachers, with journal and budget.
    pub calls: TeacherClient,
    /// Prompt templates.
    pub prompts: PromptTemplates,
}

/// Returns reasoning and answer of the rewritten trace: the last think block of the content, and the text after that
/// block. A reasoning model's own deliberation comes in an earlier block or in `reasoning` and is ignored. If the
/// content has no think block, the endpoint moved the only one to `reasoning`.
fn split_rewrite(entry: &Entry) -> (Option<String>, String) {
    if let Some((before, answer)) = entry.content.rsplit_once(CLOSE_TAG) {
        let trace = before.rsplit_once(OPEN_TAG).map_or(before, |(_, trace)| trace);
        return (Some(trace.trim().to_owned()), answer.trim().to_owned());
    }
    split_completion(entry)
}

/// Returns the prompt for a difficulty grade; `None` if the trace stays unchanged.
fn rewrite_role(difficulty: Option<Difficulty>) -> Option<PromptRole> {
    match difficulty? {
        Difficulty::Easy => Some(PromptRole::Extend),
        Difficulty::Hard => Some(PromptRole::Simplify),
        Difficulty::Medium | Difficulty::Unscored => None,
    }
}

impl Stage for RewriteStage {
    type In = Trace;
    type Out = RewriteCandidate;

    fn name(&self) -> &'static str {
        "rewrite"
    }

    async fn process(&self, cot: Trace) -> Result<StageOutcome<RewriteCandidate>, StageError> {
        let unchanged = |cot| Ok(StageOutcome::keep(vec![RewriteCandidate { cot, original: None }]));
        let (Some(model), Some(role)) = (&self.model, rewrite_role(cot.difficulty)) else {
            return unchanged(cot);
        };
        let stop = |problem| StageError { stage: "rewrite", reason: problem };
        let question = CompletionRequest {
            stage: "rewrite",
            model: model.clone(),
            prompt: self
                .prompts
                .render_for_completion(role, &cot.problem, &cot.completion())
                .map_err(stop)?,
            temperature: self.temperature,
            top_p: 0.95,
            max_tokens: self.max_tokens,
            seed: (cot.id.seed() >> 2) as i64,
            revision: None,
        };
        let entry = match self.calls.complete(&question).await {
            Ok(entry) => entry,
            Err(TeacherError::Run(error)) => return Err(error),
            Err(TeacherError::Row(reason)) => {
                tracing::warn!(trace = %cot.id, reason, "a trace was not rewritten; the original goes on");
                return unchanged(cot);
            }
        };
        let (thinking, answer) = split_rewrite(&entry);
        // Without an answer, only a judge could verify the rewrite, while the original can be verified by rules.
        let whole = entry.finish_reason == "stop" && (!answer.is_empty() || cot.answer.is_empty());
        let Some(thinking) = thinking.filter(|text| !text.is_empty() && whole) else {
            return unchanged(cot);
        };
        if thinking == cot.thinking {
            // The model changed no word, so the trace keeps its grade.
            return unchanged(cot);
        }
        let mut rewritten = cot.clone();
        rewritten.id = Trace::content_id(&cot.problem, &thinking, &answer);
        rewritten.thinking = thinking;
        rewritten.answer = answer;
        rewritten.parent = Some(cot.id.clone());
        rewritten.origin = Origin {
            teacher: model.clone(),
            sample: cot.origin.sample,
            asked: Some(GenerationParams {
                request: entry.id.clone(),
                prompt_hash: self.prompts.template_hash(role),
                temperature: self.temperature,
                seed: question.seed,
            }),
        };
        rewritten.completion_tokens = entry.completion_tokens;
        rewritten.difficulty = Some(Difficulty::Medium);
        Ok(StageOutcome::keep(vec![RewriteCandidate { cot: rewritten, original: Some(cot) }]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &str, reasoning: Option<&str>) -> (Option<String>, String) {
        split_rewrite(&Entry {
            id: ContentId::from_parts(&["q"]),
            stage: String::new(),
            model: String::new(),
            seconds: 0.0,
            content: content.into(),
            reasoning: reasoning.map(str::to_owned),
            finish_reason: "stop".into(),
            prompt_tokens: 0,
            completion_tokens: 0,
        })
    }

    #[test]
    fn ignores_the_deliberation_of_the_rewriting_model() {
        let new = (Some("new".to_owned()), "\\boxed{1}".to_owned());
        assert_eq!(read("<think>new</think>\\boxed{1}", None), new);
        assert_eq!(read("<think>meta</think><think>new</think>\\boxed{1}", None), new);
        assert_eq!(read("<think>new</think>\\boxed{1}", Some("meta")), new);
        assert_eq!(read("\\boxed{1}", Some("new")), new, "an endpoint that splits the one block off");
        assert_eq!(read("no block", None).0, None);
    }
}
