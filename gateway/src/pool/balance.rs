//! Load balancing: chooses the node for a request. Pure: the state of the nodes and random numbers are arguments.

use crate::config::LoadBalancing;
use crate::hash::mix;

/// State of a node, as far as load balancing needs it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NodeView {
    /// Requests on the node.
    pub requests: usize,
    /// Number of slots; 0 if the node is not ready, ejected or paused.
    pub slots: usize,
    /// Expected tokens of all requests on the node.
    pub tokens: u64,
    /// Seconds per token of a request.
    pub seconds_per_token: f64,
    /// Hash of the URL, equal in all gateways. Decides the position of the node in consistent hashing.
    pub hash: u64,
}

impl NodeView {
    fn has_free_slot(&self) -> bool {
        self.requests < self.slots
    }
}

/// The request, as far as load balancing needs it.
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestView {
    /// Expected number of prompt and completion tokens.
    pub tokens: u64,
    /// Hash of the prompt prefix or of the session.
    pub affinity: Option<u64>,
    /// Number of other requests in the queue.
    pub queued: usize,
    /// Index of a node that must not be chosen, because it has just failed this request.
    pub exclude: Option<usize>,
    /// Random number for choices between equal nodes.
    pub random: u64,
}

/// Returns the index of a node with a free slot. `turn` counts requests, for round robin.
///
/// Returns `None` if no slot is free, or if waiting for a busy faster node is expected to be quicker than any free
/// node.
pub fn choose_node(
    balance: LoadBalancing,
    nodes: &[NodeView],
    request: &RequestView,
    turn: u64,
) -> Option<usize> {
    match balance {
        LoadBalancing::LeastTokens => least_tokens(nodes, request),
        LoadBalancing::PeakEwma => peak_ewma(nodes, request),
        LoadBalancing::PrefixHash | LoadBalancing::Session => match request.affinity {
            Some(affinity) => bounded_hash(nodes, request, affinity),
            None => least_tokens(nodes, request),
        },
        LoadBalancing::RoundRobin => round_robin(nodes, request, turn),
    }
}

