//! KEDA's external push scaler (gRPC service `externalscaler.ExternalScaler`), for clusters in which KEDA sets `replicas`. The
//! published count is the one that the gateway would set itself, so KEDA lowers it only after the pods that will be deleted
//! have drained. Every gateway of the cluster responds with the count that the leader wrote into the Lease.
//!
//! ```text
//! metadata of the trigger: scalerAddress: potstill-gateway:9090, model: qwq-32b
//! metric "nodes", target 1: the horizontal pod autoscaler sets replicas = nodes
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};
use http::Request;
use http_body_util::BodyExt;
use http_body_util::combinators::MapErr;
use hyper::body::Incoming;
use prost::Message;
use tokio::net::TcpListener;
use tonic::server::Grpc;
use tonic::{Response, Status};
use tonic_prost::ProstCodec;
use tower::service_fn;

use super::lease::{LeaseCoordinator, PublishedScale};
use crate::autoscale::context::AutoscaleContext;
use crate::config::{Actuator, Limits};
use crate::server::{Handler, tls};

/// Name of the only metric.
const METRIC: &str = "nodes";
/// Interval at which a stream checks for changes.
const PUSH_INTERVAL: Duration = Duration::from_millis(500);

/// The ScaledObject that KEDA scales.
#[derive(Clone, PartialEq, Message)]
pub struct ScaledObjectRef {
    /// Name of the ScaledObject.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Metadata of its trigger.
    #[prost(map = "string, string", tag = "3")]
    pub scaler_metadata: HashMap<String, String>,
}

/// Whether any replica is needed.
#[derive(Clone, PartialEq, Message)]
pub struct IsActiveResponse {
    /// True if so.
    #[prost(bool, tag = "1")]
    pub result: bool,
}

/// A metric and its target value per replica.
#[derive(Clone, PartialEq, Message)]
pub struct MetricSpec {
    /// Its name.
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// The same as `target_size_float`, for old versions of KEDA.
    #[prost(int64, tag = "2")]
    pub target_size: i64,
    /// Target value per replica.
    #[prost(double, tag = "3")]
    pub target_size_float: f64,
}

/// All metrics.
#[derive(Clone, PartialEq, Message)]
pub struct GetMetricSpecResponse {
    /// One entry per metric.
    #[prost(message, repeated, tag = "1")]
    pub metric_specs: Vec<MetricSpec>,
}

/// Request for the value of a metric.
#[derive(Clone, PartialEq, Message)]
pub struct GetMetricsRequest {
    /// The object.
    #[prost(message, optional, tag = "1")]
    pub scaled_object_ref: Option<ScaledObjectRef>,
    /// Name of the metric.
    #[prost(string, tag = "2")]
    pub metric_name: String,
}

/// Current value of a metric.
#[derive(Clone, PartialEq, Message)]
pub struct MetricValue {
    /// Its name.
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// The same as `metric_value_float`, for old versions of KEDA.
    #[prost(int64, tag = "2")]
    pub metric_value: i64,
    /// Its value.
    #[prost(double, tag = "3")]
    pub metric_value_float: f64,
}

/// Current values.
#[derive(Clone, PartialEq, Message)]
pub struct GetMetricsResponse {
    /// One entry per metric.
    #[prost(message, repeated, tag = "1")]
    pub metric_values: Vec<MetricValue>,
}

/// Serves until the gateway stops. `limits` returns the current bounds on clients.
pub(crate) async fn serve(
    context: Arc<AutoscaleContext>,
    cluster: Arc<LeaseCoordinator>,
    limits: impl Fn() -> Arc<Limits> + Clone + Send + Sync + 'static,
    listener: TcpListener,
) {
    let draining = context.draining.clone();
    let stop = draining.clone();
    let grace = Duration::from_secs(1);
    let scaler = ExternalScaler { scales: Scales { context, cluster }, limits };
    crate::server::serve(listener, scaler, grace, &draining, stop.wait()).await;
}

/// The published scales.
#[derive(Clone)]
struct Scales {
    context: Arc<AutoscaleContext>,
    cluster: Arc<LeaseCoordinator>,
}

#[derive(Clone)]
struct ExternalScaler<L> {
    scales: Scales,
    limits: L,
}

type Body = MapErr<tonic::body::Body, fn(Status) -> std::io::Error>;

impl<L: Fn() -> Arc<Limits> + Clone + Send + Sync + 'static> Handler for ExternalScaler<L> {
    type Body = Body;

    async fn handle(&self, request: Request<Incoming>) -> http::Response<Self::Body> {
        let failed: fn(Status) -> std::io::Error = std::io::Error::other;
        respond(&self.scales, request).await.map(|body| body.map_err(failed))
    }

    fn limits(&self) -> Arc<Limits> {
        (self.limits)()
    }

    fn tls(&self) -> Option<tls::Tls> {
        None
    }

    fn count_connection(&self, _change: i64) {}
}

