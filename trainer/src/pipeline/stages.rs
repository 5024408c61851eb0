//! The CoT stages of a recipe, with whom they ask.

use std::sync::Arc;

use anyhow::Context;
use potstill_cot::classify::Classify;
use potstill_cot::difficulty::{Grade, Judge};
use potstill_cot::generate::Generate;
use potstill_cot::prompts::Prompts;
use potstill_cot::rewrite::Rewrite;
use potstill_cot::rv_cd::Score;
use potstill_cot::teacher::Teachers;
use potstill_cot::verify::Verify;
use potstill_data::records::{Cot, Problem};
use potstill_sandbox::{Limits, Sandbox};
use potstill_verify::verifier::Verifier;
use tokio::sync::{Semaphore, mpsc};

use super::chain::Chain;
use crate::recipe::{JudgeSection, Recipe};

/// Makes the stages.
#[derive(Clone)]
pub(super) struct Stages {
    pub(super) recipe: Arc<Recipe>,
    pub(super) prompts: Prompts,
    pub(super) calls: Teachers,
}

impl Stages {
    pub(super) fn classifier(&self) -> anyhow::Result<Classify> {
        let section = self.recipe.classify.as_ref().context("the recipe has no `classify`")?;
        Ok(Classify { judge: self.judge(section) })
    }

    pub(super) fn generator(&self) -> anyhow::Result<Generate> {
        anyhow::ensure!(
            self.recipe.makes_traces(),
            "the recipe has no `generate`, and no source with `traces`"
        );
        Ok(Generate {
            teachers: self.recipe.generate.iter().flat_map(|section| section.teachers.clone()).collect(),
            calls: self.calls.clone(),
            prompts: self.prompts.clone(),
            seed: self.recipe.seed,
        })
    }

    fn judge(&self, section: &JudgeSection) -> Judge {
        Judge {
            model: section.model.clone(),
            max_tokens: section.max_tokens,
            reasks: section.reasks,
            variation: 0,
            calls: self.calls.clone(),
            prompts: self.prompts.clone(),
        }
    }

    pub(super) fn grader(&self) -> anyhow::Result<Grade> {
        let section = self.recipe.difficulty.as_ref().context("the recipe has no `difficulty`")?;
        Ok(Grade { judge: self.judge(section) })
    }

    pub(super) fn rewriter(&self) -> Rewrite {
        let section = self.recipe.rewrite.as_ref();
        Rewrite {
            model: section.map(|section| section.model.clone()),
            temperature: section.map_or(0.0, |section| section.temperature),
            max_tokens: section.map_or(0, |section| section.max_tokens),
            calls: self.calls.clone(),
            prompts: self.prompts.clone(),
        }
    }

    pub(super) fn verifier(&self) -> anyhow::Result<Verify> {
        let judge = self.recipe.verify.as_ref().map(|section| self.judge(section));
        let mut sources = self.recipe.collect.iter().flat_map(|section| &section.sources);
        let sandbox = if sources.any(|source| source.tests_field().is_some()) {
            // This program is its own helper.
            Some(Sandbox::new(std::env::current_exe()?, Limits::default())?)
        } else {
            None
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Verify { verifier: Verifier::new(sandbox), programs: Semaphore::new(cores), judge })
    }

    pub(super) fn score_judge(&self) -> anyhow::Result<Judge> {
        Ok(self.judge(self.recipe.score.as_ref().context("the recipe has no `score`")?))
    }

    pub(super) fn scorer(&self) -> anyhow::Result<Score> {
        Ok(Score { judge: self.score_judge()? })
    }

    /// generate -> difficulty -> rewrite -> verify -> score, as far as the recipe has them.
    pub(super) fn link_all(
        &self,
        chain: &mut Chain,
        problems: mpsc::Receiver<Problem>,
    ) -> anyhow::Result<mpsc::Receiver<Cot>> {
        let generated = chain.link(self.generator()?, problems)?;
        let graded = match self.recipe.difficulty {
            Some(_) => chain.link(self.grader()?, generated)?,
            None => generated,
        };
        let rewritten = chain.link(self.rewriter(), graded)?;
        let verified = chain.link(self.verifier()?, rewritten)?;
        Ok(match self.recipe.score {
            Some(_) => chain.link(self.scorer()?, verified)?,
            None => verified,
        })
    }
}
