//! Announces to the gateway how many requests the stages of this run still have to send. The gateway starts nodes for
//! this demand instead of guessing, and advises how many requests to keep open.
//!
//! If the gateway rejects a plan, announcements stop and the run continues without them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use potstill_cot::executor::StageCounts;
use potstill_cot::gate::ConcurrencyLimits;
use potstill_shared::client::Client;
use serde_json::{Value, json};

use crate::local::LocalPlanRegistry;
use crate::recipe::Recipe;

/// Interval between two announcements.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(2);
/// Seconds after which the gateway drops a plan that is no longer renewed.
const PLAN_TTL_S: f64 = 30.0;
/// Records that a stage must finish before its measured ratio of kept records is used.
const MIN_MEASURED_RECORDS: usize = 20;

/// Receiver of announcements.
pub enum PlanReceiver {
    /// Gateway in this process.
    Local(LocalPlanRegistry),
    /// Admin API of another gateway.
    Remote(Client),
}

/// One stage with its requests to models.
struct StageDemand {
    stage: &'static str,
    asks: Vec<ModelRequests>,
    counts: Arc<StageCounts>,
}

/// Requests of a stage to one model: requests per record, and expected tokens per completion.
struct ModelRequests {
    model: String,
    per_record: f64,
    tokens: f64,
}

/// Announces the plan of one run and applies the gateway's advice.
pub struct Announcer {
    receiver: PlanReceiver,
    run: String,
    concurrency: usize,
    gates: Arc<ConcurrencyLimits>,
    problems: u64,
    per_problem: f64,
    steps: Vec<StageDemand>,
}

