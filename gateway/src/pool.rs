//! Pools: the nodes of each model, the queue in front of them, and the permits that count requests.
//!
//! Invariant: one [`Permit`] per request, taken before the request is sent and owned by the response body. When nothing is
//! in flight, every counter is exactly zero.

pub mod acquire;
pub mod balance;
pub mod health;
pub mod model_pool;
pub mod node;
pub mod outlier;
pub mod permit;
pub mod queue;
pub mod registry;
pub mod retry_budget;
pub mod statistics;
pub mod traffic;
mod waiter;

pub use self::acquire::AcquireRequest;
pub use self::model_pool::{ModelPool, PoolLoad};
pub use self::permit::Permit;
pub use self::registry::PoolRegistry;
