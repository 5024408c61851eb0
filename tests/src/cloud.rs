//! A scaling webhook for tests. It "starts" mock nodes that become ready after the cold start, stops nodes on request,
//! and fails as configured.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use http::StatusCode;
use potstill_gateway::config::{ScaleConfig, WebhookConfig};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::mock::{Behaviour, Mock};

/// How the program behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// It does what is requested.
    Well,
    /// It returns 500.
    Failing,
    /// It never responds.
    Silent,
    /// Its response is not JSON.
    Babbling,
    /// It starts nodes that never become healthy.
    Sterile,
}

struct Inner {
    nodes: Vec<Mock>,
    behaviour: Behaviour,
    cold: Duration,
    mood: Mood,
    /// Number of nodes that were removed while requests were running.
    cut: usize,
    most: usize,
    started: usize,
    asked: Vec<Value>,
}

/// A running webhook.
#[derive(Clone)]
pub struct Cloud {
    inner: Arc<Mutex<Inner>>,
    address: SocketAddr,
}

impl Cloud {
    /// Starts the webhook. Its nodes have this behavior and this cold start.
    pub async fn start(behaviour: Behaviour, cold: Duration) -> Self {
        let inner = Arc::new(Mutex::new(Inner {
            nodes: Vec::new(),
            behaviour,
            cold,
            mood: Mood::Well,
            cut: 0,
            most: 0,
            started: 0,
            asked: Vec::new(),
        }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/scale", post(scale)).with_state(Arc::clone(&inner));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { inner, address }
    }

    /// Returns the scaling configuration of a pool with this webhook, with short times for tests.
    pub fn scaling(&self, max: usize, slots: usize) -> ScaleConfig {
        ScaleConfig {
            max,
            max_concurrency: slots,
            cold_start_s: 0.2,
            demand_window_s: 0.3,
            scale_down_delay_s: 0.3,
            webhook: Some(WebhookConfig { url: format!("http://{}/scale", self.address), api_key_env: None }),
            ..ScaleConfig::default()
        }
    }

    /// Changes the behavior of the program.
    pub fn set_mood(&self, mood: Mood) {
        self.inner.lock().unwrap().mood = mood;
    }

    /// Current number of nodes.
    pub fn nodes(&self) -> usize {
        self.inner.lock().unwrap().nodes.len()
    }

    /// Largest number of nodes at once, number of started nodes, and number of nodes removed with running requests.
    pub fn counts(&self) -> (usize, usize, usize) {
        let inner = self.inner.lock().unwrap();
        (inner.most, inner.started, inner.cut)
    }

    /// Request bodies so far.
    pub fn asked(&self) -> Vec<Value> {
        self.inner.lock().unwrap().asked.clone()
    }

    /// Calls `act` with every node.
    pub fn each(&self, act: impl FnMut(&mut Mock)) {
        self.inner.lock().unwrap().nodes.iter_mut().for_each(act);
    }
}

async fn scale(State(cloud): State<Arc<Mutex<Inner>>>, Json(ask): Json<Value>) -> Response {
    let mood = {
        let mut inner = cloud.lock().unwrap();
        inner.asked.push(ask.clone());
        inner.mood
    };
    match mood {
        Mood::Failing => return StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Mood::Silent => std::future::pending().await,
        Mood::Babbling => return "three nodes, I think".into_response(),
        Mood::Well | Mood::Sterile => {}
    }
    let wanted = ask["wanted"].as_u64().unwrap() as usize;
    let missing = {
        let mut inner = cloud.lock().unwrap();
        let remove: Vec<String> = serde_json::from_value(ask["remove"].clone()).unwrap();
        let removed: Vec<Mock> = inner.nodes.extract_if(.., |node| remove.contains(&node.url())).collect();
        inner.cut += removed.iter().filter(|node| node.writing() > 0).count();
        wanted.saturating_sub(inner.nodes.len())
    };
    for _ in 0..missing {
        let (behaviour, cold) = {
            let inner = cloud.lock().unwrap();
            (inner.behaviour.clone(), inner.cold)
        };
        let node = Mock::start(behaviour).await;
        node.set_healthy(false);
        if mood == Mood::Well {
            node.set_healthy_after(cold);
        }
        let mut inner = cloud.lock().unwrap();
        inner.nodes.push(node);
        inner.started += 1;
        inner.most = inner.most.max(inner.nodes.len());
    }
    let inner = cloud.lock().unwrap();
    let nodes: Vec<_> = inner.nodes.iter().map(|node| json!({"url": node.url()})).collect();
    Json(json!({ "nodes": nodes })).into_response()
}
