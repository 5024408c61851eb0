//! The configuration: one typed tree with all defaults. Unknown keys are rejected. Keys that hold a time or a size
//! carry the unit in their name.

mod file;
pub mod keys;
pub mod limits;
pub mod pools;
pub mod renamed_keys;
pub mod scale;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::file::ConfigError;
use self::file::read_toml;
pub use self::keys::{JwtConfig, KeyConfig, KeyLimits, Priority};
pub use self::limits::Limits;
pub use self::pools::{
    Deadlines, HealthConfig, HedgeConfig, LoadBalancing, NodeConfig, OutlierConfig, PoolConfig, Price,
    QueueConfig, Reasoning, RetryConfig,
};
pub use self::scale::{
    Actuator, AutoscaleConfig, KubernetesConfig, ProcessConfig, ScaleConfig, WebhookConfig, WorkloadKind,
};

/// The configuration file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Address that clients connect to; default `127.0.0.1:8080`.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Certificate and key of the listener. Without this table the listener speaks plain HTTP.
    pub tls: Option<TlsConfig>,
    /// The admin API. Without this table there is none.
    pub admin: Option<AdminConfig>,
    /// Bounds on connections and requests of clients.
    #[serde(default)]
    pub limits: Limits,
    /// Client keys. If there are none here, no `keys_file` and no `jwt`, every request is accepted without a key.
    #[serde(default)]
    pub keys: Vec<KeyConfig>,
    /// TOML file with further `[[keys]]`. `potstill-gateway key new` and the admin API write this file.
    pub keys_file: Option<PathBuf>,
    /// Verification of bearer tokens from an external issuer.
    pub jwt: Option<JwtConfig>,
    /// Settings that apply to all scaled pools.
    #[serde(default)]
    pub autoscale: AutoscaleConfig,
    /// The pools, one per model.
    #[serde(default)]
    pub pools: Vec<PoolConfig>,
    /// Seconds for which running requests may continue after SIGTERM; default 30.
    #[serde(default = "default_drain")]
    pub drain_seconds: u64,
    /// Whether to write one JSON line per request to standard output, without prompts and completions; default `false`.
    #[serde(default)]
    pub access_log: bool,
    /// Base URL of an OpenTelemetry collector that receives traces by OTLP over HTTP. Without this key no traces are
    /// sent.
    pub otlp_endpoint: Option<String>,
}

/// TLS of the listener. The files are read again on reload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM file with the certificate chain.
    pub certificate: PathBuf,
    /// PEM file with the private key.
    pub key: PathBuf,
    /// PEM file with the certificate authorities that sign client certificates. With this key the listener requests a
    /// certificate from every client.
    pub client_ca: Option<PathBuf>,
}

/// Listener and key of the admin API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminConfig {
    /// Address of the admin API; default `127.0.0.1:8081`.
    #[serde(default = "default_admin")]
    pub listen: SocketAddr,
    /// BLAKE3 hash of the admin key, as `potstill-gateway key new` prints it. Either `hash` or `env` is required.
    pub hash: Option<String>,
    /// Environment variable that holds the admin key. Either `hash` or `env` is required.
    pub env: Option<String>,
    /// Whether nodes that are added through the API may have loopback and private addresses; default `false`. Required
    /// inside a cluster.
    #[serde(default)]
    pub allow_private: bool,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8080))
}

fn default_admin() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8081))
}

fn default_drain() -> u64 {
    30
}

