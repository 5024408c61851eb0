//! Status of a run: `status.json` in its folder, rewritten every two seconds, and `potstill status`, which reads it.
//! Only the local machine is checked for a running process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use potstill_cot::executor::{StageCounts, StageSummary};
use potstill_cot::ledger::{Amounts, BudgetLimits, Ledger};
use potstill_cot::teacher::TeacherClient;
use potstill_shared::durable::write_file;
use serde::{Deserialize, Serialize};

use crate::run::{Manifest, RunFolder};
use crate::stage_id::StageId;

/// Interval between two writes.
const WRITE_INTERVAL: Duration = Duration::from_secs(2);
/// Age in seconds above which a status does not count as that of a running process.
const MAX_AGE_S: u64 = 15;

/// Status of a running stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageStatus {
    /// Name of the stage.
    pub name: String,
    /// Number of records done.
    pub done: u64,
    /// Number of records taken, kept and dropped.
    #[serde(flatten)]
    pub summary: StageSummary,
}

/// Contents of `status.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusSnapshot {
    /// Id of the process.
    pub pid: u32,
    /// Unix time of the write, in seconds.
    pub written: u64,
    /// Seconds since the stages started.
    pub seconds: f64,
    /// Number of records in the input of the first stage.
    pub total: u64,
    /// Running stages; records stream through all of them.
    pub stages: Vec<StageStatus>,
    /// Spending by stage, of all processes of this run.
    pub spent: BTreeMap<String, Amounts>,
    /// Limits on the spending of the run.
    pub limits: BudgetLimits,
}

impl StatusSnapshot {
    /// Returns the estimated seconds until the last stage has finished, at the average speed so far. `None` before the
    /// first record is done.
    fn seconds_left(&self) -> Option<f64> {
        let (first, last) = (self.stages.first()?, self.stages.last()?);
        let share = if self.stages.len() == 1 || last.summary.taken == 0 {
            first.done as f64 / self.total.max(1) as f64
        } else {
            // Expected input of the last stage after the first one has finished.
            let come = last.summary.taken as f64 * self.total as f64 / first.done.max(1) as f64;
            last.done as f64 / come.max(1.0)
        };
        (share > 0.0).then(|| self.seconds * (1.0 - share.min(1.0)) / share)
    }
}

