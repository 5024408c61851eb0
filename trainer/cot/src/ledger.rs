//! Budget accounting: each request reserves its largest possible usage beforehand and settles its real usage
//! afterwards. Tokens, requests and cost never exceed a limit.
//!
//! A request that does not fit waits until others settle. If none is outstanding, the run stops. Usage in the journal
//! of earlier processes counts. Deliberately absent: the charges of a provider for failed requests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use potstill_data::journal::UsageTotals;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// Spending limits of a run or a stage. `None` means unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BudgetLimits {
    /// Number of successful requests.
    pub requests: Option<u64>,
    /// Tokens of prompts and completions together.
    pub tokens: Option<u64>,
    /// Cost, in the currency of the prices.
    pub cost: Option<f64>,
}

/// Prices of a model, per million tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Price per million prompt tokens.
    #[serde(default)]
    pub prompt: f64,
    /// Price per million completion tokens.
    #[serde(default)]
    pub completion: f64,
}

impl Price {
    /// Returns the cost of a request with the given token counts.
    pub fn cost(&self, prompt_tokens: u64, completion_tokens: u64) -> f64 {
        (self.prompt * prompt_tokens as f64 + self.completion * completion_tokens as f64) / 1e6
    }
}

/// Limits and prices: section `budget` of a recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Limit on successful requests of the run.
    pub requests: Option<u64>,
    /// Limit on prompt and completion tokens of the run.
    pub tokens: Option<u64>,
    /// Limit on the cost of the run, in the currency of the prices.
    pub cost: Option<f64>,
    /// Limits of single stages, by stage name.
    pub stages: BTreeMap<String, BudgetLimits>,
    /// Prices, by model. A model without a price is free.
    pub prices: BTreeMap<String, Price>,
}

impl Budget {
    /// Returns the limits of the whole run.
    pub fn run_limits(&self) -> BudgetLimits {
        BudgetLimits { requests: self.requests, tokens: self.tokens, cost: self.cost }
    }
}

/// Usage that is spent or reserved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Amounts {
    /// Number of requests.
    pub requests: u64,
    /// Tokens of prompts and completions together.
    pub tokens: u64,
    /// Cost, in the currency of the prices.
    pub cost: f64,
}

impl Amounts {
    /// Returns the sum of two amounts.
    pub fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            tokens: self.tokens + other.tokens,
            cost: self.cost + other.cost,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(other.requests),
            tokens: self.tokens.saturating_sub(other.tokens),
            cost: (self.cost - other.cost).max(0.0),
        }
    }

    /// Returns a description of the first limit that these amounts exceed.
    fn exceeded_limit(self, limits: &BudgetLimits) -> Option<String> {
        // Tolerance for rounding errors in sums of costs.
        const COST_TOLERANCE: f64 = 1e-9;
        match limits {
            BudgetLimits { requests: Some(most), .. } if self.requests > *most => {
                Some(format!("{most} requests"))
            }
            BudgetLimits { tokens: Some(most), .. } if self.tokens > *most => Some(format!("{most} tokens")),
            BudgetLimits { cost: Some(most), .. } if self.cost > *most + COST_TOLERANCE => {
                Some(format!("a cost of {most}"))
            }
            _ => None,
        }
    }
}

/// State behind the lock of a [`Ledger`]: usage by stage.
#[derive(Debug, Default)]
struct LedgerState {
    spent: BTreeMap<String, Amounts>,
    reserved: BTreeMap<String, Amounts>,
}

fn total(of: &BTreeMap<String, Amounts>) -> Amounts {
    of.values().fold(Amounts::default(), |sum, amounts| sum.plus(*amounts))
}

impl LedgerState {
    fn spent_and_reserved(&self, stage: &str) -> Amounts {
        let get = |map: &BTreeMap<String, Amounts>| map.get(stage).copied().unwrap_or_default();
        get(&self.spent).plus(get(&self.reserved))
    }
}

/// Budget and usage of a run, shared by all stages.
#[derive(Debug, Default)]
pub struct Ledger {
    budget: Budget,
    state: Mutex<LedgerState>,
    settled: Notify,
}

/// Reserved amounts of one request. Dropping a reservation without settling frees the amounts unspent.
#[derive(Debug)]
pub struct Reservation {
    ledger: Arc<Ledger>,
    stage: String,
    model: String,
    amounts: Amounts,
}

