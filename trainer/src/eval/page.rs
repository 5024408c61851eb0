//! HTML pages of an evaluation: a report with tables, pass@k curves and histograms of lengths, and one page per problem
//! with all samples. Static files without scripts; text written by models is escaped.

use std::path::Path;

use minijinja::value::Serde;
use minijinja::{Environment, context};
use potstill_shared::durable::{create_folder, write_file};
use potstill_verify::verifier::Reference;
use serde::Serialize;

use super::benchmarks::LoadedBenchmark;
use super::figures::EvalMetrics;
use super::{EvalReport, EvalSample};

/// Number of bars of a histogram.
const HISTOGRAM_BARS: usize = 24;

/// Template data of one benchmark.
#[derive(Serialize)]
struct BenchmarkView<'a> {
    figures: &'a EvalMetrics,
    /// Points of the pass@k curve in SVG coordinates.
    curve: String,
    dots: Vec<(f64, f64, u32, f64)>,
    bars: Vec<HistogramBar>,
    longest: u64,
    problems: Vec<ProblemLink<'a>>,
}

/// A bar of the length histogram: position, width, and heights of correct and other samples.
#[derive(Serialize)]
struct HistogramBar {
    x: f64,
    width: f64,
    right: f64,
    wrong: f64,
}

/// A link to a problem's page, with its number of correct samples and of all samples.
#[derive(Serialize)]
struct ProblemLink<'a> {
    name: &'a str,
    page: String,
    right: usize,
    of: usize,
}

/// Returns the template environment with both templates.
fn environment() -> anyhow::Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.add_template("report.html", include_str!("report.html.jinja"))?;
    environment.add_template("problem.html", include_str!("problem.html.jinja"))?;
    Ok(environment)
}

/// Returns the file name of a problem's page. It uses the index, because ids may contain any character.
fn problem_page_name(bench: &str, index: usize) -> String {
    format!("{bench}-{index}.html")
}

/// Writes `report.json` and `report.html`.
pub(super) fn write_report(
    out: &Path,
    report: &EvalReport,
    all: &[(EvalMetrics, Vec<EvalSample>)],
) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(report)?;
    write_file(&out.join("report.json"), format!("{json}\n").as_bytes())?;
    let benches: Vec<BenchmarkView<'_>> =
        all.iter().map(|(figures, samples)| benchmark_view(figures, samples)).collect();
    let environment = environment()?;
    let html = environment.get_template("report.html")?.render(context! {
        report => minijinja::Value::from(Serde(report)),
        benches => minijinja::Value::from(Serde(&benches)),
    })?;
    Ok(write_file(&out.join("report.html"), html.as_bytes())?)
}

/// Writes one page per problem.
pub(super) fn write_problem_pages(
    out: &Path,
    loaded: &LoadedBenchmark,
    samples: &[EvalSample],
) -> anyhow::Result<()> {
    let folder = out.join("problems");
    create_folder(&folder)?;
    let environment = environment()?;
    let template = environment.get_template("problem.html")?;
    for (index, item) in loaded.items.iter().enumerate() {
        let mine: Vec<&EvalSample> = samples.iter().filter(|sample| sample.problem == item.name).collect();
        let html = template.render(context! {
            bench => &item.bench,
            name => &item.name,
            prompt => &item.prompt,
            gold => reference_text(&item.gold),
            samples => minijinja::Value::from(Serde(&mine)),
        })?;
        write_file(&folder.join(problem_page_name(&loaded.name, index)), html.as_bytes())?;
    }
    Ok(())
}

/// Returns the reference answer or tests as text.
fn reference_text(gold: &Reference) -> String {
    match gold {
        Reference::Answer(answer) => answer.clone(),
        Reference::Choice(letter) => letter.to_string(),
        Reference::Functions { tests, entry, .. } => format!("{entry} passes\n{tests}"),
        Reference::Prints(examples) => {
            let shown =
                examples.iter().take(3).map(|example| format!("{}→ {}", example.input, example.output));
            format!("{} tests, such as\n{}", examples.len(), shown.collect::<Vec<_>>().join("\n"))
        }
    }
}

/// Computes curve, histogram and links of one benchmark.
fn benchmark_view<'a>(figures: &'a EvalMetrics, samples: &'a [EvalSample]) -> BenchmarkView<'a> {
    let most = figures.pass_at_k.keys().max().copied().unwrap_or(1);
    let place = |k: u32| if most > 1 { 300.0 * f64::from(k).log2() / f64::from(most).log2() } else { 0.0 };
    let dots: Vec<(f64, f64, u32, f64)> = figures
        .pass_at_k
        .iter()
        .map(|(k, share)| (place(*k), 120.0 * (1.0 - share / 100.0), *k, *share))
        .collect();
    let curve = dots.iter().map(|(x, y, ..)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ");
    let longest = samples.iter().map(|sample| sample.tokens).max().unwrap_or(0).max(1);
    let mut counts = vec![(0usize, 0usize); HISTOGRAM_BARS];
    for sample in samples {
        let at = (sample.tokens as usize * HISTOGRAM_BARS / (longest as usize + 1)).min(HISTOGRAM_BARS - 1);
        if sample.correct == Some(true) {
            counts[at].0 += 1;
        } else {
            counts[at].1 += 1;
        }
    }
    let tallest = counts.iter().map(|(right, wrong)| right + wrong).max().unwrap_or(1).max(1) as f64;
    let width = 300.0 / HISTOGRAM_BARS as f64;
    let bars = counts
        .iter()
        .enumerate()
        .map(|(at, (right, wrong))| HistogramBar {
            x: at as f64 * width,
            width: width - 1.0,
            right: 100.0 * *right as f64 / tallest,
            wrong: 100.0 * *wrong as f64 / tallest,
        })
        .collect();
    let mut problems: Vec<ProblemLink<'_>> = Vec::new();
    for sample in samples {
        if problems.last().is_none_or(|last| last.name != sample.problem) {
            let page = format!("problems/{}", problem_page_name(&figures.bench, problems.len()));
            problems.push(ProblemLink { name: &sample.problem, page, right: 0, of: 0 });
        }
        if let Some(last) = problems.last_mut() {
            last.of += 1;
            last.right += usize::from(sample.correct == Some(true));
        }
    }
    BenchmarkView { figures, curve, dots, bars, longest, problems }
}
