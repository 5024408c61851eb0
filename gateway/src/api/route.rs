//! Who answers a request path.

use crate::normalize::Kind;

/// Who answers requests to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// An upstream node, with a response of this kind.
    Upstream(Kind),
    /// An upstream node, by a chat request; the client speaks the Responses API.
    Responses,
    /// The gateway itself: models, health, metrics.
    Builtin,
}

/// Returns the route of `path`. Unknown paths are [`Route::Builtin`], which answers 404.
pub fn route(path: &str) -> Route {
    match path {
        "/v1/chat/completions" => Route::Upstream(Kind::Chat),
        "/v1/completions" => Route::Upstream(Kind::Text),
        "/v1/embeddings" => Route::Upstream(Kind::Embeddings),
        "/v1/responses" => Route::Responses,
        "/tokenize" | "/v1/tokenize" | "/detokenize" | "/v1/detokenize" | "/rerank" | "/v1/rerank"
        | "/v2/rerank" | "/score" | "/v1/score" => Route::Upstream(Kind::Other),
        _ => Route::Builtin,
    }
}
