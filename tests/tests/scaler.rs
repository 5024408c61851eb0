//! The process actuator with real node processes: none without requests, more under load, none again, and a killed node
//! is replaced. No request fails.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;
use std::process::Command;

use potstill_gateway::config::{Config, PoolConfig, ProcessConfig, ScaleConfig};
use serde_json::json;
use system_tests::gateway::{TestGateway, config};
use system_tests::mock::until;
use system_tests::programs::{program, teacher};

/// A pool of teachers that append their process ids to `pids`.
fn pool(pids: &Path, max: usize) -> PoolConfig {
    let command = format!(
        "echo $$ >> {}; exec {} serve --name m --threads 1 --exit-with-parent --max-running 4 --model {} --port {{port}}",
        pids.display(),
        program("potstill").display(),
        teacher().display()
    );
    let mut pool = PoolConfig::new("m");
    pool.scale = Some(ScaleConfig {
        max,
        max_concurrency: 4,
        cold_start_s: 0.3,
        demand_window_s: 0.3,
        scale_down_delay_s: 0.3,
        startup_timeout_s: 60,
        process: Some(ProcessConfig {
            command: vec!["sh".into(), "-c".into(), command],
            log_folder: None,
            gpus: Vec::new(),
        }),
        ..ScaleConfig::default()
    });
    pool
}

/// Sets the decision interval to 50 ms.
fn quick(mut config: Config) -> Config {
    config.autoscale.interval_ms = 50;
    config
}

fn ids(pids: &Path) -> Vec<String> {
    std::fs::read_to_string(pids).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn alive(id: &str) -> bool {
    Path::new("/proc").join(id).exists()
}

fn ask(gateway: &TestGateway, number: usize) -> tokio::task::JoinHandle<u16> {
    let problem = format!("A Tom has {} pens. B Tom loses {} away. How many pens has Tom?", 30 + number, 10);
    let body = json!({"model": "m", "temperature": 0, "messages": [{"role": "user", "content": problem}]});
    let request = gateway.client.post(gateway.url("/v1/chat/completions")).json(&body).send();
    tokio::spawn(async move {
        let response = request.await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        assert!(text.contains("boxed"), "{text}");
        status
    })
}

#[tokio::test]
async fn scales_processes_with_demand() {
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pids");
    let gateway = TestGateway::start(quick(config(pool(&pids, 2)))).await;
    assert!(ids(&pids).is_empty(), "no node while nobody asks");
    let requests: Vec<_> = (0..60).map(|number| ask(&gateway, number)).collect();
    until("two nodes work", || gateway.gateway.load("m").unwrap().ready == 2).await;
    for request in requests {
        assert_eq!(request.await.unwrap(), 200);
    }
    until("all nodes are gone", || ids(&pids).iter().all(|id| !alive(id))).await;
    assert_eq!(ids(&pids).len(), 2, "no more than two were started");
    assert_eq!(ask(&gateway, 1).await.unwrap(), 200, "from none again");
    gateway.all_free().await;
    let last = ids(&pids);
    gateway.stop(std::time::Duration::from_secs(30)).await;
    assert!(last.iter().all(|id| !alive(id)), "the gateway takes its nodes along");
}

#[tokio::test]
async fn replaces_a_killed_node() {
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pids");
    let mut pool = pool(&pids, 1);
    pool.scale.as_mut().unwrap().min = 1;
    let gateway = TestGateway::start(quick(config(pool))).await;
    until("it works", || gateway.gateway.load("m").unwrap().ready == 1).await;
    assert!(Command::new("kill").args(["-9", &ids(&pids)[0]]).status().unwrap().success());
    until("another one was started", || ids(&pids).len() == 2).await;
    assert_eq!(ask(&gateway, 1).await.unwrap(), 200);
}
