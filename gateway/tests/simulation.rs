//! Simulation of a pool. Nodes crash, slow down, break streams and recover; clients disconnect; the configuration
//! changes. Invariants are checked throughout. The clock is tokio's paused one, so that a minute takes milliseconds and
//! a seed always gives the same run. `POTSTILL_SEEDS=10000` runs more seeds.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "simulation/orders.rs"]
mod orders;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use potstill_gateway::config::{LoadBalancing, NodeConfig, PoolConfig, Priority};
use potstill_gateway::error::GatewayError;
use potstill_gateway::pool::node::NodeState;
use potstill_gateway::pool::{AcquireRequest, ModelPool, Permit};
use potstill_gateway::telemetry::metrics::Metrics;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

const SLOTS: usize = 4;
const SECONDS: u64 = 60;

/// Actual health of a node, which the pool has to detect.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Health {
    Well,
    /// Slower by this factor.
    Slow(u32),
    /// Responses break halfway.
    Breaks,
    /// Connections are refused.
    Down,
}

#[derive(Default)]
struct Counts {
    asked: AtomicUsize,
    whole: AtomicUsize,
    refused: AtomicUsize,
    broken: AtomicUsize,
    left: AtomicUsize,
    tries: AtomicUsize,
}

struct World {
    pool: Arc<ModelPool>,
    health: Mutex<BTreeMap<String, Health>>,
    on_node: Mutex<BTreeMap<String, usize>>,
    counts: Counts,
}

impl World {
    fn health(&self, node: &str) -> Health {
        self.health.lock().unwrap().get(node).copied().unwrap_or(Health::Well)
    }
}

fn config(nodes: usize, load_balancing: LoadBalancing) -> PoolConfig {
    let mut pool = PoolConfig::new("m");
    let node =
        |n| NodeConfig { url: format!("http://node-{n}:1"), max_concurrency: Some(SLOTS), api_key_env: None };
    pool.nodes = (0..nodes).map(node).collect();
    pool.load_balancing = load_balancing;
    pool.queue.requests = 40;
    pool.queue.wait_ms = 20_000;
    pool.queue.starvation_ms = 5_000;
    pool
}

/// Counts a request on a node until it is dropped, however the request ends.
struct OnNode<'a> {
    world: &'a World,
    name: String,
}

impl<'a> OnNode<'a> {
    fn enter(world: &'a World, permit: &Permit) -> Self {
        let name = permit.node().name.clone();
        let mut held = world.on_node.lock().unwrap();
        let held = held.entry(name.clone()).or_default();
        *held += 1;
        assert!(*held <= SLOTS, "{name} holds {held} requests with {SLOTS} slots");
        Self { world, name }
    }
}

impl Drop for OnNode<'_> {
    fn drop(&mut self) {
        *self.world.on_node.lock().unwrap().get_mut(&self.name).unwrap() -= 1;
    }
}

