//! Authentication of clients, and the rate limits of their keys.

pub mod jwt;
pub mod keys;
pub mod rate_limit;