fn free_nodes<'a>(
    nodes: &'a [NodeView],
    request: &RequestView,
) -> impl Iterator<Item = (usize, &'a NodeView)> + use<'a> {
    let exclude = request.exclude;
    nodes.iter().enumerate().filter(move |(index, node)| node.has_free_slot() && Some(*index) != exclude)
}

/// Expected seconds until the node completes the request: seconds per token times the sum of the request's tokens and
/// the outstanding tokens per slot. With equal speeds the node with the fewest outstanding tokens is chosen.
fn expected_seconds(node: &NodeView, request: &RequestView) -> f64 {
    let outstanding = node.tokens as f64 / node.slots.max(1) as f64;
    node.seconds_per_token * (request.tokens as f64 + outstanding)
}

/// A node is slow if its time per token exceeds this multiple of the time of another node. Smaller differences are
/// within the noise of batching.
const SLOW_NODE_RATIO: f64 = 1.5;

fn least_tokens(nodes: &[NodeView], request: &RequestView) -> Option<usize> {
    let by_time = |a: &(usize, &NodeView), b: &(usize, &NodeView)| {
        let key = |(_, node): &(usize, &NodeView)| expected_seconds(node, request);
        key(a).total_cmp(&key(b)).then((a.1.requests * b.1.slots).cmp(&(b.1.requests * a.1.slots)))
    };
    let (index, best) = free_nodes(nodes, request).min_by(by_time)?;
    // Compares the free node with faster nodes that are full: waiting for one of their slots can be quicker.
    let (mut slots, mut speed) = (0usize, 0.0);
    for (other, node) in nodes.iter().enumerate() {
        let full = node.slots > 0 && node.requests >= node.slots && Some(other) != request.exclude;
        if full && best.seconds_per_token > SLOW_NODE_RATIO * node.seconds_per_token {
            slots += node.slots;
            speed += node.slots as f64 * node.seconds_per_token;
        }
    }
    if slots > 0 {
        let service = request.tokens as f64 * speed / slots as f64;
        let wait = service * (request.queued + 1) as f64 / slots as f64;
        if wait + service < best.seconds_per_token * request.tokens as f64 {
            return None;
        }
    }
    Some(index)
}

/// Power of two choices (Mitzenmacher 2001), by time per token times requests.
fn peak_ewma(nodes: &[NodeView], request: &RequestView) -> Option<usize> {
    let free: Vec<_> = free_nodes(nodes, request).collect();
    let count = free.len() as u64;
    if count == 0 {
        return None;
    }
    let first = request.random % count;
    let second = (first + 1 + (request.random >> 32) % (count - 1).max(1)) % count;
    let cost = |at: u64| {
        let (_, node) = free[at as usize];
        node.seconds_per_token * (node.requests + 1) as f64
    };
    let at = if cost(second) < cost(first) { second } else { first };
    Some(free[at as usize].0)
}

/// Largest load of a node relative to the mean load (consistent hashing with bounded loads, Mirrokni et al. 2018).
const MAX_LOAD_RATIO: f64 = 1.25;

/// Rendezvous hashing with bounded loads: returns the node with the highest hash of node and affinity that is not
/// overloaded. If a node is added or removed, only the requests of that node move.
fn bounded_hash(nodes: &[NodeView], request: &RequestView, affinity: u64) -> Option<usize> {
    let open: Vec<&NodeView> = nodes.iter().filter(|node| node.slots > 0).collect();
    let total: usize = open.iter().map(|node| node.requests).sum::<usize>() + 1;
    let bound = (MAX_LOAD_RATIO * total as f64 / open.len().max(1) as f64).ceil() as usize;
    let weight = |node: &NodeView| mix(node.hash ^ affinity);
    free_nodes(nodes, request)
        .max_by_key(|(_, node)| (node.requests < bound, weight(node)))
        .map(|(index, _)| index)
}

fn round_robin(nodes: &[NodeView], request: &RequestView, turn: u64) -> Option<usize> {
    let count = nodes.len().max(1);
    let start = (turn % count as u64) as usize;
    free_nodes(nodes, request).map(|(index, _)| index).min_by_key(|index| (index + count - start) % count)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [LoadBalancing; 5] = [
        LoadBalancing::LeastTokens,
        LoadBalancing::PeakEwma,
        LoadBalancing::PrefixHash,
        LoadBalancing::Session,
        LoadBalancing::RoundRobin,
    ];

    fn node() -> impl Strategy<Value = NodeView> {
        (0usize..6, 0usize..5, 0u64..10_000, 0.001f64..1.0, any::<u64>()).prop_map(
            |(requests, slots, tokens, seconds_per_token, hash)| NodeView {
                requests,
                slots,
                tokens,
                seconds_per_token,
                hash,
            },
        )
    }

    fn request() -> impl Strategy<Value = RequestView> {
        (1u64..2_000, prop::option::of(any::<u64>()), 0usize..50, prop::option::of(0usize..8), any::<u64>())
            .prop_map(|(tokens, affinity, waiting, exclude, random)| RequestView {
                tokens,
                affinity,
                queued: waiting,
                exclude,
                random,
            })
    }

    proptest! {
        #[test]
        fn picks_only_free_nodes(nodes in prop::collection::vec(node(), 0..8), request in request(), turn: u64) {
            let free = |i: usize| nodes[i].has_free_slot() && Some(i) != request.exclude;
            for balance in ALL {
                match choose_node(balance, &nodes, &request, turn) {
                    Some(i) => prop_assert!(free(i), "{balance:?}"),
                    // Waiting is valid only if a busy node can become free.
                    None => {
                        let busy = nodes.iter().any(|n| n.slots > 0 && n.requests >= n.slots);
                        prop_assert!(busy || (0..nodes.len()).all(|i| !free(i)), "{balance:?}");
                    }
                }
            }
        }

        #[test]
        fn picks_fewest_tokens_at_equal_speeds(mut nodes in prop::collection::vec(node(), 1..8), request in request()) {
            for node in &mut nodes { node.seconds_per_token = 0.01; }
            let free = |i: usize| nodes[i].has_free_slot() && Some(i) != request.exclude;
            let picked = choose_node(LoadBalancing::LeastTokens, &nodes, &request, 0);
            prop_assert_eq!(picked.is_none(), (0..nodes.len()).all(|i| !free(i)));
            if let Some(i) = picked {
                let load = |n: &NodeView| n.tokens as f64 / n.slots as f64;
                for j in (0..nodes.len()).filter(|j| free(*j)) {
                    prop_assert!(load(&nodes[i]) <= load(&nodes[j]) + 1e-6);
                }
            }
        }

        #[test]
        fn prefix_keeps_its_node_when_another_is_removed(hashes in prop::collection::hash_set(any::<u64>(), 3..8), affinity: u64) {
            let nodes: Vec<_> = hashes.iter().map(|hash| NodeView { requests: 0, slots: 4, tokens: 0, seconds_per_token: 1.0, hash: *hash }).collect();
            let request = RequestView { tokens: 1, affinity: Some(affinity), ..RequestView::default() };
            let home = choose_node(LoadBalancing::PrefixHash, &nodes, &request, 0).unwrap();
            let gone = (home + 1) % nodes.len();
            let mut fewer = nodes.clone();
            fewer.remove(gone);
            let again = choose_node(LoadBalancing::PrefixHash, &fewer, &request, 0).unwrap();
            prop_assert_eq!(fewer[again].hash, nodes[home].hash);
        }
    }

    #[test]
    fn slow_node_is_used_only_with_a_long_queue() {
        let fast = NodeView { requests: 8, slots: 8, tokens: 800, seconds_per_token: 0.002, hash: 1 };
        let slow = NodeView { requests: 0, slots: 8, tokens: 0, seconds_per_token: 0.008, hash: 2 };
        let at = |waiting| RequestView { tokens: 100, queued: waiting, ..RequestView::default() };
        assert_eq!(
            choose_node(LoadBalancing::LeastTokens, &[fast, slow], &at(0), 0),
            None,
            "a fast slot comes sooner"
        );
        assert_eq!(choose_node(LoadBalancing::LeastTokens, &[fast, slow], &at(40), 0), Some(1));
        let free = NodeView { requests: 7, ..fast };
        assert_eq!(choose_node(LoadBalancing::LeastTokens, &[free, slow], &at(0), 0), Some(0));
    }

    #[test]
    fn prefix_leaves_an_overloaded_node() {
        let node = |hash, requests| NodeView { requests, slots: 64, tokens: 0, seconds_per_token: 1.0, hash };
        let request = RequestView { tokens: 1, affinity: Some(7), ..RequestView::default() };
        let idle = [node(1, 0), node(2, 0), node(3, 0)];
        let home = choose_node(LoadBalancing::PrefixHash, &idle, &request, 0).unwrap();
        let mut busy = idle;
        busy[home].requests = 30;
        assert_ne!(choose_node(LoadBalancing::PrefixHash, &busy, &request, 0).unwrap(), home);
    }

    #[test]
    fn round_robin_uses_nodes_in_turn() {
        let node = NodeView { requests: 0, slots: 1, tokens: 0, seconds_per_token: 1.0, hash: 0 };
        let picks: Vec<_> = (0..5)
            .map(|turn| {
                choose_node(LoadBalancing::RoundRobin, &[node; 3], &RequestView::default(), turn).unwrap()
            })
            .collect();
        assert_eq!(picks, [0, 1, 2, 0, 1]);
    }
}
