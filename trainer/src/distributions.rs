//! Logit distillation (white-box) in a run: the teacher is a loaded model, or a remote one that returns top-k log
//! probabilities. The losses are in `potstill_learn::kd`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use futures_util::{StreamExt, TryStreamExt, stream};
use potstill_cot::teacher::{TeacherClient, TeacherError};
use potstill_data::records::{Problem, Trace};
use potstill_engine::device::compute_dtype;
use potstill_engine::loader::{LoadedModel, load};
use potstill_engine::tokenizer::Tokenizer;
use potstill_learn::error::LearnError;
use potstill_learn::examples::Example;
use potstill_learn::kd::{
    KdConfig, TeacherLogits, TopK, check_same_vocabulary, kd, kd_on_policy, read_top_k, write_top_k,
};
use potstill_shared::client::prompt_logprobs::ScoreInput;
use potstill_shared::durable::create_folder;
use potstill_shared::id::ContentId;
use serde_json::json;

use crate::alignment::{tokenize_prompt, tokenize_training_set, with_recipe_seed};
use crate::progress::Progress;
use crate::recipe::{KdSection, Recipe};
use crate::students::{TrainingSet, finalize_model, report_result, run_with_progress};

/// Stage name of these requests, for the gateway and the budget.
const KD_STAGE: &str = "kd";
/// Examples per cache file. After a crash, at most this many requests are repeated.
const EXAMPLES_PER_FILE: usize = 32;
/// Number of examples on which the vocabularies are compared.
const COMPARED_EXAMPLES: usize = 4;
/// Number of extra tokens that the teacher may put before a text, such as a begin-of-sequence token.
const MAX_PREFIX_TOKENS: usize = 1;

/// Distills the teacher into the student and returns the result. With `on_policy` the student's own completions are
/// used, otherwise the traces.
pub fn distill(
    recipe: &Recipe,
    section: &KdSection,
    calls: &TeacherClient,
    student: &LoadedModel,
    traces: &[Trace],
    folder: &Path,
    progress: &Progress,
) -> anyhow::Result<LoadedModel> {
    let config = KdConfig { run: with_recipe_seed(recipe, &section.train.run), ..section.train.clone() };
    let at_hand = match &section.teacher {
        None => None,
        Some(path) => {
            let device = config.run.parse_devices()?.swap_remove(0);
            let teacher = load(path, &device, compute_dtype(&device))
                .with_context(|| format!("cannot load `kd.teacher` `{}`", path.display()))?;
            check_same_vocabulary(&teacher.tokenizer, &student.tokenizer)?;
            Some(teacher)
        }
    };
    let asked = section.model.as_ref().map(|model| RemoteTeacher {
        calls,
        model,
        tokenizer: &student.tokenizer,
        k: config.top_k,
        at_once: recipe.concurrency,
        kept: folder.join("rows"),
    });
    let teacher = match (&at_hand, &asked) {
        (Some(teacher), _) => TeacherLogits::local(teacher, &config)?,
        (None, Some(asked)) => TeacherLogits {
            id: asked.model.clone(),
            max_positions: usize::MAX,
            rows: Box::new(|examples| {
                let rows = asked
                    .block_on(asked.request_rows(examples))
                    .map_err(|error| LearnError::Teacher(error.to_string()))?;
                rows.into_iter().collect::<Result<_, String>>().map_err(LearnError::Teacher)
            }),
        },
        (None, None) => anyhow::bail!("`kd` names no teacher"),
    };
    let trained = if section.on_policy {
        let mut problems: Vec<&Problem> = traces.iter().map(|trace| &trace.problem).collect();
        problems.dedup_by(|a, b| a.id == b.id);
        let prompts = problems
            .iter()
            .map(|problem| Ok(tokenize_prompt(recipe, student, problem)?.0))
            .collect::<anyhow::Result<Vec<_>>>()?;
        if let Some(asked) = &asked {
            asked.block_on(asked.check_vocabulary(prompts.iter().map(Vec::as_slice)))?;
        }
        run_with_progress(folder, "kd", progress, |observe| {
            kd_on_policy(student, &teacher, &prompts, &config, folder, observe)
        })?
    } else {
        let mut examples = tokenize_training_set(student, &TrainingSet::chains_of_thought(recipe, traces))?;
        let rows = match &asked {
            None => (teacher.rows)(&examples)?,
            Some(asked) => {
                asked.block_on(
                    asked.check_vocabulary(examples.iter().map(|example| example.tokens.as_slice())),
                )?;
                let longest = config.run.max_length.min(student.config.max_positions);
                // Requests are paid for, so examples that are too long for training are removed first.
                examples.retain(|example| example.tokens.len() <= longest);
                let (fitting, rows) = asked.block_on(asked.cached_rows(examples, progress))?;
                examples = fitting;
                rows
            }
        };
        run_with_progress(folder, "kd", progress, |observe| {
            kd(student, &examples, &rows, &config, folder, observe)
        })?
    };
    report_result("kd", &trained.1, progress);
    finalize_model(&trained.0, folder, recipe)
}

