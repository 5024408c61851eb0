//! A request to an upstream node: which headers of the client it carries, and how its head is written.

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, header};

use super::target::Target;

/// Returns whether a client header is forwarded to nodes. Credentials, hop-by-hop headers (RFC 9110, section 7.6.1) and
/// headers that the gateway sets itself are not.
fn is_forwarded_header(name: &str) -> bool {
    !matches!(
        name,
        "authorization"
            | "api-key"
            | "x-api-key"
            | "cookie"
            | "proxy-authorization"
            | "proxy-authenticate"
            | "proxy-connection"
            | "connection"
            | "keep-alive"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "expect"
            | "host"
            | "content-length"
            | "content-encoding"
            // The gateway parses responses, so they must not be compressed.
            | "accept-encoding"
            | "forwarded"
    ) && !name.starts_with("x-potstill-")
}

/// A request, the same for every node that is tried.
pub struct UpstreamRequest {
    /// `POST`, mostly.
    pub method: Method,
    /// Path and query, below the node's prefix.
    pub path: PathAndQuery,
    /// Headers of the client; [`Self::write_head`] picks those that are forwarded.
    pub client_headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl UpstreamRequest {
    /// Returns whether the client's `connection` header lists `name` (RFC 9110, section 7.6.1).
    fn is_connection_option(&self, name: &str) -> bool {
        let lists =
            self.client_headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
        lists.flat_map(|list| list.split(',')).any(|listed| listed.trim().eq_ignore_ascii_case(name))
    }

    /// Appends the request head for `target` to `output`.
    pub(super) fn write_head(&self, target: &Target, output: &mut Vec<u8>) {
        // The usual values `keep-alive` and `close` name no header.
        let usual = |value: &HeaderValue| {
            value.as_bytes().eq_ignore_ascii_case(b"keep-alive") || value.as_bytes() == b"close"
        };
        let listing = !self.client_headers.get_all(header::CONNECTION).iter().all(usual);
        let (method, path) = (self.method.as_str(), self.path.as_str());
        for part in [method, " ", &target.url.prefix, path, " HTTP/1.1\r\n"] {
            output.extend_from_slice(part.as_bytes());
        }
        let mut field = |name: &str, value: &[u8]| {
            for part in [name.as_bytes(), b": ", value, b"\r\n"] {
                output.extend_from_slice(part);
            }
        };
        field("host", target.host.as_bytes());
        for (name, value) in &self.client_headers {
            if is_forwarded_header(name.as_str()) && !(listing && self.is_connection_option(name.as_str())) {
                field(name.as_str(), value.as_bytes());
            }
        }
        if let Some(key) = &target.authorization {
            field("authorization", key.as_bytes());
        }
        if !self.body.is_empty() || self.method != Method::GET {
            field("content-length", self.body.len().to_string().as_bytes());
        }
        output.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::address::AddressPolicy;

    #[test]
    fn does_not_forward_credentials_and_hop_by_hop_headers() {
        let mut client = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("cookie", "secret"),
            ("connection", "close, X-Mine"),
            ("x-mine", "secret"),
            ("te", "trailers"),
            ("x-potstill-stage", "generate"),
            ("x-stainless-retry-count", "1"),
            ("traceparent", "00-1-2-3"),
            ("content-type", "application/json"),
        ] {
            client.insert(http::HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let path = PathAndQuery::from_static("/v1/chat/completions?a=b");
        let request =
            UpstreamRequest { method: Method::POST, path, client_headers: client, body: Bytes::new() };
        let target = Target::new("http://h:1", None, AddressPolicy::Trusted).unwrap();
        let mut head = Vec::new();
        request.write_head(&target, &mut head);
        let head = String::from_utf8(head).unwrap();
        let mut lines: Vec<_> = head.split_terminator("\r\n").collect();
        lines[1..].sort_unstable();
        let wanted = [
            "POST /v1/chat/completions?a=b HTTP/1.1",
            "",
            "content-length: 0",
            "content-type: application/json",
            "host: h:1",
            "traceparent: 00-1-2-3",
            "x-stainless-retry-count: 1",
        ];
        assert_eq!(lines, wanted);
    }
}
