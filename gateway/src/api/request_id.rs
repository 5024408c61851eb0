//! The request id: accepted from the client or generated, sent to the node, returned in the response, and written to
//! the logs.

use std::fmt;

use http::HeaderValue;
use potstill_shared::id::unique_id;

/// Longest client id that is accepted, in bytes.
const MAX_ID_BYTES: usize = 128;

/// A request id. A clone shares the text.
#[derive(Clone)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// Returns a new id, `req-` and a unique suffix.
    pub fn generate() -> Self {
        // Cannot fail: `unique_id` returns letters, digits and hyphens only.
        Self(HeaderValue::try_from(unique_id("req")).unwrap_or_else(|_| HeaderValue::from_static("req")))
    }

    /// Returns the client's id, or `None` if the id is empty, longer than 128 bytes, or not visible ASCII. The text is
    /// copied, because the header shares the buffer that the request was read into and would keep all of it alive.
    pub fn from_header(header: &HeaderValue) -> Option<Self> {
        let text = header.to_str().ok().filter(|id| !id.is_empty() && id.len() <= MAX_ID_BYTES)?;
        HeaderValue::from_str(text).ok().map(Self)
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    /// The id as a header value.
    pub fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_only_short_ascii_ids() {
        let of = |bytes: &[u8]| {
            RequestId::from_header(&HeaderValue::from_bytes(bytes).unwrap()).map(|id| id.to_string())
        };
        assert_eq!(of(b"mine-1").as_deref(), Some("mine-1"));
        for unusable in [&b""[..], b"\xff", &[b'a'; 129]] {
            assert_eq!(of(unusable), None);
        }
        assert!(RequestId::generate().as_str().starts_with("req-"));
    }
}
