//! Client keys: known by their hash, each with its own rate and its own models.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use dashmap::DashMap;
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::{HeaderMap, header};
use rand::RngCore;

use crate::config::KeyConfig;
use crate::error::GatewayError;

/// A key that was let in.
pub struct Key {
    /// For logs and metrics.
    pub name: String,
    models: Vec<String>,
    rate: Option<DefaultDirectRateLimiter>,
}

/// All keys.
pub struct Keys {
    by_hash: HashMap<[u8; 32], Arc<Key>>,
    requests: DashMap<String, u64>,
}

/// A fresh random key and its hash, for `potstill-gateway key`.
pub fn generate() -> (String, String) {
    let mut bytes = [0u8; 32];
    rand::rng().fill_bytes(&mut bytes);
    let key = format!("sk-potstill-{}", blake3::Hash::from_bytes(bytes).to_hex());
    let hash = blake3::hash(key.as_bytes()).to_hex().to_string();
    (key, hash)
}

impl Keys {
    /// Reads the configured keys; `Config::problems` has checked them.
    pub fn new(configs: &[KeyConfig]) -> Self {
        let mut by_hash = HashMap::new();
        for config in configs {
            let hash = match (&config.hash, &config.env) {
                (Some(hash), _) => blake3::Hash::from_hex(hash).ok(),
                (None, Some(variable)) => {
                    std::env::var(variable).ok().map(|key| blake3::hash(key.as_bytes()))
                }
                (None, None) => None,
            };
            let Some(hash) = hash else {
                tracing::error!(key = config.name, "key left out: no usable hash");
                continue;
            };
            let rate = config.requests_per_minute.and_then(NonZeroU32::new).map(Quota::per_minute);
            let key = Key {
                name: config.name.clone(),
                models: config.models.clone(),
                rate: rate.map(RateLimiter::direct),
            };
            by_hash.insert(*hash.as_bytes(), Arc::new(key));
        }
        Self { by_hash, requests: DashMap::new() }
    }

    /// Finds the client's key. Without configured keys everyone is `anonymous`. Keys are random and looked up by hash, so
    /// the time of the look-up tells nothing about them.
    pub fn authenticate(&self, headers: &HeaderMap) -> Result<Arc<Key>, GatewayError> {
        if self.by_hash.is_empty() {
            return Ok(Arc::new(Key { name: "anonymous".to_owned(), models: Vec::new(), rate: None }));
        }
        let given = bearer(headers).or_else(|| headers.get("x-api-key")?.to_str().ok());
        given
            .and_then(|key| self.by_hash.get(blake3::hash(key.as_bytes()).as_bytes()))
            .cloned()
            .ok_or(GatewayError::Unauthorized)
    }

    /// Counts a request of `key` and refuses it over the key's rate.
    pub fn admit(&self, key: &Key) -> Result<(), GatewayError> {
        if let Some(rate) = &key.rate
            && let Err(until) = rate.check()
        {
            let wait = until.wait_time_from(DefaultClock::default().now());
            return Err(GatewayError::RateLimited { retry_after: wait.as_secs() + 1 });
        }
        *self.requests.entry(key.name.clone()).or_default() += 1;
        Ok(())
    }

    /// Requests let in so far, by name of the key.
    pub fn requests(&self) -> HashMap<String, u64> {
        self.requests.iter().map(|entry| (entry.key().clone(), *entry.value())).collect()
    }
}

impl Key {
    /// Whether the key may use `model`.
    pub fn allows(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|allowed| allowed == model)
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_open_by_hash_and_keep_their_rate() {
        let (key, hash) = generate();
        let keys = Keys::new(&[KeyConfig {
            name: "a".into(),
            hash: Some(hash),
            env: None,
            requests_per_minute: Some(2),
            models: vec!["m".into()],
        }]);
        let mut headers = HeaderMap::new();
        assert!(keys.authenticate(&headers).is_err());
        headers.insert(header::AUTHORIZATION, format!("bearer {key}").parse().unwrap());
        let known = keys.authenticate(&headers).unwrap();
        assert!(known.allows("m") && !known.allows("n"));
        assert!(keys.admit(&known).is_ok() && keys.admit(&known).is_ok());
        assert!(matches!(keys.admit(&known), Err(GatewayError::RateLimited { retry_after: 1..=31 })));
        assert_eq!(keys.requests()["a"], 2);
    }
}
