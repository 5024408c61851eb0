//! Processes under measurement: pinned to a core, observed through `/proc`, killed when dropped.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

/// A running process, killed when it is dropped.
pub(crate) struct Process {
    child: Child,
    /// Time from the start until the port accepted a connection.
    pub(crate) started_in: Duration,
    /// Resident memory in KiB when the process was ready.
    pub(crate) fresh_kb: u64,
}

impl Process {
    /// Starts `command` on `core` and waits until `port` accepts connections.
    pub(crate) async fn start(core: &str, command: &[String], port: u16) -> anyhow::Result<Self> {
        let started = Instant::now();
        let child = Command::new("taskset")
            .args(["-c", core])
            .args(command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start `{}`", command[0]))?;
        let mut process = Self { child, started_in: Duration::ZERO, fresh_kb: 0 };
        for _ in 0..5_000 {
            if tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                process.started_in = started.elapsed();
                process.fresh_kb = process.memory_kb();
                return Ok(process);
            }
            if let Some(status) = process.child.try_wait()? {
                anyhow::bail!("`{}` ended with {status} instead of listening on {port}", command.join(" "));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        anyhow::bail!("`{}` does not listen on {port}", command.join(" "))
    }

    /// CPU time of all threads so far.
    pub(crate) fn cpu(&self) -> Duration {
        let tasks =
            std::fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten().flatten();
        let nanoseconds = tasks.filter_map(|task| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split_whitespace().next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanoseconds.sum())
    }

    /// Resident memory in KiB.
    pub(crate) fn memory_kb(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        line.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// Kills the process.
    pub(crate) fn kill(&mut self) {
        let _already_dead = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Returns a TCP port that is currently free.
pub(crate) fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
