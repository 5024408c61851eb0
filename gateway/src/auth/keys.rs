//! Client keys, looked up by their BLAKE3 hash, each with its own limits, models and priority class. The set is rebuilt
//! on reload. A key whose configuration is unchanged keeps its rate-limit counters.

use std::collections::HashMap;
use std::sync::Arc;

use dashmap::DashMap;
use http::{HeaderMap, header};
use rand::RngCore;

use super::jwt::TokenVerifier;
use super::rate_limit::{KeyLimiter, Reservation};
use crate::config::{Config, KeyConfig, Priority};
use crate::error::GatewayError;

/// An authenticated key.
pub struct Key {
    /// Name of the key, for logs and metrics.
    pub name: Arc<str>,
    config: KeyConfig,
    key_limiter: Arc<KeyLimiter>,
    stage_limiters: HashMap<String, Arc<KeyLimiter>>,
}

/// Number of token subjects above which idle ones are removed.
const MAX_SUBJECTS: usize = 10_000;

/// All keys of a configuration.
pub struct Keys {
    by_hash: HashMap<[u8; 32], Arc<Key>>,
    by_certificate: HashMap<[u8; 32], Arc<Key>>,
    jwt: Option<TokenVerifier>,
    subjects: DashMap<String, Arc<Key>>,
    /// Key of every request when authentication is not configured.
    anonymous: Option<Arc<Key>>,
}

/// BLAKE3 hash of the client certificate (DER). Stored as an extension of each request on a connection with such a
/// certificate.
#[derive(Debug, Clone, Copy)]
pub struct ClientCertificate(pub [u8; 32]);

/// Generates a random key. Returns the key and its BLAKE3 hash as hex.
pub fn generate_key() -> (String, String) {
    let mut bytes = [0u8; 32];
    rand::rng().fill_bytes(&mut bytes);
    let key = format!("sk-potstill-{}", blake3::Hash::from_bytes(bytes).to_hex());
    let hash = blake3::hash(key.as_bytes()).to_hex().to_string();
    (key, hash)
}

/// Returns the hash of a configured secret: `hash` itself, or the hash of the value of the environment variable `env`.
/// Returns `None` if the hash is not hex, or if the variable is not set.
pub fn configured_hash(hash: &Option<String>, env: &Option<String>) -> Option<[u8; 32]> {
    let hash = match (hash, env) {
        (Some(hash), _) => blake3::Hash::from_hex(hash).ok(),
        (None, Some(variable)) => std::env::var(variable).ok().map(|key| blake3::hash(key.as_bytes())),
        (None, None) => None,
    };
    hash.map(|hash| *hash.as_bytes())
}

impl Keys {
    /// Builds the keys of `config` and `more` keys from the keys file. Keys whose configuration equals that in `before`
    /// keep their counters. An error describes a JWT key that cannot be read.
    pub fn new(config: &Config, more: &[KeyConfig], before: Option<&Self>) -> Result<Self, String> {
        let mut keys = Self {
            by_hash: HashMap::new(),
            by_certificate: HashMap::new(),
            jwt: config.jwt.as_ref().map(TokenVerifier::new).transpose()?,
            subjects: before.filter(|_| config.jwt.is_some()).map(|b| b.subjects.clone()).unwrap_or_default(),
            anonymous: None,
        };
        for config in config.keys.iter().chain(more) {
            let kept = |map: &HashMap<[u8; 32], Arc<Key>>, hash: &[u8; 32]| {
                map.get(hash).filter(|key| key.config == *config).cloned()
            };
            let fresh = || Arc::new(Key::new(config.clone()));
            if let Some(hash) = configured_hash(&config.certificate, &None) {
                let key = before.and_then(|before| kept(&before.by_certificate, &hash)).unwrap_or_else(fresh);
                keys.by_certificate.insert(hash, key);
            } else if let Some(hash) = configured_hash(&config.hash, &config.env) {
                let key = before.and_then(|before| kept(&before.by_hash, &hash)).unwrap_or_else(fresh);
                keys.by_hash.insert(hash, key);
            } else {
                tracing::error!(key = config.name, "key left out: no usable hash");
            }
        }
        let configured = config.keys_file.is_some() || keys.jwt.is_some();
        if keys.by_hash.is_empty() && keys.by_certificate.is_empty() && !configured {
            let everyone = KeyConfig {
                name: "anonymous".to_owned(),
                priority: Priority::Interactive,
                ..KeyConfig::default()
            };
            keys.anonymous = Some(Arc::new(Key::new(everyone)));
        }
        Ok(keys)
    }