impl Config {
    /// Returns a configuration with defaults and without pools that listens on `listen`.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            tls: None,
            admin: None,
            limits: Limits::default(),
            keys: Vec::new(),
            keys_file: None,
            jwt: None,
            autoscale: AutoscaleConfig::default(),
            pools: Vec::new(),
            drain_seconds: default_drain(),
            access_log: false,
            otlp_endpoint: None,
        }
    }

    /// Reads and checks a configuration file and its keys file. Relative paths are relative to the folder of the file.
    /// The error lists all problems.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = read_toml(path)?;
        config.resolve(path.parent().unwrap_or(Path::new("")));
        let mut problems = config.problems();
        if let Some(file) = &config.keys_file {
            match keys::read_keys_file(file) {
                Ok(keys) => problems.extend(keys::problems(&keys, "keys_file")),
                Err(error) => problems.push(error.to_string()),
            }
        }
        if problems.is_empty() { Ok(config) } else { Err(ConfigError { path: path.to_owned(), problems }) }
    }

    fn resolve(&mut self, folder: &Path) {
        let anchor = |path: &mut PathBuf| *path = folder.join(&*path);
        self.keys_file.as_mut().map(anchor);
        self.autoscale.load_trace_file.as_mut().map(anchor);
        if let Some(tls) = &mut self.tls {
            anchor(&mut tls.certificate);
            anchor(&mut tls.key);
            tls.client_ca.as_mut().map(anchor);
        }
        if let Some(jwt) = &mut self.jwt {
            jwt.public_key.as_mut().map(anchor);
        }
    }

    /// Returns everything that is wrong beyond types, one message per problem.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = keys::problems(&self.keys, "keys");
        let mut models = std::collections::HashSet::new();
        for (index, pool) in self.pools.iter().enumerate() {
            let place = format!("pools[{index}] (`{}`)", pool.model);
            if !models.insert(&pool.model) {
                problems.push(format!("{place}: a second pool for this model; give each model one pool"));
            }
            problems.extend(pool.problems().into_iter().map(|problem| format!("{place}: {problem}")));
        }
        for pool in &self.pools {
            for other in pool.fallback.iter().filter(|other| !models.contains(other)) {
                problems
                    .push(format!("pool `{}`: `fallback` names `{other}`, which has no pool", pool.model));
            }
        }
        problems.extend(self.limits.problems().into_iter().map(|problem| format!("limits: {problem}")));
        if self.autoscale.budget.is_some_and(|budget| !(budget.is_finite() && budget >= 0.0)) {
            problems.push("autoscale: `budget` must be a number that is not negative".to_owned());
        }
        for pool in &self.pools {
            let kubernetes = pool.scale.as_ref().and_then(|scale| scale.kubernetes.as_ref());
            let by_keda = kubernetes.is_some_and(|workload| workload.actuator == Actuator::Keda);
            if by_keda && self.autoscale.keda_listen.is_none() {
                problems.push(format!(
                    "pool `{}`: its `actuator` is `keda`, which needs `autoscale.keda_listen`",
                    pool.model
                ));
            }
        }
        if let Some(admin) = &self.admin {
            problems.extend(keys::secret_problem(&admin.hash, &admin.env).map(|p| format!("admin: {p}")));
        }
        if let Some(jwt) = &self.jwt {
            problems.extend(jwt.key_problems().into_iter().map(|problem| format!("jwt: {problem}")));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let path = std::env::temp_dir().join(format!("{}.toml", potstill_shared::id::unique_id("config")));
        potstill_shared::durable::write_file(&path, text.as_bytes()).unwrap();
        Config::read(&path)
    }

    #[test]
    fn reports_every_problem_with_its_key() {
        let error = read("[[pools]]\nmodel = \"m\"\nnodez = []").unwrap_err().to_string();
        assert!(error.contains("pools[0]") && error.contains("nodez"), "{error}");
        let error = read(
            "[[pools]]\nmodel = \"m\"\nnodes = [{url = \"ftp://x\"}]\nfallback = [\"z\"]\n[[pools]]\nmodel = \"m\"\n[[keys]]\nname = \"a\"",
        )
        .unwrap_err();
        assert_eq!(error.problems.len(), 5, "{error}");
    }

    #[test]
    fn accepts_a_minimal_configuration() {
        let config = read("[[pools]]\nmodel = \"m\"\nnodes = [{url = \"http://127.0.0.1:9000\"}]").unwrap();
        assert_eq!(config.pools[0].nodes[0].max_concurrency, None, "learnt");
    }
}