/// Writer of the status.
#[derive(Clone)]
pub(crate) struct StatusWriter {
    path: PathBuf,
    stages: Vec<(&'static str, Arc<StageCounts>)>,
    total: u64,
    ledger: Arc<Ledger>,
    begun: Instant,
}

impl StatusWriter {
    /// Creates a writer for the given stages.
    pub(crate) fn new(
        folder: &RunFolder,
        stages: &[(&'static str, Arc<StageCounts>)],
        total: u64,
        teachers: &TeacherClient,
    ) -> Self {
        Self {
            path: folder.path().join("status.json"),
            stages: stages.to_vec(),
            total,
            ledger: Arc::clone(teachers.ledger()),
            begun: Instant::now(),
        }
    }

    /// Returns the current status.
    fn snapshot(&self) -> StatusSnapshot {
        let stages = self.stages.iter().map(|(name, counts)| StageStatus {
            name: (*name).to_owned(),
            done: counts.done.load(Ordering::Relaxed) as u64,
            summary: counts.summary(),
        });
        StatusSnapshot {
            pid: std::process::id(),
            written: unix_time_s(),
            seconds: self.begun.elapsed().as_secs_f64(),
            total: self.total,
            stages: stages.collect(),
            spent: self.ledger.spent(),
            limits: self.ledger.budget().run_limits(),
        }
    }

    /// Writes the status once. A failure is only logged: a full disk also fails writes whose data matter, and these
    /// stop the run.
    pub(crate) fn write(&self) {
        let text = serde_json::to_vec_pretty(&self.snapshot()).unwrap_or_default();
        if let Err(error) = write_file(&self.path, &text) {
            tracing::warn!(%error, "the status was not written");
        }
    }

    /// Writes the status at a fixed interval until the future is dropped.
    pub(crate) async fn write_periodically(self) {
        let mut ticks = tokio::time::interval(WRITE_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            tokio::task::block_in_place(|| self.write());
        }
    }
}

/// Returns the Unix time in seconds.
fn unix_time_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Status of a run, as shown by `potstill status`.
#[derive(Debug, Serialize)]
pub struct RunStatus {
    /// Whether a process is working on the run.
    pub running: bool,
    /// Manifest with finished stages and sources.
    pub manifest: Manifest,
    /// Last status that a process wrote.
    pub now: Option<StatusSnapshot>,
    /// Estimated seconds until the running stages have finished.
    pub seconds_left: Option<f64>,
}

/// Reads the status of a run folder. Fails if the folder contains no run.
pub fn read_status(folder: &Path) -> anyhow::Result<RunStatus> {
    let path = folder.join("run.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("`{}` holds no run: cannot read `{}`", folder.display(), path.display()))?;
    let manifest = serde_json::from_str(&text).with_context(|| format!("`{}` is damaged", path.display()))?;
    let now_said = std::fs::read_to_string(folder.join("status.json")).ok();
    let snapshot: Option<StatusSnapshot> = now_said.and_then(|text| serde_json::from_str(&text).ok());
    let running = snapshot.as_ref().is_some_and(|snapshot| {
        unix_time_s().saturating_sub(snapshot.written) <= MAX_AGE_S
            && Path::new(&format!("/proc/{}", snapshot.pid)).exists()
    });
    let seconds_left = snapshot.as_ref().filter(|_| running).and_then(StatusSnapshot::seconds_left);
    Ok(RunStatus { running, manifest, now: snapshot, seconds_left })
}

/// Formats the status as text for the terminal.
pub fn status_table(status: &RunStatus) -> String {
    let mut text = format!(
        "run `{}`: {}\n",
        status.manifest.name,
        if status.running { "running" } else { "no process is working on it" }
    );
    let row = |name: &str, mark: &str, summary: &StageSummary| {
        let reasons: Vec<String> =
            summary.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        format!("{name:<22} {mark:<8} {:>9} {:>9}  {}\n", summary.taken, summary.kept, reasons.join(", "))
    };
    text.push_str(&format!("{:<22} {:<8} {:>9} {:>9}  dropped\n", "stage", "", "in", "kept"));
    let now: Vec<&StageStatus> =
        status.now.iter().filter(|_| status.running).flat_map(|now| &now.stages).collect();
    for name in StageId::ALL
        .iter()
        .map(|stage| stage.name().to_owned())
        .chain(status.manifest.stages.keys().filter(|name| name.starts_with("evaluate")).cloned())
    {
        if let Some(stage) = now.iter().find(|stage| stage.name == name) {
            text.push_str(&row(&name, "running", &stage.summary));
        } else if let Some(stage) = status.manifest.stages.get(&name) {
            text.push_str(&row(&name, "done", &stage.summary));
        }
    }
    let Some(now) = &status.now else { return text };
    text.push_str(&format!("\n{:<22} {:>9} {:>13} {:>10}\n", "spent", "requests", "tokens", "cost"));
    let mut all = Amounts::default();
    for (stage, amounts) in &now.spent {
        all = all.plus(*amounts);
        let Amounts { requests, tokens, cost } = amounts;
        text.push_str(&format!("{stage:<22} {requests:>9} {tokens:>13} {cost:>10.4}\n"));
    }
    text.push_str(&format!("{:<22} {:>9} {:>13} {:>10.4}\n", "all", all.requests, all.tokens, all.cost));
    let limit = |most: Option<String>| most.unwrap_or_else(|| "-".to_owned());
    if now.limits != BudgetLimits::default() {
        text.push_str(&format!(
            "{:<22} {:>9} {:>13} {:>10}\n",
            "budget",
            limit(now.limits.requests.map(|most| most.to_string())),
            limit(now.limits.tokens.map(|most| most.to_string())),
            limit(now.limits.cost.map(|most| format!("{most:.4}"))),
        ));
    }
    if let Some(seconds) = status.seconds_left {
        text.push_str(&format!("\n{seconds:.0} s left at the pace so far\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(name: &str, taken: usize, done: u64, kept: usize) -> StageStatus {
        StageStatus {
            name: name.into(),
            done,
            summary: StageSummary { taken, kept, ..StageSummary::default() },
        }
    }

    #[test]
    fn time_left_depends_on_the_last_stage() {
        let snapshot = |stages| StatusSnapshot {
            pid: 1,
            written: 0,
            seconds: 30.0,
            total: 100,
            stages,
            spent: BTreeMap::new(),
            limits: BudgetLimits::default(),
        };
        assert_eq!(snapshot(vec![]).seconds_left(), None);
        assert_eq!(snapshot(vec![stage("generate", 30, 25, 50)]).seconds_left(), Some(90.0));
        // 25 of 100 problems gave 50 traces, so 200 traces are expected; 40 are done.
        let both = snapshot(vec![stage("generate", 30, 25, 50), stage("score", 50, 40, 40)]);
        assert_eq!(both.seconds_left(), Some(120.0));
    }
}
