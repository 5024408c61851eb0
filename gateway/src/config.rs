//! The configuration: one typed tree, unknown keys refused, defaults in one place. All times carry their unit in the name.

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

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where to listen.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Certificate and key of the listener; none for plain text.
    pub tls: Option<TlsConfig>,
    /// The admin API; none for no admin API.
    pub admin: Option<AdminConfig>,
    /// Bounds on clients.
    #[serde(default)]
    pub limits: Limits,
    /// Client keys; without any (here, in `keys_file` or by `jwt`), everyone is let in.
    #[serde(default)]
    pub keys: Vec<KeyConfig>,
    /// A file of further `[[keys]]`, which `potstill-gateway key new` and the admin API write.
    pub keys_file: Option<PathBuf>,
    /// Bearer tokens signed by someone else.
    pub jwt: Option<JwtConfig>,
    /// What holds for all pools that are scaled.
    #[serde(default)]
    pub autoscale: AutoscaleConfig,
    /// One pool per model.
    #[serde(default)]
    pub pools: Vec<PoolConfig>,
    /// Seconds that streams may still run after SIGTERM.
    #[serde(default = "default_drain")]
    pub drain_seconds: u64,
    /// One JSON line per request on standard output, without prompts and answers.
    #[serde(default)]
    pub access_log: bool,
    /// Where traces go: the base URL of an OpenTelemetry collector that takes OTLP over HTTP.
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
    /// PEM file with the authorities that sign client certificates; asks every client for one.
    pub client_ca: Option<PathBuf>,
}

/// The admin API's own listener and key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminConfig {
    /// Where to listen.
    #[serde(default = "default_admin")]
    pub listen: SocketAddr,
    /// BLAKE3 hash of the admin key, as `potstill-gateway key new` prints it.
    pub hash: Option<String>,
    /// Environment variable that holds the admin key.
    pub env: Option<String>,
    /// Nodes that are added by the API may have private addresses (a cluster needs this).
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
    /// An empty configuration that listens on `listen`.
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

    /// Reads and checks a file, and the keys file that it names. Relative paths in it start at its own folder.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = read_toml(path)?;
        config.resolve(path.parent().unwrap_or(Path::new("")));
        let mut problems = config.problems();
        if let Some(file) = &config.keys_file {
            match keys::read_file(file) {
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

    /// What is wrong beyond types.
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
            problems.extend(jwt.problems().into_iter().map(|problem| format!("jwt: {problem}")));
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
    fn errors_name_the_key_and_what_was_expected() {
        let error = read("[[pools]]\nmodel = \"m\"\nnodez = []").unwrap_err().to_string();
        assert!(error.contains("pools[0]") && error.contains("nodez"), "{error}");
        let error = read(
            "[[pools]]\nmodel = \"m\"\nnodes = [{url = \"ftp://x\"}]\nfallback = [\"z\"]\n[[pools]]\nmodel = \"m\"\n[[keys]]\nname = \"a\"",
        )
        .unwrap_err();
        assert_eq!(error.problems.len(), 5, "{error}");
    }

    #[test]
    fn a_small_configuration_is_enough() {
        let config = read("[[pools]]\nmodel = \"m\"\nnodes = [{url = \"http://127.0.0.1:9000\"}]").unwrap();
        assert_eq!(config.pools[0].nodes[0].max_concurrency, None, "learnt");
    }
}
