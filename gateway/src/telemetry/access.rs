//! The access log: one JSON line per request on standard output, without prompts and answers. Lines are written by one thread,
//! so a slow reader of the log never holds up a request; when it is too slow, lines are counted and left out.

use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use serde::Serialize;

/// Lines that may wait to be written.
const WAITING: usize = 8192;

/// Where lines go.
pub struct AccessLog {
    lines: SyncSender<String>,
}

/// One line.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    /// Seconds since 1970.
    pub time: f64,
    /// Id of the request.
    pub request: &'a str,
    /// Name of the key.
    pub key: &'a str,
    /// What was asked for.
    pub model: &'a str,
    /// The stage, if one was named.
    pub stage: Option<&'a str>,
    /// The node that answered.
    pub node: Option<&'a str>,
    /// Status.
    pub status: u16,
    /// How it ended.
    pub end: &'a str,
    /// Nodes that were tried.
    pub attempts: u32,
    /// Waiting for a slot.
    pub queue_ms: f64,
    /// Until the first piece.
    pub first_ms: Option<f64>,
    /// In all.
    pub total_ms: f64,
    /// Tokens read.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub completion_tokens: u64,
    /// Their price.
    pub cost: f64,
}

impl AccessLog {
    /// Starts the writer.
    pub fn start() -> std::io::Result<Self> {
        let (lines, waiting) = sync_channel(WAITING);
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || write(&waiting))?;
        Ok(Self { lines })
    }

    /// Writes a line, some time.
    pub fn push(&self, line: &Line<'_>) {
        let Ok(text) = serde_json::to_string(line) else { return };
        if let Err(TrySendError::Full(_)) = self.lines.try_send(text) {
            tracing::warn!("the access log is read too slowly; a line is left out");
        }
    }
}

fn write(waiting: &Receiver<String>) {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    while let Ok(line) = waiting.recv() {
        let mut lines = std::iter::once(line).chain(waiting.try_iter().take(WAITING));
        let written = lines.try_for_each(|line| writeln!(out, "{line}")).and_then(|()| out.flush());
        if let Err(error) = written {
            tracing::warn!(%error, "the access log cannot be written");
            return;
        }
    }
}
