//! Quantized versions of the last student. Each is written, evaluated on the student's held-out problems, and published
//! if it loses little accuracy. Quantization itself is in [`crate::compress`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use candle_core::{DType, Device};
use potstill_data::records::Problem;
use potstill_engine::loader::{LoadedModel, load};
use potstill_learn::examples::tokenize_conversation;
use potstill_shared::durable::{create_folder, publish_folder, remove_folder, write_file};
use potstill_shared::id::ContentId;
use serde_json::{Value, json};

use super::Run;
use crate::compress::{self, MAX_USED_TOKENS, QuantizedFile, QuantizedFormat};
use crate::report::{QuantizedResult, StudentResult};
use crate::students::TrainingSet;

impl Run {
    /// Quantizes the last student to the recipe's formats and evaluates the results. `figures` must contain the
    /// evaluation of the student.
    pub(super) async fn quantize_student(
        &self,
        figures: &[StudentResult],
    ) -> anyhow::Result<Vec<QuantizedResult>> {
        let Some(section) = &self.recipe.compress else { return Ok(Vec::new()) };
        let variant = self.variants().pop().context("the recipe trains no student")?;
        let before = figures.iter().find(|figures| figures.name == variant.name());
        let before = before.context("the student was not tested; run `potstill evaluate` first")?;
        let student = self.student_name(variant);
        let held_out = self.held_out()?;
        let mut all = Vec::new();
        for (bits, written) in self.write_quantized(&student, &section.to, section.calibrate).await? {
            let name = quantized_name(&student, bits);
            self.serve_model(&name, written.path.clone())?;
            let revision = ContentId::from_bytes(&std::fs::read(&written.path)?).to_string();
            let figures = self.evaluate_model(&name, revision, bits.name(), &held_out).await?;
            let figures = StudentResult::new(bits.name(), figures);
            let lost = before.accuracy - figures.accuracy;
            let found = QuantizedResult {
                written,
                before: before.accuracy,
                lost,
                published: lost <= section.limit,
                figures,
            };
            self.publish_quantized(&student, bits, &found, section.limit)?;
            all.push(found);
        }
        Ok(all)
    }

    /// Writes the quantized files to the folder `compress` of the run, where nobody mistakes them for published ones.
    async fn write_quantized(
        &self,
        student: &str,
        to: &[QuantizedFormat],
        calibrate: bool,
    ) -> anyhow::Result<Vec<(QuantizedFormat, QuantizedFile)>> {
        let (recipe, progress) = (Arc::clone(&self.recipe), self.progress.clone());
        let folder = self.folder.path().to_owned();
        let (student, to, traces) = (student.to_owned(), to.to_vec(), self.selected_traces()?);
        let problems: Vec<Problem> =
            if recipe.collect.is_some() { self.folder.read_stage("collect")? } else { Vec::new() };
        tokio::task::spawn_blocking(move || {
            let source = folder.join("models").join(&student);
            let model = load(&source, &Device::Cpu, DType::F32)
                .with_context(|| format!("cannot load `{}`", source.display()))?;
            let lessons = match recipe.sft.as_ref().and_then(|sft| sft.conversations.as_ref()) {
                Some(section) => TrainingSet::conversations(section, &[])?.messages,
                None => TrainingSet::chains_of_thought(&recipe, &traces).messages,
            };
            let tokens = calibration_tokens(&model, &lessons, &problems)?;
            let work = folder.join("compress");
            create_folder(&work)?;
            let made = to.iter().map(|&bits| {
                let name = quantized_name(&student, bits);
                progress.message(format!("`{name}` is written and read back"));
                let path = work.join(format!("{name}.gguf"));
                Ok((bits, compress::quantize_and_measure(&model, &name, bits, calibrate, &tokens, &path)?))
            });
            made.collect()
        })
        .await?
    }

    /// Reports the result, and publishes the file or removes an older published one.
    fn publish_quantized(
        &self,
        student: &str,
        bits: QuantizedFormat,
        found: &QuantizedResult,
        limit: f64,
    ) -> anyhow::Result<()> {
        let name = quantized_name(student, bits);
        let target = self.folder.path().join("models").join(&name);
        self.progress.message(format!(
            "`{name}`: {:.1} MB, {:.1} % [{:.1}, {:.1}], {:+.1} points; {}",
            found.written.bytes as f64 / 1e6,
            found.figures.accuracy,
            found.figures.ci_low,
            found.figures.ci_high,
            // The subtraction avoids "-0.0" for no loss.
            0.0 - found.lost,
            match found.published {
                true => format!("published as `{}`", target.display()),
                false => format!(
                    "not published, the limit is {limit} points (it stays as `{}`)",
                    found.written.path.display()
                ),
            }
        ));
        if !found.published {
            return if target.exists() { Ok(remove_folder(&target)?) } else { Ok(()) };
        }
        publish_folder::<anyhow::Error>(&target, |folder| {
            link_or_copy(&found.written.path, &folder.join(format!("{name}.gguf")))?;
            let card = compress::quantized_card(&name, student, &found.written, Some(found));
            write_file(&folder.join("README.md"), card.as_bytes())?;
            let quality = format!("{:#}\n", serde_json::to_value(found)?);
            Ok(write_file(&folder.join("quality.json"), quality.as_bytes())?)
        })
    }
}

/// Returns the model name of a quantized student.
fn quantized_name(student: &str, bits: QuantizedFormat) -> String {
    format!("{student}-{}", bits.name())
}

/// Hard-links the file to `target`, or copies it if the file system has no hard links.
fn link_or_copy(file: &Path, target: &PathBuf) -> anyhow::Result<()> {
    std::fs::hard_link(file, target)
        .or_else(|_| std::fs::copy(file, target).map(drop))
        .with_context(|| format!("cannot place `{}`", target.display()))
}

/// Returns tokens similar to the student's input and output, for calibration and measurement. Uses examples of its
/// training set first, then problems.
fn calibration_tokens(
    model: &LoadedModel,
    lessons: &[Vec<Value>],
    problems: &[Problem],
) -> anyhow::Result<Vec<u32>> {
    let mut tokens = Vec::new();
    // Examples are ordered by problem and source, so every n-th gives a mix.
    let step = (lessons.len() / 256).max(1);
    for messages in lessons.iter().step_by(step) {
        tokens.extend(tokenize_conversation(model, messages)?.tokens);
        if tokens.len() >= MAX_USED_TOKENS {
            return Ok(tokens);
        }
    }
    for problem in problems {
        let text = model.chat_template.render(
            &json!([{"role": "user", "content": problem.problem}]),
            true,
            &json!({}),
        )?;
        tokens.extend(model.tokenizer.encode(&text)?);
        if tokens.len() >= MAX_USED_TOKENS {
            break;
        }
    }
    Ok(tokens)
}
