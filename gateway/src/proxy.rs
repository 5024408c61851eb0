//! The request path. Start reading at [`handler`]: every step of a request on one screen.

pub mod attempt;
pub mod context;
pub mod fallback;
pub mod fetch;
pub mod handler;
pub mod keep_alive;
pub mod relay;
pub mod request_headers;
pub mod request_record;
pub mod respond;
pub mod response_body;
mod retry;
