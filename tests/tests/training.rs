//! Every training algorithm in one process: reward models, logit distillation, DPO and GRPO. Killed in the middle of
//! each, the run ends with the same bytes.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use potstill_shared::durable::write_file;
use serde_json::{Value, json};
use system_tests::programs::{Running, answers, free_port, program, root, write_caller};

const RECIPE: &str = r#"
[kd]
teacher = "TEACHER"
[kd.train]
learning_rate = 1e-3
epochs = 1
top_k = 10
[kd.train.run]
batch_tokens = 1000
max_steps = 4
checkpoint_every = 2

[dpo]
samples = 2
max_tokens = 200
[dpo.train]
learning_rate = 1e-4
[dpo.train.run]
devices = ["cpu", "cpu"]
batch_tokens = 2000
max_steps = 4
checkpoint_every = 2
"#;

/// `demo-reward.toml` with all algorithms and minimal sizes.
fn recipe(folder: &Path) -> PathBuf {
    let recipes = root().join("trainer/recipes");
    let teacher = recipes.join("demo-teacher");
    let text = std::fs::read_to_string(recipes.join("demo-reward.toml")).unwrap();
    let more = RECIPE.replace("TEACHER", teacher.to_str().unwrap());
    let mut table: toml::Table = format!("{text}{more}").parse().unwrap();
    let absolute = |path: &Path| toml::Value::from(path.to_str().unwrap());
    table["prompts"] = absolute(&recipes.join("demo-prompts"));
    table["local"][0]["path"] = absolute(&teacher);
    table["reward"]["base"] = absolute(&teacher);
    table["collect"]["builtin"]["problems"] = 60.into();
    table["evaluate"]["builtin"]["problems"] = 9.into();
    table["evaluate"]["samples"] = 2.into();
    let mut set = |section: [&str; 2], steps: i64| {
        let mut run = table.get_mut(section[0]).unwrap();
        for key in section[1].split('.').filter(|key| !key.is_empty()) {
            run = run.get_mut(key).unwrap();
        }
        let run = run.as_table_mut().unwrap();
        run.insert("max_steps".to_owned(), steps.into());
        run.insert("checkpoint_every".to_owned(), 2.into());
    };
    set(["sft", "run"], 20);
    set(["reward", "train.run"], 4);
    set(["grpo", "train.run"], 4);
    table["reward"]["train"]["run"]["batch_tokens"] = 1500.into();
    let practice = table["grpo"]["train"].as_table_mut().unwrap();
    practice.insert("prompts".to_owned(), 8.into());
    practice.insert("max_tokens".to_owned(), 120.into());
    practice.insert("max_truncated".to_owned(), 1.0.into());
    let path = folder.join("recipe.toml");
    write_file(&path, toml::to_string(&table).unwrap().as_bytes()).unwrap();
    path
}

fn start(recipe: &Path, out: &Path) -> Running {
    let mut command = Command::new(program("potstill"));
    command.arg("run").arg(recipe).arg("--out").arg(out);
    Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
}

fn finish(recipe: &Path, out: &Path) -> String {
    let mut running = start(recipe, out);
    let mut log = String::new();
    std::io::Read::read_to_string(&mut running.0.stderr.take().unwrap(), &mut log).unwrap();
    assert!(running.0.wait().unwrap().success(), "{log}");
    log
}

#[test]
fn check_rejects_an_unavailable_device() {
    let folder = tempfile::tempdir().unwrap();
    let path = recipe(folder.path());
    let text = std::fs::read_to_string(&path).unwrap().replace("[\"cpu\", \"cpu\"]", "[\"cuda:0\", \"gpu\"]");
    write_file(&path, text.as_bytes()).unwrap();
    let checked = Command::new(program("potstill")).arg("check").arg(&path).output().unwrap();
    let told = String::from_utf8_lossy(&checked.stderr);
    assert!(!checked.status.success(), "{told}");
    assert!(told.contains("`dpo.train.run.devices`") && told.contains("not gpu"), "{told}");
    assert!(!told.contains("cuda:0"), "a name that may be elsewhere: {told}");
}

fn has_checkpoint(folder: &Path) -> bool {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).any(|name| name.starts_with("checkpoint-"))
}

