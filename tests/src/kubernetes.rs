//! A Kubernetes cluster for tests: an API server over TLS that enforces the roles of our manifests, controllers, and
//! pods that are mock nodes with their own addresses.

mod api;
mod control;
pub mod rights;
pub mod store;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::server::TlsStream;
use tower::ServiceExt;

use self::rights::{Attempt, Rights};
use self::store::{Key, Store};
use crate::mock::Behaviour;

/// Fault of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The request gets no response.
    Hang,
    /// The request gets this status.
    Status(u16),
}

/// Faults that a test has configured.
struct Faults {
    /// Planned faults: verb, resource, number of requests, fault.
    planned: Vec<(&'static str, &'static str, usize, Fault)>,
    watch_epoch: u64,
    behaviour: Behaviour,
    cold: Duration,
    grace: Duration,
    quota: Option<usize>,
    /// Health that a test has set, by pod.
    health: HashMap<String, bool>,
    /// Readiness that a test has set, by pod, independent of health.
    readiness: HashMap<String, bool>,
    /// Pods that get a new address.
    moves: Vec<String>,
}

/// Counters of pods.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Number of started pods.
    pub started: usize,
    /// Number of assigned addresses.
    pub addresses: usize,
    /// Largest number of pods at once.
    pub most: usize,
    /// Number of responses that were cut when their pod was killed.
    pub cut: usize,
}

struct Inner {
    store: Mutex<Store>,
    users: Mutex<HashMap<String, Rights>>,
    audit: Mutex<Vec<(String, Attempt, u16)>>,
    faults: Mutex<Faults>,
    counts: Mutex<Counts>,
    /// Number of requests by pod.
    asked: Mutex<HashMap<String, usize>>,
    port: u16,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the labels in the pod selector of a workload.
fn pod_labels(resource: &str, workload: &Value) -> Vec<(String, String)> {
    if resource == "leaderworkerset.x-k8s.io/leaderworkersets" {
        let name = workload["metadata"]["name"].as_str().unwrap().to_owned();
        return vec![
            ("leaderworkerset.sigs.k8s.io/name".to_owned(), name),
            ("leaderworkerset.sigs.k8s.io/worker-index".to_owned(), "0".to_owned()),
        ];
    }
    let labels = workload["spec"]["selector"]["matchLabels"].as_object().unwrap();
    labels.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned())).collect()
}

/// A running cluster.
#[derive(Clone)]
pub struct Kubernetes {
    inner: Arc<Inner>,
    address: SocketAddr,
    folder: PathBuf,
}

impl Kubernetes {
    /// Starts a cluster with its files in `folder`. Its pods have this behavior and the cold start `cold`.
    pub async fn start(folder: &Path, behaviour: Behaviour, cold: Duration) -> Self {
        let inner = Arc::new(Inner {
            store: Mutex::default(),
            users: Mutex::new(HashMap::from([("admin".to_owned(), Rights::all())])),
            audit: Mutex::default(),
            faults: Mutex::new(Faults {
                planned: Vec::new(),
                watch_epoch: 0,
                behaviour,
                cold,
                grace: Duration::ZERO,
                quota: None,
                health: HashMap::new(),
                readiness: HashMap::new(),
                moves: Vec::new(),
            }),
            counts: Mutex::default(),
            asked: Mutex::default(),
            port: crate::programs::free_port(),
        });
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        std::fs::write(folder.join("ca.pem"), made.cert.pem()).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let listener = Tls { tcp, acceptor: TlsAcceptor::from(Arc::new(config)) };
        let router = api::router(&inner);
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        tokio::spawn(control::run(Arc::downgrade(&inner)));
        Self { inner, address, folder: folder.to_owned() }
    }

