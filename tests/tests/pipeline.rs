//! A run as a process. Killed repeatedly, it sends no request twice, loses nothing, and produces the same bytes as an
//! uninterrupted run.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use system_tests::programs::{Running, program, root};

/// A short recipe with the demonstration's teacher: all stages, two dozen problems, a few training steps.
fn recipe(folder: &Path) -> std::path::PathBuf {
    let text = std::fs::read_to_string(root().join("trainer/recipes/demo.toml")).unwrap();
    let mut table: toml::Table = text.parse().unwrap();
    let recipes = root().join("trainer/recipes");
    let absolute = |name: &str| toml::Value::from(recipes.join(name).to_str().unwrap());
    table["prompts"] = absolute("demo-prompts");
    table["local"][0]["path"] = absolute("demo-teacher");
    table["collect"]["builtin"]["problems"] = 120.into();
    table["evaluate"]["builtin"]["problems"] = 9.into();
    table["evaluate"]["samples"] = 2.into();
    let run = table["sft"]["run"].as_table_mut().unwrap();
    run.insert("max_steps".to_owned(), 12.into());
    run.insert("checkpoint_every".to_owned(), 5.into());
    let path = folder.join("recipe.toml");
    potstill_shared::durable::write_file(&path, toml::to_string(&table).unwrap().as_bytes()).unwrap();
    path
}

fn start(recipe: &Path, out: &Path) -> Running {
    let child = Command::new(program("potstill"))
        .arg("run")
        .arg(recipe)
        .arg("--out")
        .arg(out)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Running(child)
}

fn finish(recipe: &Path, out: &Path) {
    let mut running = start(recipe, out);
    let mut log = String::new();
    std::io::Read::read_to_string(&mut running.0.stderr.take().unwrap(), &mut log).unwrap();
    assert!(running.0.wait().unwrap().success(), "{log}");
}

/// Ids in the journal. Fails if one occurs twice.
fn journal(out: &Path) -> HashSet<String> {
    let Ok(text) = std::fs::read_to_string(out.join("journal.log")) else { return HashSet::new() };
    let mut ids = HashSet::new();
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let entry: serde_json::Value = serde_json::from_str(line[9..].trim_end()).unwrap();
        assert!(ids.insert(entry["id"].as_str().unwrap().to_owned()), "a question was paid for twice");
    }
    ids
}