#[test]
fn every_algorithm_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let log = finish(&recipe, &whole);
    for part in ["trained `reward-rv`", "trained `kd`", "trained `dpo`", "trained `grpo`", "`grpo`: "] {
        assert!(log.contains(part), "`{part}` is not in:\n{log}");
    }

    let trainings = ["reward-rv", "reward-cd", "distilled", "kd", "dpo", "grpo"];
    for training in ["reward-rv", "kd", "dpo", "grpo"] {
        let running = start(&recipe, &killed);
        let checkpoints = killed.join("train").join(training);
        let begin = Instant::now();
        while !has_checkpoint(&checkpoints) {
            assert!(begin.elapsed() < Duration::from_secs(120), "`{training}` wrote no checkpoint");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(running);
    }
    let log = finish(&recipe, &killed);
    assert!(log.contains("resumed at step"), "{log}");

    let models = [
        "reward-student",
        "reward-student-distilled",
        "reward-student-kd",
        "reward-student-dpo",
        "reward-student-rv",
        "reward-student-cd",
    ];
    for model in models {
        let weights =
            |out: &Path| std::fs::read(out.join("models").join(model).join("model.safetensors")).unwrap();
        assert!(weights(&whole) == weights(&killed), "`{model}` differs");
    }
    let read = |path: &str| std::fs::read_to_string(killed.join(path)).unwrap();
    assert!(read("models/reward-student/README.md").contains("practised with rewards"));
    assert!(read("models/reward-student-cd/README.md").contains("Spearman"));
    let page = read("report.html");
    for training in trainings {
        assert!(page.contains(&format!("Training {training}")), "`{training}` has no curves");
    }
    assert!(read("train/grpo/trainer_state.json").contains("\"reward/accuracy\""));

    // The reward models in the node: scores from 0 to 1, of each model and combined, and a ranking by them.
    let port = free_port();
    let mut command = Command::new(program("potstill"));
    command.args(["serve", "--port", &port.to_string()]);
    for name in ["rv", "cd"] {
        let folder = killed.join(format!("models/reward-student-{name}"));
        command.args(["--reward", &format!("{name}={}", folder.display())]);
    }
    let _node = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let url = format!("http://127.0.0.1:{port}");
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        answers(&format!("{url}/health")).await;
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let post = async |path: &str, body: Value| -> Value {
            http.post(format!("{url}{path}")).json(&body).send().await.unwrap().json().await.unwrap()
        };
        let texts = ["<think>A=3</think>\\boxed{3}", "<think>A=3;B=3+4;B=7</think>\\boxed{7}"];
        let all = post("/v1/score", json!({"problem": "A Dan has 3 cards.", "completion": texts})).await;
        let one =
            post("/score", json!({"model": "cd", "text_1": "A Dan has 3 cards.", "text_2": texts})).await;
        for at in 0..2 {
            let scores = &all["data"][at]["scores"];
            assert!(
                ["rv", "cd"].iter().all(|name| (0.0..=1.0).contains(&scores[*name].as_f64().unwrap())),
                "{all}"
            );
            assert_eq!(one["data"][at]["score"], scores["cd"]);
        }
        let ranked =
            post("/rerank", json!({"model": "cd", "query": "A Dan has 3 cards.", "documents": texts})).await;
        let ranked = ranked["results"].as_array().unwrap();
        assert!(
            ranked[0]["relevance_score"].as_f64() >= ranked[1]["relevance_score"].as_f64()
                && ranked.len() == 2
        );
        let wrong = post("/rerank", json!({"query": "q", "documents": texts})).await;
        assert!(wrong["error"]["message"].as_str().unwrap().contains("`cd`, `rv`"), "{wrong}");
        let wrong = post("/v1/score", json!({"model": "no", "problem": "q", "completion": "c"})).await;
        assert_eq!(wrong["error"]["code"], "model_not_found");
    });
}

/// Losses of a training by step.
fn losses(out: &Path, training: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(out.join("train").join(training).join("trainer_state.json")).unwrap();
    let state: Value = serde_json::from_str(&text).unwrap();
    let history = state["log_history"].as_array().unwrap();
    history.iter().filter_map(|entry| entry["loss"].as_f64()).collect()
}

#[test]
fn remote_teacher_gives_the_same_logits_as_a_local_one() {
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(recipe(folder.path())).unwrap();
    let write = |name: &str, change: &dyn Fn(&mut toml::Table)| {
        let mut table: toml::Table = text.parse().unwrap();
        for section in ["reward", "dpo", "grpo", "evaluate"] {
            table.remove(section);
        }
        change(table["kd"].as_table_mut().unwrap());
        let path = folder.path().join(name);
        write_file(&path, toml::to_string(&table).unwrap().as_bytes()).unwrap();
        path
    };
    let behind = |kd: &mut toml::Table| {
        kd.remove("teacher");
        kd.insert("model".to_owned(), "demo-teacher".into());
    };
    let (at_hand, asked) = (folder.path().join("at-hand"), folder.path().join("asked"));
    finish(&write("at-hand.toml", &|_| {}), &at_hand);
    let recipe = write("asked.toml", &behind);
    let log = finish(&recipe, &asked);
    assert!(log.contains("`demo-teacher` said its likeliest 10 tokens for "), "{log}");
    let (expected, found) = (losses(&at_hand, "kd"), losses(&asked, "kd"));
    assert!(expected.len() == 4 && found.len() == 4, "{expected:?} {found:?}");
    for (expected, found) in expected.iter().zip(&found) {
        assert!((expected - found).abs() < 1e-3 * expected.abs(), "{expected} at hand, {found} asked");
    }

    // No completion is paid for twice: a repeated training reads the stored ones.
    let student = |out: &Path| std::fs::read(out.join("models/reward-student/model.safetensors")).unwrap();
    let rows = asked.join("train/kd/rows");
    let written = || -> Vec<_> {
        let files = std::fs::read_dir(&rows).unwrap().map(|file| file.unwrap());
        let mut files: Vec<_> =
            files.map(|file| (file.path(), file.metadata().unwrap().modified().unwrap())).collect();
        files.sort();
        files
    };
    let (before, trained) = (written(), student(&asked));
    assert!(!before.is_empty());
    for name in std::fs::read_dir(asked.join("train/kd")).unwrap().map(|entry| entry.unwrap().path()) {
        if name != rows {
            let removed =
                if name.is_dir() { std::fs::remove_dir_all(&name) } else { std::fs::remove_file(&name) };
            removed.unwrap();
        }
    }
    finish(&recipe, &asked);
    assert!(written() == before && student(&asked) == trained);

    // On-policy: completions of the student, judged by the remote teacher.
    let recipe = write("on-policy.toml", &|kd| {
        behind(kd);
        kd.insert("on_policy".to_owned(), true.into());
        let train = kd["train"].as_table_mut().unwrap();
        train.insert("max_tokens".to_owned(), 60.into());
        train["run"].as_table_mut().unwrap().insert("max_steps".to_owned(), 2.into());
    });
    let log = finish(&recipe, &folder.path().join("on-policy"));
    assert!(log.contains("trained `kd`"), "{log}");
}

