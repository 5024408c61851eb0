//! Checkpoints: a folder `checkpoint-N` made whole by one rename, with everything that the next step depends on.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor, Var};
use potstill_engine::checkpoint_files::write_tensors;
use potstill_shared::durable::{publish_folder, remove_folder, write_file};
use serde::{Deserialize, Serialize};

use crate::adamw::AdamW;
use crate::error::LearnError;

/// Where a run stands. Together with weights and moments this fixes every later step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cursor {
    /// Hash of data, phases and settings; another hash never resumes from here.
    pub run_hash: String,
    /// Index of the phase.
    pub phase: usize,
    /// Steps done in it.
    pub step: usize,
    /// Steps done in all.
    pub global_step: usize,
    /// Steps that the optimiser counts.
    pub optimiser_step: usize,
    /// What was logged so far.
    pub log: Vec<LogEntry>,
}

/// One line of the training log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Step in all.
    pub step: usize,
    /// Times the data were seen.
    pub epoch: f64,
    /// Mean loss per learnt token.
    pub loss: f64,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Rate of the step.
    pub learning_rate: f64,
    /// Seconds since 1970.
    pub wall_time: f64,
    /// What else the algorithm measures: rewards, margins, divergences.
    #[serde(flatten)]
    pub metrics: BTreeMap<String, f64>,
}

fn broken(path: &Path, problem: impl ToString) -> LearnError {
    LearnError::Checkpoint { path: path.to_owned(), problem: problem.to_string() }
}

/// Writes `checkpoint-N` under `folder` and removes all but the newest `keep`.
pub fn save(
    folder: &Path,
    cursor: &Cursor,
    variables: &BTreeMap<String, Var>,
    optimiser: &AdamW,
    keep: usize,
) -> Result<(), LearnError> {
    let weights: HashMap<String, Tensor> =
        variables.iter().map(|(name, variable)| (name.clone(), variable.as_tensor().clone())).collect();
    let moments = optimiser.state()?;
    let path = folder.join(format!("checkpoint-{}", cursor.global_step));
    publish_folder::<LearnError>(&path, |folder| {
        write_tensors(&folder.join("model.safetensors"), &weights)?;
        write_tensors(&folder.join("optimizer.safetensors"), &moments)?;
        let json = serde_json::to_string_pretty(cursor).map_err(|error| broken(folder, error))?;
        Ok(write_file(&folder.join("cursor.json"), json.as_bytes())?)
    })?;
    let mut all = list(folder);
    while all.len() > keep.max(1) {
        remove_folder(&all.remove(0).1)?;
    }
    Ok(())
}

/// Checkpoints under `folder`, oldest first.
fn list(folder: &Path) -> Vec<(usize, PathBuf)> {
    let mut found: Vec<(usize, PathBuf)> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            Some((name.to_str()?.strip_prefix("checkpoint-")?.parse().ok()?, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// Loads the newest checkpoint of this run into variables and optimiser; `None` when there is none.
pub fn resume(
    folder: &Path,
    run_hash: &str,
    variables: &BTreeMap<String, Var>,
    optimiser: &mut AdamW,
) -> Result<Option<Cursor>, LearnError> {
    let Some((_, path)) = list(folder).pop() else { return Ok(None) };
    let text = std::fs::read_to_string(path.join("cursor.json")).map_err(|error| broken(&path, error))?;
    let cursor: Cursor = serde_json::from_str(&text).map_err(|error| broken(&path, error))?;
    if cursor.run_hash != run_hash {
        return Err(LearnError::OtherRun { path });
    }
    let load = |name: &str| {
        candle_core::safetensors::load(path.join(name), &Device::Cpu).map_err(|error| broken(&path, error))
    };
    let mut weights = load("model.safetensors")?;
    for (name, variable) in variables {
        let tensor =
            weights.remove(name).ok_or_else(|| broken(&path, format!("tensor `{name}` is missing")))?;
        variable.set(&tensor.to_device(variable.device())?)?;
    }
    optimiser.restore(load("optimizer.safetensors")?, cursor.optimiser_step)?;
    Ok(Some(cursor))
}
