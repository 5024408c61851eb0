//! Builds the trace stages of a recipe, each with its model client. The stages themselves are in `potstill-cot`;
//! [`Chain`] connects them.

use std::sync::Arc;

use anyhow::Context;
use potstill_cot::classify::ClassifyStage;
use potstill_cot::difficulty::{DifficultyStage, Judge};
use potstill_cot::generate::GenerateStage;
use potstill_cot::prompts::PromptTemplates;
use potstill_cot::rewrite::RewriteStage;
use potstill_cot::rv_cd::ScoreStage;
use potstill_cot::teacher::TeacherClient;
use potstill_cot::verify::VerifyStage;
use potstill_data::records::{Problem, Trace};
use potstill_sandbox::{Limits, Sandbox};
use potstill_verify::verifier::Verifier;
use tokio::sync::{Semaphore, mpsc};

use super::chain::Chain;
use crate::recipe::{JudgeSection, Recipe};

/// Builds stages from a recipe.
#[derive(Clone)]
pub(super) struct StageFactory {
    pub(super) recipe: Arc<Recipe>,
    pub(super) prompts: PromptTemplates,
    pub(super) calls: TeacherClient,
}

impl StageFactory {
    /// Returns the classify stage. Fails if the recipe has no `classify`.
    pub(super) fn classifier(&self) -> anyhow::Result<ClassifyStage> {
        let section = self.recipe.classify.as_ref().context("the recipe has no `classify`")?;
        Ok(ClassifyStage { judge: self.judge(section) })
    }

    /// Returns the generate stage. Fails if neither `generate` nor a source with traces exists.
    pub(super) fn generator(&self) -> anyhow::Result<GenerateStage> {
        anyhow::ensure!(
            self.recipe.makes_traces(),
            "the recipe has no `generate`, and no source with `traces`"
        );
        Ok(GenerateStage {
            teachers: self.recipe.generate.iter().flat_map(|section| section.teachers.clone()).collect(),
            calls: self.calls.clone(),
            prompts: self.prompts.clone(),
            seed: self.recipe.seed,
        })
    }

    /// Returns a judge with the settings of a section.
    fn judge(&self, section: &JudgeSection) -> Judge {
        Judge {
            model: section.model.clone(),
            max_tokens: section.max_tokens,
            parse_retries: section.reasks,
            repetition: 0,
            client: self.calls.clone(),
            prompts: self.prompts.clone(),
        }
    }

    /// Returns the difficulty stage. Fails if the recipe has no `difficulty`.
    pub(super) fn grader(&self) -> anyhow::Result<DifficultyStage> {
        let section = self.recipe.difficulty.as_ref().context("the recipe has no `difficulty`")?;
        Ok(DifficultyStage { judge: self.judge(section) })
    }

    /// Returns the rewrite stage. Without a `rewrite` section, traces pass unchanged.
    pub(super) fn rewriter(&self) -> RewriteStage {
        let section = self.recipe.rewrite.as_ref();
        RewriteStage {
            model: section.map(|section| section.model.clone()),
            temperature: section.map_or(0.0, |section| section.temperature),
            max_tokens: section.map_or(0, |section| section.max_tokens),
            calls: self.calls.clone(),
            prompts: self.prompts.clone(),
        }
    }

    /// Returns the verify stage, with a sandbox if a source has tests.
    pub(super) fn verifier(&self) -> anyhow::Result<VerifyStage> {
        let judge = self.recipe.verify.as_ref().map(|section| self.judge(section));
        let mut sources = self.recipe.collect.iter().flat_map(|section| &section.sources);
        let sandbox = if sources.any(|source| source.tests_field().is_some()) {
            // This program also contains the sandbox helper.
            Some(Sandbox::new(std::env::current_exe()?, Limits::default())?)
        } else {
            None
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(VerifyStage { verifier: Verifier::new(sandbox), programs: Semaphore::new(cores), judge })
    }

    /// Returns the judge of RV and CD. Fails if the recipe has no `score`.
    pub(super) fn score_judge(&self) -> anyhow::Result<Judge> {
        Ok(self.judge(self.recipe.score.as_ref().context("the recipe has no `score`")?))
    }

    /// Returns the score stage.
    pub(super) fn scorer(&self) -> anyhow::Result<ScoreStage> {
        Ok(ScoreStage { judge: self.score_judge()? })
    }

    /// Appends generate -> difficulty -> rewrite -> verify -> score to the chain, without difficulty and score if the
    /// recipe lacks them. Returns the output.
    pub(super) fn append_trace_stages(
        &self,
        chain: &mut Chain,
        problems: mpsc::Receiver<Problem>,
    ) -> anyhow::Result<mpsc::Receiver<Trace>> {
        let generated = chain.append(self.generator()?, problems)?;
        let graded = match self.recipe.difficulty {
            Some(_) => chain.append(self.grader()?, generated)?,
            None => generated,
        };
        let rewritten = chain.append(self.rewriter(), graded)?;
        let verified = chain.append(self.verifier()?, rewritten)?;
        Ok(match self.recipe.score {
            Some(_) => chain.append(self.scorer()?, verified)?,
            None => verified,
        })
    }
}
