//! Usage ledger: requests, tokens and price by key, stage and model.

use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use dashmap::DashMap;
use potstill_shared::openai::Usage;
use serde::Serialize;

/// Number of rows above which new keys and stages are counted as `other`.
const MAX_ROWS: usize = 4096;

#[derive(Default)]
struct UsageCell {
    key: String,
    stage: String,
    model: String,
    requests: AtomicU64,
    prompt: AtomicU64,
    completion: AtomicU64,
    cost: Mutex<f64>,
}

/// A row of the ledger, as in the admin API.
#[derive(Debug, Clone, Default, Serialize)]
pub struct UsageRow {
    /// Name of the key.
    pub key: String,
    /// Name of the stage; empty without a stage.
    pub stage: String,
    /// Name of the model.
    pub model: String,
    /// Number of served requests.
    pub requests: u64,
    /// Number of prompt tokens.
    pub prompt_tokens: u64,
    /// Number of completion tokens.
    pub completion_tokens: u64,
    /// Price of the tokens, in the currency of the pools' prices.
    pub cost: f64,
}

/// Usage of all keys since the start of the gateway.
#[derive(Default)]
pub struct UsageLedger {
    /// Rows by hash of key, stage and model, so that a lookup allocates no strings.
    rows: DashMap<u64, Arc<UsageCell>>,
    hasher: RandomState,
}

impl UsageLedger {
    /// Adds a served request.
    pub fn add(&self, key: &str, stage: Option<&str>, model: &str, usage: Usage, cost: f64) {
        let stage = stage.unwrap_or("");
        let place = self.hasher.hash_one((key, stage, model));
        let known = self.rows.get(&place).map(|cell| Arc::clone(&cell));
        let cell = known.unwrap_or_else(|| {
            let (key, stage) = if self.rows.len() < MAX_ROWS { (key, stage) } else { ("other", "other") };
            let fresh = UsageCell {
                key: key.into(),
                stage: stage.into(),
                model: model.into(),
                ..UsageCell::default()
            };
            let place = self.hasher.hash_one((key, stage, model));
            Arc::clone(&self.rows.entry(place).or_insert_with(|| Arc::new(fresh)))
        });
        cell.requests.fetch_add(1, Ordering::Relaxed);
        cell.prompt.fetch_add(usage.prompt_tokens, Ordering::Relaxed);
        cell.completion.fetch_add(usage.completion_tokens, Ordering::Relaxed);
        if cost > 0.0 {
            *cell.cost.lock().unwrap_or_else(PoisonError::into_inner) += cost;
        }
    }

    /// Returns all rows, sorted by key, stage and model.
    pub fn rows(&self) -> Vec<UsageRow> {
        let mut rows: Vec<UsageRow> = self
            .rows
            .iter()
            .map(|entry| {
                let cell = entry.value();
                UsageRow {
                    key: cell.key.clone(),
                    stage: cell.stage.clone(),
                    model: cell.model.clone(),
                    requests: cell.requests.load(Ordering::Relaxed),
                    prompt_tokens: cell.prompt.load(Ordering::Relaxed),
                    completion_tokens: cell.completion.load(Ordering::Relaxed),
                    cost: *cell.cost.lock().unwrap_or_else(PoisonError::into_inner),
                }
            })
            .collect();
        rows.sort_by(|a, b| (&a.key, &a.stage, &a.model).cmp(&(&b.key, &b.stage, &b.model)));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_rows_and_counts_every_request() {
        let ledger = UsageLedger::default();
        for number in 0..2 * MAX_ROWS {
            ledger.add(&format!("k{number}"), Some("s"), "m", Usage::new(1, 2), 0.5);
        }
        let rows = ledger.rows();
        assert!(rows.len() <= MAX_ROWS + 1);
        assert_eq!(rows.iter().map(|row| row.requests).sum::<u64>(), 2 * MAX_ROWS as u64);
        assert_eq!(rows.iter().map(|row| row.completion_tokens).sum::<u64>(), 4 * MAX_ROWS as u64);
    }
}
