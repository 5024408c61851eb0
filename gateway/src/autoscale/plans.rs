//! What runs announce: their stages, in order, with what is left of each. A plan that nobody refreshes is forgotten. Time is
//! passed in as seconds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::pools::is_name;
use crate::scaling_policy::StagePlan;

/// Runs that may have a plan at the same time.
const RUNS: usize = 64;
/// Stages of a plan.
const STAGES: usize = 64;

/// A plan as its owner declares it; it takes the place of what the same run declared before.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RunPlan {
    /// Name of the run.
    pub run: String,
    /// Seconds after which it is forgotten if it is not declared again.
    #[serde(default = "default_ttl")]
    pub ttl_s: f64,
    /// Its stages.
    pub stages: Vec<PlannedStage>,
}

/// One stage on one model.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
pub struct PlannedStage {
    /// The model that it asks.
    pub model: String,
    /// What it will ask.
    #[serde(flatten)]
    pub plan: StagePlan,
}

fn default_ttl() -> f64 {
    120.0
}

/// A plan as one gateway tells it to another.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
pub struct SharedPlan {
    /// Name of the run.
    pub run: String,
    /// Seconds since it was declared.
    pub age_s: f64,
    /// Seconds until it is forgotten, counted from its declaration.
    pub ttl_s: f64,
    /// Its stages as they were declared.
    pub stages: Vec<PlannedStage>,
}

#[derive(Debug)]
struct Declared {
    at: f64,
    until: f64,
    stages: Vec<(PlannedStage, u64)>,
    /// The gateway that it was declared to, when it was not this one.
    origin: Option<String>,
}

/// The plans of all runs.
#[derive(Debug, Default)]
pub struct Plans {
    runs: BTreeMap<String, Declared>,
}

impl Plans {
    /// Takes a plan. `finished` tells how many completions of a stage a model has seen so far, so that progress counts
    /// without a further word from the owner. An error says what is wrong with it.
    pub fn register(
        &mut self,
        plan: RunPlan,
        now: f64,
        finished: impl Fn(&str, &str) -> u64,
    ) -> Result<(), String> {
        self.expire(now);
        if !is_name(&plan.run) {
            return Err("`run` must be a name of letters, digits and `._:-`".to_owned());
        }
        if !(plan.ttl_s.is_finite() && plan.ttl_s > 0.0 && plan.ttl_s <= 86_400.0) {
            return Err(format!("`ttl_s` must be more than 0 and at most 86400, not {}", plan.ttl_s));
        }
        if plan.stages.len() > STAGES {
            return Err(format!("a plan may have up to {STAGES} stages, not {}", plan.stages.len()));
        }
        for (index, stage) in plan.stages.iter().enumerate() {
            let StagePlan { est_out_tokens: tokens, starts_in_s, deadline_s, cost_ceiling, .. } = &stage.plan;
            let bad =
                |field: &str| Err(format!("`stages[{index}].{field}` must be a number that is not negative"));
            if !is_name(&stage.plan.stage) {
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
        if self.runs.len() >= RUNS && !self.runs.contains_key(&plan.run) {
            return Err(format!("{RUNS} runs have a plan already; wait until one of them ends"));
        }
        let stages = plan.stages.into_iter().map(|stage| {
            let seen = finished(&stage.model, &stage.plan.stage);
            (stage, seen)
        });
        let declared = Declared { at: now, until: now + plan.ttl_s, stages: stages.collect(), origin: None };
        self.runs.insert(plan.run, declared);
        Ok(())
    }

    /// The plans that were declared here, for other gateways.
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

    /// Takes what other gateways were told: of each run what was declared last, wherever that was. `told` names a gateway, its
    /// plans, and for how many seconds these words have stood; what it no longer tells is forgotten.
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
                // Ages are as old as the words that carry them: a second more or less is the same declaration.
                if known.is_some_and(|known| known.at + 1.0 >= at)
                    || at + plan.ttl_s <= now
                    || (known.is_none() && self.runs.len() >= RUNS)
                {
                    continue;
                }
                let stages = plan.stages.iter().map(|stage| {
                    let seen = finished(&stage.model, &stage.plan.stage);
                    (stage.clone(), seen)
                });
                let declared = Declared {
                    at,
                    until: at + plan.ttl_s,
                    stages: stages.collect(),
                    origin: Some(gateway.clone()),
                };
                self.runs.insert(plan.run.clone(), declared);
            }
        }
    }

    /// Forgets a run. False when it has no plan.
    pub fn remove(&mut self, run: &str) -> bool {
        self.runs.remove(run).is_some()
    }

    /// Forgets the plans that were not refreshed in time.
    pub fn expire(&mut self, now: f64) {
        self.runs.retain(|run, declared| {
            let stays = declared.until > now;
            if !stays {
                tracing::info!(run, "the plan was not refreshed and is forgotten");
            }
            stays
        });
    }

    /// What is announced for `model`, with what is left of it.
    pub fn of(&self, model: &str, now: f64, finished: impl Fn(&str) -> u64) -> Vec<StagePlan> {
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

    /// The runs that have a plan, with the seconds until it is forgotten.
    pub fn runs(&self, now: f64) -> Vec<(String, f64)> {
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
    fn progress_counts_and_an_abandoned_plan_expires() {
        let mut plans = Plans::default();
        plans.register(plan(PLAN), 0.0, |_, _| 40).unwrap();
        let left = plans.of("m", 5.0, |_| 70);
        assert_eq!((left[0].remaining, left[0].deadline_s), (70, Some(55.0)));
        assert!(plans.of("m", 5.0, |_| 140).is_empty() && plans.of("other", 5.0, |_| 40).is_empty());
        plans.expire(9.9);
        assert_eq!(plans.runs(9.9).len(), 1);
        plans.expire(10.0);
        assert!(plans.runs(10.0).is_empty() && plans.of("m", 10.0, |_| 0).is_empty());
    }

    #[test]
    fn gateways_tell_each_other_and_the_last_word_counts() {
        let (mut a, mut b) = (Plans::default(), Plans::default());
        a.register(plan(PLAN), 0.0, |_, _| 0).unwrap();
        let told = |from: &Plans, now: f64| vec![("a".to_owned(), from.export(now), 0.5)];
        b.import(100.0, &told(&a, 1.0), |_, _| 7);
        assert_eq!(b.of("m", 100.0, |_| 17)[0].remaining, 90, "what b finishes from then on counts");
        assert!(b.export(100.0).is_empty(), "what was told is not told on");
        // Declared again to b: that is the last word, and a takes it over.
        b.register(plan(&PLAN.replace("100", "30")), 104.0, |_, _| 0).unwrap();
        b.import(104.0, &told(&a, 5.0), |_, _| 0);
        assert_eq!(b.of("m", 104.0, |_| 0)[0].remaining, 30);
        a.import(5.0, &[("b".to_owned(), b.export(104.0), 0.0)], |_, _| 0);
        assert_eq!(a.of("m", 5.0, |_| 0)[0].remaining, 30);
        assert!(a.export(5.0).is_empty());
        // Withdrawn where it was declared, it is gone everywhere; it expires as it would there.
        assert_eq!(a.runs(5.0)[0].1, 10.0);
        b.remove("r");
        a.import(6.0, &[("b".to_owned(), b.export(105.0), 0.0)], |_, _| 0);
        assert!(a.runs(6.0).is_empty());
    }

    #[test]
    fn a_plan_that_makes_no_sense_is_refused_and_names_the_field() {
        let mut plans = Plans::default();
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
            assert_eq!(taken.is_ok(), run < RUNS);
        }
    }
}
