//! Who has used what: requests, tokens and their price by key, stage and model.

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
    rows: DashMap<(String, String, String), Arc<Cell>>,
}

impl UsageLedger {
    /// Counts an answer.
    pub fn add(&self, key: &str, stage: Option<&str>, model: &str, usage: Usage, cost: f64) {
        let place = (key.to_owned(), stage.unwrap_or("").to_owned(), model.to_owned());
        let known = self.rows.get(&place).map(|cell| Arc::clone(&cell));
        let cell = known.unwrap_or_else(|| {
            let place = if self.rows.len() < ROWS {
                place
            } else {
                ("other".into(), "other".into(), model.to_owned())
            };
            Arc::clone(&self.rows.entry(place).or_default())
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
                let ((key, stage, model), cell) = entry.pair();
                UsageRow {
                    key: key.clone(),
                    stage: stage.clone(),
                    model: model.clone(),
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
