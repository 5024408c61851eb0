//! The run folder: recipe, journal, one file per stage, models, report, and a manifest with what went in and out of each
//! stage.
//!
//! ```text
//! RUN/recipe.toml     the recipe as it was when the run began
//! RUN/run.json        manifest: counts and hashes by stage
//! RUN/journal.log     every answer that was paid for
//! RUN/quarantine.jsonl lines of sources that could not be read
//! RUN/dropped.jsonl    problems that were left out: copies, nearly so, or in the test
//! RUN/stages/*.jsonl  records, ordered by id
//! RUN/train/NAME/     checkpoints, trainer_state.json, TensorBoard events
//! RUN/models/NAME/    exported students
//! RUN/report.json, RUN/report.html
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;

use anyhow::Context;
use potstill_cot::executor::Summary;
use potstill_data::jsonl::{read_records, write_records};
use potstill_shared::durable::{create_folder, write_file};
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};

/// What the manifest says of a stage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StageManifest {
    /// Counts in, kept and dropped by reason.
    #[serde(flatten)]
    pub summary: Summary,
    /// Hash of the records written.
    pub output_hash: String,
}

/// The manifest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Name of the recipe.
    pub name: String,
    /// Version of this program.
    pub version: String,
    /// Hash of the recipe.
    pub recipe_hash: String,
    /// Stages by name.
    pub stages: BTreeMap<String, StageManifest>,
}

/// An opened run folder.
pub struct RunFolder {
    path: PathBuf,
    manifest: Mutex<Manifest>,
}

impl RunFolder {
    /// Opens or creates the folder for a recipe. A folder of another recipe is refused: its journal would answer other
    /// questions, and its stage files would mix.
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
        manifest.recipe_hash = ContentId::of_bytes(&text).to_string();
        write_file(&path.join("recipe.toml"), &text)?;
        let folder = Self { path: path.to_owned(), manifest: Mutex::new(manifest) };
        folder.write_manifest()?;
        Ok(folder)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// File of a stage's records.
    pub fn stage_file(&self, stage: &str) -> PathBuf {
        self.path.join("stages").join(format!("{stage}.jsonl"))
    }

    /// Writes a stage's records and its line in the manifest.
    pub fn write_stage<T: Serialize>(
        &self,
        stage: &str,
        records: &[T],
        summary: Summary,
    ) -> anyhow::Result<()> {
        let path = self.stage_file(stage);
        write_records(&path, records)?;
        let output_hash = ContentId::of_bytes(&std::fs::read(&path)?).to_string();
        let mut manifest = self.manifest.lock().unwrap_or_else(PoisonError::into_inner);
        manifest.stages.insert(stage.to_owned(), StageManifest { summary, output_hash });
        drop(manifest);
        self.write_manifest()
    }

    /// Reads the records of a stage.
    pub fn read_stage<T: for<'de> Deserialize<'de>>(&self, stage: &str) -> anyhow::Result<Vec<T>> {
        let path = self.stage_file(stage);
        anyhow::ensure!(path.exists(), "`{}` does not exist; run `potstill {stage}` first", path.display());
        Ok(read_records(&path)?)
    }

    /// The manifest as it stands.
    pub fn manifest(&self) -> Manifest {
        self.manifest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn write_manifest(&self) -> anyhow::Result<()> {
        let manifest = self.manifest();
        let json = serde_json::to_string_pretty(&manifest)?;
        Ok(write_file(&self.path.join("run.json"), format!("{json}\n").as_bytes())?)
    }
}
