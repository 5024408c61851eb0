//! The access log: one JSON line per request on standard output, without prompts and completions. One thread writes the lines,
//! so a slow reader of the log never delays a request. Lines that do not fit its queue are dropped and counted.

use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use serde::Serialize;

/// Capacity of the queue, in lines.
const QUEUE_LINES: usize = 8192;

/// Queue of lines to write.
pub struct AccessLog {
    lines: SyncSender<String>,
}

/// One line.
#[derive(Debug, Serialize)]
pub struct LogLine<'a> {
    /// Unix time in seconds.
    pub time: f64,
    /// Id of the request.
    pub request: &'a str,
    /// Name of the key.
    pub key: &'a str,
    /// Model that the client asked for.
    pub model: &'a str,
    /// Stage, if the client named one.
    pub stage: Option<&'a str>,
    /// Node of the last attempt.
    pub node: Option<&'a str>,
    /// HTTP status.
    pub status: u16,
    /// How the request ended.
    pub outcome: &'a str,
    /// Attempts on nodes.
    pub attempts: u32,
    /// Time spent waiting for slots.
    pub queue_ms: f64,
    /// Time to the first piece of the response.
    pub first_ms: Option<f64>,
    /// Time to the end of the response.
    pub total_ms: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the completion.
    pub completion_tokens: u64,
    /// Price of the tokens.
    pub cost: f64,
}

impl AccessLog {
    /// Starts the writer thread.
    pub fn start() -> std::io::Result<Self> {
        let (lines, queue) = sync_channel(QUEUE_LINES);
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || write_lines(&queue))?;
        Ok(Self { lines })
    }

    /// Queues a line.
    pub fn push(&self, line: &LogLine<'_>) {
        let Ok(text) = serde_json::to_string(line) else { return };
        if let Err(TrySendError::Full(_)) = self.lines.try_send(text) {
            tracing::warn!("the access log is read too slowly; a line was dropped");
        }
    }
}

fn write_lines(queue: &Receiver<String>) {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    while let Ok(line) = queue.recv() {
        let mut lines = std::iter::once(line).chain(queue.try_iter().take(QUEUE_LINES));
        let written = lines.try_for_each(|line| writeln!(out, "{line}")).and_then(|()| out.flush());
        if let Err(error) = written {
            tracing::warn!(%error, "the access log cannot be written");
            return;
        }
    }
}
