//! `potstill plan`: estimates the cost of a run. A sample of problems passes all stages with paid requests, and the
//! result is extrapolated. The run reuses the completions of the sample from the journal.

use std::collections::BTreeMap;

use potstill_cot::executor::channel_from_records;
use potstill_data::journal::{Usage, UsageTotals};
use potstill_data::records::Problem;
use serde::Serialize;

use super::Run;
use super::chain::Chain;
use super::stages::StageFactory;
use crate::recipe::Recipe;

/// Number of groups into which the sample is divided. Their variance gives the intervals.
const GROUPS: usize = 8;
/// Quantile of Student's t distribution for a 95 % interval with seven degrees of freedom.
const T_QUANTILE: f64 = 2.365;
/// Assumed `max_concurrency` of a node in a remote pool.
const REMOTE_NODE_CONCURRENCY: usize = 32;

/// An estimate with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// Estimated value.
    pub mean: f64,
    /// Half the width of the interval.
    pub plus_minus: f64,
}

impl Estimate {
    /// Extrapolates the sum over all groups by `factor`, the number of problems divided by the sample size.
    fn extrapolate(groups: &[f64], factor: f64) -> Self {
        let n = groups.len() as f64;
        let sum: f64 = groups.iter().sum();
        let mean = sum / n;
        let variance = groups.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        Self { mean: sum * factor, plus_minus: T_QUANTILE * (variance * n).sqrt() * factor }
    }
}

/// Estimate for one model in one stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageEstimate {
    /// Name of the stage.
    pub stage: String,
    /// Name of the model.
    pub model: String,
    /// Number of requests.
    pub calls: Estimate,
    /// Prompt tokens.
    pub prompt_tokens: Estimate,
    /// Completion tokens.
    pub completion_tokens: Estimate,
    /// Hours of one fully loaded node.
    pub node_hours: Estimate,
    /// Cost at the recipe's prices; 0 without prices.
    pub cost: Estimate,
}

/// Estimate for a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunEstimate {
    /// Number of problems of the run.
    pub problems: usize,
    /// Number of problems in the sample.
    pub pilot: usize,
    /// Estimates by stage and model.
    pub stages: Vec<StageEstimate>,
    /// Hours until the last completion, if the recipe's `concurrency` is always used.
    pub hours: Estimate,
    /// Limits of the budget that the run would exceed.
    pub over_budget: Vec<String>,
}

impl Run {
    /// Runs `pilot` problems through all stages with paid requests, and returns the estimate. Uses at least 8 problems.
    pub async fn estimate(&self, pilot: usize) -> anyhow::Result<RunEstimate> {
        anyhow::ensure!(
            self.recipe.generate.is_some(),
            "the recipe asks no teachers: there is nothing to plan"
        );
        let problems = tokio::task::block_in_place(|| self.collect())?;
        // The file is ordered by hashes, so its first rows are a random sample.
        let rows = self.folder.stage_records::<Problem>("collect")?.take(pilot.max(GROUPS));
        let sample = rows.map(|row| row.map(|(_, problem)| problem)).collect::<Result<Vec<_>, _>>()?;
        let size = sample.len().min(problems);
        let mut groups: Vec<Vec<Problem>> = vec![Vec::new(); GROUPS.min(size)];
        for (at, problem) in sample.into_iter().enumerate() {
            let group = at % groups.len();
            groups[group].push(problem);
        }
        let all = groups.into_iter().map(|group| self.run_group(group));
        let totals = futures_util::future::try_join_all(all).await?;
        Ok(estimate_run(&self.recipe, problems, size, &totals))
    }

    /// Runs one group through all stages and returns its usage. Only the journal keeps the results.
    async fn run_group(&self, problems: Vec<Problem>) -> anyhow::Result<UsageTotals> {
        let calls = self.stages.calls.with_own_usage();
        let stages = StageFactory { calls: calls.clone(), ..self.stages.clone() };
        let mut chain = Chain::new(&self.folder, self.recipe.concurrency);
        let mut input = channel_from_records(problems);
        if self.recipe.classify.is_some() {
            input = chain.append(stages.classifier()?, input)?;
        }
        let mut last = stages.append_trace_stages(&mut chain, input)?;
        while last.recv().await.is_some() {}
        chain.discard().await?;
        Ok(calls.usage())
    }
}

