//! Plans of runs: stages in order, with the remaining requests of each. A plan that is not refreshed expires. Time is
//! an argument, in seconds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::pools::is_model_name;
use crate::scaling_policy::StagePlan;

/// Largest number of runs with a plan.
const MAX_RUNS: usize = 64;
/// Largest number of stages of a plan.
const MAX_STAGES: usize = 64;

/// A plan as a run registers it. Replaces the earlier plan of the same run.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RunPlan {
    /// Name of the run.
    pub run: String,
    /// Seconds after which the plan expires if it is not registered again; default 120, at most 86,400.
    #[serde(default = "default_ttl")]
    pub ttl_s: f64,
    /// Stages of the plan.
    pub stages: Vec<PlannedStage>,
}

/// A stage of a plan, on one model.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
pub struct PlannedStage {
    /// Model that the stage uses.
    pub model: String,
    /// Expected demand of the stage.
    #[serde(flatten)]
    pub plan: StagePlan,
}

fn default_ttl() -> f64 {
    120.0
}

/// A plan in the exchange between gateways.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
pub struct SharedPlan {
    /// Name of the run.
    pub run: String,
    /// Seconds since the plan was registered.
    pub age_s: f64,
    /// Seconds from the registration to the expiry.
    pub ttl_s: f64,
    /// Stages as registered.
    pub stages: Vec<PlannedStage>,
}

#[derive(Debug)]
struct RegisteredPlan {
    at: f64,
    until: f64,
    stages: Vec<(PlannedStage, u64)>,
    /// Name of the gateway where the plan was registered; `None` for this one.
    origin: Option<String>,
}

/// The plans of all runs.
#[derive(Debug, Default)]
pub struct PlanRegistry {
    runs: BTreeMap<String, RegisteredPlan>,
}

impl PlanRegistry {
    /// Registers a plan. `finished` returns the number of completions so far for a model and a stage, so that progress
    /// is counted without further messages of the run. An error names the invalid field.
    pub fn register(
        &mut self,
        plan: RunPlan,
        now: f64,
        finished: impl Fn(&str, &str) -> u64,
    ) -> Result<(), String> {
        self.expire(now);
        if !is_model_name(&plan.run) {
            return Err("`run` must be a name of letters, digits and `._:-`".to_owned());
        }
        if !(plan.ttl_s.is_finite() && plan.ttl_s > 0.0 && plan.ttl_s <= 86_400.0) {
            return Err(format!("`ttl_s` must be more than 0 and at most 86400, not {}", plan.ttl_s));
        }
        if plan.stages.len() > MAX_STAGES {
            return Err(format!("a plan may have up to {MAX_STAGES} stages, not {}", plan.stages.len()));
        }
        for (index, stage) in plan.stages.iter().enumerate() {
            let StagePlan { est_out_tokens: tokens, starts_in_s, deadline_s, cost_ceiling, .. } = &stage.plan;
            let bad =
                |field: &str| Err(format!("`stages[{index}].{field}` must be a number that is not negative"));
            if !is_model_name(&stage.plan.stage) {
                return Err(format!("`stages[{index}].stage` must be a name of letters, digits and `._:-`"));
            }
            let numbers = [
                ("est_out_tokens", Some(*tokens)),
                ("starts_in_s", *starts_in_s),
                ("deadline_s", *deadline_s),
                ("cost_ceiling", *cost_ceiling),
            ];
            for (field, value) in numbers {
                if value.is_some_and(|value| !(value.is_finite() && value >= 0.0)) {
                    return bad(field);
                }
            }
        }
        if self.runs.len() >= MAX_RUNS && !self.runs.contains_key(&plan.run) {
            return Err(format!("{MAX_RUNS} runs have a plan already; wait until one of them ends"));
        }
        let stages = plan.stages.into_iter().map(|stage| {
            let seen = finished(&stage.model, &stage.plan.stage);
            (stage, seen)
        });
        let declared =
            RegisteredPlan { at: now, until: now + plan.ttl_s, stages: stages.collect(), origin: None };
        self.runs.insert(plan.run, declared);
        Ok(())
    }

    /// Returns the plans that were registered here, for other gateways.
    pub fn export(&self, now: f64) -> Vec<SharedPlan> {
        let own = self.runs.iter().filter(|(_, declared)| declared.origin.is_none() && declared.until > now);
        own.map(|(run, declared)| SharedPlan {
            run: run.clone(),
            age_s: now - declared.at,
            ttl_s: declared.until - declared.at,
            stages: declared.stages.iter().map(|(stage, _)| stage.clone()).collect(),
        })
        .collect()
    }

    /// Imports the plans of other gateways. Each entry of `told` is a gateway, its plans, and their age in seconds. For
    /// each run the latest registration counts. A plan that its gateway no longer exports is removed.
    pub fn import(
        &mut self,
        now: f64,
        told: &[(String, Vec<SharedPlan>, f64)],
        finished: impl Fn(&str, &str) -> u64,
    ) {
        self.runs.retain(|run, declared| {
            let origin = declared.origin.as_ref();
            let words = told.iter().find(|(gateway, ..)| Some(gateway) == origin);
            words.is_none_or(|(_, plans, _)| plans.iter().any(|plan| plan.run == *run))
        });
        for (gateway, plans, since) in told {
            for plan in plans {
                let at = now - since - plan.age_s;
                let known = self.runs.get(&plan.run);
                // Ages are inexact by up to the transfer time, so registrations within one second count as the same.
                if known.is_some_and(|known| known.at + 1.0 >= at)
                    || at + plan.ttl_s <= now
                    || (known.is_none() && self.runs.len() >= MAX_RUNS)
                {
                    continue;
                }
                let stages = plan.stages.iter().map(|stage| {
                    let seen = finished(&stage.model, &stage.plan.stage);
                    (stage.clone(), seen)
                });
                let declared = RegisteredPlan {
                    at,
                    until: at + plan.ttl_s,
                    stages: stages.collect(),
                    origin: Some(gateway.clone()),
                };
                self.runs.insert(plan.run.clone(), declared);
            }
        }
    }

