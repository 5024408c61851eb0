//! Student variants of a run: their order, training, export and serving. Each algorithm starts from the result of the
//! one before it. The algorithms are in [`crate::students`], [`crate::alignment`] and [`crate::distributions`].

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use potstill_data::records::{Problem, Trace};
use potstill_engine::loader::LoadedModel;

use super::Run;
use crate::alignment::{self, ScoreKind};
use crate::distributions::distill;
use crate::recipe::{Baseline, LocalModel, StudentSection};
use crate::students::{SftDataset, TrainingSet, load_base};
use crate::variant::Variant;
use crate::{card, export};

impl Run {
    /// Returns the variants of this run: baselines first, then the algorithms in order.
    pub(super) fn variants(&self) -> Vec<Variant> {
        let compared = self.recipe.evaluate.iter().flat_map(|section| &section.compare);
        let mut variants: Vec<Variant> = compared
            .map(|baseline| match baseline {
                Baseline::Raw => Variant::Raw,
                Baseline::AnswersOnly => Variant::AnswersOnly,
            })
            .collect();
        let recipe = &self.recipe;
        for (wanted, variant) in [
            (recipe.sft.is_some(), Variant::Distilled),
            (recipe.kd.is_some(), Variant::Kd),
            (recipe.dpo.is_some(), Variant::Dpo),
            (recipe.grpo.is_some(), Variant::Grpo),
        ] {
            if wanted {
                variants.push(variant);
            }
        }
        variants
    }

    /// Returns the model name of a variant. The last variant has the recipe's name for the student, the others add a
    /// suffix.
    pub(super) fn student_name(&self, variant: Variant) -> String {
        let name = &self.recipe.student.name;
        if self.variants().last() == Some(&variant) {
            name.clone()
        } else {
            format!("{name}-{}", variant.name().replace('_', "-"))
        }
    }

    /// Trains the reward models for RV and CD and exports them. Does nothing if the recipe has no `reward`.
    pub(super) async fn train_reward_models(&self) -> anyhow::Result<()> {
        if self.recipe.reward.is_none() {
            return Ok(());
        }
        let scored: Vec<Trace> = self.folder.read_stage("score")?;
        let (recipe, progress) = (Arc::clone(&self.recipe), self.progress.clone());
        let train = self.folder.path().join("train");
        let targets = [ScoreKind::Rv, ScoreKind::Cd].map(|metric| (metric, self.reward_model_folder(metric)));
        tokio::task::spawn_blocking(move || {
            for (metric, target) in targets {
                let folder = train.join(format!("reward-{}", metric.name()));
                let (model, agreement) =
                    alignment::train_reward_model(&recipe, metric, &scored, &folder, &progress)?;
                let text = card::reward_model_card(&recipe, metric, model.model(), &agreement);
                export::export_model(&target, model.model(), recipe.student.export, &text)?;
            }
            Ok(())
        })
        .await?
    }

    /// Returns the model folder of a reward model.
    fn reward_model_folder(&self, metric: ScoreKind) -> std::path::PathBuf {
        self.folder.path().join("models").join(format!("{}-{}", self.recipe.student.name, metric.name()))
    }

    /// Trains every variant. A variant that was trained before is loaded from its last checkpoint.
    pub(super) async fn train_students(&self, traces: &[Trace]) -> anyhow::Result<()> {
        self.for_each_trained(traces, |_, _| Ok(())).await
    }

    /// Trains every variant, as [`Run::train`] does, and exports it as a model folder.
    pub(super) async fn export_students(&self, traces: &[Trace]) -> anyhow::Result<()> {
        let (models, recipe, progress) =
            (self.folder.path().join("models"), Arc::clone(&self.recipe), self.progress.clone());
        potstill_shared::durable::create_folder(&models)?;
        let names: Vec<(Variant, String)> =
            self.variants().into_iter().map(|v| (v, self.student_name(v))).collect();
        self.for_each_trained(traces, move |variant, model| {
            let name = &names.iter().find(|(other, _)| *other == variant).context("an unknown variant")?.1;
            let folder = models.join(name);
            let text = card::student_card(&recipe, name, variant, model, None, None);
            export::export_model(&folder, model, recipe.student.export, &text)?;
            progress.message(format!("exported `{}`", folder.display()));
            Ok(())
        })
        .await
    }

