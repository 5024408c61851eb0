//! Exhaustive test of all interleavings of three requests and a node that drains and becomes ready again. A request
//! asks for a slot, polls, and leaves, with or without a slot. Each step runs under the one lock of the pool, so these
//! are all histories. Only interleavings between two locks of one step are not covered.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use potstill_gateway::config::{LoadBalancing, NodeConfig, PoolConfig, Priority};
use potstill_gateway::error::GatewayError;
use potstill_gateway::pool::node::NodeState;
use potstill_gateway::pool::{AcquireRequest, ModelPool, Permit};
use potstill_gateway::telemetry::metrics::Metrics;
use tokio_util::sync::CancellationToken;

type Outcome = Result<Permit, GatewayError>;

/// Progress of a request.
enum Asked {
    NotYet,
    Waits(Pin<Box<dyn Future<Output = Outcome>>>),
    Holds(Permit),
    Refused,
    Left,
}

/// One setup: nodes, queue and requests.
struct Scene {
    nodes: usize,
    /// Capacity of the queue.
    room: usize,
    classes: [Priority; 3],
    /// Whether the last request excludes the first node, as after a failure there.
    avoids: bool,
}

const STEPS: [usize; 4] = [3, 3, 3, 2];
/// Index of the fourth actor: the first node, which drains and becomes ready again.
const NODE: usize = 3;

struct Play {
    pool: Arc<ModelPool>,
    avoids: Option<u64>,
    classes: [Priority; 3],
    room: usize,
    asked: [Asked; 3],
}

impl Play {
    fn new(scene: &Scene, metrics: &Metrics) -> Self {
        let mut config = PoolConfig::new("m");
        let node =
            |n| NodeConfig { url: format!("http://node-{n}:1"), max_concurrency: Some(1), api_key_env: None };
        config.nodes = (0..scene.nodes).map(node).collect();
        config.load_balancing = LoadBalancing::LeastTokens;
        config.queue.requests = scene.room;
        let pool = ModelPool::new(config, metrics, CancellationToken::new());
        let avoids = scene.avoids.then(|| pool.nodes()[0].id);
        let asked = [const { Asked::NotYet }; 3];
        Self { pool, avoids, classes: scene.classes, room: scene.room, asked }
    }

    fn exclude(&self, request: usize) -> Option<u64> {
        self.avoids.filter(|_| request == 2)
    }

    fn take(&mut self, actor: usize, step: usize) {
        if actor == NODE {
            let node = Arc::clone(&self.pool.nodes()[0]);
            self.pool.set_node_state(&node, if step == 0 { NodeState::Draining } else { NodeState::Ready });
            return;
        }
        if step == 0 {
            let ask = AcquireRequest {
                class: self.classes[actor],
                key: format!("key-{actor}").into(),
                max_wait: None,
                tokens: 10,
                bytes: 100,
                affinity: None,
            };
            let (pool, exclude) = (Arc::clone(&self.pool), self.exclude(actor));
            self.asked[actor] = Asked::Waits(Box::pin(async move { pool.acquire(&ask, exclude).await }));
        }
        if step == 2 {
            self.asked[actor] = Asked::Left;
        } else if let Asked::Waits(waits) = &mut self.asked[actor]
            && let Poll::Ready(outcome) = waits.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        {
            self.asked[actor] = match outcome {
                Ok(permit) => {
                    assert!(self.exclude(actor) != Some(permit.node().id) || self.pool.nodes().len() == 1);
                    Asked::Holds(permit)
                }
                Err(GatewayError::NoUpstream { .. }) => Asked::Refused,
                Err(error) => {
                    let full = matches!(error, GatewayError::QueueFull { .. }) && self.room < 3;
                    assert!(full, "{error}");
                    Asked::Refused
                }
            };
        }
    }

    /// Checks the invariants after a step. `before`: requests on the first node, and whether it was draining.
    fn check(&self, before: (usize, bool)) {
        let (load, nodes) = (self.pool.load(), self.pool.nodes());
        let held = self.asked.iter().filter_map(|asked| match asked {
            Asked::Holds(permit) => Some(permit.node().id),
            _ => None,
        });
        let waiting = self.asked.iter().filter(|asked| matches!(asked, Asked::Waits(_))).count();
        for node in &nodes {
            assert!(node.requests() <= 1, "a slot was given twice");
            assert!(
                node.requests() >= held.clone().filter(|id| *id == node.id).count(),
                "a slot that is held counts"
            );
        }
        // A waiting request is in the queue, has a slot that it has not seen yet, or was displaced from a full queue.
        let placed = load.active - held.count() + load.queued;
        assert!(
            placed == waiting || placed < waiting && self.room < 3,
            "a request was lost or counted twice"
        );
        assert!(load.queued <= self.room && load.queued_bytes == 100 * load.queued);
        let draining = nodes[0].state() == NodeState::Draining;
        assert!(!(draining && before.1) || nodes[0].requests() <= before.0, "a draining node got a request");
        // No slot stays free while a request that may use it waits.
        for node in nodes.iter().filter(|node| node.state() == NodeState::Ready && node.requests() == 0) {
            let avoided = self.avoids == Some(node.id)
                && nodes.iter().any(|other| other.id != node.id && other.state() == NodeState::Ready);
            assert!(load.queued == 0 || avoided && load.queued == 1, "a slot is free and somebody waits");
        }
    }
}

/// Runs all interleavings and returns their number.
fn every_order(scene: &Scene, metrics: &Metrics, order: &mut Vec<usize>) -> usize {
    if order.len() == STEPS.iter().sum::<usize>() {
        let mut play = Play::new(scene, metrics);
        let mut taken = [0; 4];
        for &actor in &*order {
            let first = &play.pool.nodes()[0];
            let before = (first.requests(), first.state() == NodeState::Draining);
            play.take(actor, taken[actor]);
            taken[actor] += 1;
            play.check(before);
        }
        let load = play.pool.load();
        assert_eq!((load.active, load.tokens, load.queued, load.queued_bytes), (0, 0, 0, 0));
        return 1;
    }
    let mut orders = 0;
    for (actor, steps) in STEPS.into_iter().enumerate() {
        if order.iter().filter(|taken| **taken == actor).count() < steps {
            order.push(actor);
            orders += every_order(scene, metrics, order);
            order.pop();
        }
    }
    orders
}

#[test]
fn counters_balance_in_every_interleaving() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let _inside = runtime.enter();
    let metrics = Metrics::new().unwrap();
    let same = [Priority::Default; 3];
    let mixed = [Priority::Bulk, Priority::Interactive, Priority::Default];
    for (nodes, room, classes, avoids) in [
        (1, 3, same, false),
        (1, 3, mixed, false),
        (1, 1, mixed, false),
        (2, 3, same, true),
        (2, 3, mixed, true),
        (2, 1, mixed, true),
    ] {
        let scene = Scene { nodes, room, classes, avoids };
        assert_eq!(every_order(&scene, &metrics, &mut Vec::new()), 92_400);
    }
}
