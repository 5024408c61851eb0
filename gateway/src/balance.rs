//! Which node gets the next request. Pure: what is known of the nodes is passed in.

/// What a balancer knows of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeView {
    /// It may get requests: healthy, not draining.
    pub available: bool,
    /// Requests that it works on.
    pub requests: usize,
    /// Requests that it can work on.
    pub slots: usize,
    /// Tokens that it still has to read and write, as far as can be told.
    pub tokens: u64,
}

/// Picks the node with the fewest outstanding tokens per slot among those with a free slot; the one with fewer requests
/// and then the first among equals. `exclude` is a node that has just failed this request.
pub fn least_tokens(nodes: &[NodeView], exclude: Option<usize>) -> Option<usize> {
    nodes
        .iter()
        .enumerate()
        .filter(|(index, node)| node.available && node.requests < node.slots && Some(*index) != exclude)
        .min_by_key(|(_, node)| {
            // Tokens per slot in thousandths, so that nodes of different size compare.
            (node.tokens.saturating_mul(1000) / node.slots as u64, node.requests * 1000 / node.slots)
        })
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node() -> impl Strategy<Value = NodeView> {
        (any::<bool>(), 0usize..6, 1usize..5, 0u64..10_000)
            .prop_map(|(available, requests, slots, tokens)| NodeView { available, requests, slots, tokens })
    }

    proptest! {
        #[test]
        fn picks_a_free_node_exactly_when_there_is_one(nodes in prop::collection::vec(node(), 0..8), exclude in prop::option::of(0usize..8)) {
            let free = |i: usize| nodes[i].available && nodes[i].requests < nodes[i].slots && Some(i) != exclude;
            match least_tokens(&nodes, exclude) {
                Some(i) => {
                    prop_assert!(free(i));
                    let load = |n: &NodeView| n.tokens * 1000 / n.slots as u64;
                    for (j, other) in nodes.iter().enumerate() {
                        prop_assert!(!free(j) || load(&nodes[i]) <= load(other));
                    }
                }
                None => prop_assert!((0..nodes.len()).all(|i| !free(i))),
            }
        }
    }
}
