//! The run folder and its manifest. [`RunFolder`] lists the files. A stage's files are written in order of ids, so they
//! do not depend on timing. The journal is opened elsewhere.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;

use anyhow::Context;
use potstill_cot::executor::{Recorder, StageOutcome, StageSummary};
use potstill_data::jsonl::{ReadError, iter_records, read_records, write_records};
use potstill_data::records::Dropped;
use potstill_data::spool::{SortKey, SortedWriter, SortedWriterError};
use potstill_shared::durable::{DurableError, create_folder, write_file};
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};

/// Entry of a stage in the manifest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StageManifest {
    /// Number of records taken, kept, and dropped by reason.
    #[serde(flatten)]
    pub summary: StageSummary,
    /// Hash of the kept records.
    pub output_hash: String,
}

/// Manifest of a run, as in `run.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Name of the recipe.
    pub name: String,
    /// Version of this program.
    pub version: String,
    /// Hash of the recipe.
    pub recipe_hash: String,
    /// Sources of problems.
    #[serde(default)]
    pub sources: Vec<SourceManifest>,
    /// Finished stages by name.
    pub stages: BTreeMap<String, StageManifest>,
}

/// Entry of a source in the manifest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceManifest {
    /// Path or address, as in the recipe.
    pub path: String,
    /// License, if known.
    pub licence: Option<String>,
    /// Number of rows read.
    pub rows: usize,
    /// Number of its problems that were kept.
    pub kept: usize,
}

/// Files of a running stage.
pub struct StageFiles<T> {
    /// Kept records, for `NAME.jsonl`.
    pub kept: SortedWriter<T>,
    /// Dropped records, for `NAME.dropped.jsonl`.
    pub dropped: SortedWriter<Dropped>,
}

impl<T: SortKey + Send + 'static> Recorder<T> for StageFiles<T> {
    fn record(&mut self, outcome: &StageOutcome<T>) -> Result<(), String> {
        let kept = outcome.kept.iter().try_for_each(|record| self.kept.push(record));
        let all = kept.and_then(|()| outcome.dropped.iter().try_for_each(|record| self.dropped.push(record)));
        all.map_err(|error| error.to_string())
    }
}

/// An opened run folder.
///
/// ```text
/// RUN/recipe.toml                recipe of the last start
/// RUN/run.json                   manifest: counts and hashes by stage
/// RUN/journal.log                every paid completion
/// RUN/status.json                counts and spending during the run
/// RUN/quarantine.jsonl           rows of sources that could not be read
/// RUN/stages/NAME.jsonl          kept records of a stage, ordered by id
/// RUN/stages/NAME.dropped.jsonl  dropped records, with reasons
/// RUN/train/NAME/                checkpoints, trainer_state.json, TensorBoard events
/// RUN/models/NAME/               exported models
/// RUN/report.json, RUN/report.html
/// ```
pub struct RunFolder {
    path: PathBuf,
    manifest: Mutex<Manifest>,
}

impl RunFolder {
    /// Opens or creates the folder for a recipe called `name`, and copies the recipe into it. Fails if the folder
    /// belongs to a run with another name, because journal and stage files would mix.
    pub fn open(path: &Path, recipe: &Path, name: &str) -> anyhow::Result<Self> {
        create_folder(&path.join("stages"))?;
        let text = std::fs::read(recipe).with_context(|| format!("cannot read `{}`", recipe.display()))?;
        let manifest_path = path.join("run.json");
        let mut manifest = if manifest_path.exists() {
            let text = std::fs::read_to_string(&manifest_path)?;
            serde_json::from_str::<Manifest>(&text)
                .with_context(|| format!("`{}` is damaged", manifest_path.display()))?
        } else {
            Manifest::default()
        };
        anyhow::ensure!(
            manifest.name.is_empty() || manifest.name == name,
            "`{}` holds the run `{}`; choose another folder for `{name}`",
            path.display(),
            manifest.name
        );
        manifest.name = name.to_owned();
        manifest.version = env!("CARGO_PKG_VERSION").to_owned();
        manifest.recipe_hash = ContentId::from_bytes(&text).to_string();
        write_file(&path.join("recipe.toml"), &text)?;
        let folder = Self { path: path.to_owned(), manifest: Mutex::new(manifest) };
        folder.write_manifest()?;
        Ok(folder)
    }