fn stage_files(out: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(out.join("stages"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[test]
fn killed_run_equals_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    finish(&recipe, &whole);
    let all = journal(&whole);
    assert!(all.len() > 500, "{} answers", all.len());

    let mut known = HashSet::new();
    for kill in 1..=10u64 {
        let running = start(&recipe, &killed);
        // Killed after some more completions, or after a while during training.
        let target = known.len() + 37 * kill as usize;
        for _ in 0..150 {
            std::thread::sleep(Duration::from_millis(10));
            if std::fs::read_to_string(killed.join("journal.log"))
                .is_ok_and(|log| log.lines().count() >= target)
            {
                break;
            }
        }
        drop(running);
        let now = journal(&killed);
        assert!(now.is_superset(&known), "kill {kill}: an answer that was paid for is lost");
        known = now;
    }
    finish(&recipe, &killed);
    assert_eq!(journal(&killed), all, "the same questions, each once");
    for ((name, expected), (other, found)) in stage_files(&whole).iter().zip(&stage_files(&killed)) {
        assert_eq!(name, other);
        assert!(expected == found, "`{name}` differs");
    }
    let weights = |out: &Path| std::fs::read(out.join("models/demo-student/model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&killed), "the students differ");

    // A finished run sends no request and changes nothing.
    let before = std::fs::read(killed.join("journal.log")).unwrap();
    finish(&recipe, &killed);
    assert!(before == std::fs::read(killed.join("journal.log")).unwrap());
}

#[test]
fn single_stages_produce_the_same_files() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let (whole, alone) = (folder.path().join("whole"), folder.path().join("alone"));
    finish(&recipe, &whole);
    for stage in [
        "collect",
        "generate",
        "difficulty",
        "rewrite",
        "verify",
        "score",
        "sample",
        "sft",
        "export",
        "evaluate",
        "card",
    ] {
        let output = Command::new(program("potstill"))
            .arg(stage)
            .arg(&recipe)
            .arg("--out")
            .arg(&alone)
            .output()
            .unwrap();
        assert!(output.status.success(), "{stage}: {}", String::from_utf8_lossy(&output.stderr));
    }
    for ((name, expected), (other, found)) in stage_files(&whole).iter().zip(&stage_files(&alone)) {
        assert_eq!(name, other);
        assert!(expected == found, "`{name}` differs");
    }
    let card = std::fs::read_to_string(alone.join("models/demo-student/README.md")).unwrap();
    assert!(card.contains("held-out problems"), "{card}");
}

#[test]
fn invalid_recipe_fails_before_the_first_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = recipe(folder.path());
    let text = std::fs::read_to_string(&path).unwrap().replace("learning_rate", "learning_rat");
    potstill_shared::durable::write_file(&path, text.as_bytes()).unwrap();
    let out = folder.path().join("out");
    let output =
        Command::new(program("potstill")).arg("run").arg(&path).arg("--out").arg(&out).output().unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("recipe.toml") && message.contains("learning_rat"), "{message}");
    assert!(!out.exists());
}

/// Problems from tables in several formats. Duplicates, near duplicates, broken rows and problems of the test set are
/// counted and listed.
#[test]
fn collects_sources_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let path = recipe(folder.path());
    let mut table: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
    let parquet = root().join("trainer/data/tests/fixtures/gsm8k.parquet");
    let train = "A train leaves Hamburg at noon and drives to Munich with 90 kilometres an hour while a second one leaves Munich an hour \
                 later and drives to Hamburg: where do they meet?";
    let other = train.replace("90", "80");
    let rows = format!(
        "problem,answer\n\"{train}\",1\n\"{train} Explain.\",1\n\"{other}\",2\nWhat is  2 + 2?,4\nIs 7 prime?,yes\n"
    );
    let csv = folder.path().join("problems.csv");
    potstill_shared::durable::write_file(&csv, rows.as_bytes()).unwrap();
    let held_out = folder.path().join("held-out.jsonl");
    potstill_shared::durable::write_file(&held_out, b"{\"problem\": \"Is 7 prime?\", \"answer\": \"yes\"}\n")
        .unwrap();
    let source = |path: &Path| toml::Table::from_iter([("path".to_owned(), path.to_str().unwrap().into())]);
    let mut published = source(&parquet);
    published.insert("format".to_owned(), "gsm8k".into());
    let collect = table["collect"].as_table_mut().unwrap();
    collect.remove("builtin");
    collect.insert("near".to_owned(), 0.8.into());
    collect.insert("sources".to_owned(), vec![published, source(&csv)].into());
    table["evaluate"].as_table_mut().unwrap().insert("sources".to_owned(), vec![source(&held_out)].into());
    potstill_shared::durable::write_file(&path, toml::to_string(&table).unwrap().as_bytes()).unwrap();
    let out = folder.path().join("out");
    let run =
        Command::new(program("potstill")).arg("collect").arg(&path).arg("--out").arg(&out).output().unwrap();
    let said = String::from_utf8(run.stderr).unwrap();
    assert!(
        run.status.success()
            && said.contains("8 in, 5 kept (1 contaminated_ngram, 1 duplicate, 1 near_duplicate)"),
        "{said}"
    );
    let lines = |name: &str| -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(out.join(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let mut dropped: Vec<_> = lines("stages/collect.dropped.jsonl")
        .iter()
        .map(|line| (line["reason"].as_str().unwrap().to_owned(), line["like"].as_str().unwrap().to_owned()))
        .collect();
    dropped.sort();
    assert_eq!(
        dropped.iter().map(|(reason, _)| reason.as_str()).collect::<Vec<_>>(),
        ["contaminated_ngram", "duplicate", "near_duplicate"]
    );
    assert_eq!((dropped[0].1.as_str(), dropped[2].1.as_str()), ("Is 7 prime?", train));
    let kept = lines("stages/collect.jsonl");
    let thousand = kept.iter().find(|problem| problem["problem"] == "What is 500 + 500?").unwrap();
    assert_eq!((&thousand["answer"], &thousand["metadata"]["level"]), (&"1000".into(), &2.into()));
    assert!(thousand["source"].as_str().unwrap().ends_with("gsm8k.parquet:3"));
}
