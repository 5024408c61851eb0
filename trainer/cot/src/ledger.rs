//! The budget: tokens, requests and money are reserved before a call, at the most that it can take, and settled after it. A
//! limit is never crossed: a call that does not fit waits until others are settled, and the run stops when none is left to wait
//! for. What the journal holds of earlier processes counts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use potstill_data::journal::Totals;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// What a run, or one of its stages, may spend; nothing set is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Answered calls.
    pub requests: Option<u64>,
    /// Tokens of prompts and answers.
    pub tokens: Option<u64>,
    /// Money, in the currency of the prices.
    pub cost: Option<f64>,
}

/// What a model costs, per million tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Of prompts.
    #[serde(default)]
    pub prompt: f64,
    /// Of answers.
    #[serde(default)]
    pub completion: f64,
}

impl Price {
    /// Money for so many tokens.
    pub fn of(&self, prompt_tokens: u64, completion_tokens: u64) -> f64 {
        (self.prompt * prompt_tokens as f64 + self.completion * completion_tokens as f64) / 1e6
    }
}

/// The budget of a recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Answered calls of the whole run.
    pub requests: Option<u64>,
    /// Tokens of the whole run.
    pub tokens: Option<u64>,
    /// Money of the whole run.
    pub cost: Option<f64>,
    /// Limits of single stages.
    pub stages: BTreeMap<String, Limits>,
    /// Prices by model.
    pub prices: BTreeMap<String, Price>,
}

impl Budget {
    /// Limits of the whole run.
    pub fn run(&self) -> Limits {
        Limits { requests: self.requests, tokens: self.tokens, cost: self.cost }
    }
}

/// What was spent, or is reserved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Amounts {
    /// Calls.
    pub requests: u64,
    /// Tokens.
    pub tokens: u64,
    /// Money.
    pub cost: f64,
}

impl Amounts {
    /// The sum of two.
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

    /// The first limit that these amounts cross, in words.
    fn over(self, limits: &Limits) -> Option<String> {
        // Sums of rounded numbers.
        const CENT: f64 = 1e-9;
        match limits {
            Limits { requests: Some(most), .. } if self.requests > *most => Some(format!("{most} requests")),
            Limits { tokens: Some(most), .. } if self.tokens > *most => Some(format!("{most} tokens")),
            Limits { cost: Some(most), .. } if self.cost > *most + CENT => Some(format!("a cost of {most}")),
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    spent: BTreeMap<String, Amounts>,
    reserved: BTreeMap<String, Amounts>,
}

fn sum(of: &BTreeMap<String, Amounts>) -> Amounts {
    of.values().fold(Amounts::default(), |sum, amounts| sum.plus(*amounts))
}

impl State {
    fn of(&self, stage: &str) -> Amounts {
        let get = |map: &BTreeMap<String, Amounts>| map.get(stage).copied().unwrap_or_default();
        get(&self.spent).plus(get(&self.reserved))
    }
}

/// The ledger of a run.
#[derive(Debug, Default)]
pub struct Ledger {
    budget: Budget,
    state: Mutex<State>,
    settled: Notify,
}

/// What a call may take at most. Dropped without being settled, nothing was spent.
#[derive(Debug)]
pub struct Reservation {
    ledger: Arc<Ledger>,
    stage: String,
    model: String,
    amounts: Amounts,
}

impl Ledger {
    /// A budget, and what the journal says was spent already.
    pub fn new(budget: Budget, totals: &Totals) -> Self {
        let mut state = State::default();
        for ((stage, model), usage) in totals {
            let cost = budget.prices.get(model).copied().unwrap_or_default();
            let amounts = Amounts {
                requests: usage.calls,
                tokens: usage.prompt_tokens + usage.completion_tokens,
                cost: cost.of(usage.prompt_tokens, usage.completion_tokens),
            };
            let spent = state.spent.entry(stage.clone()).or_default();
            *spent = spent.plus(amounts);
        }
        Self { budget, state: Mutex::new(state), settled: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was spent so far, by stage.
    pub fn spent(&self) -> BTreeMap<String, Amounts> {
        self.state().spent.clone()
    }

    /// What the run may spend.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    fn price(&self, model: &str) -> Price {
        self.budget.prices.get(model).copied().unwrap_or_default()
    }

    /// Reserves what a call can take at most; waits while others may give back what is missing. The error names the limit.
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
            cost: self.price(model).of(prompt_tokens, completion_tokens),
        };
        loop {
            let mut settled = std::pin::pin!(self.settled.notified());
            settled.as_mut().enable();
            {
                let mut state = self.state();
                let run = sum(&state.spent).plus(sum(&state.reserved)).plus(amounts);
                let limits = self.budget.stages.get(stage);
                let mine = limits.and_then(|limits| state.of(stage).plus(amounts).over(limits));
                let over = run
                    .over(&self.budget.run())
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
                        let spent = sum(&state.spent);
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
    /// The call was answered and took so much.
    pub fn settle(self, prompt_tokens: u64, completion_tokens: u64) {
        let taken = Amounts {
            requests: 1,
            tokens: prompt_tokens + completion_tokens,
            cost: self.ledger.price(&self.model).of(prompt_tokens, completion_tokens),
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
        Arc::new(Ledger::new(budget, &Totals::default()))
    }

    #[tokio::test]
    async fn a_limit_is_never_crossed_whatever_the_order() {
        let ledger = ledger(r#"{"tokens": 10000, "prices": {"m": {"completion": 2.0}}}"#);
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..500u64 {
            let ledger = Arc::clone(&ledger);
            tasks.spawn(async move {
                let reservation = ledger.reserve("generate", "m", 10, 90).await?;
                tokio::task::yield_now().await;
                // Every fifth call fails: it gives all of it back.
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
        let reserved = sum(&ledger.state().reserved);
        assert_eq!((reserved.requests, reserved.tokens), (0, 0));
    }

    #[tokio::test]
    async fn stages_and_what_was_spent_before_count() {
        let budget = r#"{"requests": 5, "stages": {"score": {"requests": 1}}}"#;
        let mut totals = Totals::default();
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