    /// Returns the path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file of a stage's kept records.
    pub fn stage_file(&self, stage: &str) -> PathBuf {
        self.path.join("stages").join(format!("{stage}.jsonl"))
    }

    /// Returns the file of a stage's dropped records.
    pub fn dropped_file(&self, stage: &str) -> PathBuf {
        self.path.join("stages").join(format!("{stage}.dropped.jsonl"))
    }

    /// Creates the files of a stage that starts.
    pub fn create_stage_files<T: SortKey>(&self) -> anyhow::Result<StageFiles<T>> {
        let folder = self.path.join("stages");
        Ok(StageFiles { kept: SortedWriter::new(&folder)?, dropped: SortedWriter::new(&folder)? })
    }

    /// Publishes the files of a finished stage and its entry in the manifest.
    pub fn publish_stage<T: SortKey>(
        &self,
        stage: &str,
        files: StageFiles<T>,
        summary: StageSummary,
    ) -> Result<(), SortedWriterError> {
        files.dropped.write_sorted(&self.dropped_file(stage))?;
        let written = files.kept.write_sorted(&self.stage_file(stage))?;
        Ok(self.set_stage_entry(stage, summary, written.hash.to_string())?)
    }

    /// Writes the records of a stage, in the given order, and its entry in the manifest.
    pub fn write_stage<T: Serialize>(
        &self,
        stage: &str,
        records: &[T],
        summary: StageSummary,
    ) -> anyhow::Result<()> {
        let path = self.stage_file(stage);
        write_records(&path, records)?;
        let output_hash = ContentId::from_bytes(&std::fs::read(&path)?).to_string();
        Ok(self.set_stage_entry(stage, summary, output_hash)?)
    }

    /// Sets the manifest entry of a stage.
    fn set_stage_entry(
        &self,
        stage: &str,
        summary: StageSummary,
        output_hash: String,
    ) -> Result<(), DurableError> {
        self.update_manifest(|manifest| {
            manifest.stages.insert(stage.to_owned(), StageManifest { summary, output_hash });
        })
    }

    /// Sets the sources in the manifest.
    pub fn set_sources(&self, sources: Vec<SourceManifest>) -> Result<(), DurableError> {
        self.update_manifest(|manifest| manifest.sources = sources)
    }

    /// Changes the manifest and writes it.
    fn update_manifest(&self, change: impl FnOnce(&mut Manifest)) -> Result<(), DurableError> {
        change(&mut self.manifest.lock().unwrap_or_else(PoisonError::into_inner));
        self.write_manifest()
    }

    /// Reads all records of a stage. Fails if the stage has no file.
    pub fn read_stage<T: for<'de> Deserialize<'de>>(&self, stage: &str) -> anyhow::Result<Vec<T>> {
        Ok(read_records(&self.existing_stage_file(stage)?)?)
    }

    /// Reads the records of a stage one at a time, each with the offset of its line.
    pub fn stage_records<T: for<'de> Deserialize<'de>>(
        &self,
        stage: &str,
    ) -> anyhow::Result<impl Iterator<Item = Result<(u64, T), ReadError>> + use<T>> {
        Ok(iter_records(&self.existing_stage_file(stage)?)?)
    }

    /// Returns the file of a stage, or an error if it does not exist.
    fn existing_stage_file(&self, stage: &str) -> anyhow::Result<PathBuf> {
        let path = self.stage_file(stage);
        anyhow::ensure!(path.exists(), "`{}` does not exist; run `potstill {stage}` first", path.display());
        Ok(path)
    }

    /// Returns a copy of the current manifest.
    pub fn manifest(&self) -> Manifest {
        self.manifest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes the manifest to `run.json`.
    fn write_manifest(&self) -> Result<(), DurableError> {
        // A manifest contains only values that JSON can represent.
        let json = serde_json::to_string_pretty(&self.manifest()).unwrap_or_default();
        write_file(&self.path.join("run.json"), format!("{json}\n").as_bytes())
    }
}