impl Announcer {
    /// Creates an announcer for the trace stages of `recipe` over `problems` problems. `counts` holds the progress of
    /// each stage.
    pub fn new(
        front: PlanReceiver,
        run: &str,
        recipe: &Recipe,
        problems: u64,
        counts: &[(&'static str, Arc<StageCounts>)],
        gates: Arc<ConcurrencyLimits>,
    ) -> Self {
        let teachers = recipe.generate.iter().flat_map(|section| &section.teachers);
        let asks_of = |stage: &str| -> Vec<ModelRequests> {
            let one = |model: &str, per_record, most: u32| {
                // Completions rarely reach their token limit. The gateway later replaces the estimate by its own
                // measurement.
                vec![ModelRequests { model: model.to_owned(), per_record, tokens: f64::from(most) / 2.0 }]
            };
            match stage {
                "classify" => recipe.classify.iter().flat_map(|s| one(&s.model, 1.0, s.max_tokens)).collect(),
                "generate" => teachers
                    .clone()
                    .map(|teacher| ModelRequests {
                        model: teacher.model.clone(),
                        per_record: teacher.temperatures.len() as f64 * f64::from(teacher.samples),
                        tokens: f64::from(teacher.max_tokens) / 2.0,
                    })
                    .collect(),
                "difficulty" => {
                    recipe.difficulty.iter().flat_map(|s| one(&s.model, 1.0, s.max_tokens)).collect()
                }
                // Only easy and hard traces are rewritten; 0.6 is a guess of their fraction.
                "rewrite" => recipe.rewrite.iter().flat_map(|s| one(&s.model, 0.6, s.max_tokens)).collect(),
                // Each trace gets two scores, RV and CD.
                "score" => recipe.score.iter().flat_map(|s| one(&s.model, 2.0, s.max_tokens)).collect(),
                // `verify` asks a judge only where rules cannot decide, so its demand is unknown in advance.
                _ => Vec::new(),
            }
        };
        let steps: Vec<StageDemand> = counts
            .iter()
            .map(|(stage, counts)| StageDemand { stage, asks: asks_of(stage), counts: Arc::clone(counts) })
            .collect();
        let per_problem =
            teachers.map(|teacher| teacher.temperatures.len() as f64 * f64::from(teacher.samples)).sum();
        Self {
            receiver: front,
            run: run.to_owned(),
            concurrency: recipe.concurrency,
            gates,
            problems,
            per_problem,
            steps,
        }
    }

    /// Returns the current plan as JSON for the gateway's admin API. All stages have order 0, because records stream
    /// through them at the same time.
    fn plan(&self) -> Value {
        let mut stages = Vec::new();
        let mut coming = self.problems as f64;
        for (index, step) in self.steps.iter().enumerate() {
            let (done, kept) =
                (step.counts.done.load(Ordering::Relaxed), step.counts.kept.load(Ordering::Relaxed));
            let left = (coming - done as f64).max(0.0);
            for ask in &step.asks {
                let remaining = (left * ask.per_record).ceil();
                if remaining >= 1.0 {
                    stages.push(json!({
                        "model": ask.model, "stage": step.stage, "order": 0, "remaining": remaining as u64,
                        "est_out_tokens": ask.tokens, "concurrency": self.concurrency.min(remaining as usize),
                    }));
                }
            }
            let usual = if index == 0 { self.per_problem.max(1.0) } else { 1.0 };
            let gives = if done >= MIN_MEASURED_RECORDS { kept as f64 / done as f64 } else { usual };
            coming = kept as f64 + left * gives;
        }
        json!({ "run": self.run, "ttl_s": PLAN_TTL_S, "stages": stages })
    }

    /// Sends the plan and returns the gateway's forecasts, or the reason for a rejection.
    async fn register_plan(&self, plan: Value) -> Result<Value, String> {
        match &self.receiver {
            PlanReceiver::Local(plans) => plans.register_plan(plan),
            PlanReceiver::Remote(client) => {
                client.register_plan(&plan).await.map_err(|error| error.to_string())
            }
        }
    }

    /// Limits the open requests of each model to the number that the gateway advises. There is no limit if all
    /// remaining requests may be open, or if the gateway gives no advice. The recipe's `concurrency` applies in any
    /// case.
    fn apply_advice(&self, plan: &Value, answer: &Value) {
        let rows = |of: &Value, list: &str, field: &str| -> HashMap<(String, String), u64> {
            let rows = of.get(list).and_then(Value::as_array).into_iter().flatten();
            rows.filter_map(|row| {
                let text = |name: &str| row.get(name)?.as_str().map(str::to_owned);
                Some(((text("model")?, text("stage")?), row.get(field)?.as_u64()?))
            })
            .collect()
        };
        let remaining = rows(plan, "stages", "remaining");
        let mut open: HashMap<String, u64> = HashMap::new();
        for (stage, advised) in rows(answer, "forecasts", "advised_open") {
            let all = remaining.get(&stage).is_none_or(|remaining| advised >= *remaining);
            // Stages that use one model share its nodes, so the largest advice applies.
            let most = open.entry(stage.0).or_default();
            *most = (*most).max(if all { u64::MAX } else { advised });
        }
        for ask in self.steps.iter().flat_map(|step| &step.asks) {
            let advised = open.get(&ask.model).copied().unwrap_or(u64::MAX);
            self.gates
                .for_model(&ask.model)
                .set_advised_limit(usize::try_from(advised).unwrap_or(usize::MAX));
        }
    }

    /// Announces the plan at a fixed interval until the future is dropped or the gateway rejects a plan.
    pub async fn announce_periodically(self) {
        let mut ticks = tokio::time::interval(ANNOUNCE_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let plan = self.plan();
            match self.register_plan(plan.clone()).await {
                Ok(answer) => self.apply_advice(&plan, &answer),
                Err(problem) => {
                    tracing::warn!(problem, "the gateway took no plan; it follows the requests alone");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_shrinks_with_progress_and_advice_limits_open_requests() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.toml");
        let text = r#"
            name = "t"
            [gateway]
            url = "http://127.0.0.1:9/v1"
            [collect.builtin]
            task = "arithmetic"
            problems = 10
            seed = 1
            [generate]
            teachers = [{ model = "m", temperatures = [0.5, 1.0], samples = 2, max_tokens = 100 }]
            [difficulty]
            model = "m"
            max_tokens = 4
            [student]
            name = "s"
            init = { family = "qwen2", hidden_size = 64, intermediate_size = 192, layers = 3, heads = 4, max_positions = 1024, tokenizer = "arithmetic" }
            [sft]
            learning_rate = 1e-3
            "#;
        potstill_shared::durable::write_file(&path, text.as_bytes()).unwrap();
        let recipe = Recipe::load(&path).unwrap();
        let counts = [("generate", Arc::<StageCounts>::default()), ("difficulty", Arc::default())];
        let front = PlanReceiver::Remote(
            Client::new(potstill_shared::client::Endpoint::new("http://127.0.0.1:9")).unwrap(),
        );
        let gates = Arc::new(ConcurrencyLimits::new(recipe.concurrency));
        let announcer = Announcer::new(front, "r", &recipe, 10, &counts, Arc::clone(&gates));
        let forecast = |stage: &str, advised: u64| json!({ "forecasts": [{ "model": "m", "stage": stage, "advised_open": advised }] });
        for (answer, limit) in [
            (forecast("generate", 9), 9),
            (forecast("generate", 40), 64),
            (forecast("other", 3), 64),
            (json!({}), 64),
        ] {
            announcer.apply_advice(&announcer.plan(), &answer);
            assert_eq!(gates.for_model("m").limit(), limit, "{answer}");
        }
        let remaining = |plan: &Value| -> Vec<u64> {
            plan["stages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|stage| stage["remaining"].as_u64().unwrap())
                .collect()
        };
        assert_eq!(remaining(&announcer.plan()), [40, 40]);
        counts[0].1.done.store(10, Ordering::Relaxed);
        counts[0].1.kept.store(30, Ordering::Relaxed);
        counts[1].1.done.store(29, Ordering::Relaxed);
        assert_eq!(remaining(&announcer.plan()), [1]);
        counts[1].1.done.store(30, Ordering::Relaxed);
        assert!(remaining(&announcer.plan()).is_empty());
    }
}