/// Dispatches a call of the service.
async fn respond(scales: &Scales, request: Request<Incoming>) -> http::Response<tonic::body::Body> {
    match request.uri().path() {
        "/externalscaler.ExternalScaler/IsActive" => {
            let active = service_fn(async |object: tonic::Request<ScaledObjectRef>| {
                let result = scales.read(object.get_ref()).await? > 0;
                Ok::<_, Status>(Response::new(IsActiveResponse { result }))
            });
            Grpc::new(ProstCodec::default()).unary(active, request).await
        }
        "/externalscaler.ExternalScaler/StreamIsActive" => {
            let active = service_fn(async |object: tonic::Request<ScaledObjectRef>| {
                let object = object.into_inner();
                scales.known(&object)?;
                Ok::<_, Status>(Response::new(Box::pin(changes(scales.clone(), object))))
            });
            Grpc::new(ProstCodec::default()).server_streaming(active, request).await
        }
        "/externalscaler.ExternalScaler/GetMetricSpec" => {
            let specs = service_fn(async |_: tonic::Request<ScaledObjectRef>| {
                let spec =
                    MetricSpec { metric_name: METRIC.to_owned(), target_size: 1, target_size_float: 1.0 };
                Ok::<_, Status>(Response::new(GetMetricSpecResponse { metric_specs: vec![spec] }))
            });
            Grpc::new(ProstCodec::default()).unary(specs, request).await
        }
        "/externalscaler.ExternalScaler/GetMetrics" => {
            let values = service_fn(async |request: tonic::Request<GetMetricsRequest>| {
                let object = request.into_inner().scaled_object_ref.unwrap_or_default();
                let replicas = scales.read(&object).await?;
                let value = MetricValue {
                    metric_name: METRIC.to_owned(),
                    metric_value: replicas as i64,
                    metric_value_float: replicas as f64,
                };
                Ok::<_, Status>(Response::new(GetMetricsResponse { metric_values: vec![value] }))
            });
            Grpc::new(ProstCodec::default()).unary(values, request).await
        }
        path => Status::unimplemented(format!("`{path}` is not known")).into_http(),
    }
}

impl Scales {
    /// Model of the trigger, and the workload of its pods.
    fn workload<'a>(&self, object: &'a ScaledObjectRef) -> Result<(&'a str, String), Status> {
        let Some(model) = object.scaler_metadata.get("model") else {
            return Err(Status::invalid_argument(format!(
                "the trigger of `{}` names no `model` in its metadata",
                object.name
            )));
        };
        let Some(pool) = self.context.pools.get(model) else {
            return Err(Status::invalid_argument(format!("no pool serves `{model}`")));
        };
        let config = pool.config();
        let workload = config.scale.as_ref().and_then(|scale| scale.kubernetes.as_ref());
        let Some(workload) = workload.filter(|workload| workload.actuator == Actuator::Keda) else {
            return Err(Status::failed_precondition(format!(
                "`{model}` is not scaled by KEDA; its pool needs `actuator = \"keda\"`"
            )));
        };
        Ok((model, workload.workload()))
    }

    /// Reads the replicas from the Lease. On an error KEDA uses the fallback of its object.
    async fn read(&self, object: &ScaledObjectRef) -> Result<usize, Status> {
        let (model, workload) = self.workload(object)?;
        let lease = self.context.config().lease_name.clone();
        let scale = self.cluster.read_published_scale(&lease, model).await.map_err(Status::unavailable)?;
        replicas(model, &workload, scale)
    }

    /// The replicas as this gateway knows them: up to one round of the Lease old.
    fn known(&self, object: &ScaledObjectRef) -> Result<usize, Status> {
        let (model, workload) = self.workload(object)?;
        replicas(model, &workload, self.cluster.published_scale(model))
    }
}

fn replicas(model: &str, workload: &str, scale: Option<PublishedScale>) -> Result<usize, Status> {
    let scale = scale.filter(|scale| scale.workload == workload);
    scale
        .map(|scale| scale.replicas)
        .ok_or_else(|| Status::unavailable(format!("it is not known yet how many nodes `{model}` needs")))
}

/// Streams whether any replica is needed: now, and whenever that changes.
fn changes(scales: Scales, object: ScaledObjectRef) -> impl Stream<Item = Result<IsActiveResponse, Status>> {
    stream::unfold((scales, object, None), |(scales, object, last)| async move {
        loop {
            let active = |replicas: usize| replicas > 0;
            // The known value may be old, so a change is reported only once the Lease confirms it.
            if scales.known(&object).ok().map(active).is_some_and(|now| Some(now) != last)
                && let Ok(result) = scales.read(&object).await.map(active)
                && Some(result) != last
            {
                return Some((Ok(IsActiveResponse { result }), (scales, object, Some(result))));
            }
            tokio::select! {
                () = scales.context.draining.wait() => return None,
                () = tokio::time::sleep(PUSH_INTERVAL) => {}
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as KEDA's own protobuf definition encodes them.
    #[test]
    fn encodes_messages_as_keda_defines_them() {
        let object = ScaledObjectRef {
            name: "n".to_owned(),
            namespace: "s".to_owned(),
            scaler_metadata: HashMap::from([("model".to_owned(), "m".to_owned())]),
        };
        let bytes = b"\n\x01n\x12\x01s\x1a\n\n\x05model\x12\x01m";
        assert_eq!(object.encode_to_vec(), bytes);
        let request = GetMetricsRequest { scaled_object_ref: Some(object), metric_name: "nodes".to_owned() };
        assert_eq!(request.encode_to_vec(), [b"\n\x12", &bytes[..], b"\x12\x05nodes"].concat());
        let value = MetricValue { metric_name: "nodes".to_owned(), metric_value: 3, metric_value_float: 3.0 };
        let response = GetMetricsResponse { metric_values: vec![value] };
        assert_eq!(response.encode_to_vec(), b"\n\x12\n\x05nodes\x10\x03\x19\0\0\0\0\0\0\x08@");
        assert_eq!(IsActiveResponse { result: true }.encode_to_vec(), b"\x08\x01");
    }
}
