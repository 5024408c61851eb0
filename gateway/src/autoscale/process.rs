//! Starts and stops local node processes so that their number follows the policy.
//!
//! A node gets requests only after its first successful health check. A node that is taken away drains first: it gets
//! no more requests, finishes what it holds, then gets SIGTERM. A node that dies is replaced, with growing pauses when
//! it dies again and again.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use super::policy::{Bounds, Memory, Observation, decide};
use crate::config::{ProcessConfig, ms};
use crate::pool::ModelPool;
use crate::pool::health::check;
use crate::pool::node::{Node, NodeSpec, NodeState};
use crate::telemetry::Metrics;
use crate::upstream::connect::Connector;

/// After SIGTERM a node has so long to exit.
const EXIT_GRACE: Duration = Duration::from_secs(10);

/// A node that worked and then fails its checks for so long is killed and replaced.
const ILL_GRACE: Duration = Duration::from_secs(30);

struct Process {
    child: Child,
    node: Arc<Node>,
    started: Instant,
    was_ready: bool,
    /// Since when it fails its health checks.
    ill_since: Option<Instant>,
    stopping: Option<Instant>,
}

/// Keeps the number of processes at what the policy says, until the pool is retired; then, once they hold nothing any
/// more, stops them all.
pub async fn scale(pool: Arc<ModelPool>, connector: Connector, metrics: Arc<Metrics>) {
    let Some(config) = pool.config().process.clone() else { return };
    let end = pool.retired();
    let mut scaler = ProcessScaler {
        pool,
        connector,
        metrics,
        config,
        processes: Vec::new(),
        memory: Memory::default(),
        losses: 0,
        pause_until: Instant::now(),
        epoch: Instant::now(),
    };
    let mut ticks = tokio::time::interval(ms(scaler.config.tick_ms.max(10)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = end.cancelled() => break,
            _ = ticks.tick() => scaler.tick().await,
        }
    }
    // Nobody new comes, but what was begun is finished.
    while scaler.pool.load().active > 0 {
        ticks.tick().await;
    }
    scaler.stop_all().await;
}

struct ProcessScaler {
    pool: Arc<ModelPool>,
    connector: Connector,
    metrics: Arc<Metrics>,
    config: ProcessConfig,
    processes: Vec<Process>,
    memory: Memory,
    /// Nodes lost in a row before one became ready.
    losses: u32,
    pause_until: Instant,
    epoch: Instant,
}

impl ProcessScaler {
    async fn tick(&mut self) {
        self.bury_the_dead();
        self.look_after_starting().await;
        self.finish_draining();
        let load = self.pool.load();
        let running = self.processes.iter().filter(|p| p.node.state() != NodeState::Draining).count();
        let bounds = Bounds {
            min: self.config.min,
            max: self.config.max,
            slots: self.config.slots,
            down_ms: self.config.scale_down_ms,
        };
        let seen = Observation {
            now_ms: self.epoch.elapsed().as_millis() as u64,
            open: load.active + load.queued,
            nodes: running,
        };
        let decision = decide(bounds, seen, &mut self.memory);
        if decision.nodes != running {
            tracing::info!(
                model = &*self.pool.model,
                from = running,
                to = decision.nodes,
                reason = decision.reason,
                "scaling"
            );
        }
        for _ in running..decision.nodes {
            // A node that still drains comes back before a new one is started.
            if !self.revive() && Instant::now() >= self.pause_until {
                self.start();
            }
        }
        for _ in decision.nodes..running {
            self.drain_emptiest();
        }
    }

    fn event(&self, event: &str) {
        self.metrics.scale_events.with_label_values(&[&*self.pool.model, event]).inc();
    }