/// A teacher behind the gateway.
struct RemoteTeacher<'a> {
    calls: &'a TeacherClient,
    model: &'a String,
    /// Tokenizer of the student, which must match the teacher's.
    tokenizer: &'a Tokenizer,
    k: usize,
    at_once: usize,
    /// Folder that caches the rows of paid requests.
    kept: PathBuf,
}

impl RemoteTeacher<'_> {
    /// Waits for a future. Training occupies a blocking thread, where this is allowed.
    fn block_on<T>(&self, answer: impl Future<Output = T>) -> T {
        tokio::runtime::Handle::current().block_on(answer)
    }

    /// Checks on a few examples that the teacher splits text into the same tokens as the student. Fails if not.
    async fn check_vocabulary<'t>(&self, texts: impl Iterator<Item = &'t [u32]>) -> anyhow::Result<()> {
        for tokens in texts.take(COMPARED_EXAMPLES) {
            let text = self.tokenizer.decode(tokens)?;
            let own = self.tokenizer.encode(&text)?;
            let given = ScoreInput::Text(&text);
            let found = match self.calls.top_logprobs(KD_STAGE, self.model, given, 1).await {
                Ok(found) => found.tokens,
                Err(TeacherError::Row(problem)) => anyhow::bail!("`kd.model` `{}`: {problem}", self.model),
                Err(TeacherError::Run(problem)) => return Err(problem.into()),
            };
            let same = (0..=MAX_PREFIX_TOKENS).any(|start| found.get(start..) == Some(&own));
            anyhow::ensure!(
                same,
                "teacher `{}` and student do not share a vocabulary: {} tokens to one and {} to the other for {:?}; distil through text instead",
                self.model,
                found.len(),
                own.len(),
                text.chars().take(60).collect::<String>()
            );
        }
        Ok(())
    }

    /// Returns, per example, the teacher's rows at the tokens in the loss mask, or the reason why the teacher rejected
    /// the example.
    async fn request_rows(&self, examples: &[Example]) -> anyhow::Result<Vec<Result<TopK, String>>> {
        let ask = async |example: &Example| match self
            .calls
            .top_logprobs(KD_STAGE, self.model, ScoreInput::Tokens(&example.tokens), self.k)
            .await
        {
            Ok(found) => {
                let learnt = found.rows.into_iter().zip(&example.loss_mask).filter(|(_, learnt)| **learnt);
                let mut rows = TopK { k: self.k, ..TopK::default() };
                for (id, log_prob) in learnt.flat_map(|(row, _)| row) {
                    rows.ids.push(id);
                    rows.log_probs.push(log_prob);
                }
                Ok(Ok(rows))
            }
            Err(TeacherError::Row(problem)) => Ok(Err(problem)),
            Err(TeacherError::Run(problem)) => Err(anyhow::Error::from(problem)),
        };
        stream::iter(examples).map(ask).buffered(self.at_once).try_collect().await
    }

    /// Returns the examples that the teacher accepts, with their rows. Reads cached rows from files and stores new
    /// ones. Fails if no example is accepted.
    async fn cached_rows(
        &self,
        examples: Vec<Example>,
        progress: &Progress,
    ) -> anyhow::Result<(Vec<Example>, Vec<TopK>)> {
        create_folder(&self.kept)?;
        let (mut fitting, mut rows, mut problem) = (Vec::new(), Vec::new(), None);
        let all = examples.len();
        for part in examples.chunks(EXAMPLES_PER_FILE) {
            let key: Vec<_> = part.iter().map(|example| (&example.tokens, &example.loss_mask)).collect();
            let id = ContentId::from_parts(&[self.model, &self.k.to_string(), &json!(key).to_string()]);
            let file = self.kept.join(format!("{id}.safetensors"));
            let found = if file.exists() {
                read_top_k(&file, self.tokenizer)?
            } else {
                let found = self.request_rows(part).await?;
                let found = found.into_iter().map(|row| {
                    row.unwrap_or_else(|why| {
                        problem = Some(why);
                        TopK::default()
                    })
                });
                let found: Vec<TopK> = found.collect();
                write_top_k(&file, &found, self.tokenizer)?;
                found
            };
            // A rejected example has no rows.
            let taken = part.iter().zip(found).filter(|(_, found)| !found.ids.is_empty());
            let (more, of_them): (Vec<_>, Vec<_>) =
                taken.map(|(example, found)| (example.clone(), found)).unzip();
            fitting.extend(more);
            rows.extend(of_them);
        }
        progress.message(format!(
            "`{}` said its likeliest {} tokens for {} of {all} examples",
            self.model,
            self.k,
            fitting.len()
        ));
        if fitting.is_empty() {
            anyhow::bail!(
                "`kd.model` `{}` took no example: {}",
                self.model,
                problem.unwrap_or_else(|| "all were refused before".to_owned())
            );
        }
        Ok((fitting, rows))
    }
}
