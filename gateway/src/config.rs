//! The configuration: one typed tree, unknown keys refused, defaults in one place. All times carry their unit in the name.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The whole configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where to listen.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Bounds on clients.
    #[serde(default)]
    pub limits: Limits,
    /// Client keys; without any, everyone is let in.
    #[serde(default)]
    pub keys: Vec<KeyConfig>,
    /// One pool per model.
    #[serde(default)]
    pub pools: Vec<PoolConfig>,
    /// Seconds that streams may still run after SIGTERM.
    #[serde(default = "default_drain")]
    pub drain_seconds: u64,
}

/// Bounds on connections and requests.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections.
    pub connections: usize,
    /// Until the first byte of a connection.
    pub first_byte_ms: u64,
    /// Until a request head is whole, and between requests.
    pub head_ms: u64,
    /// Between two pieces of a request body.
    pub body_idle_ms: u64,
    /// A client that takes nothing of its answer for so long is given up.
    pub write_idle_ms: u64,
    /// Largest request body.
    pub body_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            first_byte_ms: 60_000,
            head_ms: 65_000,
            body_idle_ms: 30_000,
            write_idle_ms: 120_000,
            body_bytes: 32 << 20,
        }
    }
}

/// A client key. The key itself is never stored: either its hash stands here, or it is read from the environment.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// For logs and metrics.
    pub name: String,
    /// BLAKE3 hash of the key, as `potstill-gateway key` prints it.
    pub hash: Option<String>,
    /// Environment variable that holds the key.
    pub env: Option<String>,
    /// Requests per minute; none for no limit.
    pub requests_per_minute: Option<u32>,
    /// Models that it may use; empty for all.
    #[serde(default)]
    pub models: Vec<String>,
}

/// The nodes of one model.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// Name that clients use.
    pub model: String,
    /// Nodes that run elsewhere.
    #[serde(default)]
    pub nodes: Vec<NodeConfig>,
    /// Nodes that the gateway starts and stops itself.
    pub process: Option<ProcessConfig>,
    /// Bounds on waiting.
    #[serde(default)]
    pub queue: QueueConfig,
    /// Deadlines towards nodes.
    #[serde(default)]
    pub deadlines: Deadlines,
    /// How nodes are watched.
    #[serde(default)]
    pub health: HealthConfig,
}

/// One node.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Base URL without `/v1`, `http://host:port`.
    pub url: String,
    /// Requests that it works on at once.
    #[serde(default = "default_slots")]
    pub slots: usize,
    /// Environment variable with the node's own key.
    pub api_key_env: Option<String>,
}

/// Local node processes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessConfig {
    /// Program and arguments; `{port}` stands for the port it must listen on (127.0.0.1).
    pub command: Vec<String>,
    /// Folder for one log file per node; none discards what nodes print.
    pub log_folder: Option<PathBuf>,
    /// Fewest nodes.
    #[serde(default)]
    pub min: usize,
    /// Most nodes.
    #[serde(default = "default_max")]
    pub max: usize,
    /// Requests that a node works on at once.
    #[serde(default = "default_slots")]
    pub slots: usize,
    /// How long the demand must stay low before a node is taken away.
    #[serde(default = "default_down_ms")]
    pub scale_down_ms: u64,
    /// How often the demand is looked at.
    #[serde(default = "default_tick_ms")]
    pub tick_ms: u64,
    /// A node that is not ready after this is stopped.
    #[serde(default = "default_start_ms")]
    pub start_ms: u64,
}

/// Bounds on the requests that wait for a slot.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QueueConfig {
    /// Most requests.
    pub requests: usize,
    /// Most bytes of request bodies.
    pub bytes: usize,
    /// Longest wait.
    pub wait_ms: u64,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self { requests: 4096, bytes: 256 << 20, wait_ms: 600_000 }
    }
}

/// The four clocks of a request to a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// Until the connection stands.
    pub connect_ms: u64,
    /// Until the response head.
    pub first_byte_ms: u64,
    /// Between two pieces of the response.
    pub idle_ms: u64,
    /// For the whole response.
    pub total_ms: u64,
}

impl Default for Deadlines {
    /// Fit for half an hour of thinking.
    fn default() -> Self {
        Self { connect_ms: 2_000, first_byte_ms: 1_800_000, idle_ms: 120_000, total_ms: 3_600_000 }
    }
}

/// Active health checks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// Path that answers 200 when the node can work.
    pub path: String,
    /// Time between checks.
    pub interval_ms: u64,
    /// Time for one check.
    pub timeout_ms: u64,
    /// Failures in a row that take a node out.
    pub failures: u32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self { path: "/health".to_owned(), interval_ms: 2_000, timeout_ms: 2_000, failures: 2 }
    }
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8080))
}

fn default_drain() -> u64 {
    30
}

fn default_slots() -> usize {
    8
}

fn default_max() -> usize {
    1
}

fn default_down_ms() -> u64 {
    30_000
}

fn default_tick_ms() -> u64 {
    500
}

fn default_start_ms() -> u64 {
    300_000
}

