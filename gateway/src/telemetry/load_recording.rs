//! A recording of the load for simulators of scaling policies: one CSV row per complete request,
//! `t_s,in_tokens,out_tokens,wait_s,stay_s,model,stage`. Times are seconds; `t_s` counts from the start of the gateway. No
//! text is recorded.

use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use potstill_shared::durable::open_for_append;
use tokio::time::Instant;

use super::request_summary::RequestSummary;

/// Capacity of the queue, in rows.
const QUEUE_ROWS: usize = 8192;
/// First line of the file.
const HEADER: &str = "t_s,in_tokens,out_tokens,wait_s,stay_s,model,stage";

/// Queue of rows to write.
pub struct LoadRecording {
    rows: SyncSender<String>,
    epoch: Instant,
}

impl LoadRecording {
    /// Opens the file and starts its writer thread; an existing recording is continued.
    pub fn start(path: &Path) -> Result<Self, String> {
        let file = open_for_append(path).map_err(|error| error.to_string())?;
        let is_new = file.get_ref().metadata().map_err(|error| error.to_string())?.len() == 0;
        let (rows, queue) = sync_channel(QUEUE_ROWS);
        let recording = Self { rows, epoch: Instant::now() };
        if is_new {
            recording.send(HEADER.to_owned());
        }
        std::thread::Builder::new()
            .name("load-recording".to_owned())
            .spawn(move || write_rows(file, &queue))
            .map_err(|error| error.to_string())?;
        Ok(recording)
    }

    fn send(&self, row: String) {
        if let Err(TrySendError::Full(_)) = self.rows.try_send(row) {
            tracing::warn!("the load recording is written too slowly; a row was dropped");
        }
    }

    /// Queues the row of a complete request.
    pub fn push(&self, request: &RequestSummary<'_>) {
        let arrived = request.started.saturating_duration_since(self.epoch).as_secs_f64();
        let wait = request.queue_time.as_secs_f64();
        let stay = request.duration.saturating_sub(request.queue_time).as_secs_f64();
        let (prompt, completion) = (request.usage.prompt_tokens, request.usage.completion_tokens);
        let (model, stage) = (request.served_model, request.stage.unwrap_or_default());
        self.send(format!("{arrived:.3},{prompt},{completion},{wait:.3},{stay:.3},{model},{stage}"));
    }
}

fn write_rows(mut file: impl Write, queue: &Receiver<String>) {
    while let Ok(row) = queue.recv() {
        let mut rows = std::iter::once(row).chain(queue.try_iter().take(QUEUE_ROWS));
        let written = rows.try_for_each(|row| writeln!(file, "{row}")).and_then(|()| file.flush());
        if let Err(error) = written {
            tracing::error!(%error, "the load recording cannot be written; it ends here");
            return;
        }
    }
}