    /// Finds the key of a request: by `authorization`, `x-api-key` or `api-key`, as a key or a signed token, else by
    /// the client certificate. Returns [`GatewayError::Unauthorized`] if there is none.
    ///
    /// Keys are random and looked up by hash, so the time of the lookup reveals nothing about them.
    pub fn authenticate(
        &self,
        headers: &HeaderMap,
        certificate: Option<ClientCertificate>,
    ) -> Result<Arc<Key>, GatewayError> {
        if let Some(key) = &self.anonymous {
            return Ok(Arc::clone(key));
        }
        let other = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(given) = bearer_token(headers).or_else(|| other("x-api-key")).or_else(|| other("api-key"))
        {
            if let Some(key) = self.by_hash.get(blake3::hash(given.as_bytes()).as_bytes()) {
                return Ok(Arc::clone(key));
            }
            if let Some(jwt) = self.jwt.as_ref().filter(|_| given.starts_with("ey")) {
                return self.authenticate_token(jwt, given);
            }
            return Err(GatewayError::Unauthorized);
        }
        certificate
            .and_then(|hash| self.by_certificate.get(&hash.0))
            .cloned()
            .ok_or(GatewayError::Unauthorized)
    }

    fn authenticate_token(&self, jwt: &TokenVerifier, token: &str) -> Result<Arc<Key>, GatewayError> {
        let config = jwt.verify(token).ok_or(GatewayError::Unauthorized)?;
        if let Some(known) = self.subjects.get(&config.name).filter(|known| known.config == config) {
            return Ok(Arc::clone(&known));
        }
        if self.subjects.len() >= MAX_SUBJECTS {
            // Keys without a running request have one reference: the one of this map.
            self.subjects.retain(|_, key| Arc::strong_count(key) > 1);
        }
        let key = Arc::new(Key::new(config));
        self.subjects.insert(key.name.to_string(), Arc::clone(&key));
        Ok(key)
    }

    /// Returns names and configurations of all keys, sorted by name, for the admin API. Secrets and hashes are left
    /// out.
    pub fn configs(&self) -> Vec<KeyConfig> {
        let all = self.by_hash.values().chain(self.by_certificate.values());
        let mut list: Vec<_> = all
            .map(|key| KeyConfig { hash: None, env: None, certificate: None, ..key.config.clone() })
            .collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }
}

impl Key {
    fn new(config: KeyConfig) -> Self {
        let stages = config.stages.iter();
        Self {
            name: config.name.as_str().into(),
            key_limiter: Arc::new(KeyLimiter::new(&config.limits())),
            stage_limiters: stages
                .map(|(stage, limits)| (stage.clone(), Arc::new(KeyLimiter::new(limits))))
                .collect(),
            config,
        }
    }

    /// Returns whether the key may use `model`.
    pub fn allows(&self, model: &str) -> bool {
        self.config.models.is_empty() || self.config.models.iter().any(|allowed| allowed == model)
    }

    /// Returns the class of a request: `wanted`, but never a higher class than that of the key.
    pub fn request_class(&self, wanted: Option<Priority>) -> Priority {
        wanted.map_or(self.config.priority, |wanted| wanted.max(self.config.priority))
    }

