//! Dataset card: columns, sources with their licenses, and counts of each stage with drop reasons.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::DatasetFormat;
use crate::run::Manifest;
use crate::stage_id::StageId;

/// Returns the licenses of all sources, and whether any source has an unknown license.
pub(crate) fn licenses(manifest: &Manifest) -> (BTreeSet<&str>, bool) {
    let known = manifest.sources.iter().filter_map(|source| source.licence.as_deref()).collect();
    (known, manifest.sources.iter().any(|source| source.licence.is_none()))
}

/// Returns Hugging Face's `size_categories` value for a number of rows.
fn size_category(rows: usize) -> &'static str {
    match rows {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        100_000..1_000_000 => "100K<n<1M",
        _ => "1M<n<10M",
    }
}

/// Returns the card as Markdown with front matter. The license is `other` unless all sources have the same known
/// license.
pub(super) fn dataset_card(manifest: &Manifest, shape: DatasetFormat, rows: usize, file: &str) -> String {
    let mut card = String::new();
    let mut line = |text: &str| {
        let _infallible = writeln!(card, "{text}");
    };
    let (known, unknown) = licenses(manifest);
    line("---");
    match known.first() {
        Some(licence) if known.len() == 1 && !unknown => line(&format!("license: {licence}")),
        // People have to check several or unknown licenses themselves.
        _ => line("license: other"),
    }
    line("task_categories:\n- text-generation");
    line("tags:\n- reasoning\n- chain-of-thought\n- distillation\n- potstill");
    line(&format!("size_categories:\n- {}", size_category(rows)));
    line(&format!("configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {file}"));
    line(&format!("dataset_info:\n  splits:\n  - name: train\n    num_examples: {rows}"));
    line("---\n");
    line(&format!("# {}\n", manifest.name));
    line(&format!(
        "{rows} rows in the columns of `{}`, made by Potstill {} from the recipe with the hash `{}`.\n",
        shape.name(),
        manifest.version,
        manifest.recipe_hash
    ));
    if !manifest.sources.is_empty() {
        line("## Sources\n");
        line("| source | licence | rows | kept |\n|---|---|---|---|");
        for source in &manifest.sources {
            let licence = source.licence.as_deref().unwrap_or("not known");
            line(&format!("| `{}` | {licence} | {} | {} |", source.path, source.rows, source.kept));
        }
        line("");
    }
    if unknown {
        line("The licence of a source is not known: look it up before you pass this on.\n");
    } else if known.len() > 1 {
        let all: Vec<&str> = known.into_iter().collect();
        line(&format!("Rows are under the licences of their sources: {}.\n", all.join(", ")));
    }
    line("## Stages\n");
    line("| stage | in | kept | dropped |\n|---|---|---|---|");
    for name in StageId::ALL.map(StageId::name) {
        let Some(stage) = manifest.stages.get(name) else { continue };
        let dropped: Vec<String> =
            stage.summary.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        line(&format!(
            "| {name} | {} | {} | {} |",
            stage.summary.taken,
            stage.summary.kept,
            dropped.join(", ")
        ));
    }
    line(
        "\nChains of thought were written by models: they may be wrong where no rule could check them, and repeat what their",
    );
    line("teachers learnt.");
    card
}
