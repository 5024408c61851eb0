//! The client side of the API: routes, the request fields that the gateway reads, request ids, and the translation
//! between the Responses API and Chat Completions. Only [`read_body`] does I/O.

pub mod chunked_bytes;
mod json_scan;
pub mod read_body;
pub mod request_fields;
pub mod request_id;
pub mod responses;
pub mod route;
