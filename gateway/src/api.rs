//! The client's side of the API: which path is what, what is read of a request, what an answer's body is.

pub mod body;
pub mod local;
mod outline;
pub mod pieces;
pub mod reply;
pub mod request;
pub mod request_id;
pub mod responses;
pub mod waiting;

use crate::upstream::mend::Kind;

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// A node answers.
    Node(Kind),
    /// A node answers a chat request; the client speaks the Responses API.
    Responses,
    /// The gateway itself answers.
    Local,
}

/// The endpoint of a path.
pub fn endpoint(path: &str) -> Endpoint {
    match path {
        "/v1/chat/completions" => Endpoint::Node(Kind::Chat),
        "/v1/completions" => Endpoint::Node(Kind::Text),
        "/v1/embeddings" => Endpoint::Node(Kind::Embeddings),
        "/v1/responses" => Endpoint::Responses,
        "/tokenize" | "/v1/tokenize" | "/detokenize" | "/v1/detokenize" | "/rerank" | "/v1/rerank"
        | "/v2/rerank" | "/score" | "/v1/score" => Endpoint::Node(Kind::Other),
        _ => Endpoint::Local,
    }
}
