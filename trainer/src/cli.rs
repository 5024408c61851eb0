//! Command line of `potstill`: one enum variant per subcommand. Subcommands are implemented in the other modules of
//! this crate.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand};
use potstill_shared::redact::Secret;

use crate::bench::{self, BenchArguments};
use crate::calibrate;
use crate::compress::{self, QuantizeArguments};
use crate::dataset;
use crate::demo::{DemoArguments, run_demo};
use crate::eval::{self, EvalArguments};
use crate::import;
use crate::lineage;
use crate::pairs::{self, PairArguments};
use crate::pipeline::{Run, SharedStore, plan};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::run_recipe::{AfterRun, print_line, run_all_stages};
use crate::selection;
use crate::serve::{ServeArguments, serve};
use crate::stage_id::StageId;
use crate::status;

/// Distill reasoning models: teachers write chains of thought, students are trained on them, and all are served through
/// one OpenAI-compatible API.
#[derive(Parser)]
#[command(name = "potstill", version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// Recipe, run folder and store of a run.
#[derive(clap::Args)]
struct RunArguments {
    /// TOML file of the recipe.
    recipe: PathBuf,
    /// Run folder; `runs/NAME` if left out. The same command resumes a stopped run.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Port of the local gateway on 127.0.0.1; any free port if left out.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// PostgreSQL database that stores the completions for several workers; the run folder's journal if left out.
    #[arg(long, value_name = "postgres://…", env = "POTSTILL_STORE", hide_env_values = true)]
    store: Option<String>,
    /// Number of shards for a new run in that database.
    #[arg(long, default_value_t = 64, requires = "store", value_parser = clap::value_parser!(u32).range(1..=65536))]
    shards: u32,
}

impl RunArguments {
    /// Returns the settings of the shared store, or `None` without `--store`.
    fn store(&self) -> Option<SharedStore> {
        let url = Secret::new(self.store.clone()?);
        Some(SharedStore { url, shards: self.shards })
    }

    /// Reads the recipe and opens the run.
    async fn start(&self, progress: Progress) -> anyhow::Result<Run> {
        let recipe = Recipe::load(&self.recipe)?;
        let out = run_folder(self, &recipe);
        Run::start(recipe, &self.recipe, &out, self.port, self.store().as_ref(), progress).await
    }
}

/// Either the stage of a run, or pairs of answers.
#[derive(clap::Args)]
struct VerifyArguments {
    #[command(flatten)]
    pairs: PairArguments,
    /// TOML file of the recipe, for the stage.
    #[arg(required_unless_present = "pairs", conflicts_with = "pairs")]
    recipe: Option<PathBuf>,
    /// Run folder; `runs/NAME` if left out.
    #[arg(long, conflicts_with = "pairs")]
    out: Option<PathBuf>,
    /// Port of the local gateway on 127.0.0.1; any free port if left out.
    #[arg(long, default_value_t = 0, conflicts_with = "pairs")]
    port: u16,
}

