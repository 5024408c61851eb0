//! Who answers a request path.

use crate::normalize::EndpointKind;

/// Who answers requests to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// An upstream node, with a response of this kind.
    Upstream(EndpointKind),
    /// An upstream node, by a chat request; the client speaks the Responses API.
    Responses,
    /// The gateway itself: models, health, metrics.
    Builtin,
}

/// Returns the route of `path`. Unknown paths are [`Route::Builtin`], which answers 404.
pub fn route(path: &str) -> Route {
    match path {
        "/v1/chat/completions" => Route::Upstream(EndpointKind::Chat),
        "/v1/completions" => Route::Upstream(EndpointKind::Text),
        "/v1/embeddings" => Route::Upstream(EndpointKind::Embeddings),
        "/v1/responses" => Route::Responses,
        "/tokenize" | "/v1/tokenize" | "/detokenize" | "/v1/detokenize" | "/rerank" | "/v1/rerank"
        | "/v2/rerank" | "/score" | "/v1/score" => Route::Upstream(EndpointKind::Other),
        _ => Route::Builtin,
    }
}
