//! Actuator for nodes as local processes.
//!
//! A node receives requests after its first successful health check. A node that is removed drains first: it finishes
//! its requests, and then gets SIGTERM. A node that exits unexpectedly is replaced, after a pause that doubles with
//! each consecutive loss.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::process::{Child, Command};

use crate::autoscale::actuator::{NodeActuator, NodeSupply};
use crate::config::{ProcessConfig, ScaleConfig};
use crate::pool::ModelPool;
use crate::pool::health::is_healthy;
use crate::pool::node::{Node, NodeOrigin, NodeSpec, NodeState};
use crate::telemetry::metrics::Metrics;
use crate::upstream::connect::Connector;

/// Time after SIGTERM in which a node must exit; then it is killed.
const EXIT_GRACE: Duration = Duration::from_secs(10);

/// Timeout of the health check of a starting node.
const CHECK_TIMEOUT: Duration = Duration::from_millis(500);

/// Time for which a node may be unhealthy after it was ready. Then it is killed and replaced.
const UNHEALTHY_GRACE: Duration = Duration::from_secs(30);

struct Process {
    child: Child,
    node: Arc<Node>,
    gpus: Option<String>,
    started_at: Instant,
    /// Time at which draining began.
    draining_since: Option<Instant>,
    was_ready: bool,
    /// Time since which the health checks fail.
    unhealthy_since: Option<Instant>,
    stopping_since: Option<Instant>,
}

impl Process {
    fn is_starting(&self) -> bool {
        !self.was_ready && self.stopping_since.is_none()
    }
}

/// Actuator that starts and stops local processes.
pub struct ProcessActuator {
    pool: Arc<ModelPool>,
    connector: Connector,
    metrics: Arc<Metrics>,
    config: ProcessConfig,
    processes: Vec<Process>,
    supply: NodeSupply,
    /// Consecutive nodes that were lost before one became ready.
    consecutive_losses: u32,
    pause_until: Instant,
}

impl NodeActuator for ProcessActuator {
    async fn step(&mut self, target: Option<usize>) {
        self.remove_exited();
        self.check_starting().await;
        self.finish_draining();
        let running = self.processes.iter().filter(|p| p.node.state() != NodeState::Draining).count();
        let target = target.unwrap_or(running);
        for _ in running..target {
            // A draining node is readmitted before a new one is started.
            if !self.readmit_draining() && Instant::now() >= self.pause_until {
                self.start_node();
            }
        }
        for _ in target..running {
            self.drain_least_loaded();
        }
    }

    fn supply(&mut self) -> Option<NodeSupply> {
        let mut supply =
            NodeSupply { cold_starts_s: self.supply.cold_starts_s.clone(), ..NodeSupply::default() };
        for process in &self.processes {
            match (process.node.state(), process.was_ready) {
                (NodeState::Draining, _) => supply.draining += 1,
                (_, true) => supply.ready += 1,
                (_, false) => supply.starting_age_s.push(process.started_at.elapsed().as_secs_f64()),
            }
        }
        Some(supply)
    }

    async fn stop(&mut self) {
        for process in &mut self.processes {
            self.pool.remove_node(process.node.id);
            terminate(&mut process.child);
        }
        for process in &mut self.processes {
            if tokio::time::timeout(EXIT_GRACE, process.child.wait()).await.is_err() {
                let _already_dead = process.child.start_kill();
                let _status = process.child.wait().await;
            }
        }
    }
}

impl ProcessActuator {
    /// Creates an actuator without nodes.
    pub fn new(
        pool: Arc<ModelPool>,
        connector: Connector,
        metrics: Arc<Metrics>,
        config: ProcessConfig,
    ) -> Self {
        Self {
            pool,
            connector,
            metrics,
            config,
            processes: Vec::new(),
            supply: NodeSupply::default(),
            consecutive_losses: 0,
            pause_until: Instant::now(),
        }
    }