/// Computes the estimate from the usage of the groups.
fn estimate_run(recipe: &Recipe, problems: usize, pilot: usize, groups: &[UsageTotals]) -> RunEstimate {
    let factor = problems as f64 / pilot.max(1) as f64;
    let keys: std::collections::BTreeSet<&(String, String)> =
        groups.iter().flat_map(BTreeMap::keys).collect();
    let estimate = |of: &dyn Fn(&UsageTotals) -> f64| {
        Estimate::extrapolate(&groups.iter().map(of).collect::<Vec<f64>>(), factor)
    };
    let stages: Vec<StageEstimate> = keys
        .into_iter()
        .map(|key| {
            let usage =
                |of: fn(&Usage) -> f64| estimate(&|totals: &UsageTotals| totals.get(key).map_or(0.0, of));
            let (stage, model) = key;
            let slots = recipe
                .local
                .iter()
                .find(|local| local.model == *model)
                .map_or(REMOTE_NODE_CONCURRENCY, |local| local.slots);
            let price = recipe.budget.prices.get(model).copied().unwrap_or_default();
            StageEstimate {
                stage: stage.clone(),
                model: model.clone(),
                calls: usage(|usage| usage.calls as f64),
                prompt_tokens: usage(|usage| usage.prompt_tokens as f64),
                completion_tokens: usage(|usage| usage.completion_tokens as f64),
                node_hours: estimate(&|totals: &UsageTotals| {
                    totals.get(key).map_or(0.0, |usage| usage.seconds / slots as f64 / 3600.0)
                }),
                cost: estimate(&|totals: &UsageTotals| {
                    totals
                        .get(key)
                        .map_or(0.0, |usage| price.cost(usage.prompt_tokens, usage.completion_tokens))
                }),
            }
        })
        .collect();
    let open = recipe.concurrency as f64;
    let hours = estimate(&|totals: &UsageTotals| {
        // Each model has its own limit on open requests, so the busiest model determines the time.
        let mut by_model: BTreeMap<&str, f64> = BTreeMap::new();
        for ((_, model), usage) in totals {
            *by_model.entry(model).or_default() += usage.seconds;
        }
        by_model.values().copied().fold(0.0, f64::max) / open / 3600.0
    });
    let sum = |of: fn(&StageEstimate) -> f64| stages.iter().map(of).sum::<f64>();
    let limits = recipe.budget.run_limits();
    let mut over_budget = Vec::new();
    let mut compare = |name: &str, limit: Option<f64>, needed: f64| {
        if let Some(limit) = limit.filter(|limit| needed > *limit) {
            over_budget.push(format!("{name}: {needed:.0} are needed, {limit:.0} are allowed"));
        }
    };
    compare("requests", limits.requests.map(|most| most as f64), sum(|stage| stage.calls.mean));
    let tokens = sum(|stage| stage.prompt_tokens.mean + stage.completion_tokens.mean);
    compare("tokens", limits.tokens.map(|most| most as f64), tokens);
    compare("cost", limits.cost, sum(|stage| stage.cost.mean));
    RunEstimate { problems, pilot, stages, hours, over_budget }
}

/// Formats the estimate as a table for the terminal.
pub fn estimate_table(plan: &RunEstimate) -> String {
    let range = |estimate: &Estimate, digits: usize| {
        format!("{:.digits$} ± {:.digits$}", estimate.mean, estimate.plus_minus)
    };
    let mut text = format!(
        "{} problems, from a pilot of {}; 95 % intervals from {GROUPS} groups\n\n{:<12} {:<24} {:>16} {:>22} {:>22} {:>16} {:>16}\n",
        plan.problems,
        plan.pilot,
        "stage",
        "model",
        "calls",
        "prompt tokens",
        "tokens written",
        "node-hours",
        "cost"
    );
    for stage in &plan.stages {
        text.push_str(&format!(
            "{:<12} {:<24} {:>16} {:>22} {:>22} {:>16} {:>16}\n",
            stage.stage,
            stage.model,
            range(&stage.calls, 0),
            range(&stage.prompt_tokens, 0),
            range(&stage.completion_tokens, 0),
            range(&stage.node_hours, 3),
            range(&stage.cost, 2),
        ));
    }
    text.push_str(&format!("\n{} hours with the recipe's open requests\n", range(&plan.hours, 3)));
    for limit in &plan.over_budget {
        text.push_str(&format!("over budget: {limit}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimate_extrapolates_sum_and_interval() {
        let estimate = Estimate::extrapolate(&[10.0, 12.0, 8.0, 10.0], 5.0);
        assert!((estimate.mean - 200.0).abs() < 1e-9);
        assert!((estimate.plus_minus - T_QUANTILE * (8.0f64 / 3.0 * 4.0).sqrt() * 5.0).abs() < 1e-9);
        assert_eq!(Estimate::extrapolate(&[3.0, 3.0], 1.0).plus_minus, 0.0);
    }
}