    /// Trains every variant and calls `use_it` with each. Runs on a blocking thread, because training occupies the
    /// processor.
    async fn for_each_trained(
        &self,
        traces: &[Trace],
        use_it: impl Fn(Variant, &LoadedModel) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let (recipe, progress) = (Arc::clone(&self.recipe), self.progress.clone());
        let calls = self.stages.calls.clone();
        let (variants, folder, traces) = (self.variants(), self.folder.path().join("train"), traces.to_vec());
        let held_out: Vec<String> = self.held_out()?.into_iter().map(|problem| problem.problem).collect();
        let problems: Vec<Problem> =
            if recipe.grpo.is_some() { self.folder.read_stage("collect")? } else { Vec::new() };
        let own_rewards = if recipe.reward.is_some() {
            [ScoreKind::Rv, ScoreKind::Cd]
                .map(|metric| (metric.name(), self.reward_model_folder(metric)))
                .into()
        } else {
            std::collections::HashMap::new()
        };
        tokio::task::spawn_blocking(move || {
            let base = load_base(&recipe)?;
            let plan = match &recipe.sft {
                None => None,
                Some(sft) => {
                    let lessons = match &sft.conversations {
                        Some(section) => TrainingSet::conversations(section, &held_out)?,
                        None => TrainingSet::chains_of_thought(&recipe, &traces),
                    };
                    Some(SftDataset::new(&recipe, &base, &lessons)?)
                }
            };
            let mut student = base.clone();
            for variant in variants {
                let name = variant.name();
                let folder = folder.join(name);
                let trained = match variant {
                    Variant::Raw => {
                        use_it(variant, &base)?;
                        continue;
                    }
                    Variant::AnswersOnly => {
                        let plan = plan.as_ref().context("`answers_only` needs `sft`")?;
                        let lessons = TrainingSet::answers_only(&recipe, &traces);
                        let answers =
                            SftDataset::new(&recipe, &base, &lessons)?.with_token_budget(plan.total_tokens());
                        use_it(variant, &answers.train(&recipe, &base, &folder, name, &progress)?)?;
                        continue;
                    }
                    Variant::Distilled => {
                        let plan = plan.as_ref().context("the recipe has no `sft`")?;
                        plan.train(&recipe, &base, &folder, name, &progress)?
                    }
                    Variant::Kd => {
                        let section = recipe.kd.as_ref().context("the recipe has no `kd`")?;
                        distill(&recipe, section, &calls, &student, &traces, &folder, &progress)?
                    }
                    Variant::Dpo => {
                        let section = recipe.dpo.as_ref().context("the recipe has no `dpo`")?;
                        alignment::train_dpo(&recipe, section, &student, &traces, &folder, &progress)?
                    }
                    Variant::Grpo => {
                        let section = recipe.grpo.as_ref().context("the recipe has no `grpo`")?;
                        alignment::train_grpo(
                            &recipe,
                            section,
                            &student,
                            &problems,
                            &own_rewards,
                            &folder,
                            &progress,
                        )?
                    }
                };
                use_it(variant, &trained)?;
                student = trained;
            }
            Ok(())
        })
        .await?
    }

    /// Serves an exported variant through the local gateway and returns its model name.
    pub(super) fn serve_variant(&self, variant: Variant) -> anyhow::Result<String> {
        let model = self.student_name(variant);
        let path = self.folder.path().join("models").join(&model);
        anyhow::ensure!(path.exists(), "`{}` does not exist; run `potstill export` first", path.display());
        self.serve_model(&model, path)?;
        Ok(model)
    }

    /// Serves a model of this run through the local gateway, with at most one node.
    pub(super) fn serve_model(&self, model: &str, path: PathBuf) -> anyhow::Result<()> {
        let StudentSection { threads, device, .. } = &self.recipe.student;
        self.local_gateway.add_model(&LocalModel {
            model: model.to_owned(),
            path,
            min: 0,
            max: 1,
            slots: 64,
            threads: *threads,
            device: device.clone(),
        })
    }
}
