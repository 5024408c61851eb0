//! A gateway in this process, on a real socket.

use std::net::SocketAddr;
use std::time::Duration;

use potstill_gateway::Gateway;
use potstill_gateway::config::{Config, NodeConfig, PoolConfig};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::canary;
use crate::mock::Mock;

/// A running gateway.
pub struct TestGateway {
    /// The gateway.
    pub gateway: Gateway,
    /// HTTP client without a timeout.
    pub client: reqwest::Client,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

/// Returns the configuration of a pool `m` over mock nodes, with short intervals.
pub fn pool(nodes: &[&Mock], slots: usize) -> PoolConfig {
    let mut pool = PoolConfig::new("m");
    pool.nodes = nodes
        .iter()
        .map(|mock| NodeConfig { url: mock.url(), max_concurrency: Some(slots), api_key_env: None })
        .collect();
    pool.health.interval_ms = 50;
    pool
}

/// Returns a configuration with one pool.
pub fn config(pool: PoolConfig) -> Config {
    let mut config = Config::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    config.pools.push(pool);
    config
}

impl TestGateway {
    /// Starts a gateway.
    pub async fn start(config: Config) -> Self {
        canary::watch();
        assert_eq!(config.problems(), Vec::<String>::new());
        let listener = TcpListener::bind(config.listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let gateway = Gateway::build(config).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = gateway.clone();
        let task = tokio::spawn(async move {
            serving.serve(listener, async { drop(stopped.await) }).await;
        });
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { gateway, client, address, stop: Some(stop), task: Some(task) }
    }

    /// Returns the URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Address of the gateway.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Builds a chat request to `m`.
    pub fn chat(&self, stream: bool) -> reqwest::RequestBuilder {
        let body = json!({"model": "m", "stream": stream, "messages": [{"role": "user", "content": canary::PROMPT}]});
        self.client.post(self.url("/v1/chat/completions")).json(&body)
    }

    /// Sends a request and returns the status and the JSON body.
    pub async fn json(request: reqwest::RequestBuilder) -> (u16, Value) {
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}")))
    }

    /// Waits until the last bodies are dropped. Asserts that every counter of the pool is zero.
    pub async fn all_free(&self) {
        crate::mock::until("every permit is back", || {
            let load = self.gateway.load("m").unwrap();
            load.active == 0 && load.tokens == 0 && load.queued == 0
        })
        .await;
    }

    /// Stops the gateway within `wait`.
    pub async fn stop(mut self, wait: Duration) {
        drop(self.stop.take());
        tokio::time::timeout(wait, self.task.take().unwrap())
            .await
            .expect("the gateway did not stop")
            .unwrap();
    }

    /// Starts the shutdown without waiting for it.
    pub fn begin_drain(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until the gateway has stopped.
    pub async fn stopped(&mut self, wait: Duration) {
        tokio::time::timeout(wait, self.task.take().unwrap())
            .await
            .expect("the gateway did not stop")
            .unwrap();
    }
}
