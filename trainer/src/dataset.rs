//! `potstill dataset`: exports the traces of a run as a dataset. The output is a table in a published format, and a
//! card with the origin of the rows. Formats that LLaMA-Factory reads also get an entry for it.

mod card;
mod pairs;
mod shapes;

use std::path::{Path, PathBuf};

use anyhow::Context;
use potstill_data::columns::write_parquet;
use potstill_data::jsonl::iter_records;
use potstill_data::records::Trace;
use potstill_shared::durable::{create_folder, write_file, write_file_with};
use serde_json::{Value, json};

pub use shapes::DatasetFormat;

use crate::run::Manifest;

/// Arguments of `potstill dataset`.
#[derive(clap::Args)]
pub struct DatasetArguments {
    /// Run folder.
    pub run: PathBuf,
    /// Output folder.
    pub out: PathBuf,
    /// Columns of the table.
    #[arg(long, value_enum, default_value = "messages")]
    pub format: DatasetFormat,
    /// Stage whose traces are exported.
    #[arg(long, default_value = "sample", value_parser = ["generate", "difficulty", "verify", "score", "sample"])]
    pub stage: String,
    /// Write Parquet instead of JSON lines.
    #[arg(long)]
    pub parquet: bool,
    /// `beta` of pairs with a small, medium and large gap, for `cogpo`.
    #[arg(long, value_delimiter = ',', num_args = 3, default_values_t = [0.1, 0.2, 0.5])]
    pub betas: Vec<f64>,
}

/// A written dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenDataset {
    /// Path of the table.
    pub path: PathBuf,
    /// Number of rows.
    pub rows: usize,
}

/// Rows of a table, produced one at a time.
type Rows = Box<dyn Iterator<Item = anyhow::Result<Value>>>;

/// Writes the dataset: table, card, and LLaMA-Factory's entry. Fails if no row fits the format.
pub fn write_dataset(arguments: &DatasetArguments) -> anyhow::Result<WrittenDataset> {
    let run = RunReader::open(&arguments.run)?;
    let shape = arguments.format;
    let rows: Rows = match shape {
        DatasetFormat::Dpo => Box::new(pairs::dpo_pairs(&run, &arguments.stage)?),
        DatasetFormat::Cogpo => {
            let betas: [f64; 3] =
                arguments.betas.clone().try_into().ok().context("`--betas` takes three numbers")?;
            Box::new(pairs::cogpo_pairs(&run, &arguments.stage, betas)?)
        }
        DatasetFormat::Omnithought => Box::new(run.rows_by_problem(&arguments.stage)?),
        _ => {
            let prompt = run.prompt.clone();
            let traces = run.traces(&arguments.stage)?;
            Box::new(traces.map(move |trace| Ok(shape.row(&trace?, &prompt))))
        }
    };
    create_folder(&arguments.out)?;
    let file = if arguments.parquet { "train.parquet" } else { "train.jsonl" };
    let path = arguments.out.join(file);
    let rows = if arguments.parquet {
        write_parquet(&path, &shape.columns(), rows)?
    } else {
        write_jsonl(&path, rows)?
    };
    anyhow::ensure!(rows > 0, "`{}` holds nothing for this format", arguments.run.display());
    let card = card::dataset_card(&run.manifest, shape, rows, file);
    write_file(&arguments.out.join("README.md"), card.as_bytes())?;
    if let Some(entry) = shape.llama_factory(file) {
        let info = serde_json::to_string_pretty(&json!({ (run.manifest.name.clone()): entry }))?;
        write_file(&arguments.out.join("dataset_info.json"), format!("{info}\n").as_bytes())?;
    }
    Ok(WrittenDataset { path, rows })
}

/// Writes `rows` as JSON lines and returns their number.
fn write_jsonl(path: &Path, rows: Rows) -> anyhow::Result<usize> {
    let (mut count, mut fault) = (0, None);
    let written = write_file_with(path, |file| {
        use std::io::Write;
        for row in rows {
            match row {
                Ok(row) => {
                    serde_json::to_writer(&mut *file, &row)?;
                    file.write_all(b"\n")?;
                    count += 1;
                }
                Err(error) => {
                    fault = Some(error);
                    return Err(std::io::ErrorKind::InvalidData.into());
                }
            }
        }
        Ok(())
    });
    match fault {
        Some(fault) => Err(fault),
        None => Ok(written.map(|()| count)?),
    }
}

/// Folder of a run, opened for reading.
struct RunReader {
    path: PathBuf,
    manifest: Manifest,
    /// Prompt of the student; `{{ problem }}` stands for the problem.
    prompt: String,
}

impl RunReader {
    /// Opens a run folder. Fails if `run.json` or `recipe.toml` is missing or damaged.
    fn open(path: &Path) -> anyhow::Result<Self> {
        let read = |name: &str| {
            let file = path.join(name);
            std::fs::read_to_string(&file).with_context(|| {
                format!("`{}` holds no run: cannot read `{}`", path.display(), file.display())
            })
        };
        let manifest = serde_json::from_str(&read("run.json")?)
            .with_context(|| format!("`{}` is damaged", path.join("run.json").display()))?;
        // The recipe was checked when the run started; only the student's prompt is needed here.
        let recipe: toml::Table = read("recipe.toml")?.parse()?;
        let prompt = recipe.get("student").and_then(|student| student.get("prompt")?.as_str());
        let prompt = prompt.unwrap_or("{{ problem }}").to_owned();
        Ok(Self { path: path.to_owned(), manifest, prompt })
    }

    /// Returns the path of a stage file. Fails if the file does not exist.
    fn stage_file(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.path.join("stages").join(name);
        anyhow::ensure!(path.exists(), "`{}` does not exist: the run has not come so far", path.display());
        Ok(path)
    }

    /// Returns the traces of a stage, one at a time.
    fn traces(&self, stage: &str) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Trace>> + use<>> {
        let rows = iter_records::<Trace>(&self.stage_file(&format!("{stage}.jsonl"))?)?;
        Ok(rows.map(|row| Ok(row?.1)))
    }

    /// Returns one OmniThought row per problem, with all its traces of the stage.
    fn rows_by_problem(
        &self,
        stage: &str,
    ) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Value>> + use<>> {
        let file = self.stage_file(&format!("{stage}.jsonl"))?;
        let mut places: Vec<(u64, u64)> = Vec::new();
        for row in iter_records::<Trace>(&file)? {
            let (place, trace) = row?;
            places.push((trace.problem.id.seed(), place));
        }
        places.sort_unstable();
        let lines = potstill_shared::durable::LineReader::open(&file)?;
        let groups: Vec<Vec<u64>> = places
            .chunk_by(|a, b| a.0 == b.0)
            .map(|group| group.iter().map(|(_, place)| *place).collect())
            .collect();
        Ok(groups.into_iter().map(move |places| {
            let traces =
                places.into_iter().map(|place| Ok(serde_json::from_str(&lines.read_line_at(place)?)?));
            Ok(shapes::omnithought_row(&traces.collect::<anyhow::Result<Vec<Trace>>>()?))
        }))
    }
}