const COMPRESSED: &str = r#"
name = "small"
concurrency = 8
[collect]
sources = [{ path = "rows.jsonl", format = "omnithought", traces = true }]
[student]
name = "small"
base = "base"
export = "f32"
[sft]
learning_rate = 1e-3
[sft.run]
max_steps = 2
[evaluate]
sources = [{ path = "test.jsonl" }]
samples = 1
max_tokens = 4
[compress]
to = ["q8_0", "q4_k_m"]
limit = 0.0
"#;

/// Quantized models of a student are evaluated after its training. Their cards state the loss of accuracy, and they are
/// served like any other model.
#[test]
fn quantized_students_are_evaluated_before_publication() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    std::fs::create_dir(place("base")).unwrap();
    write_caller(&place("base"));
    let words: Vec<String> =
        ('a'..='t').map(|letter| format!("{letter} word like {letter}{letter}")).collect();
    let row = |word: &String| {
        let trace = json!({"thought": format!("it is the {word}, as it was"), "solution": format!("\\boxed{{{word}}}"), "teacher": "t"});
        json!({"question": format!("say the {word}"), "answer": word, "reasoning": [trace]}).to_string()
    };
    write_file(&place("rows.jsonl"), words.iter().map(row).collect::<Vec<_>>().join("\n").as_bytes())
        .unwrap();
    write_file(&place("test.jsonl"), "{\"problem\": \"what is it\", \"answer\": \"it\"}\n".as_bytes())
        .unwrap();
    write_file(&place("recipe.toml"), COMPRESSED.as_bytes()).unwrap();
    let out = place("out");
    let log = finish(&place("recipe.toml"), &out);
    let report: Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("report.json")).unwrap()).unwrap();
    let forms = report["compressed"].as_array().unwrap();
    assert_eq!(forms.len(), 2, "{log}");
    for (form, name) in forms.iter().zip(["small-q8_0", "small-q4_k_m"]) {
        // The student solves nothing before and after, so nothing is lost.
        assert_eq!((&form["published"], form["lost"].as_f64()), (&json!(true), Some(0.0)), "{form}");
        let folder = out.join("models").join(name);
        assert!(folder.join(format!("{name}.gguf")).exists(), "{log}");
        let card = std::fs::read_to_string(folder.join("README.md")).unwrap();
        for part in ["base_model: small\n", "| tokens compared |", "1 held-out problems, 1 samples each"] {
            assert!(card.contains(part), "`{part}` is not in:\n{card}");
        }
    }
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("Smaller forms of the last student"));
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let file = out.join("models/small-q8_0/small-q8_0.gguf");
        let (_node, url) = system_tests::programs::serve(&file, "small", &[]).await;
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let body = json!({"model": "small", "prompt": "say", "max_tokens": 2});
        let answer = http.post(format!("{url}/v1/completions")).json(&body).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    });

    // If the student had solved half of the problems, both would have lost too much.
    let mut report = report;
    report["students"][0]["accuracy"] = json!(50.0);
    write_file(&out.join("report.json"), report.to_string().as_bytes()).unwrap();
    let mut command = Command::new(program("potstill"));
    command.arg("compress").arg(place("recipe.toml")).arg("--out").arg(&out);
    let output = command.output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && log.contains("-50.0 points; not published, the limit is 0 points"),
        "{log}"
    );
    for name in ["small-q8_0", "small-q4_k_m"] {
        assert!(
            !out.join("models").join(name).exists() && out.join(format!("compress/{name}.gguf")).exists()
        );
    }
}
