//! Pools: the nodes of each model, the queue in front of them, and the permits that count requests.
//!
//! Invariant: each attempt owns one [`Permit`], which is taken before the request is sent and dropped with the response
//! body. Without requests in flight every counter is zero.

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
