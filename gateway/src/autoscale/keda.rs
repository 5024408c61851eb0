//! KEDA's external push scaler (gRPC service `externalscaler.ExternalScaler`): for clusters in which KEDA changes
//! `replicas`. The number told is that which the gateway would set itself, so KEDA lowers it only after the pods that go have
//! drained. Any gateway of the cluster answers, with the number that the leader wrote into the Lease.
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

use super::kubernetes::Word;
use crate::config::{Actuator, Limits};
use crate::gateway::Shared;
use crate::server::{Handler, tls};

/// Name of the one metric.
const METRIC: &str = "nodes";
/// How often a stream looks whether something has changed.
const PUSH: Duration = Duration::from_millis(500);

/// Which object KEDA asks for.
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

/// Whether there should be any replica.
#[derive(Clone, PartialEq, Message)]
pub struct IsActiveResponse {
    /// It is so.
    #[prost(bool, tag = "1")]
    pub result: bool,
}

/// A metric and what one replica should have of it.
#[derive(Clone, PartialEq, Message)]
pub struct MetricSpec {
    /// Its name.
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// The same as `target_size_float`, for old versions of KEDA.
    #[prost(int64, tag = "2")]
    pub target_size: i64,
    /// What one replica should have.
    #[prost(double, tag = "3")]
    pub target_size_float: f64,
}

/// The metrics that there are.
#[derive(Clone, PartialEq, Message)]
pub struct GetMetricSpecResponse {
    /// One each.
    #[prost(message, repeated, tag = "1")]
    pub metric_specs: Vec<MetricSpec>,
}

/// Asks for a value.
#[derive(Clone, PartialEq, Message)]
pub struct GetMetricsRequest {
    /// For which object.
    #[prost(message, optional, tag = "1")]
    pub scaled_object_ref: Option<ScaledObjectRef>,
    /// Of which metric.
    #[prost(string, tag = "2")]
    pub metric_name: String,
}

/// A metric as it is now.
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

/// The values.
#[derive(Clone, PartialEq, Message)]
pub struct GetMetricsResponse {
    /// One each.
    #[prost(message, repeated, tag = "1")]
    pub metric_values: Vec<MetricValue>,
}

/// Serves until the gateway stops.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let stop = shared.stop.clone();
    let draining = stop.clone();
    let grace = Duration::from_secs(1);
    crate::server::serve(listener, ExternalScaler(shared), grace, &draining, stop.wait()).await;
}

#[derive(Clone)]
struct ExternalScaler(Arc<Shared>);

type Body = MapErr<tonic::body::Body, fn(Status) -> std::io::Error>;

impl Handler for ExternalScaler {
    type Body = Body;

    async fn handle(&self, request: Request<Incoming>) -> http::Response<Self::Body> {
        let failed: fn(Status) -> std::io::Error = std::io::Error::other;
        self.answer(request).await.map(|body| body.map_err(failed))
    }

    fn limits(&self) -> Arc<Limits> {
        Arc::clone(&self.0.live().limits)
    }

    fn tls(&self) -> Option<tls::Tls> {
        None
    }

    fn connections(&self, _change: i64) {}
}

impl ExternalScaler {
    async fn answer(&self, request: Request<Incoming>) -> http::Response<tonic::body::Body> {
        let shared = &self.0;
        match request.uri().path() {
            "/externalscaler.ExternalScaler/IsActive" => {
                let active = service_fn(async |asked: tonic::Request<ScaledObjectRef>| {
                    let result = replicas_now(shared, asked.get_ref()).await? > 0;
                    Ok::<_, Status>(Response::new(IsActiveResponse { result }))
                });
                Grpc::new(ProstCodec::default()).unary(active, request).await
            }
            "/externalscaler.ExternalScaler/StreamIsActive" => {
                let active = service_fn(async |asked: tonic::Request<ScaledObjectRef>| {
                    let asked = asked.into_inner();
                    replicas(shared, &asked)?;
                    Ok::<_, Status>(Response::new(Box::pin(changes(Arc::clone(shared), asked))))
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
                let values = service_fn(async |asked: tonic::Request<GetMetricsRequest>| {
                    let asked = asked.into_inner();
                    let replicas = replicas_now(shared, &asked.scaled_object_ref.unwrap_or_default()).await?;
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
}

/// The model of the trigger, and the workload that its pods belong to.
fn model<'a>(shared: &Shared, asked: &'a ScaledObjectRef) -> Result<(&'a str, String), Status> {
    let Some(model) = asked.scaler_metadata.get("model") else {
        return Err(Status::invalid_argument(format!(
            "the trigger of `{}` names no `model` in its metadata",
            asked.name
        )));
    };
    let Some(pool) = shared.pool(model) else {
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

/// Pods that the model should have. Without an answer KEDA keeps to the fallback of its object.
async fn replicas_now(shared: &Shared, asked: &ScaledObjectRef) -> Result<usize, Status> {
    let (model, workload) = model(shared, asked)?;
    known(model, &workload, shared.cluster.word_now(shared, model).await.map_err(Status::unavailable)?)
}

/// The same, as far as it is known here: up to a round of the Lease old.
fn replicas(shared: &Shared, asked: &ScaledObjectRef) -> Result<usize, Status> {
    let (model, workload) = model(shared, asked)?;
    known(model, &workload, shared.cluster.word(model))
}

fn known(model: &str, workload: &str, word: Option<Word>) -> Result<usize, Status> {
    let word = word
        .filter(|word| word.workload == workload)
        .ok_or_else(|| Status::unavailable(format!("it is not known yet how many nodes `{model}` needs")))?;
    Ok(word.replicas)
}

/// Says at once whether there should be any replica, and again whenever that changes.
fn changes(
    shared: Arc<Shared>,
    asked: ScaledObjectRef,
) -> impl Stream<Item = Result<IsActiveResponse, Status>> {
    stream::unfold((shared, asked, None), |(shared, asked, last)| async move {
        loop {
            let active = |replicas: usize| replicas > 0;
            // What is known here may be old, so it is told only once the Lease says the same.
            if replicas(&shared, &asked).ok().map(active).is_some_and(|now| Some(now) != last)
                && let Ok(result) = replicas_now(&shared, &asked).await.map(active)
                && Some(result) != last
            {
                return Some((Ok(IsActiveResponse { result }), (shared, asked, Some(result))));
            }
            tokio::select! {
                () = shared.stop.wait() => return None,
                () = tokio::time::sleep(PUSH) => {}
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes as KEDA's own definition of the messages gives them.
    #[test]
    fn messages_have_the_form_that_keda_knows() {
        let asked = ScaledObjectRef {
            name: "n".to_owned(),
            namespace: "s".to_owned(),
            scaler_metadata: HashMap::from([("model".to_owned(), "m".to_owned())]),
        };
        let bytes = b"\n\x01n\x12\x01s\x1a\n\n\x05model\x12\x01m";
        assert_eq!(asked.encode_to_vec(), bytes);
        let request = GetMetricsRequest { scaled_object_ref: Some(asked), metric_name: "nodes".to_owned() };
        assert_eq!(request.encode_to_vec(), [b"\n\x12", &bytes[..], b"\x12\x05nodes"].concat());
        let value = MetricValue { metric_name: "nodes".to_owned(), metric_value: 3, metric_value_float: 3.0 };
        let answer = GetMetricsResponse { metric_values: vec![value] };
        assert_eq!(answer.encode_to_vec(), b"\n\x12\n\x05nodes\x10\x03\x19\0\0\0\0\0\0\x08@");
        assert_eq!(IsActiveResponse { result: true }.encode_to_vec(), b"\x08\x01");
    }
}
