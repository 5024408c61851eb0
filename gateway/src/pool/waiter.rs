//! A request in the queue of a pool.

use tokio::sync::oneshot;

use super::permit::Permit;
use crate::error::GatewayError;

/// A waiting request.
pub(super) struct Waiter {
    pub(super) affinity: Option<u64>,
    /// Id of a node that must not be chosen, because it has just failed this request.
    pub(super) exclude: Option<u64>,
    /// Receives the permit, or the reason why there is none.
    pub(super) grant: oneshot::Sender<Result<Permit, GatewayError>>,
}