    /// Interval of heartbeat comments in streams, in milliseconds, if set for this key.
    pub fn heartbeat_ms(&self) -> Option<u64> {
        self.config.heartbeat_ms
    }

    fn limiters(&self, stage: Option<&str>) -> impl Iterator<Item = &Arc<KeyLimiter>> {
        stage
            .and_then(|stage| self.stage_limiters.get(stage))
            .into_iter()
            .chain(std::iter::once(&self.key_limiter))
    }

    /// Counts a request. Returns [`GatewayError::RateLimited`] above the requests per minute of the key or of its
    /// stage.
    pub fn admit(&self, stage: Option<&str>) -> Result<(), GatewayError> {
        self.limiters(stage).try_for_each(|limiter| limiter.take_request())
    }

    /// Reserves `tokens` and one concurrent request, of the key and of its stage. Returns [`GatewayError::RateLimited`]
    /// if either is used up.
    pub fn reserve(&self, stage: Option<&str>, tokens: u64) -> Result<Reservation, GatewayError> {
        let mut reservation = Reservation::new(tokens);
        for limiter in self.limiters(stage) {
            reservation.reserve_at(limiter)?;
        }
        Ok(reservation)
    }

    /// Writes `x-ratelimit-*` headers with the limits of the key. The limits of the stage take precedence.
    pub fn write_rate_limit_headers(&self, stage: Option<&str>, headers: &mut HeaderMap) {
        self.key_limiter.write_headers(headers);
        if let Some(limiter) = stage.and_then(|stage| self.stage_limiters.get(stage)) {
            limiter.write_headers(headers);
        }
    }
}

/// Returns the credential of an `authorization: Bearer` header (RFC 6750).
pub fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn config(keys: Vec<KeyConfig>) -> Config {
        let mut config = Config::new(SocketAddr::from(([127, 0, 0, 1], 0)));
        config.keys = keys;
        config
    }

    #[test]
    fn authenticates_by_hash_and_keeps_counters_on_reload() {
        let (key, hash) = generate_key();
        let one = KeyConfig {
            name: "a".into(),
            hash: Some(hash),
            requests_per_minute: Some(2),
            models: vec!["m".into()],
            priority: Priority::Default,
            ..KeyConfig::default()
        };
        let config = config(vec![one]);
        let keys = Keys::new(&config, &[], None).unwrap();
        let mut headers = HeaderMap::new();
        assert!(keys.authenticate(&headers, None).is_err());
        for name in ["authorization", "x-api-key", "api-key"] {
            let value = if name == "authorization" { format!("bearer {key}") } else { key.clone() };
            headers.insert(http::HeaderName::from_static(name), value.parse().unwrap());
            assert!(keys.authenticate(&headers, None).is_ok(), "{name}");
            headers.clear();
        }
        headers.insert(header::AUTHORIZATION, format!("bearer {key}").parse().unwrap());
        let known = keys.authenticate(&headers, None).unwrap();
        assert!(known.allows("m") && !known.allows("n"));
        assert_eq!(known.request_class(Some(Priority::Interactive)), Priority::Default, "clamped");
        assert_eq!(known.request_class(Some(Priority::Bulk)), Priority::Bulk);
        assert!(known.admit(None).is_ok() && known.admit(None).is_ok());
        let reloaded = Keys::new(&config, &[], Some(&keys)).unwrap();
        let again = reloaded.authenticate(&headers, None).unwrap();
        assert!(matches!(again.admit(None), Err(GatewayError::RateLimited { retry_after: 1..=31, .. })));
        let mut shown = HeaderMap::new();
        again.write_rate_limit_headers(None, &mut shown);
        assert_eq!(shown["x-ratelimit-limit-requests"], "2");
        assert_eq!(shown["x-ratelimit-remaining-requests"], "0");
        assert!(!format!("{:?}", keys.configs()).contains(&key));
    }
}
