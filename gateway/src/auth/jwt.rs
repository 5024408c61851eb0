//! Verifies JSON Web Tokens (RFC 7519) from an external issuer: signature, `exp`, `nbf`, `iss` and `aud`. The claim
//! `sub` names the key; the claims `models` and `priority` restrict its rights.

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};
use serde::Deserialize;

use crate::config::{JwtConfig, KeyConfig, Priority};

/// Verifies tokens with one configured key.
pub struct TokenVerifier {
    key: DecodingKey,
    validation: Validation,
    config: JwtConfig,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    #[serde(default)]
    models: Vec<String>,
    priority: Option<Priority>,
}

impl TokenVerifier {
    /// Reads the secret or public key. The algorithm follows from the key: HS256 for a secret; RS256, ES256 or EdDSA
    /// for a PEM file.
    pub fn new(config: &JwtConfig) -> Result<Self, String> {
        let (key, algorithms) = match (&config.secret_env, &config.public_key) {
            (Some(variable), _) => {
                let secret = std::env::var(variable).map_err(|_| format!("`{variable}` is not set"))?;
                (DecodingKey::from_secret(secret.as_bytes()), vec![Algorithm::HS256])
            }
            (None, Some(file)) => {
                let pem = std::fs::read(file).map_err(|error| format!("`{}`: {error}", file.display()))?;
                DecodingKey::from_rsa_pem(&pem)
                    .map(|key| (key, vec![Algorithm::RS256]))
                    .or_else(|_| DecodingKey::from_ec_pem(&pem).map(|key| (key, vec![Algorithm::ES256])))
                    .or_else(|_| DecodingKey::from_ed_pem(&pem).map(|key| (key, vec![Algorithm::EdDSA])))
                    .map_err(|_| format!("`{}` holds no RSA, EC or Ed25519 public key", file.display()))?
            }
            (None, None) => return Err("`jwt` needs `secret_env` or `public_key`".to_owned()),
        };
        let mut validation = Validation::new(algorithms[0]);
        validation.algorithms = algorithms;
        validation.validate_nbf = true;
        validation.set_required_spec_claims(&["exp", "sub"]);
        if let Some(issuer) = &config.issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".to_owned());
        }
        match &config.audience {
            Some(audience) => {
                validation.set_audience(&[audience]);
                validation.required_spec_claims.insert("aud".to_owned());
            }
            None => validation.validate_aud = false,
        }
        Ok(Self { key, validation, config: config.clone() })
    }

    /// Returns the key configuration for a valid token, with the name `jwt:` and the subject. Returns `None` for an
    /// invalid token, and for a subject that is empty, longer than 96 bytes, or has control characters. A claimed
    /// priority is never higher than the configured one.
    pub fn verify(&self, token: &str) -> Option<KeyConfig> {
        let claims = match decode::<Claims>(token, &self.key, &self.validation) {
            Ok(token) => token.claims,
            Err(error) => {
                tracing::info!(%error, "a token was refused");
                return None;
            }
        };
        if claims.sub.is_empty() || claims.sub.len() > 96 || claims.sub.contains(char::is_control) {
            return None;
        }
        let limits = &self.config.limits;
        Some(KeyConfig {
            name: format!("jwt:{}", claims.sub),
            models: claims.models,
            priority: claims.priority.map_or(self.config.priority, |asked| asked.max(self.config.priority)),
            requests_per_minute: limits.requests_per_minute,
            tokens_per_minute: limits.tokens_per_minute,
            concurrency: limits.concurrency,
            ..KeyConfig::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;

    use super::*;

    #[test]
    fn accepts_only_valid_tokens() {
        let secret = "0123456789abcdef0123456789abcdef";
        let config = JwtConfig {
            secret_env: None,
            public_key: None,
            issuer: Some("me".into()),
            audience: None,
            limits: Default::default(),
            priority: Priority::Default,
        };
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_issuer(&["me"]);
        validation.validate_aud = false;
        let verifier = TokenVerifier { key: DecodingKey::from_secret(secret.as_bytes()), validation, config };
        let now = potstill_shared::openai::unix_time_s();
        let sign = |claims: serde_json::Value, secret: &str| {
            encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes())).unwrap()
        };
        let good =
            json!({"sub": "ann", "iss": "me", "exp": now + 60, "priority": "interactive", "models": ["m"]});
        let key = verifier.verify(&sign(good.clone(), secret)).unwrap();
        assert_eq!(
            (key.name.as_str(), key.priority),
            ("jwt:ann", Priority::Default),
            "no higher than configured"
        );
        assert!(verifier.verify(&sign(good.clone(), "another secret of thirty-two bytes")).is_none());
        for (field, value) in [("exp", json!(now - 3_600)), ("iss", json!("you")), ("sub", json!(""))] {
            let mut bad = good.clone();
            bad[field] = value;
            assert!(verifier.verify(&sign(bad, secret)).is_none(), "{field}");
        }
        let none = format!("{}.{}.", "eyJhbGciOiJub25lIn0", "eyJzdWIiOiJhbm4iLCJleHAiOjk5OTk5OTk5OTl9");
        assert!(verifier.verify(&none).is_none(), "no signature, no entry");
    }
}
