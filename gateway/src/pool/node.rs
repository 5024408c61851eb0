//! One upstream endpoint: where it is, how it is, what it holds.

use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use http::Uri;
use http::uri::{Authority, PathAndQuery, Scheme};
use potstill_shared::redact::Redacted;

use crate::balance::NodeView;

/// Whether a node may get requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum NodeState {
    /// It may.
    Ready = 0,
    /// It is starting, or a check or a request found it ill.
    Unhealthy = 1,
    /// It finishes what it holds and is then removed.
    Draining = 2,
}

/// An upstream endpoint.
pub struct Node {
    /// Number within the pool.
    pub id: u64,
    /// `host:port`, for logs and metrics.
    pub name: String,
    authority: Authority,
    prefix: String,
    /// The node's own key.
    pub key: Option<Redacted<String>>,
    slots: usize,
    state: AtomicU8,
    requests: AtomicUsize,
    tokens: AtomicU64,
}

/// Checks a node's base URL and splits it into authority and path prefix.
pub fn parse_url(url: &str) -> Result<(Authority, String), String> {
    let uri: Uri = url.parse().map_err(|error| format!("`url` is not a URL: {error}"))?;
    if uri.scheme() != Some(&Scheme::HTTP) {
        return Err("`url` must begin with `http://`".to_owned());
    }
    let authority = uri.authority().cloned().ok_or_else(|| "`url` names no host".to_owned())?;
    if authority.as_str().contains('@') {
        return Err("`url` must not hold a user name; use `api_key_env`".to_owned());
    }
    let prefix = uri.path().trim_end_matches('/').to_owned();
    if prefix.ends_with("/v1") {
        return Err("`url` must not end in `/v1`".to_owned());
    }
    Ok((authority, prefix))
}

impl Node {
    /// A node at `url`.
    pub fn new(
        id: u64,
        url: &str,
        slots: usize,
        key: Option<String>,
        state: NodeState,
    ) -> Result<Self, String> {
        let (authority, prefix) = parse_url(url)?;
        Ok(Self {
            id,
            name: authority.to_string(),
            authority,
            prefix,
            key: key.map(Redacted::new),
            slots,
            state: AtomicU8::new(state as u8),
            requests: AtomicUsize::new(0),
            tokens: AtomicU64::new(0),
        })
    }

    /// Address of `path` on this node.
    pub fn uri(&self, path: &PathAndQuery) -> Result<Uri, http::Error> {
        Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(self.authority.clone())
            .path_and_query(format!("{}{path}", self.prefix))
            .build()
    }

    /// How it is.
    pub fn state(&self) -> NodeState {
        match self.state.load(Ordering::Acquire) {
            0 => NodeState::Ready,
            1 => NodeState::Unhealthy,
            _ => NodeState::Draining,
        }
    }

    pub(super) fn set_state(&self, state: NodeState) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// What a balancer needs to know.
    pub fn view(&self) -> NodeView {
        NodeView {
            available: self.state() == NodeState::Ready,
            requests: self.requests.load(Ordering::Acquire),
            slots: self.slots,
            tokens: self.tokens.load(Ordering::Acquire),
        }
    }

    pub(super) fn begin(&self, tokens: u64) {
        self.requests.fetch_add(1, Ordering::AcqRel);
        self.tokens.fetch_add(tokens, Ordering::AcqRel);
    }

    pub(super) fn end(&self, tokens: u64) {
        self.requests.fetch_sub(1, Ordering::AcqRel);
        self.tokens.fetch_sub(tokens, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked() {
        for (url, problem) in [
            ("https://x", "http://"),
            ("file:///etc/passwd", "`url`"),
            ("http://u:p@x", "user name"),
            ("http://x/v1", "/v1"),
            ("x", "http://"),
        ] {
            assert!(parse_url(url).unwrap_err().contains(problem), "{url}");
        }
        let node = Node::new(0, "http://h:1/base/", 1, None, NodeState::Ready).unwrap();
        let uri = node.uri(&PathAndQuery::from_static("/v1/models?a=b")).unwrap();
        assert_eq!(uri.to_string(), "http://h:1/base/v1/models?a=b");
    }
}
