//! A target with its idle connections.

use potstill_shared::redact::Secret;

use super::address::AddressPolicy;
use super::idle_connections::IdleConnections;
use super::target::Target;

/// An upstream server: where it is, and the connections to it that can be used again.
pub struct Endpoint {
    /// Address and headers.
    pub target: Target,
    /// Connections without a request.
    pub idle: IdleConnections,
}

impl Endpoint {
    /// Creates an endpoint without connections. An error says what is wrong with the URL or the key.
    pub fn new(url: &str, key: Option<&Secret<String>>, policy: AddressPolicy) -> Result<Self, String> {
        Ok(Self { target: Target::new(url, key, policy)?, idle: IdleConnections::default() })
    }

    /// `host:port` as written in the URL, for logs and metrics.
    pub fn name(&self) -> &str {
        self.target.url.authority.as_str()
    }
}