    /// Returns the current scaling settings of the pool.
    fn settings(&self) -> ScaleConfig {
        self.pool.config().scale.clone().unwrap_or_default()
    }

    fn count_event(&self, event: &str) {
        self.metrics.scale_events.with_label_values(&[&*self.pool.model, event]).inc();
    }

    fn start_node(&mut self) {
        let taken: Vec<_> = self.processes.iter().filter_map(|process| process.gpus.clone()).collect();
        let gpus = self.config.gpus.iter().find(|gpus| !taken.contains(gpus)).cloned();
        if gpus.is_none() && !self.config.gpus.is_empty() {
            return;
        }
        let max_concurrency = self.settings().max_concurrency;
        let started = free_port().and_then(|port| {
            let filled = |part: &String| {
                part.replace("{port}", &port.to_string())
                    .replace("{gpus}", gpus.as_deref().unwrap_or_default())
            };
            let mut command = Command::new(self.config.command.first().map_or_else(String::new, filled));
            if let Some(gpus) = &gpus {
                command.env("CUDA_VISIBLE_DEVICES", gpus);
            }
            command
                .args(self.config.command.iter().skip(1).map(filled))
                .stdin(Stdio::piped())
                .kill_on_drop(true);
            match &self.config.log_folder {
                None => command.stdout(Stdio::null()).stderr(Stdio::null()),
                Some(folder) => {
                    let name = self.pool.model.replace(['/', '\\'], "_");
                    let open = || {
                        std::fs::create_dir_all(folder)?;
                        let path = folder.join(format!("{name}-{port}.log"));
                        std::fs::OpenOptions::new().create(true).append(true).open(path)
                    };
                    let file = open()?;
                    command.stdout(file.try_clone()?).stderr(file)
                }
            };
            Ok((command.spawn()?, port))
        });
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        match started {
            Ok((child, port)) => {
                match self.pool.add_node(NodeSpec {
                    state: NodeState::Unhealthy,
                    origin: NodeOrigin::Scaler,
                    ..NodeSpec::new(url(port), Some(max_concurrency))
                }) {
                    Ok(node) => {
                        tracing::info!(model = &*self.pool.model, node = node.name, "node started");
                        self.count_event("started");
                        let started = Instant::now();
                        self.processes.push(Process {
                            child,
                            node,
                            gpus,
                            started_at: started,
                            draining_since: None,
                            was_ready: false,
                            unhealthy_since: None,
                            stopping_since: None,
                        });
                    }
                    Err(problem) => tracing::error!(problem, "node left out"),
                }
            }
            Err(error) => {
                tracing::error!(model = &*self.pool.model, command = ?self.config.command, %error, "cannot start a node");
                self.count_loss();
            }
        }
    }

    /// Counts a lost node and delays the next start: by 0.5 s, 1 s, … up to 30 s.
    fn count_loss(&mut self) {
        self.count_event("lost");
        let pause = Duration::from_millis(500) * 2u32.saturating_pow(self.consecutive_losses.min(6));
        self.consecutive_losses += 1;
        self.pause_until = Instant::now() + pause.min(Duration::from_secs(30));
    }

    fn remove_exited(&mut self) {
        let mut index = 0;
        while index < self.processes.len() {
            let process = &mut self.processes[index];
            match process.child.try_wait() {
                Ok(None) => index += 1,
                status => {
                    let process = self.processes.remove(index);
                    self.pool.remove_node(process.node.id);
                    if process.stopping_since.is_some() {
                        self.count_event("stopped");
                    } else {
                        tracing::error!(
                            model = &*self.pool.model,
                            node = process.node.name,
                            ?status,
                            "node died"
                        );
                        if process.was_ready {
                            self.consecutive_losses = 0;
                        }
                        self.count_loss();
                    }
                }
            }
        }
    }

