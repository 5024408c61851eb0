//! The gateway as a process, with its output.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::canary::secret_in;
use crate::programs::{Running, answers, free_port, program};

/// A running `potstill-gateway`. Its output is checked for secrets at the end.
pub struct Started {
    /// The process.
    pub process: Running,
    /// Base URL.
    pub url: String,
    /// Port of the gateway.
    pub port: u16,
    /// Folder of configuration and output.
    pub folder: TempDir,
}

impl Started {
    /// Starts the gateway with this configuration, adds `listen`, and waits until it responds.
    pub async fn with(config: &str, log: &str) -> Self {
        Self::with_env(config, log, &[]).await
    }

    /// Like [`with`](Self::with), with additional environment variables.
    pub async fn with_env(config: &str, log: &str, env: &[(&str, &std::ffi::OsStr)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let path = folder.path().join("gateway.toml");
        std::fs::write(&path, format!("listen = \"127.0.0.1:{port}\"\n{config}")).unwrap();
        let output = |name: &str| Stdio::from(std::fs::File::create(folder.path().join(name)).unwrap());
        let child = Command::new(program("potstill-gateway"))
            .arg("serve")
            .arg(&path)
            .env("POTSTILL_LOG", log)
            .env("NO_COLOR", "1")
            .envs(env.iter().copied())
            .stdout(output("out"))
            .stderr(output("err"))
            .spawn()
            .unwrap();
        let url = format!("http://127.0.0.1:{port}");
        let started = Self { process: Running(child), url, port, folder };
        answers(&format!("{}/health", started.url)).await;
        started
    }

    /// Path of the configuration file.
    pub fn config(&self) -> PathBuf {
        self.folder.path().join("gateway.toml")
    }

    /// Output so far.
    pub fn printed(&self) -> String {
        let read = |name| std::fs::read(self.folder.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&[read("out"), read("err")].concat()).into_owned()
    }

    /// Resident memory in KiB.
    pub fn memory_kb(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.process.0.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    /// Waits until the process has ended.
    pub async fn ended(&mut self, within: Duration) {
        let deadline = std::time::Instant::now() + within;
        while self.process.0.try_wait().unwrap().is_none() {
            assert!(std::time::Instant::now() < deadline, "the gateway did not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(secret_in(self.printed().as_bytes()), None, "it was printed");
        }
    }
}
