//! The client side of the API, without I/O except for [`read_body`]: who answers a path, which fields of a request
//! the gateway reads, and the translation between the Responses API and Chat Completions.

pub mod chunked_bytes;
mod json_scan;
pub mod read_body;
pub mod request_fields;
pub mod request_id;
pub mod responses;
pub mod route;
