//! Distributes the budget over all pools, in this order: `min` of each pool, unplanned demand, running stages in
//! proportion to their remaining work, and last warm nodes and nodes in the scale-down delay.

use super::need::CapacityNeed;
use super::observation::{Observation, PoolObservation};

/// Distribution of the budget.
struct BudgetAllocator<'a> {
    wanted: &'a [(usize, CapacityNeed)],
    cost: Vec<f64>,
    granted: Vec<usize>,
    remaining: f64,
}

impl BudgetAllocator<'_> {
    /// Raises the nodes of pool `at` to `up_to`, within the wanted number and the remaining budget.
    fn grant(&mut self, at: usize, up_to: usize) {
        let affordable = (self.remaining / self.cost[at] + 1e-9) as usize;
        let more = up_to.min(self.wanted[at].0).saturating_sub(self.granted[at]).min(affordable);
        self.granted[at] += more;
        self.remaining -= more as f64 * self.cost[at];
    }
}

/// Reduces the wanted nodes to what the budget allows. Nodes that exist, including draining ones, still cost, so new
/// nodes may have to wait for them.
pub(super) fn apply_budget(seen: &Observation, wanted: &mut [(usize, CapacityNeed)]) {
    let Some(budget) = seen.budget else { return };
    let cost: Vec<f64> = seen.pools.iter().map(|pool| pool.cost_per_node_s.max(1e-9)).collect();
    let total: f64 = wanted.iter().zip(&cost).map(|((nodes, _), cost)| *nodes as f64 * cost).sum();
    if total > budget + 1e-9 {
        let given = allocate(seen, budget, cost.clone(), wanted);
        for ((nodes, need), given) in wanted.iter_mut().zip(given) {
            if given < *nodes {
                need.reason += &format!("; the budget of {budget} allows {given} of {nodes}");
                *nodes = given;
            }
        }
    }
    let held = |pool: &PoolObservation| pool.nodes() + pool.draining;
    let mut room =
        budget - seen.pools.iter().zip(&cost).map(|(pool, cost)| held(pool) as f64 * cost).sum::<f64>();
    for ((pool, cost), (nodes, need)) in seen.pools.iter().zip(&cost).zip(wanted) {
        // A draining node can be readmitted without additional cost.
        let more = nodes.saturating_sub(held(pool));
        let affordable = more.min((room / cost + 1e-9).max(0.0) as usize);
        room -= affordable as f64 * cost;
        if affordable < more {
            need.reason += &format!("; {} wait until draining nodes are gone", more - affordable);
            *nodes -= more - affordable;
        }
    }
}

fn allocate(seen: &Observation, budget: f64, cost: Vec<f64>, wanted: &[(usize, CapacityNeed)]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*b].1.work.total_cmp(&wanted[*a].1.work));
    let mut allocator = BudgetAllocator { wanted, cost, granted: vec![0; wanted.len()], remaining: budget };
    for &at in &order {
        allocator.grant(at, seen.pools[at].min);
    }
    for &at in &order {
        allocator.grant(at, wanted[at].1.online);
    }
    let (running, others): (Vec<usize>, Vec<usize>) = order.iter().partition(|at| wanted[**at].1.stage > 0);
    let held = |allocator: &BudgetAllocator<'_>| {
        running.iter().map(|at| allocator.granted[*at] as f64 * allocator.cost[*at]).sum::<f64>()
    };
    let share = allocator.remaining + held(&allocator);
    let work: f64 = running.iter().map(|at| wanted[*at].1.work).sum();
    for &at in &running {
        let fair = share * wanted[at].1.work / work.max(1e-9) / allocator.cost[at];
        allocator.grant(at, (fair.round() as usize).max(1));
    }
    // Budget that one stage does not use goes to the others.
    for &at in running.iter().chain(&others) {
        allocator.grant(at, wanted[at].0);
    }
    allocator.granted
}