impl Ledger {
    /// Creates the ledger from a budget and the usage in the journal.
    pub fn new(budget: Budget, totals: &UsageTotals) -> Self {
        let mut state = LedgerState::default();
        for ((stage, model), usage) in totals {
            let cost = budget.prices.get(model).copied().unwrap_or_default();
            let amounts = Amounts {
                requests: usage.calls,
                tokens: usage.prompt_tokens + usage.completion_tokens,
                cost: cost.cost(usage.prompt_tokens, usage.completion_tokens),
            };
            let spent = state.spent.entry(stage.clone()).or_default();
            *spent = spent.plus(amounts);
        }
        Self { budget, state: Mutex::new(state), settled: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, LedgerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the settled usage, by stage.
    pub fn spent(&self) -> BTreeMap<String, Amounts> {
        self.state().spent.clone()
    }

    /// Returns the budget.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    fn price(&self, model: &str) -> Price {
        self.budget.prices.get(model).copied().unwrap_or_default()
    }

    /// Reserves the largest possible usage of a request. Waits while outstanding reservations may free enough.
    ///
    /// # Errors
    ///
    /// Returns a message that names the exceeded limit, once no reservation is outstanding.
    pub async fn reserve(
        self: &Arc<Self>,
        stage: &str,
        model: &str,
        prompt_tokens: u64,
        completion_tokens: u64,
    ) -> Result<Reservation, String> {
        let amounts = Amounts {
            requests: 1,
            tokens: prompt_tokens + completion_tokens,
            cost: self.price(model).cost(prompt_tokens, completion_tokens),
        };
        loop {
            let mut settled = std::pin::pin!(self.settled.notified());
            settled.as_mut().enable();
            {
                let mut state = self.state();
                let run = total(&state.spent).plus(total(&state.reserved)).plus(amounts);
                let limits = self.budget.stages.get(stage);
                let mine = limits
                    .and_then(|limits| state.spent_and_reserved(stage).plus(amounts).exceeded_limit(limits));
                let over = run
                    .exceeded_limit(&self.budget.run_limits())
                    .map(|limit| format!("the budget of the run, {limit},"))
                    .or_else(|| mine.map(|limit| format!("the budget of `{stage}`, {limit},")));
                match over {
                    None => {
                        let reserved = state.reserved.entry(stage.to_owned()).or_default();
                        *reserved = reserved.plus(amounts);
                        return Ok(Reservation {
                            ledger: Arc::clone(self),
                            stage: stage.to_owned(),
                            model: model.to_owned(),
                            amounts,
                        });
                    }
                    Some(limit) if state.reserved.values().all(|reserved| reserved.requests == 0) => {
                        let spent = total(&state.spent);
                        return Err(format!(
                            "{limit} has no room for another call of up to {} tokens; {} requests and {} tokens were used so \
                             far. Nothing is lost: raise it in `[budget]` and run the same command again",
                            amounts.tokens, spent.requests, spent.tokens
                        ));
                    }
                    Some(_) => {}
                }
            }
            settled.await;
        }
    }
}

impl Reservation {
    /// Replaces the reservation by the real usage of a successful request.
    pub fn settle(self, prompt_tokens: u64, completion_tokens: u64) {
        let taken = Amounts {
            requests: 1,
            tokens: prompt_tokens + completion_tokens,
            cost: self.ledger.price(&self.model).cost(prompt_tokens, completion_tokens),
        };
        let mut state = self.ledger.state();
        let spent = state.spent.entry(self.stage.clone()).or_default();
        *spent = spent.plus(taken);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.ledger.state();
        if let Some(reserved) = state.reserved.get_mut(&self.stage) {
            *reserved = reserved.minus(self.amounts);
        }
        drop(state);
        self.ledger.settled.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(text: &str) -> Arc<Ledger> {
        let budget = serde_json::from_str(text).unwrap();
        Arc::new(Ledger::new(budget, &UsageTotals::default()))
    }

    #[tokio::test]
    async fn concurrent_reservations_never_exceed_a_limit() {
        let ledger = ledger(r#"{"tokens": 10000, "prices": {"m": {"completion": 2.0}}}"#);
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..500u64 {
            let ledger = Arc::clone(&ledger);
            tasks.spawn(async move {
                let reservation = ledger.reserve("generate", "m", 10, 90).await?;
                tokio::task::yield_now().await;
                // Every fifth request fails and frees its reservation.
                if n % 5 > 0 {
                    reservation.settle(10, 10 + n % 30);
                }
                Ok::<(), String>(())
            });
        }
        let ended = tasks.join_all().await;
        let refused: Vec<&String> = ended.iter().filter_map(|end| end.as_ref().err()).collect();
        let spent = ledger.spent()["generate"];
        assert!(spent.tokens <= 10_000 && spent.tokens > 9_900, "{spent:?}");
        assert!((spent.cost - (spent.tokens - 10 * spent.requests) as f64 * 2e-6).abs() < 1e-9);
        assert!(!refused.is_empty() && refused[0].contains("10000 tokens"), "{refused:?}");
        let reserved = total(&ledger.state().reserved);
        assert_eq!((reserved.requests, reserved.tokens), (0, 0));
    }

    #[tokio::test]
    async fn stage_limits_and_earlier_usage_count() {
        let budget = r#"{"requests": 5, "stages": {"score": {"requests": 1}}}"#;
        let mut totals = UsageTotals::default();
        totals.entry(("generate".into(), "m".into())).or_default().add(5, 5, 0.1);
        let ledger = Arc::new(Ledger::new(serde_json::from_str(budget).unwrap(), &totals));
        ledger.reserve("score", "m", 1, 1).await.unwrap().settle(1, 1);
        let refused = ledger.reserve("score", "m", 1, 1).await.unwrap_err();
        assert!(refused.contains("budget of `score`, 1 requests"), "{refused}");
        for _ in 0..3 {
            ledger.reserve("generate", "m", 1, 1).await.unwrap().settle(1, 1);
        }
        let refused = ledger.reserve("generate", "m", 1, 1).await.unwrap_err();
        assert!(refused.contains("budget of the run, 5 requests"), "{refused}");
    }
}