#[derive(Subcommand)]
enum Command {
    /// Run the whole pipeline on built-in data: teacher, gateway, chains of thought, students, evaluation.
    Demo(DemoArguments),
    /// Run a recipe from problems to evaluation.
    Run {
        #[command(flatten)]
        run: RunArguments,
        /// Keep serving the student through the local gateway after the report.
        #[arg(long)]
        serve: bool,
        /// Print the report as JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// Process some shards of a run, beside other workers with the same recipe and `--store`.
    Work {
        #[command(flatten)]
        run: RunArguments,
        /// Seconds after which the shard of a silent worker is given to another one.
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(3..=3600))]
        lease: u64,
    },
    /// Serve a model folder or GGUF file as an OpenAI-compatible node.
    Serve(ServeArguments),
    /// Evaluate a model behind any OpenAI endpoint on benchmarks.
    Eval(Box<EvalArguments>),
    /// Measure the speed of a model on this machine.
    Bench(BenchArguments),
    /// Write a model as a quantized GGUF file, if its perplexity rises little enough.
    Quantise(QuantizeArguments),
    /// Compare two evaluations problem by problem.
    Compare {
        /// Run folder of the first evaluation.
        a: PathBuf,
        /// Run folder of the second evaluation.
        b: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Estimate tokens, node-hours and cost of a recipe from a sample of its problems.
    Plan {
        #[command(flatten)]
        run: RunArguments,
        /// Problems in the sample. The run reuses their completions.
        #[arg(long, default_value_t = 64)]
        pilot: usize,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Export the traces of a run as a dataset.
    Dataset(dataset::DatasetArguments),
    /// Convert another toolkit's configuration into a recipe.
    Import(import::ImportArguments),
    /// Show progress and spending of a run.
    Status {
        /// Run folder.
        run: PathBuf,
        /// Refresh every two seconds until no process works on the run.
        #[arg(long)]
        watch: bool,
        /// Print JSON.
        #[arg(long, conflicts_with = "watch")]
        json: bool,
    },
    /// Show where a record of a run comes from: problem, teacher, prompt, verdicts, parent.
    Why {
        /// Run folder.
        run: PathBuf,
        /// Id of a trace or problem, or the first digits of an id.
        row: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Check a recipe and list all its errors.
    Check {
        /// TOML file of the recipe.
        recipe: PathBuf,
    },
    /// Stage: read sources, and remove duplicates and benchmark problems.
    Collect(RunArguments),
    /// Stage: classify problems into 32 tasks.
    Classify(RunArguments),
    /// Stage: sample problems so that each task reaches its share.
    Resample(RunArguments),
    /// Stage: generate chains of thought with the teachers.
    Generate(RunArguments),
    /// Stage: grade the difficulty of traces for the student.
    Difficulty(RunArguments),
    /// Stage: extend easy traces and simplify hard ones.
    Rewrite(RunArguments),
    /// Stage: drop incorrect traces. With `--pairs`: compare pairs of answers.
    Verify(VerifyArguments),
    /// Stage: score RV and CD.
    Score(RunArguments),
    /// Stage: choose the traces for training.
    Sample {
        #[command(flatten)]
        run: RunArguments,
        /// Compare selection policies on the existing traces without choosing any.
        #[arg(long)]
        dry_run: bool,
        /// Print the comparison as JSON.
        #[arg(long, requires = "dry_run")]
        json: bool,
    },
    /// Measure how well the judge of RV and CD agrees with known scores.
    Calibrate {
        #[command(flatten)]
        run: RunArguments,
        #[command(flatten)]
        calibrate: calibrate::CalibrateArguments,
    },
    /// Stage: train reward models for RV and CD on the judge's scores.
    Reward(RunArguments),
    /// Stage: train the students, one algorithm after another.
    #[command(visible_aliases = ["sft", "kd", "dpo", "grpo"])]
    Train(RunArguments),
    /// Stage: export the students as model folders.
    Export(RunArguments),
    /// Stage: evaluate the students on held-out problems.
    Evaluate(RunArguments),
    /// Stage: quantize the last student, evaluate the results, and publish those that lose little accuracy.
    Compress(RunArguments),
    /// Stage: write the model cards.
    Card(RunArguments),
}

/// Parses the command line and runs the subcommand.
pub fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    // A run shows its own progress; the only output of a node is its log.
    let level = if matches!(arguments.command, Command::Serve(_)) { "info" } else { "warn" };
    potstill_shared::telemetry::init_logging(level, false);
    tokio::runtime::Runtime::new()?.block_on(dispatch(arguments.command))
}

async fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Demo(arguments) => run_demo(arguments).await,
        Command::Run { run, serve, json } => {
            let recipe = Recipe::load(&run.recipe)?;
            let out = run_folder(&run, &recipe);
            let store = run.store();
            run_all_stages(recipe, &run.recipe, &out, run.port, store, AfterRun { serve, json }).await
        }
        Command::Work { run, lease } => {
            let run = run.start(Progress::new()).await?;
            let worked = run.run_worker(Duration::from_secs(lease)).await;
            run.stop().await;
            worked
        }
        Command::Serve(arguments) => serve(arguments).await,
        Command::Eval(arguments) => {
            let json = arguments.json;
            let report = eval::evaluate(*arguments).await?;
            if json {
                print_line(&serde_json::to_string_pretty(&report)?);
            } else {
                report.benchmarks.iter().for_each(|figures| print_line(&eval::summary_line(figures)));
            }
            Ok(())
        }
        Command::Bench(BenchArguments { work: Some(bench::Benchmark::Train(arguments)), .. }) => {
            let report = bench::run_train(&arguments)?;
            print_line(&if arguments.json {
                serde_json::to_string_pretty(&report)?
            } else {
                report.to_string()
            });
            Ok(())
        }
        Command::Bench(BenchArguments { work: Some(bench::Benchmark::Arrivals(arguments)), .. }) => {
            let report = bench::run_arrivals(&arguments)?;
            print_line(&if arguments.json {
                serde_json::to_string_pretty(&report)?
            } else {
                report.to_string()
            });
            Ok(())
        }
        Command::Bench(arguments) => {
            let report = bench::run(&arguments)?;
            print_line(&if arguments.json {
                serde_json::to_string_pretty(&report)?
            } else {
                bench::table(&report)
            });
            Ok(())
        }
        Command::Quantise(arguments) => {
            let written = compress::quantize(&arguments)?;
            print_line(&if arguments.json {
                serde_json::to_string_pretty(&written)?
            } else {
                written.to_string()
            });
            Ok(())
        }
        Command::Compare { a, b, json } => {
            let found = eval::compare::compare_runs(&a, &b)?;
            print_line(&if json {
                serde_json::to_string_pretty(&found)?
            } else {
                eval::compare::comparison_table(&found)
            });
            Ok(())
        }
        Command::Plan { run, pilot, json } => {
            let run = run.start(Progress::new()).await?;
            let planned = run.estimate(pilot).await;
            run.stop().await;
            let planned = planned?;
            print_line(&if json {
                serde_json::to_string_pretty(&planned)?
            } else {
                plan::estimate_table(&planned)
            });
            Ok(())
        }
        Command::Dataset(arguments) => {
            let written = dataset::write_dataset(&arguments)?;
            print_line(&format!("{} rows in `{}`", written.rows, written.path.display()));
            Ok(())
        }
        Command::Import(arguments) => {
            print_line(import::import_config(&arguments)?.trim_end());
            Ok(())
        }
        Command::Status { run, watch, json } => {
            let mut seen = status::read_status(&run)?;
            if json {
                print_line(&serde_json::to_string_pretty(&seen)?);
                return Ok(());
            }
            while watch && seen.running {
                // Clear the screen and move the cursor to its top.
                print_line(&format!("\x1b[2J\x1b[H{}", status::status_table(&seen)));
                tokio::time::sleep(Duration::from_secs(2)).await;
                seen = status::read_status(&run)?;
            }
            print_line(status::status_table(&seen).trim_end());
            Ok(())
        }
        Command::Why { run, row, json } => {
            let found = lineage::explain(&run, &row)?;
            print_line(&if json {
                serde_json::to_string_pretty(&found)?
            } else {
                lineage::lineage_table(&found)
            });
            Ok(())
        }
        Command::Check { recipe } => {
            let checked = Recipe::load(&recipe)?;
            print_line(&format!("`{}` is fine: run `{}`", recipe.display(), checked.name));
            Ok(())
        }
        Command::Collect(run) => run_stage(StageId::Collect, run).await,
        Command::Classify(run) => run_stage(StageId::Classify, run).await,
        Command::Resample(run) => run_stage(StageId::Resample, run).await,
        Command::Generate(run) => run_stage(StageId::Generate, run).await,
        Command::Difficulty(run) => run_stage(StageId::Difficulty, run).await,
        Command::Rewrite(run) => run_stage(StageId::Rewrite, run).await,
        Command::Verify(VerifyArguments { pairs, recipe, out, port }) => match (pairs.pairs, recipe) {
            (Some(path), _) => pairs::print_verdicts(&path, pairs.profile),
            (None, Some(recipe)) => {
                run_stage(StageId::Verify, RunArguments { recipe, out, port, store: None, shards: 1 }).await
            }
            (None, None) => anyhow::bail!("`verify` needs a recipe or --pairs"),
        },
        Command::Score(run) => run_stage(StageId::Score, run).await,
        Command::Sample { run, dry_run: false, .. } => run_stage(StageId::Sample, run).await,
        Command::Sample { run, json, .. } => {
            let run = run.start(Progress::new()).await?;
            let compared = run.compare_selections();
            run.stop().await;
            let compared = compared?;
            print_line(&if json {
                serde_json::to_string_pretty(&compared)?
            } else {
                selection::table(&compared)
            });
            Ok(())
        }
        Command::Calibrate { run, calibrate: arguments } => {
            let run = run.start(Progress::new()).await?;
            let found = calibrate::calibrate_judge(&run, &arguments).await;
            run.stop().await;
            let found = found?;
            let json = arguments.json;
            print_line(&if json { serde_json::to_string_pretty(&found)? } else { calibrate::table(&found) });
            Ok(())
        }
        Command::Reward(run) => run_stage(StageId::Reward, run).await,
        Command::Train(run) => run_stage(StageId::Train, run).await,
        Command::Export(run) => run_stage(StageId::Export, run).await,
        Command::Evaluate(run) => run_stage(StageId::Evaluate, run).await,
        Command::Compress(run) => run_stage(StageId::Quantize, run).await,
        Command::Card(run) => run_stage(StageId::Card, run).await,
    }
}

/// Returns the run folder: `--out`, or `runs/NAME`.
fn run_folder(run: &RunArguments, recipe: &Recipe) -> PathBuf {
    run.out.clone().unwrap_or_else(|| Path::new("runs").join(&recipe.name))
}

/// Runs one stage of a recipe.
async fn run_stage(stage: StageId, arguments: RunArguments) -> anyhow::Result<()> {
    let run = arguments.start(Progress::new()).await?;
    let result = run.run_stage(stage).await;
    run.stop().await;
    result
}
