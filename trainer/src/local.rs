//! Local mode: a gateway in this process on a loopback port, with node processes of this program behind it. The only
//! file that uses the gateway crate. Models are nevertheless reached over HTTP.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use potstill_gateway::Gateway;
use potstill_gateway::autoscale::plans::RunPlan;
use potstill_gateway::config::{Config, PoolConfig, ProcessConfig, ScaleConfig};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::recipe::LocalModel;

/// A running local gateway.
pub struct LocalGateway {
    gateway: Gateway,
    address: SocketAddr,
    logs: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl LocalGateway {
    /// Starts a gateway on `port` of the loopback address, or on any free port if `port` is 0 or taken. `logs` is the
    /// folder for logs of the nodes.
    pub async fn start(port: u16, logs: &Path) -> anyhow::Result<Self> {
        let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let listener = match TcpListener::bind(loopback(port)).await {
            Ok(listener) => listener,
            Err(_) if port != 0 => TcpListener::bind(loopback(0)).await?,
            Err(error) => return Err(error).context("cannot listen on the loopback address"),
        };
        let address = listener.local_addr()?;
        let mut config = Config::new(address);
        config.drain_seconds = 5;
        config.autoscale.interval_ms = 500;
        let gateway = Gateway::build(config)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = gateway.clone();
        let task = tokio::spawn(async move {
            let stopped = async {
                let _stopped_or_dropped = stopped.await;
            };
            serving.serve(listener, stopped).await;
        });
        Ok(Self { gateway, address, logs: logs.to_owned(), stop: Some(stop), task: Some(task) })
    }

    /// Returns the base URL for clients, ending in `/v1`.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Adds a pool of node processes that serve `model`. The gateway scales the pool with demand. A model that is
    /// already served is not changed.
    pub fn add_model(&self, model: &LocalModel) -> anyhow::Result<()> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let slots = model.slots.to_string();
        let command = [
            text(&program).as_str(),
            "serve",
            "--model",
            &text(&model.path),
            "--name",
            &model.model,
            "--port",
            "{port}",
            "--threads",
            &model.threads.to_string(),
            "--device",
            &model.device,
            "--max-running",
            &slots,
            "--exit-with-parent",
        ]
        .map(str::to_owned)
        .to_vec();
        let mut pool = PoolConfig::new(&model.model);
        // A node on this machine starts within about a second, so short memory and hold times suffice.
        pool.scale = Some(ScaleConfig {
            min: model.min,
            max: model.max,
            max_concurrency: model.slots,
            cold_start_s: 2.0,
            demand_window_s: 10.0,
            scale_down_delay_s: 5.0,
            startup_timeout_s: 300,
            process: Some(ProcessConfig { command, log_folder: Some(self.logs.clone()), gpus: Vec::new() }),
            ..ScaleConfig::default()
        });
        let _served_already = !self.gateway.add_pool(pool);
        Ok(())
    }

    /// Returns the registry of plans, for announcements.
    pub fn plan_registry(&self) -> LocalPlanRegistry {
        LocalPlanRegistry(self.gateway.clone())
    }

    /// Drains requests, stops the nodes, and returns when both are done.
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            let _already_stopped = stop.send(());
        }
        if let Some(task) = self.task.take() {
            let _panicked = task.await;
        }
    }
}

/// Plan registry of the local gateway.
pub struct LocalPlanRegistry(Gateway);

impl LocalPlanRegistry {
    /// Registers a run's plan. Takes and returns the JSON of the gateway's admin API.
    pub fn register_plan(&self, plan: serde_json::Value) -> Result<serde_json::Value, String> {
        let plan: RunPlan = serde_json::from_value(plan).map_err(|error| error.to_string())?;
        let forecasts = self.0.register_plan(plan)?;
        Ok(serde_json::json!({ "forecasts": forecasts }))
    }
}
