//! How many nodes a pool should have. Pure: no clock, no input or output; time comes in as a number.
//!
//! The demand is what is open (in flight and waiting), since reasoning answers hold a slot for minutes and a rate of
//! requests says nothing about that. Up at once; down only when the demand has been lower for the whole window.

use std::collections::VecDeque;

/// Bounds of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Fewest nodes.
    pub min: usize,
    /// Most nodes.
    pub max: usize,
    /// Requests that a node works on at once.
    pub slots: usize,
    /// How long the demand must stay lower before a node goes, in milliseconds.
    pub down_ms: u64,
}

/// What is seen of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    /// Milliseconds on any clock that does not go back.
    pub now_ms: u64,
    /// Requests on nodes and waiting.
    pub open: usize,
    /// Nodes that run or start.
    pub nodes: usize,
}

/// What the policy remembers: the demand within the window.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    seen: VecDeque<(u64, usize)>,
}

/// What should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Nodes wanted.
    pub nodes: usize,
    /// Why, for logs.
    pub reason: String,
}

/// The number of nodes for what is seen and remembered.
pub fn decide(bounds: Bounds, observation: Observation, memory: &mut Memory) -> Decision {
    let Observation { now_ms, open, nodes } = observation;
    memory.seen.push_back((now_ms, open));
    while memory.seen.front().is_some_and(|(at, _)| at + bounds.down_ms < now_ms) {
        memory.seen.pop_front();
    }
    // Bounded whatever the tick: neighbours that say the same are merged.
    if memory.seen.len() > 4096 {
        memory.seen = memory.seen.iter().copied().step_by(2).collect();
    }
    let peak = memory.seen.iter().map(|(_, open)| *open).max().unwrap_or(open);
    let wanted = |open: usize| open.div_ceil(bounds.slots).clamp(bounds.min, bounds.max);
    let (now, held) = (wanted(open), wanted(peak));
    let target = if now >= nodes { now } else { held.min(nodes).max(now) };
    let reason = format!(
        "{open} open, at most {peak} in the last {} ms, {} slots a node: {target} (min {}, max {})",
        bounds.down_ms, bounds.slots, bounds.min, bounds.max
    );
    Decision { nodes: target, reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds { min: 0, max: 4, slots: 8, down_ms: 1000 };

    proptest! {
        #[test]
        fn stays_in_bounds_and_follows_a_rise_at_once(opens in prop::collection::vec(0usize..60, 1..60), min in 0usize..3) {
            let bounds = Bounds { min, ..BOUNDS };
            let (mut memory, mut nodes) = (Memory::default(), min);
            for (tick, &open) in opens.iter().enumerate() {
                let seen = Observation { now_ms: tick as u64 * 250, open, nodes };
                let decision = decide(bounds, seen, &mut memory);
                prop_assert!((min..=4).contains(&decision.nodes));
                prop_assert!(decision.nodes >= open.div_ceil(8).min(4), "open requests always get their nodes");
                nodes = decision.nodes;
            }
        }

        #[test]
        fn goes_down_only_after_the_window(open in 9usize..30) {
            let mut memory = Memory::default();
            let start = decide(BOUNDS, Observation { now_ms: 0, open, nodes: 0 }, &mut memory).nodes;
            for now_ms in (100..=1000).step_by(100) {
                prop_assert_eq!(decide(BOUNDS, Observation { now_ms, open: 1, nodes: start }, &mut memory).nodes, start);
            }
            prop_assert_eq!(decide(BOUNDS, Observation { now_ms: 1100, open: 1, nodes: start }, &mut memory).nodes, 1);
        }
    }
}
