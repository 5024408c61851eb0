//! The pipeline with a scripted teacher: requests, kept and dropped records with their reasons, and budgets. After any
//! kill nothing is lost and no completion is paid for twice.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![expect(clippy::disallowed_methods, reason = "files of a test need not outlive a crash")]

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use system_tests::hub::Hub;
use system_tests::modelscope::ModelScope;
use system_tests::postgres::Postgres;
use system_tests::programs::{Running, program};
use system_tests::teacher::{Asked, Said, Teacher};

/// A folder with problems and a recipe.
struct Work {
    folder: tempfile::TempDir,
}

impl Work {
    fn new(problems: &[Value], recipe: &str) -> Self {
        let work = Self { folder: tempfile::tempdir().unwrap() };
        let mut lines = String::new();
        for problem in problems {
            writeln!(lines, "{problem}").unwrap();
        }
        work.write("problems.jsonl", &lines);
        work.write("recipe.toml", recipe);
        work
    }

    fn write(&self, name: &str, text: &str) {
        potstill_shared::durable::write_file(&self.folder.path().join(name), text.as_bytes()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, name: &str, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(program("potstill"));
        command.arg(name).arg(self.path("recipe.toml")).arg("--out").arg(self.path(out)).args(more);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a pipeline command with the teacher of this test.
    async fn run(&self, name: &str, out: &str, more: &[&str]) -> Output {
        let mut command = self.command(name, out, more);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    async fn done(&self, name: &str, out: &str, more: &[&str]) -> String {
        let output = self.run(name, out, more).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn rows(&self, file: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(file)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn dropped(&self, out: &str, stage: &str) -> Value {
        let manifest: Value =
            serde_json::from_str(&std::fs::read_to_string(self.path(out).join("run.json")).unwrap()).unwrap();
        manifest["stages"][stage]["dropped"].clone()
    }
}

fn recipe(teacher: &Teacher, more: &str) -> String {
    format!(
        "name = \"scripted\"\nconcurrency = 32\n{more}\n[gateway]\nurl = \"{}\"\n[collect]\nsources = [{{ path = \"problems.jsonl\" }}]\n",
        teacher.url()
    )
}

const GENERATE: &str = "[generate]\nteachers = [{ model = \"m\", temperatures = [0.7], max_tokens = 100 }]\n";

/// Returns the number in a problem such as `Say 17.`
fn number(prompt: &str) -> u64 {
    let digits: String =
        prompt.rsplit("Say ").next().unwrap().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

fn say(numbers: impl Iterator<Item = u64>) -> Vec<Value> {
    numbers.map(|n| json!({ "problem": format!("Say {n}."), "answer": n })).collect()
}

fn solved(asked: &Asked) -> Said {
    let n = number(&asked.prompt);
    Said::Text(format!("<think>It is {n}.</think>\\boxed{{{n}}}"))
}

/// Ids in the journal. Fails if one occurs twice.
fn journal(out: &Path) -> HashSet<String> {
    let Ok(text) = std::fs::read_to_string(out.join("journal.log")) else { return HashSet::new() };
    let mut ids = HashSet::new();
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let entry: Value = serde_json::from_str(line[9..].trim_end()).unwrap();
        assert!(
            ids.insert(entry["id"].as_str().unwrap().to_owned()),
            "an answer stands in the journal twice"
        );
    }
    ids
}

/// 10,000 records and 50 kills at arbitrary moments: no completion is lost or stored twice, and only requests in flight
/// are repeated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_lose_no_completion_and_repeat_none() {
    let teacher = Teacher::start(solved).await;
    let work = Work::new(&say(0..10_000), &(recipe(&teacher, "") + GENERATE));
    let out = work.path("killed");
    let mut known = HashSet::new();
    for kill in 1..=50usize {
        let running = Running(work.command("run", "killed", &[]).stderr(Stdio::null()).spawn().unwrap());
        // After some more completions have been stored, sometimes between two of them.
        let target = known.len() + 97 + kill;
        let path = out.join("journal.log");
        tokio::task::spawn_blocking(move || {
            for _ in 0..2000 {
                if std::fs::read(&path)
                    .is_ok_and(|log| log.iter().filter(|byte| **byte == b'\n').count() >= target)
                {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        })
        .await
        .unwrap();
        drop(running);
        let now = journal(&out);
        assert!(now.is_superset(&known), "kill {kill}: an answer that was paid for is lost");
        known = now;
    }
    assert!(known.len() < 10_000, "the kills came too late to matter");
    work.done("run", "killed", &[]).await;
    assert_eq!(journal(&out).len(), 10_000);
    let (calls, questions) = teacher.questions();
    assert_eq!(questions, 10_000);
    assert!(calls - questions <= 50 * 32, "{} calls were made again", calls - questions);
    let kept = work.rows("killed/stages/verify.jsonl");
    assert_eq!(kept.len(), 10_000);
    // Every trace has its own problem, without the prompt template around it.
    for trace in kept {
        let n = number(trace["problem"]["problem"].as_str().unwrap());
        assert_eq!(trace["thinking"], format!("It is {n}."));
        assert_eq!(trace["problem"]["problem"], format!("Say {n}."));
    }
}

/// Four workers share a run through a database and one is killed. The result equals that of one process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_share_a_run_and_survive_a_kill() {
    let Some(postgres) = Postgres::start() else { return };
    let store = ["--store", postgres.url.as_str()];
    let speak = |asked: &Asked| {
        // Slow enough that every worker gets requests.
        std::thread::sleep(Duration::from_millis(1));
        match asked.stage.as_str() {
            "classify" => Said::Text("<answer>Math</answer>".to_owned()),
            "score" => Said::Text("<score>4</score>".to_owned()),
            _ => solved(asked),
        }
    };
    let teacher = Teacher::start(speak).await;
    let stages =
        format!("[classify]\nmodel = \"m\"\n[resample]\ncap = 1\n{GENERATE}[score]\nmodel = \"m\"\n");
    let work = Work::new(&say(0..600), &(recipe(&teacher, "") + &stages));
    let worker = |n: usize| {
        let out = format!("worker-{n}");
        let mut command = work.command("work", &out, &store);
        let log = std::fs::File::create(work.path(&format!("worker-{n}.log"))).unwrap();
        Running(command.args(["--shards", "24", "--lease", "3"]).stderr(log).spawn().unwrap())
    };
    let mut victim = worker(0);
    let mut others: Vec<Running> = (1..4).map(worker).collect();
    while teacher.questions().1 < 700 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        let log = || std::fs::read_to_string(work.path("worker-0.log")).unwrap();
        assert!(victim.0.try_wait().unwrap().is_none(), "it is to be killed within its work: {}", log());
    }
    drop(victim);
    for other in &mut others {
        while other.0.try_wait().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(other.0.wait().unwrap().success());
    }
    let (calls, questions) = teacher.questions();
    assert_eq!(questions, 600 * 4);
    // Only requests that the killed worker had in flight were repeated.
    assert!(calls - questions <= 2 * 32, "{} calls were made again", calls - questions);
    work.done("run", "joined", &store).await;
    assert_eq!(teacher.questions().0, calls, "the run finds every answer in the store");
    work.done("run", "alone", &[]).await;
    for stage in ["collect", "classify", "resample", "generate", "verify", "score", "sample"] {
        let file =
            |out: &str| std::fs::read(work.path(out).join("stages").join(format!("{stage}.jsonl"))).unwrap();
        assert!(file("joined") == file("alone"), "`{stage}` differs");
    }
    // Another recipe under the same name is another run.
    work.write("recipe.toml", &(recipe(&teacher, "") + &stages.replace("100", "90")));
    let refused = work.run("run", "other", &store).await;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("of another recipe"), "{said}");
}

/// A budget is never exceeded. With a higher one the run resumes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn budget_stops_the_run_and_a_higher_one_resumes() {
    let teacher = Teacher::start(solved).await;
    let budget = |tokens: u64| {
        format!("[budget]\ntokens = {tokens}\nprices = {{ m = {{ prompt = 1.0, completion = 2.0 }} }}")
    };
    // A call takes 30 tokens, but may take up to 100 and its prompt.
    let work = Work::new(&say(0..200), &(recipe(&teacher, &budget(3000)) + GENERATE));
    let stopped = work.run("run", "out", &[]).await;
    let said = String::from_utf8_lossy(&stopped.stderr).into_owned();
    assert!(!stopped.status.success() && said.contains("the budget of the run, 3000 tokens"), "{said}");
    let bought = journal(&work.path("out")).len();
    assert!(bought * 30 <= 3000 && bought > 60, "{bought} calls of 30 tokens");
    work.write("recipe.toml", &(recipe(&teacher, &budget(100_000)) + GENERATE));
    work.done("run", "out", &[]).await;
    assert_eq!(journal(&work.path("out")).len(), 200);
    let status: Value = serde_json::from_str(&{
        let output = Command::new(program("potstill"))
            .arg("status")
            .arg(work.path("out"))
            .arg("--json")
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    })
    .unwrap();
    let spent = &status["now"]["spent"]["generate"];
    assert_eq!((spent["requests"].as_u64(), spent["tokens"].as_u64()), (Some(200), Some(6000)));
    assert!((spent["cost"].as_f64().unwrap() - 200.0 * (10.0 + 40.0) / 1e6).abs() < 1e-9);
    assert_eq!(
        (&status["running"], &status["manifest"]["stages"]["verify"]["kept"]),
        (&json!(false), &json!(200))
    );
}

/// Every fault of a teacher has a drop reason, and no single completion stops the run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_of_a_teacher_is_counted() {
    let speak = |asked: &Asked| {
        match number(&asked.prompt) {
        1 => Said::Text("no thinking, 1".to_owned()),
        2 => Said::Cut("<think>It is".to_owned()),
        // Truncated at 100 tokens, whole at 400.
        3 if asked.body["max_tokens"] == 100 => Said::Cut("<think>It is 3".to_owned()),
        4 => Said::Cut(format!("<think>{}", "Wait, let me think again. ".repeat(200))),
        5 => Said::Status(400),
        6 => Said::Text("<think>It is 7.</think>\\boxed{7}".to_owned()),
        7 => Said::Apart("It is 7.".to_owned(), "\\boxed{7}".to_owned()),
        8 => Said::Text("<|begin_of_thought|>\n\nIt is 8.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\\boxed{8}<|end_of_solution|>".to_owned()),
        9 if asked.before == 0 => Said::Status(503),
        _ => solved(asked),
    }
    };
    let teacher = Teacher::start(speak).await;
    let generate = GENERATE.replace("max_tokens = 100", "max_tokens = 100, retry_max_tokens = 400");
    let work = Work::new(&say(0..20), &(recipe(&teacher, "") + &generate));
    work.done("run", "out", &[]).await;
    assert_eq!(work.dropped("out", "generate"), json!({ "no_thinking": 1, "teacher_failed": 1 }));
    assert_eq!(work.dropped("out", "verify"), json!({ "loop": 1, "truncated": 1, "wrong_answer": 1 }));
    let kept: HashMap<u64, String> = work
        .rows("out/stages/verify.jsonl")
        .iter()
        .map(|trace| {
            (
                number(trace["problem"]["problem"].as_str().unwrap()),
                trace["thinking"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    assert_eq!(kept.len(), 15);
    for n in [3, 7, 8, 9] {
        assert_eq!(kept[&n], format!("It is {n}."));
    }
    // Dropped records are stored whole, with their verdict. One command shows the lineage of a row.
    let wrong = work.rows("out/stages/verify.dropped.jsonl");
    let wrong = wrong.iter().find(|row| row["reason"] == "wrong_answer").unwrap();
    assert_eq!(wrong["trace"]["verdict"]["correct"], false);
    let why = |row: &str| {
        let output =
            Command::new(program("potstill")).arg("why").arg(work.path("out")).arg(row).output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (found, story) = why(&wrong["trace"]["id"].as_str().unwrap()[..12]);
    for part in
        ["Say 6.", "problems.jsonl:7, answer 6", "by m", "temperature 0.7", "10 + 20 tokens", "wrong_answer"]
    {
        assert!(found && story.contains(part), "{part} not in:\n{story}");
    }
    assert!(why("ffffffffff").1.contains("no problem and no trace"));
    assert!(why("../x").1.contains("is no id"));
}

/// Programs are judged by their tests in the sandbox, whatever the judge would decide.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_are_judged_by_their_tests() {
    let speak = |asked: &Asked| {
        let code = match number(&asked.prompt) {
            0 => "print(int(input()) * 2)",
            1 => "print(4)",
            _ => "import sys; sys.exit(0)",
        };
        Said::Text(format!("<think>Double it.</think>\n```python\n{code}\n```"))
    };
    let teacher = Teacher::start(speak).await;
    let tests = json!({ "inputs": ["2\n", "5\n"], "outputs": ["4\n", "10\n"] });
    let rows: Vec<Value> = (0..3)
        .map(
            |n| json!({ "problem": format!("Read a number and print its double. Say {n}."), "cases": tests }),
        )
        .collect();
    let source = recipe(&teacher, "").replace("problems.jsonl\"", "problems.jsonl\", tests = \"cases\"");
    let work = Work::new(&rows, &(source + GENERATE));
    work.done("run", "out", &[]).await;
    let kept = work.rows("out/stages/verify.jsonl");
    assert_eq!((kept.len(), &kept[0]["verdict"]["method"]), (1, &json!("tests")));
    assert!(kept[0]["problem"]["problem"].as_str().unwrap().ends_with("Say 0."));
    assert_eq!(work.dropped("out", "verify"), json!({ "wrong_answer": 2 }));
}

/// Traces and scores of a dataset are not generated again. Tasks get their shares, benchmark problems are removed, and
/// sources and licenses appear in the lineage and in the card of the export.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dataset_traces_are_sampled_and_exported_with_lineage() {
    let speak = |asked: &Asked| match asked.stage.as_str() {
        // Problems from 40 on are about law.
        "classify" if number(asked.prompt.split("Instruction:").nth(1).unwrap()) < 40 => {
            Said::Text("<answer>Math</answer>".to_owned())
        }
        "classify" => Said::Text("<answer>Law</answer>".to_owned()),
        "score" => Said::Text("<score>3</score>".to_owned()),
        _ => panic!("`{}` asked", asked.stage),
    };
    let teacher = Teacher::start(speak).await;
    let rows: Vec<Value> = (0..50u64)
        .map(|n| {
            let trace = |scored: bool| {
                let level = |level: u64| if scored { json!({ "level": level, "judge": "QwQ-32B" }) } else { Value::Null };
                json!({ "thought": format!("It is {n}, {scored}."), "solution": format!("\\boxed{{{n}}}"), "teacher": "QwQ-32B",
                    "Reasoning_Verbosity": level(5), "Cognitive_Difficulty": level(4) })
            };
            json!({ "question": format!("Say {n}."), "answer": n.to_string(), "reasoning": [trace(true), trace(false)] })
        })
        .collect();
    let head = format!("name = \"scripted\"\n[gateway]\nurl = \"{}\"\n", teacher.url());
    let sources = "[collect]\nagainst = [{ path = \"test.jsonl\" }]\nsources = [{ path = \"problems.jsonl\", format = \"omnithought\", traces = true, licence = \"apache-2.0\" }]\n";
    let stages = "[classify]\nmodel = \"m\"\n[resample]\ntotal = 30\ncap = 2\nshares = { Math = 1.0, Law = 1.0 }\n[score]\nmodel = \"m\"\n[sample]\nper_problem = 1\n";
    let work = Work::new(&rows, &(head + sources + stages + GENERATE));
    work.write("test.jsonl", "{\"problem\": \"Say 0.\"}\n");
    work.done("run", "out", &[]).await;
    assert_eq!(work.dropped("out", "collect"), json!({ "contaminated_ngram": 1 }));
    assert_eq!(work.dropped("out", "resample"), json!({ "not_drawn": 24 }));
    let drawn = work.rows("out/stages/resample.jsonl");
    let of = |task: &str| {
        let rows = drawn.iter().filter(|row| row["task"] == task);
        let copies: Vec<u64> = rows.map(|row| row.get("copies").map_or(1, |n| n.as_u64().unwrap())).collect();
        (copies.iter().sum::<u64>(), copies.len())
    };
    assert_eq!(of("Math"), (15, 15));
    assert_eq!(of("Law"), (15, 10), "ten problems, five of them twice");
    assert_eq!(teacher.calls(), HashMap::from([("classify".to_owned(), 49), ("score".to_owned(), 25 * 2)]));
    let chosen = work.rows("out/stages/sample.jsonl");
    assert_eq!(chosen.len(), 25);
    assert!(
        chosen
            .iter()
            .all(|trace| trace["origin"]["teacher"] == "QwQ-32B" && trace["problem"].get("traces").is_none())
    );

    let out = work.path("dataset");
    let export = |format: &str, more: &[&str]| {
        let command =
            ["dataset", work.path("out").to_str().unwrap(), out.to_str().unwrap(), "--format", format]
                .map(str::to_owned);
        let output = Command::new(program("potstill")).args(command).args(more).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read_to_string(out.join("README.md")).unwrap()
    };
    let card = export("omnithought", &["--stage", "score"]);
    for part in [
        "license: apache-2.0",
        "| resample | 49 | 25 | 24 not_drawn |",
        "25 rows",
        "| apache-2.0 | 50 | 49 |",
    ] {
        assert!(card.contains(part), "{part} not in:\n{card}");
    }
    let exported = work.rows("dataset/train.jsonl");
    assert_eq!(exported[0]["reasoning"].as_array().unwrap().len(), 2);
    let levels: HashSet<String> = exported
        .iter()
        .flat_map(|row| row["reasoning"].as_array().unwrap())
        .map(|trace| trace["Reasoning_Verbosity"]["level"].to_string())
        .collect();
    assert_eq!(
        levels,
        HashSet::from(["5".to_owned(), "3".to_owned()]),
        "given scores stay, missing ones were asked for"
    );
    export("messages", &["--parquet"]);
    let info: Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("dataset_info.json")).unwrap()).unwrap();
    assert_eq!(info["scripted"]["file_name"], "train.parquet");
    // An exported dataset can be read again.
    let again = "name = \"again\"\n[collect]\nsources = [{ path = \"dataset/train.parquet\", format = \"messages\", traces = true }]\n";
    work.write("recipe.toml", again);
    work.done("collect", "again", &[]).await;
    work.done("generate", "again", &[]).await;
    assert_eq!(work.rows("again/stages/generate.jsonl").len(), 25);
}

/// The estimate contains what the run then takes, and the completions of its sample are not paid for again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn estimate_contains_the_cost_of_the_run() {
    let speak = |asked: &Asked| match asked.stage.as_str() {
        "difficulty" => {
            Said::Text(if number(&asked.prompt).is_multiple_of(3) { "hard" } else { "medium" }.to_owned())
        }
        "rewrite" => Said::Text(format!("<think>Simply {0}.</think>\\boxed{{{0}}}", number(&asked.prompt))),
        _ => solved(asked),
    };
    let teacher = Teacher::start(speak).await;
    let stages = format!(
        "{GENERATE}[difficulty]\nmodel = \"m\"\nmax_tokens = 4\n[rewrite]\nmodel = \"m\"\nmax_tokens = 100\n"
    );
    let budget = "[budget]\ntokens = 5000\nprices = { m = { completion = 100.0 } }";
    let work = Work::new(&say(0..300), &(recipe(&teacher, budget) + &stages));
    // An estimate also counts against the budget; this one fits.
    let plan: Value =
        serde_json::from_str(&work.done("plan", "out", &["--pilot", "40", "--json"]).await).unwrap();
    assert_eq!((plan["problems"].as_u64(), plan["pilot"].as_u64()), (Some(300), Some(40)));
    let piloted = teacher.questions();
    assert_eq!(teacher.calls()["generate"], 40);
    assert!(plan["over_budget"][0].as_str().unwrap().starts_with("tokens:"), "{plan}");
    work.write("recipe.toml", &(recipe(&teacher, "") + &stages));
    work.done("run", "out", &[]).await;
    let calls = teacher.calls();
    assert_eq!((calls["generate"], teacher.questions().0), (300, teacher.questions().1), "after {piloted:?}");
    for stage in plan["stages"].as_array().unwrap() {
        let (mean, within) =
            (stage["calls"]["mean"].as_f64().unwrap(), stage["calls"]["plus_minus"].as_f64().unwrap());
        let name = stage["stage"].as_str().unwrap();
        let taken = calls[name] as f64;
        // The intervals are at 95 %, so three of them can fail by chance.
        assert!(
            (mean - taken).abs() <= 2.0 * within + 1e-6,
            "{name}: {mean} ± {within}, and it took {taken}"
        );
    }
    assert_eq!(work.rows("out/stages/verify.jsonl").len(), 300);
}

/// Files of ModelScope: a listing in pages, a download that breaks and resumes, a wrong hash, and the cache without a
/// network. Also the license in the card of a Hugging Face dataset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hub_sources_are_downloaded_once_with_lineage() {
    let rows = |from: u64| -> bytes::Bytes {
        let rows = say(from..from + 500);
        rows.iter().map(|row| format!("{row}\n")).collect::<String>().into()
    };
    // SHA-256 of the two tables, and a wrong one.
    let sum = |bytes: &bytes::Bytes| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        potstill_shared::durable::write_file(&path, bytes).unwrap();
        let output = Command::new("sha256sum").arg(&path).output().unwrap();
        String::from_utf8(output.stdout).unwrap()[..64].to_owned()
    };
    let mut files: Vec<(String, bytes::Bytes, String)> = (0..230)
        .map(|n| (format!("other/{n}.txt"), bytes::Bytes::from_static(b"x"), String::new()))
        .collect();
    files.push(("data/a b.jsonl".to_owned(), rows(0), sum(&rows(0))));
    files.push(("data/c.jsonl".to_owned(), rows(500), sum(&rows(500))));
    files.push(("wrong/d.jsonl".to_owned(), rows(0), "0".repeat(64)));
    let scope = ModelScope::start(files).await;
    let card = bytes::Bytes::from_static(b"---\nlicense: mit\n---\n# Problems\n");
    let hub = Hub::start(
        &[("owner/name", "p.jsonl", rows(900), "etag1"), ("owner/name", "README.md", card, "etag2")],
        None,
    )
    .await;

    let work = Work::new(&[], "");
    let recipe = |sources: &str| {
        work.write("recipe.toml", &format!("name = \"hubs\"\n[gateway]\nurl = \"http://127.0.0.1:9/v1\"\n[collect]\nsources = [{sources}]\n"));
    };
    let collect = |endpoint: String, offline: bool| {
        let mut command = work.command("collect", "out", &[]);
        command.env("MODELSCOPE_ENDPOINT", endpoint).env("MODELSCOPE_CACHE", work.path("scope"));
        command
            .env("HF_ENDPOINT", hub.url())
            .env("HF_HOME", work.path("hf"))
            .env("HF_HUB_OFFLINE", if offline { "1" } else { "0" });
        async { tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap() }
    };
    let both = "{ path = \"ms://datasets/owner/name/data/*.jsonl\", licence = \"apache-2.0\" }, { path = \"hf://datasets/owner/name/p.jsonl\" }";
    recipe(both);
    scope.cut_next(1000);
    let broken = collect(scope.url(), false).await;
    let said = String::from_utf8_lossy(&broken.stderr).into_owned();
    assert!(!broken.status.success() && said.contains("goes on with it"), "{said}");
    let fine = collect(scope.url(), false).await;
    assert!(fine.status.success(), "{}", String::from_utf8_lossy(&fine.stderr));
    assert_eq!(scope.downloads(), (3, 1));
    let manifest = || -> Value {
        serde_json::from_str(&std::fs::read_to_string(work.path("out/run.json")).unwrap()).unwrap()
    };
    let first = manifest();
    assert_eq!(first["stages"]["collect"]["kept"], 1400);
    assert_eq!(
        (&first["sources"][0]["licence"], &first["sources"][1]["licence"]),
        (&json!("apache-2.0"), &json!("mit"))
    );
    assert_eq!(
        (&first["sources"][1]["rows"], &first["sources"][1]["kept"]),
        (&json!(500), &json!(400)),
        "100 of them were there before"
    );
    let place = work.rows("out/stages/collect.jsonl")[0]["source"].as_str().unwrap().to_owned();
    assert!(
        place.starts_with("ms://datasets/owner/name@master/data/")
            || place.starts_with("hf://datasets/owner/name@"),
        "{place}"
    );
    // Nothing is downloaded twice, and the hubs are not needed again.
    assert!(collect(scope.url(), false).await.status.success());
    assert!(collect("http://127.0.0.1:9".to_owned(), true).await.status.success());
    assert_eq!(scope.downloads(), (3, 1));
    assert_eq!(manifest()["stages"], first["stages"]);
    for (source, word) in [
        ("{ path = \"ms://datasets/owner/name/wrong/d.jsonl\" }", "SHA-256"),
        ("{ path = \"ms://datasets/owner/name/none.jsonl\" }", "there are `other/0.txt`"),
        ("{ path = \"ms://datasets/owner/other/a.jsonl\" }", "is not there"),
    ] {
        recipe(source);
        let refused = collect(scope.url(), false).await;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(word), "{said}");
    }
}
