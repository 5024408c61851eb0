//! The pools by model. Reading takes no lock; a change replaces the whole map.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use super::model_pool::ModelPool;

/// All pools, by model.
#[derive(Default)]
pub struct PoolRegistry(ArcSwap<BTreeMap<String, Arc<ModelPool>>>);

impl PoolRegistry {
    /// Returns the pool of `model`.
    pub fn get(&self, model: &str) -> Option<Arc<ModelPool>> {
        self.0.load().get(model).cloned()
    }

    /// Returns the pools as they are now.
    pub fn pools(&self) -> Guard<Arc<BTreeMap<String, Arc<ModelPool>>>> {
        self.0.load()
    }

    /// Adds a pool. Returns false, and changes nothing, if its model has a pool.
    pub fn insert(&self, pool: &Arc<ModelPool>) -> bool {
        let before = self.0.rcu(|pools| {
            let mut pools = BTreeMap::clone(pools);
            pools.entry(pool.model.to_string()).or_insert_with(|| Arc::clone(pool));
            pools
        });
        !before.contains_key(&*pool.model)
    }

    /// Removes and retires the pool of `model`. Its running requests continue.
    pub fn remove(&self, model: &str) {
        self.0.rcu(|pools| {
            let mut pools = BTreeMap::clone(pools);
            if let Some(pool) = pools.remove(model) {
                pool.retire();
            }
            pools
        });
    }

    /// Returns how many completions of `stage` the pool of `model` has finished.
    pub fn finished_completions(&self, model: &str, stage: &str) -> u64 {
        self.get(model).map_or(0, |pool| pool.completion_lengths(Some(stage)).1)
    }
}
