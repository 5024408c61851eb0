//! Client keys: who they are, what they may use, how much.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::file::{ConfigError, read_toml};

/// Priority class of a request; the first is served first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Someone waits for the answer.
    Interactive,
    /// Neither.
    #[default]
    Default,
    /// A distillation stage: fills what the others leave.
    Bulk,
}

impl Priority {
    /// All classes, first to last.
    pub const ALL: [Self; 3] = [Self::Interactive, Self::Default, Self::Bulk];

    /// As configured and sent.
    pub fn name(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Default => "default",
            Self::Bulk => "bulk",
        }
    }

    /// From its name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.name() == name)
    }
}

/// How much a key, or one stage of it, may use.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyLimits {
    /// Requests per minute; none for no limit.
    pub requests_per_minute: Option<u32>,
    /// Tokens per minute, prompt and completion; none for no limit.
    pub tokens_per_minute: Option<u64>,
    /// Requests at once; none for no limit.
    pub concurrency: Option<usize>,
}

/// A client key. The key itself is never stored: its hash stands here, or it is read from the environment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyConfig {
    /// For logs and metrics.
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
    /// Models that it may use; empty for all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// The highest class that its requests may ask for, and the class of those that ask for none.
    pub priority: Priority,
    /// Requests per minute of the key as a whole; none for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Tokens per minute of the key as a whole, prompt and completion; none for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u64>,
    /// Requests at once of the key as a whole; none for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<usize>,
    /// Bounds on single stages (the `x-potstill-stage` header), besides those of the key.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub stages: BTreeMap<String, KeyLimits>,
    /// Comments in its streams after so much silence; none for no comments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_ms: Option<u64>,
}

impl KeyConfig {
    /// Bounds on the key as a whole.
    pub fn limits(&self) -> KeyLimits {
        KeyLimits {
            requests_per_minute: self.requests_per_minute,
            tokens_per_minute: self.tokens_per_minute,
            concurrency: self.concurrency,
        }
    }
}

/// Bearer tokens in the form of JSON Web Tokens. `sub` names the key; the claims `models` and `priority` narrow it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtConfig {
    /// Environment variable with the shared secret (HS256).
    pub secret_env: Option<String>,
    /// PEM file with the public key (RS256, ES256 or EdDSA).
    pub public_key: Option<PathBuf>,
    /// `iss` that a token must have.
    pub issuer: Option<String>,
    /// `aud` that a token must have.
    pub audience: Option<String>,
    /// Bounds on every subject.
    #[serde(default)]
    pub limits: KeyLimits,
    /// The highest class of any subject.
    #[serde(default)]
    pub priority: Priority,
}

impl JwtConfig {
    pub(super) fn problems(&self) -> Vec<String> {
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

/// Keys in a file of their own.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysFile {
    #[serde(default)]
    keys: Vec<KeyConfig>,
}

/// Reads a keys file; one that does not exist holds no keys.
pub fn read_file(path: &Path) -> Result<Vec<KeyConfig>, ConfigError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    read_toml::<KeysFile>(path).map(|file| file.keys)
}

/// Writes a keys file, whole or not at all.
pub fn write_file(path: &Path, keys: &[KeyConfig]) -> std::io::Result<()> {
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

/// What is wrong with keys; `place` is the list that holds them.
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