/// Milliseconds as a duration.
pub fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

/// Why a configuration was refused: every problem found, one a line.
#[derive(Debug, thiserror::Error)]
#[error("`{path}`:\n  {}", problems.join("\n  "))]
pub struct ConfigError {
    /// The file.
    pub path: PathBuf,
    /// The problems.
    pub problems: Vec<String>,
}

impl Config {
    /// An empty configuration that listens on `listen`.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            limits: Limits::default(),
            keys: Vec::new(),
            pools: Vec::new(),
            drain_seconds: default_drain(),
        }
    }

    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let refused = |problem: String| ConfigError { path: path.to_owned(), problems: vec![problem] };
        let text = std::fs::read_to_string(path).map_err(|error| refused(error.to_string()))?;
        let document = toml::Deserializer::parse(&text).map_err(|error| refused(error.to_string()))?;
        let config: Self = serde_path_to_error::deserialize(document)
            .map_err(|error| refused(format!("key `{}`: {}", error.path(), error.inner().message())))?;
        let problems = config.problems();
        if problems.is_empty() { Ok(config) } else { Err(ConfigError { path: path.to_owned(), problems }) }
    }

    /// What is wrong beyond types.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut models = std::collections::HashSet::new();
        for (index, pool) in self.pools.iter().enumerate() {
            let place = format!("pools[{index}] (`{}`)", pool.model);
            if !models.insert(&pool.model) {
                problems.push(format!("{place}: a second pool for this model; give each model one pool"));
            }
            problems.extend(pool.problems().into_iter().map(|problem| format!("{place}: {problem}")));
        }
        for (index, key) in self.keys.iter().enumerate() {
            let place = format!("keys[{index}] (`{}`)", key.name);
            match (&key.hash, &key.env) {
                (Some(hash), None) if hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {}
                (Some(_), None) => {
                    problems.push(format!(
                        "{place}: `hash` must be the 64 digits that `potstill-gateway key` prints"
                    ));
                }
                (None, Some(variable)) if std::env::var(variable).is_ok_and(|key| !key.is_empty()) => {}
                (None, Some(variable)) => {
                    problems.push(format!("{place}: environment variable `{variable}` is not set"))
                }
                _ => problems.push(format!("{place}: give either `hash` or `env`")),
            }
            if key.requests_per_minute == Some(0) {
                problems.push(format!("{place}: `requests_per_minute` must be at least 1"));
            }
        }
        problems
    }
}

impl PoolConfig {
    /// A pool without nodes.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            nodes: Vec::new(),
            process: None,
            queue: QueueConfig::default(),
            deadlines: Deadlines::default(),
            health: HealthConfig::default(),
        }
    }

    /// What is wrong beyond types.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.model.is_empty() || self.model.len() > 200 || self.model.contains(char::is_control) {
            problems.push("`model` must have 1 to 200 printable characters".to_owned());
        }
        if self.nodes.is_empty() && self.process.is_none() {
            problems.push("no nodes; give `nodes` or `process`".to_owned());
        }
        for node in &self.nodes {
            if let Err(problem) = crate::pool::node::parse_url(&node.url) {
                problems.push(format!("node `{}`: {problem}", node.url));
            }
            if node.slots == 0 {
                problems.push(format!("node `{}`: `slots` must be at least 1", node.url));
            }
            if let Some(variable) =
                node.api_key_env.as_ref().filter(|variable| std::env::var(variable).is_err())
            {
                problems.push(format!("node `{}`: environment variable `{variable}` is not set", node.url));
            }
        }
        if let Some(process) = &self.process {
            if process.command.is_empty() || !process.command.iter().any(|part| part.contains("{port}")) {
                problems.push("`process.command` must name a program and contain `{port}`".to_owned());
            }
            if process.min > process.max || process.max == 0 || process.slots == 0 {
                problems.push(format!(
                    "`process` needs min <= max, max >= 1 and slots >= 1, not min {}, max {}, slots {}",
                    process.min, process.max, process.slots
                ));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let path = std::env::temp_dir().join(format!("{}.toml", potstill_shared::id::unique("config")));
        potstill_shared::durable::write_file(&path, text.as_bytes()).unwrap();
        Config::read(&path)
    }

    #[test]
    fn errors_name_the_key_and_what_was_expected() {
        let error = read("[[pools]]\nmodel = \"m\"\nnodez = []").unwrap_err().to_string();
        assert!(error.contains("pools[0]") && error.contains("nodez"), "{error}");
        let error = read(
            "[[pools]]\nmodel = \"m\"\nnodes = [{url = \"ftp://x\"}]\n[[pools]]\nmodel = \"m\"\n[[keys]]\nname = \"a\"",
        )
        .unwrap_err();
        assert_eq!(error.problems.len(), 4, "{error}");
    }

    #[test]
    fn a_small_configuration_is_enough() {
        let config = read("[[pools]]\nmodel = \"m\"\nnodes = [{url = \"http://127.0.0.1:9000\"}]").unwrap();
        assert_eq!(config.pools[0].nodes[0].slots, 8);
    }
}