    /// Adds a user and returns the path of its kubeconfig.
    pub fn user(&self, name: &str, rights: Rights) -> PathBuf {
        lock(&self.inner.users).insert(name.to_owned(), rights);
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{}", self.address), "certificate-authority": self.folder.join("ca.pem")}}],
            "users": [{"name": name, "user": {"token": name}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name, "namespace": "test"}}],
        });
        let path = self.folder.join(format!("{name}.kubeconfig"));
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    /// Port of all pods.
    pub fn port(&self) -> u16 {
        self.inner.port
    }

    /// Creates or replaces an object.
    pub fn put(&self, resource: &str, name: &str, object: Value) {
        lock(&self.inner.store).put(&Key::new(resource, name), object);
    }

    /// Creates a workload of this kind without pods.
    pub fn workload(&self, resource: &str, name: &str) {
        let labels = json!({"app.kubernetes.io/name": name});
        let object = json!({"spec": {"replicas": 0, "selector": {"matchLabels": labels}}});
        self.put(resource, name, object);
    }

    /// Returns an object.
    pub fn get(&self, resource: &str, name: &str) -> Value {
        lock(&self.inner.store).get(&Key::new(resource, name)).cloned().unwrap_or_default()
    }

    /// Applies a patch to an object, as another client would.
    pub fn change(&self, resource: &str, name: &str, patch: &Value) {
        lock(&self.inner.store).change(&Key::new(resource, name), patch).unwrap();
    }

    /// Returns `replicas` of a workload.
    pub fn replicas(&self, resource: &str, name: &str) -> usize {
        self.get(resource, name)["spec"]["replicas"].as_u64().unwrap() as usize
    }

    /// Names of all pods, including terminating ones.
    pub fn pods(&self) -> Vec<String> {
        lock(&self.inner.store).list("pods", "").into_iter().map(|(key, _)| key.name).collect()
    }

    /// Requests the eviction of a pod and returns the status.
    pub async fn evict(&self, pod: &str) -> u16 {
        let body = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}});
        let request = http::Request::post(format!("/api/v1/namespaces/test/pods/{pod}/eviction"))
            .header("authorization", "Bearer admin")
            .body(axum::body::Body::from(body.to_string()))
            .unwrap();
        api::router(&self.inner).oneshot(request).await.unwrap().status().as_u16()
    }

    /// Returns the counters of pods.
    pub fn counts(&self) -> Counts {
        *lock(&self.inner.counts)
    }

    /// Requests so far: user, attempt, status.
    pub fn audit(&self) -> Vec<(String, Attempt, u16)> {
        lock(&self.inner.audit).clone()
    }

    /// Lets the next `times` requests with this verb and resource fail.
    pub fn fault(&self, verb: &'static str, resource: &'static str, times: usize, fault: Fault) {
        lock(&self.inner.faults).planned.push((verb, resource, times, fault));
    }

    /// Returns whether planned faults are left.
    pub fn faults_left(&self) -> usize {
        lock(&self.inner.faults).planned.iter().map(|(_, _, left, _)| left).sum()
    }

    /// Ends all watches.
    pub fn break_watches(&self) {
        lock(&self.inner.faults).watch_epoch += 1;
    }

    /// Discards all past events, so that an older watch gets 410.
    pub fn forget(&self) {
        lock(&self.inner.store).forget();
    }

    /// Sets the cold start of new pods.
    pub fn set_cold(&self, cold: Duration) {
        lock(&self.inner.faults).cold = cold;
    }

    /// Sets the largest number of pods.
    pub fn set_quota(&self, pods: Option<usize>) {
        lock(&self.inner.faults).quota = pods;
    }

    /// Sets whether a pod passes its health checks.
    pub fn set_healthy(&self, pod: &str, healthy: bool) {
        lock(&self.inner.faults).health.insert(pod.to_owned(), healthy);
    }

    /// Number of requests to a pod at its current address.
    pub fn asked(&self, pod: &str) -> usize {
        lock(&self.inner.asked).get(pod).copied().unwrap_or(0)
    }

    /// Sets the `Ready` condition of a pod, independent of its health checks.
    pub fn set_ready(&self, pod: &str, ready: bool) {
        lock(&self.inner.faults).readiness.insert(pod.to_owned(), ready);
    }

    /// Gives a pod a new address, as when its sandbox is recreated.
    pub fn move_pod(&self, pod: &str) {
        lock(&self.inner.faults).moves.push(pod.to_owned());
    }

    /// Sets the termination grace period. The initial value is zero, so that only a drain can save a response.
    pub fn set_grace(&self, grace: Duration) {
        lock(&self.inner.faults).grace = grace;
    }

    /// Sets the behavior of new pods.
    pub fn behave(&self, behaviour: Behaviour) {
        lock(&self.inner.faults).behaviour = behaviour;
    }
}

struct Tls {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok((stream, peer)) = self.tcp.accept().await else { continue };
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}
