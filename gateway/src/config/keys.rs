//! Configuration of client keys and of signed tokens: credentials, permitted models, priority class and limits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::file::{ConfigError, read_toml};

/// Priority class of a request. Waiting requests of the first class are served first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// A person waits for the response.
    Interactive,
    /// The class between interactive and bulk.
    #[default]
    Default,
    /// Batch work, such as a distillation stage. Uses the capacity that the other classes leave.
    Bulk,
}

impl Priority {
    /// All classes, from the first to the last served.
    pub const ALL: [Self; 3] = [Self::Interactive, Self::Default, Self::Bulk];

    /// Returns the name in the configuration and in the header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Default => "default",
            Self::Bulk => "bulk",
        }
    }

    /// Returns the class with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.name() == name)
    }
}

/// Limits of a key, or of one of its stages. At least 1 each.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyLimits {
    /// Largest number of requests per minute. Without this key there is no limit.
    pub requests_per_minute: Option<u32>,
    /// Largest number of tokens per minute, prompt and completion together. Without this key there is no limit.
    pub tokens_per_minute: Option<u64>,
    /// Largest number of concurrent requests. Without this key there is no limit.
    pub concurrency: Option<usize>,
}

/// A client key. The configuration holds the hash of the key or names an environment variable, never the key itself.
/// Exactly one of `hash`, `env` and `certificate` is required.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyConfig {
    /// Name of the key in logs and metrics: 1 to 96 printable characters, unique.
    pub name: String,
    /// BLAKE3 hash of the key, as `potstill-gateway key new` prints it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// Environment variable that holds the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<String>,
    /// BLAKE3 hash of a client certificate (DER), as `potstill-gateway key certificate` prints it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// Models that the key may use. An empty list permits all models.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Highest priority class that requests of the key may request, and the class of requests that request none;
    /// default `default`.
    pub priority: Priority,
    /// Largest number of requests per minute of the whole key. Without this key there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Largest number of tokens per minute of the whole key, prompt and completion together. Without this key there is
    /// no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u64>,
    /// Largest number of concurrent requests of the whole key. Without this key there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<usize>,
    /// Limits of single stages, by the value of the header `x-potstill-stage`. The limits of the whole key apply as
    /// well.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub stages: BTreeMap<String, KeyLimits>,
    /// Milliseconds without an event after which a stream of this key gets an SSE comment. Applies to pools without
    /// their own `heartbeat_ms`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_ms: Option<u64>,
}

impl KeyConfig {
    /// Returns the limits of the whole key.
    pub fn limits(&self) -> KeyLimits {
        KeyLimits {
            requests_per_minute: self.requests_per_minute,
            tokens_per_minute: self.tokens_per_minute,
            concurrency: self.concurrency,
        }
    }
}

/// JSON Web Tokens as bearer tokens (RFC 7519). The claim `sub` names the key; the claims `models` and `priority`
/// restrict its rights. Exactly one of `secret_env` and `public_key` is required.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtConfig {
    /// Environment variable with the shared secret for HS256, at least 32 bytes.
    pub secret_env: Option<String>,
    /// PEM file with the public key for RS256, ES256 or EdDSA.
    pub public_key: Option<PathBuf>,
    /// Required value of the claim `iss`. Without this key the issuer is not checked.
    pub issuer: Option<String>,
    /// Required value of the claim `aud`. Without this key the audience is not checked.
    pub audience: Option<String>,
    /// Limits of each subject.
    #[serde(default)]
    pub limits: KeyLimits,
    /// Highest priority class of any subject; default `default`.
    #[serde(default)]
    pub priority: Priority,
}

impl JwtConfig {
    pub(super) fn key_problems(&self) -> Vec<String> {
        match (&self.secret_env, &self.public_key) {
            (Some(variable), None) if std::env::var(variable).is_ok_and(|secret| secret.len() >= 32) => {
                vec![]
            }
            (Some(variable), None) => {
                vec![format!("environment variable `{variable}` must hold a secret of at least 32 bytes")]
            }
            (None, Some(file)) if file.is_file() => vec![],
            (None, Some(file)) => vec![format!("`public_key`: no file `{}`", file.display())],
            _ => vec!["give either `secret_env` or `public_key`".to_owned()],
        }
    }
}

/// A file of keys, `keys_file`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysFile {
    #[serde(default)]
    keys: Vec<KeyConfig>,
}

/// Reads a keys file. A file that does not exist holds no keys.
pub fn read_keys_file(path: &Path) -> Result<Vec<KeyConfig>, ConfigError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    read_toml::<KeysFile>(path).map(|file| file.keys)
}

/// Writes a keys file atomically.
pub fn write_keys_file(path: &Path, keys: &[KeyConfig]) -> std::io::Result<()> {
    let text = toml::to_string_pretty(&KeysFile { keys: keys.to_vec() }).map_err(std::io::Error::other)?;
    potstill_shared::durable::write_file(path, text.as_bytes()).map_err(std::io::Error::other)
}

pub(super) fn secret_problem(hash: &Option<String>, env: &Option<String>) -> Option<String> {
    match (hash, env) {
        (Some(hash), None) if is_hash(hash) => None,
        (Some(_), None) => {
            Some("`hash` must be the 64 digits that `potstill-gateway key new` prints".to_owned())
        }
        (None, Some(variable)) if std::env::var(variable).is_ok_and(|key| !key.is_empty()) => None,
        (None, Some(variable)) => Some(format!("environment variable `{variable}` is not set")),
        _ => Some(
            "give one of two: `env`, an environment variable that holds the key, or `hash`, which `potstill-gateway key new` prints"
                .to_owned(),
        ),
    }
}

fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Returns what is wrong with `keys`, one message per problem. `place` names the list in the messages.
pub fn problems(keys: &[KeyConfig], place: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut names = std::collections::HashSet::new();
    for (index, key) in keys.iter().enumerate() {
        let mut found = Vec::new();
        if key.name.is_empty() || key.name.len() > 96 || key.name.contains(char::is_control) {
            found.push("`name` must have 1 to 96 printable characters".to_owned());
        }
        if !names.insert(&key.name) {
            found.push("a second key of this name; name each key differently".to_owned());
        }
        if !matches!(&key.certificate, Some(hash) if is_hash(hash) && key.hash.is_none() && key.env.is_none())
        {
            if key.certificate.is_some() {
                found.push("`certificate` must be 64 hexadecimal digits, without `hash` or `env`".to_owned());
            } else {
                found.extend(secret_problem(&key.hash, &key.env));
            }
        }
        for limits in std::iter::once(&key.limits()).chain(key.stages.values()) {
            if limits.requests_per_minute == Some(0)
                || limits.tokens_per_minute == Some(0)
                || limits.concurrency == Some(0)
            {
                found.push("limits must be at least 1; leave one out for no limit".to_owned());
            }
        }
        problems
            .extend(found.into_iter().map(|problem| format!("{place}[{index}] (`{}`): {problem}", key.name)));
    }
    problems
}
