//! The real programs: built once, started as processes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The demonstration's teacher: a small real model.
pub fn teacher() -> PathBuf {
    root().join("trainer/recipes/demo-teacher")
}

/// Path of a program of this workspace, built in this test's own profile.
pub fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let folder = BUILT.get_or_init(|| {
        // target/PROFILE/deps/this-test
        let folder = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
        let profile = match folder.file_name().unwrap().to_str().unwrap() {
            "debug" => "dev",
            name => name,
        };
        let status = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "--profile",
                profile,
                "-p",
                "potstill-trainer",
                "-p",
                "potstill-gateway",
                "--bins",
            ])
            .current_dir(root())
            .status()
            .unwrap();
        assert!(status.success(), "the programs do not build");
        folder
    });
    folder.join(name)
}

/// A process that is killed when the test ends.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _already_dead = self.0.kill();
        let _status = self.0.wait();
    }
}

/// A free port.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Starts `potstill serve` for the demonstration's teacher and waits until it answers.
pub async fn serve_teacher(extra: &[&str]) -> (Running, String) {
    let port = free_port();
    let child = Command::new(program("potstill"))
        .args(["serve", "--name", "teacher", "--threads", "1", "--port", &port.to_string(), "--model"])
        .arg(teacher())
        .args(extra)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let running = Running(child);
    let url = format!("http://127.0.0.1:{port}");
    answers(&format!("{url}/health")).await;
    (running, url)
}

/// Waits until a URL answers with success.
pub async fn answers(url: &str) {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let started = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    loop {
        ticks.tick().await;
        if client.get(url).send().await.is_ok_and(|response| response.status().is_success()) {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "`{url}` does not answer");
    }
}
