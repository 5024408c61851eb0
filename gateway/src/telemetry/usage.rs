//! Who has used what: requests, tokens and their price by key, stage and model.

use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use dashmap::DashMap;
use potstill_shared::openai::Usage;
use serde::Serialize;

/// Rows that are told apart; beyond them keys and stages count as `other`.
const ROWS: usize = 4096;

#[derive(Default)]
struct Cell {
    key: String,
    stage: String,
    model: String,
    requests: AtomicU64,
    prompt: AtomicU64,
    completion: AtomicU64,
    cost: Mutex<f64>,
}

/// One row, as the admin API shows it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct UsageRow {
    /// Name of the key.
    pub key: String,
    /// Stage, or empty.
    pub stage: String,
    /// Model.
    pub model: String,
    /// Answers.
    pub requests: u64,
    /// Tokens read.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub completion_tokens: u64,
    /// Their price, in the currency of the pools' prices.
    pub cost: f64,
}

/// The ledger.
#[derive(Default)]
pub struct UsageLedger {
    /// By a hash of key, stage and model, so that looking one up builds no strings.
    rows: DashMap<u64, Arc<Cell>>,
    hasher: RandomState,
}

impl UsageLedger {
    /// Counts an answer.
    pub fn add(&self, key: &str, stage: Option<&str>, model: &str, usage: Usage, cost: f64) {
        let stage = stage.unwrap_or("");
        let place = self.hasher.hash_one((key, stage, model));
        let known = self.rows.get(&place).map(|cell| Arc::clone(&cell));
        let cell = known.unwrap_or_else(|| {
            let (key, stage) = if self.rows.len() < ROWS { (key, stage) } else { ("other", "other") };
            let fresh = Cell { key: key.into(), stage: stage.into(), model: model.into(), ..Cell::default() };
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

    /// All rows, by key, stage and model.
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
    fn rows_are_bounded_and_nothing_is_lost() {
        let ledger = UsageLedger::default();
        for number in 0..2 * ROWS {
            ledger.add(&format!("k{number}"), Some("s"), "m", Usage::new(1, 2), 0.5);
        }
        let rows = ledger.rows();
        assert!(rows.len() <= ROWS + 1);
        assert_eq!(rows.iter().map(|row| row.requests).sum::<u64>(), 2 * ROWS as u64);
        assert_eq!(rows.iter().map(|row| row.completion_tokens).sum::<u64>(), 4 * ROWS as u64);
    }
}
