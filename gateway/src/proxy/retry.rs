//! Decides whether a failed attempt is followed by another one. Pure.

use crate::config::Priority;

/// Why an attempt failed, as far as retrying is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// The node has no free slot (429, 503, 529); `asked_for_pause` if it sent `Retry-After`.
    Busy { asked_for_pause: bool },
    /// The node failed (408, 425, other 5xx) or broke off.
    Failed,
    /// No connection could be opened.
    Unreachable,
    /// No response in time. The node may still be working, so another node would do the same work again.
    Timeout,
    /// The node rejected the request itself; every node would.
    Rejected,
}

/// What follows a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RetryDecision {
    /// Return the error.
    Fail,
    /// Take a slot that is free now on another node. If there is none, wait for any node or return the error.
    OtherNodeNow { else_wait: bool },
    /// Wait for a slot on another node. Takes from the retry budget only if the failed attempt cost a node work.
    OtherNode { takes_budget: bool },
}

/// Decides what follows. `attempts_left` is false after the last attempt that the configuration allows.
pub(super) fn decide(failure: FailureKind, attempts_left: bool, class: Priority) -> RetryDecision {
    match failure {
        _ if !attempts_left => RetryDecision::Fail,
        FailureKind::Timeout | FailureKind::Rejected => RetryDecision::Fail,
        // Nobody waits for a bulk request, so it may wait until the node has room again.
        FailureKind::Busy { asked_for_pause } => {
            RetryDecision::OtherNodeNow { else_wait: asked_for_pause && class == Priority::Bulk }
        }
        FailureKind::Failed => RetryDecision::OtherNode { takes_budget: true },
        FailureKind::Unreachable => RetryDecision::OtherNode { takes_budget: false },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_by_kind_of_failure_and_class() {
        use FailureKind::*;
        use RetryDecision::*;
        let busy = |asked_for_pause| Busy { asked_for_pause };
        for (failure, class, expected) in [
            (busy(false), Priority::Interactive, OtherNodeNow { else_wait: false }),
            (busy(true), Priority::Default, OtherNodeNow { else_wait: false }),
            (busy(false), Priority::Bulk, OtherNodeNow { else_wait: false }),
            (busy(true), Priority::Bulk, OtherNodeNow { else_wait: true }),
            (Failed, Priority::Default, OtherNode { takes_budget: true }),
            (Unreachable, Priority::Bulk, OtherNode { takes_budget: false }),
            (Timeout, Priority::Bulk, Fail),
            (Rejected, Priority::Default, Fail),
        ] {
            assert_eq!(decide(failure, true, class), expected, "{failure:?} {class:?}");
            assert_eq!(decide(failure, false, class), Fail, "{failure:?} after the last attempt");
        }
    }
}