/// A request of a client, with the same steps as in the request path: a slot, a node, and retries on other nodes.
async fn request(world: &World, ask: &AcquireRequest, work: Duration) {
    let counts = &world.counts;
    let (mut exclude, mut tries) = (None, 0);
    loop {
        let permit = match world.pool.acquire(ask, exclude).await {
            Ok(permit) => permit,
            Err(error) => {
                assert!(matches!(
                    error,
                    GatewayError::QueueFull { .. }
                        | GatewayError::QueueTimeout { .. }
                        | GatewayError::NoUpstream { .. }
                ));
                counts.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
        };
        tries += 1;
        counts.tries.fetch_add(1, Ordering::Relaxed);
        let node = permit.node().name.clone();
        let _held = OnNode::enter(world, &permit);
        match world.health(&node) {
            Health::Down => {
                permit.record_unreachable();
                if tries == 3 {
                    counts.refused.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                exclude = Some(permit.node().id);
            }
            Health::Breaks => {
                sleep(work / 2).await;
                permit.record_failure("scripted");
                // The client has received data, so there is no retry.
                counts.broken.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Health::Slow(times) => {
                sleep(work * times).await;
                permit.record_success(100, Some(ask.tokens));
                counts.whole.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Health::Well => {
                sleep(work).await;
                permit.record_success(100, Some(ask.tokens));
                counts.whole.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }
}

/// Stands in for health checks: reachable nodes become ready again.
async fn watch(world: Arc<World>) {
    loop {
        sleep(Duration::from_millis(500)).await;
        for node in world.pool.nodes() {
            let well = world.health(&node.name) != Health::Down;
            if node.state() == NodeState::Unhealthy && well {
                world.pool.set_node_state(&node, NodeState::Ready);
            }
        }
        world.pool.remove_drained();
        // Ejections and pauses end by time alone. Any change of state dispatches the queue.
        if let Some(node) = world.pool.nodes().first() {
            world.pool.set_node_state(node, node.state());
        }
    }
}

async fn run(seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let balances = [
        LoadBalancing::LeastTokens,
        LoadBalancing::PeakEwma,
        LoadBalancing::PrefixHash,
        LoadBalancing::Session,
        LoadBalancing::RoundRobin,
    ];
    let load_balancing = balances[rng.random_range(0..balances.len())];
    let nodes = rng.random_range(1..6);
    let metrics = Metrics::new().unwrap();
    let world = Arc::new(World {
        pool: ModelPool::new(config(nodes, load_balancing), &metrics, CancellationToken::new()),
        health: Mutex::default(),
        on_node: Mutex::default(),
        counts: Counts::default(),
    });
    let watcher = tokio::spawn(watch(Arc::clone(&world)));
    let rate = rng.random_range(1.0..40.0);
    let end = tokio::time::Instant::now() + Duration::from_secs(SECONDS);
    let mut clients = Vec::new();
    while tokio::time::Instant::now() < end {
        sleep(Duration::from_secs_f64(-(1.0 - rng.random::<f64>()).ln() / rate)).await;
        match rng.random_range(0..40) {
            0 => {
                let health = match rng.random_range(0..5) {
                    0 => Health::Down,
                    1 => Health::Breaks,
                    2 => Health::Slow(rng.random_range(2..8)),
                    _ => Health::Well,
                };
                let node = format!("node-{}:1", rng.random_range(0..6));
                world.health.lock().unwrap().insert(node, health);
            }
            1 => world.pool.reconfigure(config(rng.random_range(1..6), load_balancing)),
            _ => {}
        }
        let ask = AcquireRequest {
            class: Priority::ALL[rng.random_range(0..3)],
            key: format!("key-{}", rng.random_range(0..4)).into(),
            max_wait: rng.random_bool(0.2).then(|| Duration::from_millis(rng.random_range(1..5_000))),
            tokens: rng.random_range(1..2_000),
            bytes: 100,
            affinity: rng.random_bool(0.8).then(|| rng.random_range(0..20)),
        };
        let work = Duration::from_millis(rng.random_range(1..1_500));
        let patience = rng.random_bool(0.15).then(|| Duration::from_millis(rng.random_range(0..2_000)));
        let pool = Arc::clone(&world.pool);
        let world = Arc::clone(&world);
        clients.push(tokio::spawn(async move {
            world.counts.asked.fetch_add(1, Ordering::Relaxed);
            let served = request(&world, &ask, work);
            match patience {
                None => served.await,
                Some(patience) => {
                    if tokio::time::timeout(patience, served).await.is_err() {
                        world.counts.left.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        }));
        let load = pool.load();
        assert!(load.queued <= 40, "the queue has {} requests", load.queued);
    }
    for client in clients {
        client.await.unwrap();
    }
    watcher.abort();
    let load = world.pool.load();
    assert_eq!(
        (load.active, load.tokens, load.queued, load.queued_bytes),
        (0, 0, 0, 0),
        "something was not given back"
    );
    let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
    let counts = &world.counts;
    let ends = count(&counts.whole) + count(&counts.refused) + count(&counts.broken) + count(&counts.left);
    assert_eq!(ends, count(&counts.asked), "every request ends once");
    assert!(count(&counts.tries) <= 3 * count(&counts.asked));
    assert!(world.on_node.lock().unwrap().values().all(|held| *held == 0));
}

#[test]
fn counters_balance_under_random_node_failures() {
    let seeds = std::env::var("POTSTILL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_000);
    for seed in 0..seeds {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(run(seed))));
        assert!(outcome.is_ok(), "seed {seed}");
    }
}