    /// Removes the plan of a run. Returns `false` if there is none.
    pub fn remove(&mut self, run: &str) -> bool {
        self.runs.remove(run).is_some()
    }

    /// Removes plans that were not refreshed in time.
    pub fn expire(&mut self, now: f64) {
        self.runs.retain(|run, declared| {
            let stays = declared.until > now;
            if !stays {
                tracing::info!(run, "the plan was not refreshed and is forgotten");
            }
            stays
        });
    }

    /// Returns the stages planned for `model`, with their remaining requests.
    pub fn stages_for(&self, model: &str, now: f64, finished: impl Fn(&str) -> u64) -> Vec<StagePlan> {
        let mut all = Vec::new();
        for declared in self.runs.values() {
            let since = now - declared.at;
            for (stage, seen) in declared.stages.iter().filter(|(stage, _)| stage.model == model) {
                let done = finished(&stage.plan.stage).saturating_sub(*seen);
                let remaining = stage.plan.remaining.saturating_sub(done);
                if remaining > 0 {
                    let later = |seconds: f64| (seconds - since).max(0.0);
                    all.push(StagePlan {
                        remaining,
                        starts_in_s: stage.plan.starts_in_s.map(later),
                        deadline_s: stage.plan.deadline_s.map(later),
                        ..stage.plan.clone()
                    });
                }
            }
        }
        all
    }

    /// Returns the runs with a plan, and the seconds until each expires.
    pub fn expiring_runs(&self, now: f64) -> Vec<(String, f64)> {
        self.runs.iter().map(|(run, declared)| (run.clone(), declared.until - now)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> RunPlan {
        serde_json::from_str(text).unwrap()
    }

    const PLAN: &str = r#"{"run": "r", "ttl_s": 10, "stages": [{"model": "m", "stage": "generate", "order": 0,
        "remaining": 100, "est_out_tokens": 50, "concurrency": 8, "deadline_s": 60}]}"#;

    #[test]
    fn subtracts_progress_and_expires_unrefreshed_plans() {
        let mut plans = PlanRegistry::default();
        plans.register(plan(PLAN), 0.0, |_, _| 40).unwrap();
        let left = plans.stages_for("m", 5.0, |_| 70);
        assert_eq!((left[0].remaining, left[0].deadline_s), (70, Some(55.0)));
        assert!(
            plans.stages_for("m", 5.0, |_| 140).is_empty()
                && plans.stages_for("other", 5.0, |_| 40).is_empty()
        );
        plans.expire(9.9);
        assert_eq!(plans.expiring_runs(9.9).len(), 1);
        plans.expire(10.0);
        assert!(plans.expiring_runs(10.0).is_empty() && plans.stages_for("m", 10.0, |_| 0).is_empty());
    }

    #[test]
    fn gateways_share_plans_and_the_latest_counts() {
        let (mut a, mut b) = (PlanRegistry::default(), PlanRegistry::default());
        a.register(plan(PLAN), 0.0, |_, _| 0).unwrap();
        let told = |from: &PlanRegistry, now: f64| vec![("a".to_owned(), from.export(now), 0.5)];
        b.import(100.0, &told(&a, 1.0), |_, _| 7);
        assert_eq!(b.stages_for("m", 100.0, |_| 17)[0].remaining, 90, "what b finishes from then on counts");
        assert!(b.export(100.0).is_empty(), "what was told is not told on");
        // Registered again at b: the later registration counts, and a imports it.
        b.register(plan(&PLAN.replace("100", "30")), 104.0, |_, _| 0).unwrap();
        b.import(104.0, &told(&a, 5.0), |_, _| 0);
        assert_eq!(b.stages_for("m", 104.0, |_| 0)[0].remaining, 30);
        a.import(5.0, &[("b".to_owned(), b.export(104.0), 0.0)], |_, _| 0);
        assert_eq!(a.stages_for("m", 5.0, |_| 0)[0].remaining, 30);
        assert!(a.export(5.0).is_empty());
        // The plan keeps its expiry, and is removed everywhere when its gateway removes it.
        assert_eq!(a.expiring_runs(5.0)[0].1, 10.0);
        b.remove("r");
        a.import(6.0, &[("b".to_owned(), b.export(105.0), 0.0)], |_, _| 0);
        assert!(a.expiring_runs(6.0).is_empty());
    }

    #[test]
    fn rejects_invalid_plans_by_field() {
        let mut plans = PlanRegistry::default();
        for (from, to, word) in [
            ("\"r\"", "\"../r\"", "`run`"),
            (": 10,", ": -1,", "`ttl_s`"),
            (": 50,", ": -50,", "stages[0].est_out_tokens"),
            ("generate", "gen erate", "stages[0].stage"),
        ] {
            let error = plans.register(plan(&PLAN.replace(from, to)), 0.0, |_, _| 0).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        for run in 0..70 {
            let taken = plans.register(plan(&PLAN.replace("\"r\"", &format!("\"r{run}\""))), 0.0, |_, _| 0);
            assert_eq!(taken.is_ok(), run < MAX_RUNS);
        }
    }
}
