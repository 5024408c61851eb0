//! The id of a request: made here or taken over from the client, sent to the node, given back, written to the logs. One text,
//! shared by all who name it.

use std::fmt;

use http::HeaderValue;
use potstill_shared::id::unique_id;

/// Longest id that is taken over.
const LONGEST: usize = 128;

/// An id; a clone shares its text.
#[derive(Clone)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// A new one.
    pub fn generate() -> Self {
        // Letters, digits and a hyphen: always a header's value.
        Self(HeaderValue::try_from(unique_id("req")).unwrap_or_else(|_| HeaderValue::from_static("req")))
    }

    /// The client's own, if it can be used. Copied, so that it does not keep the buffer that the request was read into.
    pub fn from_header(header: &HeaderValue) -> Option<Self> {
        let text = header.to_str().ok().filter(|id| !id.is_empty() && id.len() <= LONGEST)?;
        HeaderValue::from_str(text).ok().map(Self)
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    /// As a header.
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
    fn only_plain_short_ids_are_taken_over() {
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
