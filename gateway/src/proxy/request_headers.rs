//! The request headers that the gateway itself reads, found in one pass.

use std::time::Duration;

use http::{HeaderMap, Version};

use crate::api::request_id::RequestId;
use crate::config::Priority;
use crate::config::pools::is_model_name;
use crate::error::GatewayError;
use crate::hash::hash_text;
use crate::time::ms;

/// Parsed request headers. Values that cannot be parsed are ignored.
#[derive(Default)]
pub(crate) struct RequestHeaders {
    /// `x-request-id`: kept, so that logs of client and gateway agree.
    pub(crate) request_id: Option<RequestId>,
    /// `x-potstill-stage`: stage of a distillation run.
    pub(crate) stage: Option<String>,
    /// `x-potstill-priority`.
    pub(crate) priority: Option<Priority>,
    /// `x-potstill-deadline-ms`: longest wait for a slot.
    pub(crate) max_wait: Option<Duration>,
    /// Hash of `x-session-id`.
    pub(crate) session: Option<u64>,
    /// `traceparent` (W3C Trace Context).
    pub(crate) traceparent: Option<String>,
    hosts: usize,
    transfer_encodings: usize,
    chunked: bool,
    has_content_length: bool,
}

impl RequestHeaders {
    pub(crate) fn parse(headers: &HeaderMap) -> Self {
        let mut parsed = Self::default();
        for (name, value) in headers {
            let text = || value.to_str().ok();
            match name.as_str() {
                // An empty host is as wrong as two of them.
                "host" => parsed.hosts += if value.is_empty() { 2 } else { 1 },
                "transfer-encoding" => {
                    parsed.transfer_encodings += 1;
                    parsed.chunked = value.as_bytes().eq_ignore_ascii_case(b"chunked");
                }
                "content-length" => parsed.has_content_length = true,
                "x-request-id" => parsed.request_id = RequestId::from_header(value),
                "x-potstill-stage" => {
                    parsed.stage = text().filter(|stage| is_model_name(stage)).map(str::to_owned);
                }
                "x-potstill-priority" => parsed.priority = text().and_then(Priority::from_name),
                "x-potstill-deadline-ms" => {
                    parsed.max_wait = text().and_then(|number| number.parse().ok()).map(ms);
                }
                "x-session-id" => parsed.session = text().map(hash_text),
                "traceparent" => parsed.traceparent = text().map(str::to_owned),
                _ => {}
            }
        }
        parsed
    }

    /// Checks the rules that keep two parsers of one connection from reading two different requests (RFC 9112, sections 3.2
    /// and 6.1).
    pub(crate) fn check(&self, version: Version) -> Result<(), GatewayError> {
        let invalid = |message| Err(GatewayError::InvalidHttpRequest { message });
        // In HTTP/2 `:authority` takes the place of `host`.
        let wanted = usize::from(version == Version::HTTP_11);
        if version <= Version::HTTP_11 && !(wanted..=1).contains(&self.hosts) {
            return invalid("the request must have one `host` header, and only one");
        }
        if self.transfer_encodings > 1 || (self.transfer_encodings == 1 && !self.chunked) {
            return invalid("`transfer-encoding` must be `chunked` and nothing else");
        }
        if self.transfer_encodings == 1 && self.has_content_length {
            return invalid("the request has both `content-length` and `transfer-encoding`");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn parse(lines: &[(&'static str, &'static str)]) -> RequestHeaders {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        RequestHeaders::parse(&headers)
    }

    #[test]
    fn rejects_ambiguous_request_heads() {
        let host = ("host", "a");
        for (lines, accepted) in [
            (&[host][..], true),
            (&[], false),
            (&[host, host], false),
            (&[("host", "")], false),
            (&[host, ("transfer-encoding", "chunked")], true),
            (&[host, ("transfer-encoding", "gzip, chunked")], false),
            (&[host, ("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")], false),
            (&[host, ("transfer-encoding", "chunked"), ("content-length", "3")], false),
        ] {
            assert_eq!(parse(lines).check(Version::HTTP_11).is_ok(), accepted, "{lines:?}");
        }
        assert!(parse(&[]).check(Version::HTTP_2).is_ok());
    }

    #[test]
    fn ignores_values_that_cannot_be_parsed() {
        let parsed = parse(&[
            ("x-potstill-stage", "../x"),
            ("x-potstill-priority", "urgent"),
            ("x-potstill-deadline-ms", "-1"),
        ]);
        assert!(parsed.stage.is_none() && parsed.priority.is_none() && parsed.max_wait.is_none());
        let parsed = parse(&[
            ("x-potstill-stage", "verify"),
            ("x-potstill-priority", "bulk"),
            ("x-potstill-deadline-ms", "20"),
        ]);
        assert_eq!((parsed.stage.as_deref(), parsed.priority), (Some("verify"), Some(Priority::Bulk)));
        assert_eq!(parsed.max_wait, Some(ms(20)));
    }
}
