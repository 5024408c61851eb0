//! Runs a whole recipe and shows its report.

use std::path::Path;

use crate::pipeline::{Run, SharedStore};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::Report;

/// Actions after the report of a whole run.
pub(crate) struct AfterRun {
    /// Keep serving the student until Ctrl-C.
    pub(crate) serve: bool,
    /// Print the report as JSON.
    pub(crate) json: bool,
}

/// Runs a whole recipe, shows its report, and serves the student if requested. A failed run resumes with the same
/// command.
pub(crate) async fn run_all_stages(
    recipe: Recipe,
    path: &Path,
    out: &Path,
    port: u16,
    store: Option<SharedStore>,
    end: AfterRun,
) -> anyhow::Result<()> {
    let progress = Progress::new();
    let run = Run::start(recipe, path, out, port, store.as_ref(), progress.clone()).await?;
    let finished = run.run_all().await;
    let report = match finished {
        Ok(report) => report,
        Err(error) => {
            run.stop().await;
            return Err(error
                .context(format!("the run stopped; the same command resumes it from `{}`", out.display())));
        }
    };
    print_report(&report, out, &end)?;
    if end.serve {
        let model = run.serve_student()?;
        progress.message(client_examples(&run.url(), &model));
        tokio::signal::ctrl_c().await?;
        progress.message("stopping");
    }
    run.stop().await;
    Ok(())
}

/// Prints the report as JSON or as a table.
fn print_report(report: &Report, out: &Path, end: &AfterRun) -> anyhow::Result<()> {
    if end.json {
        print_line(&serde_json::to_string_pretty(report)?);
    } else if !report.students.is_empty() {
        print_line(&format!("\n{}\n", report.table()));
        print_line(&format!("report   {}", out.join("report.html").display()));
        print_line(&format!("students {}", out.join("models").display()));
        print_line(&format!("time     {:.0} s on {} cores", report.wall_seconds, report.cores));
    }
    Ok(())
}

/// Returns example commands for clients of the served student.
fn client_examples(url: &str, model: &str) -> String {
    let problem = "A Dan has 58 cards. B Dan buys 67 more. C Eve has 41 cards. How many cards has Dan?";
    format!(
        "the student `{model}` is served at {url} until you press Ctrl-C. Talk to it:\n\n\
         curl {url}/chat/completions -H 'content-type: application/json' -d '{{\"model\": \"{model}\", \"temperature\": 0, \
         \"messages\": [{{\"role\": \"user\", \"content\": \"{problem}\"}}]}}'\n\n\
         python3 -c \"from openai import OpenAI; print(OpenAI(base_url='{url}', api_key='none').chat.completions.create(\
         model='{model}', temperature=0, messages=[{{'role': 'user', 'content': '{problem}'}}]).choices[0].message)\"\n"
    )
}

#[expect(clippy::print_stdout, reason = "results are what stdout is for")]
pub(crate) fn print_line(text: &str) {
    println!("{text}");
}
