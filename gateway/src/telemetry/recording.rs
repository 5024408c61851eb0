//! A recording of the load, one CSV row per finished request, for simulators of scaling policies:
//! `t_s,in_tokens,out_tokens,wait_s,stay_s,model,stage`. Times are seconds, `t_s` since the gateway started. No text is kept.

use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use potstill_shared::durable::append_lines;
use potstill_shared::openai::Usage;
use tokio::time::Instant;

use crate::record::Record;

/// Rows that may wait to be written.
const WAITING: usize = 8192;
/// The first line.
const HEADER: &str = "t_s,in_tokens,out_tokens,wait_s,stay_s,model,stage";

/// Where rows go.
pub struct Recording {
    rows: SyncSender<String>,
    epoch: Instant,
}

impl Recording {
    /// Opens the file and starts its writer; an existing recording is continued.
    pub fn start(path: &Path) -> Result<Self, String> {
        let file = append_lines(path).map_err(|error| error.to_string())?;
        let is_new = file.get_ref().metadata().map_err(|error| error.to_string())?.len() == 0;
        let (rows, waiting) = sync_channel(WAITING);
        let epoch = Instant::now();
        let recording = Self { rows, epoch };
        if is_new {
            recording.push(HEADER.to_owned());
        }
        std::thread::Builder::new()
            .name("recording".to_owned())
            .spawn(move || write(file, &waiting))
            .map_err(|error| error.to_string())?;
        Ok(recording)
    }

    fn push(&self, row: String) {
        if let Err(TrySendError::Full(_)) = self.rows.try_send(row) {
            tracing::warn!("the recording is written too slowly; a row is left out");
        }
    }

    /// Writes down a request that a node has answered.
    pub(crate) fn answered(&self, record: &Record, took: Duration, usage: Usage) {
        let arrived = record.started.saturating_duration_since(self.epoch).as_secs_f64();
        let (wait, stay) = (record.waited.as_secs_f64(), took.saturating_sub(record.waited).as_secs_f64());
        let stage = record.stage.as_deref().unwrap_or_default();
        let (read, written) = (usage.prompt_tokens, usage.completion_tokens);
        let model = &record.pool.model;
        self.push(format!("{arrived:.3},{read},{written},{wait:.3},{stay:.3},{model},{stage}"));
    }
}

fn write(mut file: impl Write, waiting: &Receiver<String>) {
    while let Ok(row) = waiting.recv() {
        let mut rows = std::iter::once(row).chain(waiting.try_iter().take(WAITING));
        let written = rows.try_for_each(|row| writeln!(file, "{row}")).and_then(|()| file.flush());
        if let Err(error) = written {
            tracing::error!(%error, "the recording cannot be written; it ends here");
            return;
        }
    }
}
