//! Simulation of the whole gateway. Connections of clients and nodes are in-memory pipes, and the clock is tokio's
//! paused one, so that a minute takes a few hundredths of a second. Nodes crash, hang, slow down, break streams, send
//! invalid data, reject requests and recover. The network splits, the configuration changes, clients disconnect or read
//! slowly, and the gateway shuts down. In every case each request ends exactly once, with its own response or an error.
//! `POTSTILL_SEEDS=10000` runs more seeds.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

#[path = "fleet/client.rs"]
mod client;
#[path = "fleet/network.rs"]
mod network;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use potstill_gateway::Gateway;
use potstill_gateway::config::{Config, Deadlines, HealthConfig, LoadBalancing, NodeConfig, PoolConfig};
use potstill_gateway::upstream::connect::Connector;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::{Instant, sleep, timeout};

use self::client::{Client, Door, End};
use self::network::{Condition, Network};

const HOSTS: u8 = 5;
const SLOTS: usize = 3;
const SECONDS: u64 = 60;
const BUDGET: u32 = 10;

fn config(random: &mut ChaCha8Rng, load_balancing: LoadBalancing) -> Config {
    let mut pool = PoolConfig::new("m");
    let node =
        |number| NodeConfig { url: Network::url(number), max_concurrency: Some(SLOTS), api_key_env: None };
    pool.nodes = (1..=random.random_range(1..=HOSTS)).map(node).collect();
    pool.load_balancing = load_balancing;
    pool.queue.requests = 30;
    pool.queue.wait_ms = 20_000;
    pool.deadlines = Deadlines { connect_ms: 500, first_byte_ms: 5_000, idle_ms: 4_000, total_ms: 30_000 };
    pool.health = HealthConfig { interval_ms: 500, timeout_ms: 1_000, ..HealthConfig::default() };
    pool.retry.budget_percent = BUDGET;
    pool.heartbeat_ms = None;
    let mut config: Config = toml::from_str("").unwrap();
    config.pools = vec![pool];
    config
}

fn condition(random: &mut ChaCha8Rng) -> Condition {
    match random.random_range(0..12) {
        0 | 1 => Condition::Down,
        2 => Condition::Silent,
        3 => Condition::Slow(random.random_range(2..8)),
        4 => Condition::Breaks,
        5 => Condition::Nonsense,
        6 => Condition::Refuses([429, 500, 503][random.random_range(0..3)]),
        7 => Condition::Ill,
        _ => Condition::Well,
    }
}

#[derive(Default)]
struct World {
    asked: AtomicU64,
    ends: Mutex<BTreeMap<End, u64>>,
}

/// A client that sends a few requests, one after another.
async fn visit(world: Arc<World>, door: Arc<Door>, name: String, mut random: ChaCha8Rng) {
    let requests = random.random_range(1..5);
    let mut client = None;
    for number in 0..requests {
        let mut current =
            client.take().unwrap_or_else(|| Client::connect(&door, ChaCha8Rng::from_rng(&mut random)));
        world.asked.fetch_add(1, Ordering::Relaxed);
        // Longer than all deadlines of the gateway.
        let asked = timeout(Duration::from_secs(200), current.ask(&format!("{name}-{number}"))).await;
        let (end, open) = asked.expect("every request ends");
        *world.ends.lock().unwrap().entry(end).or_default() += 1;
        client = open.then_some(current);
        sleep(Duration::from_millis(random.random_range(0..500))).await;
    }
}

async fn run(seed: u64) -> BTreeMap<End, u64> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let balances = [
        LoadBalancing::LeastTokens,
        LoadBalancing::PeakEwma,
        LoadBalancing::PrefixHash,
        LoadBalancing::Session,
        LoadBalancing::RoundRobin,
    ];
    let load_balancing = balances[random.random_range(0..balances.len())];
    let network = Network::new(HOSTS, SLOTS, seed);
    let dial = Arc::clone(&network);
    let connector = Connector::with_dialer(Arc::new(move |address| dial.dial(address)));
    let gateway = Gateway::build_with(config(&mut random, load_balancing), connector).unwrap();
    let (world, door) = (Arc::new(World::default()), Door::new(gateway.clone()));
    let rate = random.random_range(0.3..4.0);
    let end = Instant::now() + Duration::from_secs(SECONDS);
    let mut clients = Vec::new();
    while Instant::now() < end {
        sleep(Duration::from_secs_f64(-(1.0 - random.random::<f64>()).ln() / rate)).await;
        match random.random_range(0..12) {
            0..4 => {
                let now = condition(&mut random);
                network.host(random.random_range(1..=HOSTS)).condition.send_replace(now);
            }
            4 => gateway.reload(config(&mut random, load_balancing)).unwrap(),
            _ => {}
        }
        let (name, random) = (format!("c{}", clients.len()), ChaCha8Rng::from_rng(&mut random));
        clients.push(tokio::spawn(visit(Arc::clone(&world), Arc::clone(&door), name, random)));
        assert!(gateway.load("m").unwrap().queued <= 30);
    }
    let stops = random.random_bool(0.5);
    if stops {
        door.stopping.store(true, Ordering::Relaxed);
        gateway.begin_drain();
    }
    for client in clients {
        client.await.unwrap();
    }
    door.close().await;
    network.check().await;
    let load = gateway.load("m").unwrap();
    assert_eq!(
        (load.active, load.tokens, load.queued, load.queued_bytes),
        (0, 0, 0, 0),
        "something was not given back"
    );
    assert_eq!(gateway.in_flight_bytes(), 0);
    let (asked, ends) = (world.asked.load(Ordering::Relaxed), world.ends.lock().unwrap().clone());
    let sum = |of: fn(&network::Host) -> &std::sync::atomic::AtomicUsize| -> u64 {
        network.hosts().map(|host| of(host).load(Ordering::Relaxed) as u64).sum()
    };
    let (tries, stale) = (sum(|host| &host.asked), sum(|host| &host.stale));
    let bound = asked + 10 + asked * u64::from(BUDGET) / 100 + stale;
    assert!(tries <= bound, "{tries} tries of {asked} requests, {stale} on stale connections");
    if !stops {
        come_back(&network, &door, &mut random).await;
    }
    ends
}

/// Checks that the pool serves again once all nodes are healthy, however often they were ejected.
async fn come_back(network: &Network, door: &Arc<Door>, random: &mut ChaCha8Rng) {
    network.hosts().for_each(|host| {
        host.condition.send_replace(Condition::Well);
    });
    sleep(Duration::from_secs(310)).await;
    for number in 0..10 {
        let mut client = Client::connect(door, ChaCha8Rng::from_rng(random));
        let (end, _) = client.ask(&format!("last-{number}")).await;
        assert!(matches!(end, End::Whole | End::Left), "{end:?} with all nodes well");
    }
}

#[test]
fn every_request_ends_once_with_its_own_response() {
    let seeds: u64 = std::env::var("POTSTILL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_000);
    let next = AtomicU64::new(0);
    let ends = Mutex::new(BTreeMap::<End, u64>::new());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return;
            }
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .unwrap();
            let outcome =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(run(seed))));
            let Ok(found) = outcome else { panic!("seed {seed}") };
            found.into_iter().for_each(|(end, count)| *ends.lock().unwrap().entry(end).or_default() += count);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let ends = ends.into_inner().unwrap();
    for end in [End::Whole, End::Refused, End::Broken, End::Left, End::TurnedAway] {
        assert!(
            ends.get(&end).is_some_and(|count| *count >= seeds / 10),
            "hardly any request ended so: {ends:?}"
        );
    }
}