    async fn check_starting(&mut self) {
        let path = self.pool.config().health.path.clone();
        let longest = Duration::from_secs(self.settings().startup_timeout_s);
        let starting = self.processes.iter().filter(|process| process.is_starting());
        let healthy: Vec<_> = join_all(starting.map(async |process| {
            is_healthy(&self.connector, &process.node, &path, CHECK_TIMEOUT).await.then_some(process.node.id)
        }))
        .await
        .into_iter()
        .flatten()
        .collect();
        for process in &mut self.processes {
            if !process.is_starting() {
                let ill = process.was_ready && process.node.state() == NodeState::Unhealthy;
                let since = ill.then(|| process.unhealthy_since.unwrap_or_else(Instant::now));
                process.unhealthy_since = since;
                if since.is_some_and(|since| since.elapsed() > UNHEALTHY_GRACE) {
                    tracing::error!(
                        model = &*self.pool.model,
                        node = process.node.name,
                        "node hangs; it is replaced"
                    );
                    let _already_dead = process.child.start_kill();
                }
                continue;
            }
            if healthy.contains(&process.node.id) {
                process.was_ready = true;
                self.consecutive_losses = 0;
                let seconds = process.started_at.elapsed().as_secs_f64();
                tracing::info!(model = &*self.pool.model, node = process.node.name, seconds, "node is ready");
                self.supply.push_cold_start(seconds);
                self.metrics.cold_start.with_label_values(&[&*self.pool.model]).observe(seconds);
                self.pool.set_node_state(&process.node, NodeState::Ready);
            } else if process.started_at.elapsed() > longest {
                tracing::error!(
                    model = &*self.pool.model,
                    node = process.node.name,
                    "node never became ready"
                );
                let _already_dead = process.child.start_kill();
            }
        }
    }

    fn readmit_draining(&mut self) -> bool {
        let drained = self
            .processes
            .iter_mut()
            .find(|p| p.was_ready && p.stopping_since.is_none() && p.node.state() == NodeState::Draining);
        let Some(process) = drained else { return false };
        process.draining_since = None;
        self.pool.set_node_state(&process.node, NodeState::Ready);
        self.count_event("revived");
        true
    }

    fn drain_least_loaded(&mut self) {
        let emptiest = self
            .processes
            .iter_mut()
            .filter(|process| process.node.state() != NodeState::Draining)
            .min_by_key(|process| (process.was_ready, process.node.outstanding_tokens()));
        if let Some(process) = emptiest {
            process.draining_since = Some(Instant::now());
            self.pool.set_node_state(&process.node, NodeState::Draining);
        }
    }

    /// Sends SIGTERM to draining nodes without requests or past the drain timeout, and SIGKILL to those that do not
    /// exit.
    fn finish_draining(&mut self) {
        let longest = Duration::from_secs(self.settings().drain_timeout_s);
        for process in &mut self.processes {
            let late = process.draining_since.is_some_and(|since| since.elapsed() > longest);
            if process.node.state() == NodeState::Draining && (late || process.node.requests() == 0) {
                match process.stopping_since {
                    None => {
                        process.stopping_since = Some(Instant::now());
                        terminate(&mut process.child);
                    }
                    Some(since) if since.elapsed() > EXIT_GRACE => {
                        let _already_dead = process.child.start_kill();
                    }
                    Some(_) => {}
                }
            }
        }
    }
}

/// Ends a process: closes its standard input, which `potstill serve --exit-with-parent` watches, and sends SIGTERM. The
/// program `kill` sends the signal, because a system call would need `unsafe`.
fn terminate(child: &mut Child) {
    drop(child.stdin.take());
    if let Some(id) = child.id() {
        let sent = std::process::Command::new("kill").arg(id.to_string()).stdin(Stdio::null()).status();
        if !sent.is_ok_and(|status| status.success()) {
            let _already_dead = child.start_kill();
        }
    }
}

/// Returns a TCP port that is currently free.
fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
