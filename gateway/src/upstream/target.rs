//! Where requests are sent: address, address policy, and the headers that belong to the destination.

use http::HeaderValue;
use potstill_shared::redact::Secret;

use super::address::{AddressPolicy, NodeUrl, parse_url};

/// Destination of requests.
pub struct Target {
    /// Base URL.
    pub url: NodeUrl,
    /// Which addresses the host may resolve to.
    pub policy: AddressPolicy,
    /// `host` header.
    pub host: HeaderValue,
    /// `authorization` header with the target's own key.
    pub authorization: Option<HeaderValue>,
}

impl Target {
    /// Parses `url`. `key` is sent as a bearer token. An error says what is wrong with the URL or the key.
    pub fn new(url: &str, key: Option<&Secret<String>>, policy: AddressPolicy) -> Result<Self, String> {
        let url = parse_url(url)?;
        let header = |text: &str| {
            HeaderValue::from_str(text).map_err(|_| "the node's key or host is not a header value")
        };
        let mut authorization =
            key.map(|key| header(&format!("Bearer {}", key.expose_secret()))).transpose()?;
        if let Some(value) = &mut authorization {
            value.set_sensitive(true);
        }
        Ok(Self { host: header(url.authority.as_str())?, url, policy, authorization })
    }
}