    fn start(&mut self) {
        let started = free_port().and_then(|port| {
            let mut command = Command::new(self.config.command.first().map_or("", String::as_str));
            command
                .args(
                    self.config.command.iter().skip(1).map(|part| part.replace("{port}", &port.to_string())),
                )
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
                    ..NodeSpec::new(url(port), Some(self.config.slots))
                }) {
                    Ok(node) => {
                        tracing::info!(model = &*self.pool.model, node = node.name, "node started");
                        self.event("started");
                        let started = Instant::now();
                        self.processes.push(Process {
                            child,
                            node,
                            started,
                            was_ready: false,
                            ill_since: None,
                            stopping: None,
                        });
                    }
                    Err(problem) => tracing::error!(problem, "node left out"),
                }
            }
            Err(error) => {
                tracing::error!(model = &*self.pool.model, command = ?self.config.command, %error, "cannot start a node");
                self.lost();
            }
        }
    }

    /// Waits longer after each loss: 0.5 s, 1 s, … up to 30 s.
    fn lost(&mut self) {
        self.event("lost");
        let pause = Duration::from_millis(500) * 2u32.saturating_pow(self.losses.min(6));
        self.losses += 1;
        self.pause_until = Instant::now() + pause.min(Duration::from_secs(30));
    }

    fn bury_the_dead(&mut self) {
        let mut index = 0;
        while index < self.processes.len() {
            let process = &mut self.processes[index];
            match process.child.try_wait() {
                Ok(None) => index += 1,
                status => {
                    let process = self.processes.remove(index);
                    self.pool.remove_node(process.node.id);
                    if process.stopping.is_some() {
                        self.event("stopped");
                    } else {
                        tracing::error!(
                            model = &*self.pool.model,
                            node = process.node.name,
                            ?status,
                            "node died"
                        );
                        if process.was_ready {
                            self.losses = 0;
                        }
                        self.lost();
                    }
                }
            }
        }
    }

    async fn look_after_starting(&mut self) {
        let path = self.pool.config().health.path.clone();
        for process in &mut self.processes {
            if process.was_ready || process.stopping.is_some() {
                let ill = process.was_ready && process.node.state() == NodeState::Unhealthy;
                let since = ill.then(|| process.ill_since.unwrap_or_else(Instant::now));
                process.ill_since = since;
                if since.is_some_and(|since| since.elapsed() > ILL_GRACE) {
                    tracing::error!(
                        model = &*self.pool.model,
                        node = process.node.name,
                        "node hangs; it is replaced"
                    );
                    let _already_dead = process.child.start_kill();
                }
                continue;
            }
            if check(&self.connector, &process.node, &path, Duration::from_millis(500)).await {
                process.was_ready = true;
                self.losses = 0;
                let seconds = process.started.elapsed().as_secs_f64();
                tracing::info!(model = &*self.pool.model, node = process.node.name, seconds, "node is ready");
                self.pool.set_state(&process.node, NodeState::Ready);
            } else if process.started.elapsed() > ms(self.config.start_ms) {
                tracing::error!(
                    model = &*self.pool.model,
                    node = process.node.name,
                    "node never became ready"
                );
                let _already_dead = process.child.start_kill();
            }
        }
    }

    fn revive(&mut self) -> bool {
        let drained = self
            .processes
            .iter()
            .find(|p| p.was_ready && p.stopping.is_none() && p.node.state() == NodeState::Draining);
        if let Some(process) = drained {
            self.event("revived");
            self.pool.set_state(&process.node, NodeState::Ready);
        }
        drained.is_some()
    }

    fn drain_emptiest(&mut self) {
        let emptiest = self
            .processes
            .iter()
            .filter(|process| process.node.state() != NodeState::Draining)
            .min_by_key(|process| (process.was_ready, process.node.tokens()));
        if let Some(process) = emptiest {
            self.pool.set_state(&process.node, NodeState::Draining);
        }
    }

    /// Nodes that drained to the last request get SIGTERM, and SIGKILL when that does not help.
    fn finish_draining(&mut self) {
        for process in &mut self.processes {
            if process.node.state() == NodeState::Draining && process.node.requests() == 0 {
                match process.stopping {
                    None => {
                        process.stopping = Some(Instant::now());
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

    async fn stop_all(&mut self) {
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

/// Asks a process to end: closes its standard input, which `potstill serve --exit-with-parent` watches, and sends SIGTERM
/// through the `kill` program, which spares us a foreign function call.
fn terminate(child: &mut Child) {
    drop(child.stdin.take());
    if let Some(id) = child.id() {
        let sent = std::process::Command::new("kill").arg(id.to_string()).stdin(Stdio::null()).status();
        if !sent.is_ok_and(|status| status.success()) {
            let _already_dead = child.start_kill();
        }
    }
}

/// A port that is free now.
fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
