//! Calls of the Kubernetes API server.

use std::time::Duration;

use kube::Error;

/// Timeout of one call.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs a call with [`CALL_TIMEOUT`].
pub(super) async fn call<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(CALL_TIMEOUT, call).await.unwrap_or_else(|_| {
        let seconds = CALL_TIMEOUT.as_secs();
        Err(Error::Service(format!("the API server did not answer within {seconds} s").into()))
    })
}

/// Returns whether the API server responded with this status.
pub(super) fn has_status(error: &Error, code: u16) -> bool {
    matches!(error, Error::Api(status) if status.code == code)
}

/// Describes an error in one line, with the next step where there is one.
pub(super) fn describe(error: &Error) -> String {
    match error {
        Error::Api(status) if status.code == 403 => {
            format!("{}; k8s/base/rbac.yaml has the rights that the gateway needs", status.message)
        }
        Error::Api(status) => format!("{} ({})", status.message, status.code),
        other => other.to_string(),
    }
}
