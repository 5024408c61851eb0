//! Checkpoints: folders `checkpoint-N` with weights, moments and data position, which determine all later steps. A
//! rename publishes a checkpoint atomically. The format is not that of `transformers`' trainer.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor, Var};
use potstill_engine::checkpoint_files::write_tensors;
use potstill_shared::durable::{publish_folder, remove_folder, write_file};
use serde::{Deserialize, Serialize};

use crate::adamw::AdamW;
use crate::error::LearnError;

/// Position of a run. With weights and moments it determines every later step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cursor {
    /// Hash of data, settings and base model. A checkpoint resumes only a run with the same hash.
    pub run_hash: String,
    /// Index of the current phase.
    pub phase: usize,
    /// Steps done in the current phase.
    pub step: usize,
    /// Steps done in all phases.
    pub global_step: usize,
    /// Optimizer steps since its moments were last reset.
    pub optimiser_step: usize,
    /// Log entries of all steps so far.
    pub log: Vec<LogEntry>,
}

/// Log entry of one step, as in `trainer_state.json` of transformers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Steps done in all phases, including this one.
    pub step: usize,
    /// Passes over the data of the current phase so far.
    pub epoch: f64,
    /// Loss of the step.
    pub loss: f64,
    /// Global norm of the gradients before clipping; 0 if the update was skipped.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Unix time in seconds.
    pub wall_time: f64,
    /// Further metrics of the algorithm, such as rewards, margins and divergences.
    #[serde(flatten)]
    pub metrics: BTreeMap<String, f64>,
}

/// Returns a checkpoint error for `path`.
fn checkpoint_error(path: &Path, problem: impl ToString) -> LearnError {
    LearnError::Checkpoint { path: path.to_owned(), problem: problem.to_string() }
}

/// Writes `checkpoint-N` to `folder`, where `N` is the global step. Removes all but the newest `keep` checkpoints; at
/// least one stays.
pub fn save_checkpoint(
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
        let json = serde_json::to_string_pretty(cursor).map_err(|error| checkpoint_error(folder, error))?;
        Ok(write_file(&folder.join("cursor.json"), json.as_bytes())?)
    })?;
    let mut all = list_checkpoints(folder);
    while all.len() > keep.max(1) {
        remove_folder(&all.remove(0).1)?;
    }
    Ok(())
}

/// Returns the checkpoints in `folder` as (step, path), oldest first.
fn list_checkpoints(folder: &Path) -> Vec<(usize, PathBuf)> {
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

/// Loads the newest checkpoint into `variables` and `optimiser`. Returns `None` if there is no checkpoint, and
/// [`LearnError::OtherRun`] if its hash differs from `run_hash`.
pub fn load_newest(
    folder: &Path,
    run_hash: &str,
    variables: &BTreeMap<String, Var>,
    optimiser: &mut AdamW,
) -> Result<Option<Cursor>, LearnError> {
    let Some((_, path)) = list_checkpoints(folder).pop() else { return Ok(None) };
    let text =
        std::fs::read_to_string(path.join("cursor.json")).map_err(|error| checkpoint_error(&path, error))?;
    let cursor: Cursor = serde_json::from_str(&text).map_err(|error| checkpoint_error(&path, error))?;
    if cursor.run_hash != run_hash {
        return Err(LearnError::RunMismatch { path });
    }
    let load = |name: &str| {
        candle_core::safetensors::load(path.join(name), &Device::Cpu)
            .map_err(|error| checkpoint_error(&path, error))
    };
    let mut weights = load("model.safetensors")?;
    for (name, variable) in variables {
        let tensor = weights
            .remove(name)
            .ok_or_else(|| checkpoint_error(&path, format!("tensor `{name}` is missing")))?;
        variable.set(&tensor.to_device(variable.device())?)?;
    }
    optimiser.restore(load("optimizer.safetensors")?, cursor.optimiser_step)?;
    Ok(Some(cursor))
}
