//! Announces to the gateway what the CoT stages of this run still have to ask, so that it starts nodes for known work and
//! not for guesses. A gateway that does not take plans is only told once; the run goes on without.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use potstill_cot::executor::Counts;
use potstill_cot::gate::Gates;
use potstill_shared::client::Client;
use serde_json::{Value, json};

use crate::local::LocalPlans;
use crate::recipe::Recipe;

/// How often the plan is brought up to date.
const EVERY: Duration = Duration::from_secs(2);
/// A run that ends without a word is forgotten after this.
const FORGOTTEN_S: f64 = 30.0;
/// Records that a stage must have done before its own share of kept ones counts.
const ENOUGH: usize = 20;

/// Where plans go.
pub enum Front {
    /// The gateway of this process.
    Local(LocalPlans),
    /// The admin API of another one.
    Remote(Client),
}

/// One stage: which model it asks, how often per record, how long answers may be.
struct Step {
    stage: &'static str,
    asks: Vec<Ask>,
    counts: Arc<Counts>,
}

struct Ask {
    model: String,
    per_record: f64,
    tokens: f64,
}

/// The announcements of one run.
pub struct Announcer {
    front: Front,
    run: String,
    open: usize,
    gates: Arc<Gates>,
    problems: u64,
    per_problem: f64,
    steps: Vec<Step>,
}

impl Announcer {
    /// For the CoT stages of a recipe over so many problems.
    pub fn new(
        front: Front,
        run: &str,
        recipe: &Recipe,
        problems: u64,
        counts: &[(&'static str, Arc<Counts>)],
        gates: Arc<Gates>,
    ) -> Self {
        let teachers = recipe.generate.iter().flat_map(|section| &section.teachers);
        let asks_of = |stage: &str| -> Vec<Ask> {
            let one = |model: &str, per_record, most: u32| {
                // Answers rarely use up their limit; the gateway goes over to what it measures.
                vec![Ask { model: model.to_owned(), per_record, tokens: f64::from(most) / 2.0 }]
            };
            match stage {
                "classify" => recipe.classify.iter().flat_map(|s| one(&s.model, 1.0, s.max_tokens)).collect(),
                "generate" => teachers
                    .clone()
                    .map(|teacher| Ask {
                        model: teacher.model.clone(),
                        per_record: teacher.temperatures.len() as f64 * f64::from(teacher.samples),
                        tokens: f64::from(teacher.max_tokens) / 2.0,
                    })
                    .collect(),
                "difficulty" => {
                    recipe.difficulty.iter().flat_map(|s| one(&s.model, 1.0, s.max_tokens)).collect()
                }
                // Only easy and hard ones are rewritten.
                "rewrite" => recipe.rewrite.iter().flat_map(|s| one(&s.model, 0.6, s.max_tokens)).collect(),
                // Two scores a trace.
                "score" => recipe.score.iter().flat_map(|s| one(&s.model, 2.0, s.max_tokens)).collect(),
                // Rules come first there; what is left for a judge is not known ahead.
                _ => Vec::new(),
            }
        };
        let steps: Vec<Step> = counts
            .iter()
            .map(|(stage, counts)| Step { stage, asks: asks_of(stage), counts: Arc::clone(counts) })
            .collect();
        let per_problem =
            teachers.map(|teacher| teacher.temperatures.len() as f64 * f64::from(teacher.samples)).sum();
        Self { front, run: run.to_owned(), open: recipe.concurrency, gates, problems, per_problem, steps }
    }

    /// What is left now. All stages run at once, as records stream through them.
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
                        "est_out_tokens": ask.tokens, "concurrency": self.open.min(remaining as usize),
                    }));
                }
            }
            let usual = if index == 0 { self.per_problem.max(1.0) } else { 1.0 };
            let gives = if done >= ENOUGH { kept as f64 / done as f64 } else { usual };
            coming = kept as f64 + left * gives;
        }
        json!({ "run": self.run, "ttl_s": FORGOTTEN_S, "stages": stages })
    }

    async fn declare(&self, plan: Value) -> Result<Value, String> {
        match &self.front {
            Front::Local(plans) => plans.declare(plan),
            Front::Remote(client) => client.declare_stages(&plan).await.map_err(|error| error.to_string()),
        }
    }

    /// No more requests are opened at a model than the gateway says that its nodes can use. Where all that is left may be open,
    /// and where it says nothing, there is no limit but the recipe's.
    fn follow(&self, plan: &Value, answer: &Value) {
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
            // Stages of one model share its nodes: what the largest of them can use.
            let most = open.entry(stage.0).or_default();
            *most = (*most).max(if all { u64::MAX } else { advised });
        }
        for ask in self.steps.iter().flat_map(|step| &step.asks) {
            let advised = open.get(&ask.model).copied().unwrap_or(u64::MAX);
            self.gates.of(&ask.model).advise(usize::try_from(advised).unwrap_or(usize::MAX));
        }
    }

    /// Announces until it is dropped.
    pub async fn keep_announcing(self) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let plan = self.plan();
            match self.declare(plan.clone()).await {
                Ok(answer) => self.follow(&plan, &answer),
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
    fn what_is_left_follows_what_is_done() {
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
        let recipe = Recipe::read(&path).unwrap();
        let counts = [("generate", Arc::<Counts>::default()), ("difficulty", Arc::default())];
        let front =
            Front::Remote(Client::new(potstill_shared::client::Endpoint::new("http://127.0.0.1:9")).unwrap());
        let gates = Arc::new(Gates::new(recipe.concurrency));
        let announcer = Announcer::new(front, "r", &recipe, 10, &counts, Arc::clone(&gates));
        let forecast = |stage: &str, advised: u64| json!({ "forecasts": [{ "model": "m", "stage": stage, "advised_open": advised }] });
        for (answer, limit) in [
            (forecast("generate", 9), 9),
            (forecast("generate", 40), 64),
            (forecast("other", 3), 64),
            (json!({}), 64),
        ] {
            announcer.follow(&announcer.plan(), &answer);
            assert_eq!(gates.of("m").limit(), limit, "{answer}");
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
