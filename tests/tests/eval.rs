//! `potstill eval`, `compare` and `verify --pairs` as programs: metrics of a scripted model, unreadable rows, truncated
//! completions, resumed runs, and the contents of the report pages.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![expect(clippy::disallowed_methods, reason = "files of a test need not outlive a crash")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use system_tests::gateway::{TestGateway, config, pool};
use system_tests::hub::{COMMIT, Hub, TOKEN};
use system_tests::mock::{Behaviour, Mock, chunk};
use system_tests::programs::program;

fn answers(text: &str, finish: &str) -> Behaviour {
    let mut events = String::from_utf8(chunk(text, None).to_vec()).unwrap();
    events.push_str(std::str::from_utf8(&chunk("", Some(finish))).unwrap());
    Behaviour::Events(events + "data: [DONE]\n\n")
}

type Environment<'a> = &'a [(&'a str, &'a str)];

/// Runs `potstill`. By default `HF_ENDPOINT` has no server, so that no test contacts the real hub.
async fn run(arguments: Vec<String>, environment: Environment<'_>) -> Output {
    let mut command = Command::new(program("potstill"));
    command.env("HF_ENDPOINT", "http://127.0.0.1:9").env_remove("HF_TOKEN").args(arguments);
    command.envs(environment.iter().copied());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// Runs an evaluation with its caches in `data`. Returns whether it succeeded, its report, and its output.
async fn eval_with(
    gateway: &TestGateway,
    data: &Path,
    out: &Path,
    more: &[&str],
    environment: Environment<'_>,
) -> (bool, Value, String) {
    let mut arguments: Vec<String> =
        ["eval", "--model", "m", "--data", data.to_str().unwrap(), "--json"].map(Into::into).to_vec();
    arguments.extend([
        "--endpoint".to_owned(),
        gateway.url("/v1"),
        "--out".to_owned(),
        out.to_str().unwrap().to_owned(),
    ]);
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    let home = data.join("hub-cache");
    let mut all = vec![("HF_HOME", home.to_str().unwrap())];
    all.extend(environment);
    let output = run(arguments, &all).await;
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.success(), serde_json::from_slice(&output.stdout).unwrap_or_default(), said)
}

async fn eval(gateway: &TestGateway, data: &Path, out: &Path, more: &[&str]) -> (bool, Value, String) {
    eval_with(gateway, data, out, more, &[]).await
}

#[tokio::test]
async fn reports_metrics_and_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    let rows = "{\"id\": \"one\", \"problem\": \"2+2?\", \"answer\": \"4\", \"level\": 1}\nnot a row\n\
                {\"id\": \"two\", \"problem\": \"2+3?\", \"answer\": \"5\", \"level\": 2}\n{\"problem\": \"no answer\"}\n";
    std::fs::write(data.join("own.jsonl"), rows).unwrap();
    let node = Mock::start(answers("<think>easy</think>It is \\boxed{\\frac{8}{2}} <b>", "stop")).await;
    let gateway = TestGateway::start(config(pool(&[&node], 8))).await;
    let (a, b) = (data.join("a"), data.join("b"));
    let (fine, report, said) = eval(&gateway, data, &a, &["--bench", "own.jsonl", "--samples", "3"]).await;
    assert!(fine, "{said}");
    assert!(said.contains("own row 2") && said.contains("own row 4"), "{said}");
    let figures = &report["benchmarks"][0];
    assert_eq!(
        (&figures["problems"], &figures["accuracy"], &figures["cons"]),
        (&2.into(), &50.0.into(), &50.0.into())
    );
    assert_eq!(report["bad_rows"].as_array().unwrap().len(), 2);
    // Every sample is stored with reasoning and answer apart. The page escapes its text.
    let samples: Vec<Value> = std::fs::read_to_string(a.join("own.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (samples.len(), &samples[0]["thinking"], &samples[0]["correct"]),
        (6, &"easy".into(), &true.into())
    );
    let page = std::fs::read_to_string(a.join("problems/own-0.html")).unwrap();
    assert!(page.contains("&lt;b&gt;") && !page.contains("<b>") && page.contains("2+2?"));
    assert!(std::fs::read_to_string(a.join("report.html")).unwrap().contains("own-1.html"));
    // The same command sends no request again.
    let asked = node.asked();
    assert_eq!(asked, 6);
    let (fine, again, _) = eval(&gateway, data, &a, &["--bench", "own.jsonl", "--samples", "3"]).await;
    assert!(fine && node.asked() == asked && again["benchmarks"] == report["benchmarks"]);
    // A second model whose completions are truncated: nothing counts as correct, and the comparison reports the
    // difference.
    node.behave(answers("\\boxed{4}", "length"));
    let (fine, cut, _) =
        eval(&gateway, data, &b, &["--bench", "own.jsonl", "--samples", "3", "--seed", "1"]).await;
    assert!(fine && cut["benchmarks"][0]["truncated"] == 100.0 && cut["benchmarks"][0]["accuracy"] == 0.0);
    let compared = run(
        vec!["compare".into(), a.to_str().unwrap().into(), b.to_str().unwrap().into(), "--json".into()],
        &[],
    )
    .await;
    let compared: Value = serde_json::from_slice(&compared.stdout).unwrap();
    assert_eq!((&compared[0]["difference"], &compared[0]["worse"]), (&(-50.0).into(), &1.into()));
}

#[tokio::test]
async fn invalid_evaluations_fail_before_any_request() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    std::fs::write(data.join("empty.jsonl"), "{}\n").unwrap();
    std::fs::write(data.join("own.jsonl"), "{\"problem\": \"p\", \"answer\": \"1\"}\n").unwrap();
    let node = Mock::start(Behaviour::Answer(1)).await;
    let gateway = TestGateway::start(config(pool(&[&node], 8))).await;
    for (arguments, word) in [
        (vec!["--bench", "gsm8k"], "gsm8k_test.jsonl"),
        (vec!["--bench", "nothing"], "known are gsm8k"),
        (vec!["--bench", "empty.jsonl"], "no field `problem`"),
        (vec!["--bench", "own.jsonl", "--samples", "0"], "--samples"),
        (vec!["--bench", "own.jsonl", "--top-p", "2"], "--top-p"),
        (vec!["--bench", "own.jsonl", "--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
    ] {
        let (fine, _, said) = eval(&gateway, data, &data.join("out"), &arguments).await;
        assert!(!fine && said.contains(word), "{arguments:?}: {said}");
    }
    assert_eq!(node.asked(), 0);
}

/// GSM8K as on the hub: one Parquet file is downloaded once, its commit is in the report, and it is read again without
/// a network.
#[tokio::test]
async fn benchmarks_are_downloaded_once_and_cached() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/data/tests/fixtures/gsm8k.parquet");
    let table = bytes::Bytes::from(std::fs::read(table).unwrap());
    let aime = bytes::Bytes::from_static(b"{\"question\": \"2+2?\", \"answer\": \"4\"}\n");
    let gpqa = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n\"Which, a?\",a,b,c,d\n";
    let mut hub = Hub::start(
        &[
            ("openai/gsm8k", "README.md", "no table".into(), "0"),
            ("openai/gsm8k", "main/test-00000-of-00001.parquet", table, "1"),
            ("opencompass/AIME2025", "aime2025-I.jsonl", aime.clone(), &"ab".repeat(32)),
            ("math-ai/amc23", "test.jsonl", aime, "3"),
            ("Idavidrein/gpqa", "gpqa_diamond.csv", gpqa.into(), "4"),
            ("own/parts", "one.jsonl", "{\"problem\": \"2+2?\", \"answer\": \"4\"}\n".into(), "5"),
            ("own/parts", "two.jsonl", "{\"problem\": \"2+3?\", \"answer\": \"5\"}\n".into(), "6"),
        ],
        Some("Idavidrein/gpqa"),
    )
    .await;
    let url = hub.url();
    let at_hub = [("HF_ENDPOINT", url.as_str())];
    let node = Mock::start(answers("It is \\boxed{4}", "stop")).await;
    let gateway = TestGateway::start(config(pool(&[&node], 8))).await;
    let out = data.join("out");
    // The download breaks once and resumes.
    hub.cut_next(1000);
    let (fine, report, said) = eval_with(&gateway, data, &out, &["--bench", "gsm8k"], &at_hub).await;
    assert!(fine, "{said}");
    let figures = &report["benchmarks"][0];
    assert_eq!(figures["problems"], 3);
    assert!((figures["accuracy"].as_f64().unwrap() - 100.0 / 3.0).abs() < 1e-6);
    let address = format!("hf://datasets/openai/gsm8k@{COMMIT}/main/test-00000-of-00001.parquet");
    assert_eq!(report["files"], serde_json::json!([address]));
    assert_eq!(hub.downloads(), (2, 1));
    // Nothing is downloaded again. With the address of the commit, the user's table comes from the same cache.
    let (fine, _, _) = eval_with(&gateway, data, &out, &["--bench", "gsm8k"], &at_hub).await;
    assert!(fine && hub.downloads() == (2, 1));
    // A gated data set names the missing token, and is readable with it.
    let (fine, _, said) = eval_with(&gateway, data, &out, &["--bench", "gpqa"], &at_hub).await;
    assert!(!fine && said.contains("HF_TOKEN") && said.contains("gpqa_diamond"), "{said}");
    let with_token = [at_hub[0], ("HF_TOKEN", TOKEN)];
    let (fine, report, said) = eval_with(&gateway, data, &out, &["--bench", "gpqa"], &with_token).await;
    assert!(fine && report["benchmarks"][0]["problems"] == 1, "{said}");
    // The file does not match its hash on the hub.
    let (fine, _, said) = eval_with(&gateway, data, &out, &["--bench", "aime25"], &at_hub).await;
    assert!(!fine && said.contains("SHA-256"), "{said}");
    // The cache has one of two files, which is not the whole data set.
    let parts = |file: &str| format!("hf://datasets/own/parts/{file}.jsonl");
    let (fine, _, said) = eval_with(&gateway, data, &out, &["--bench", &parts("one")], &at_hub).await;
    assert!(fine, "{said}");
    let offline = [("HF_HUB_OFFLINE", "1")];
    let (fine, _, _) = eval_with(&gateway, data, &out, &["--bench", &parts("one")], &offline).await;
    assert!(fine);
    let (fine, _, said) = eval_with(&gateway, data, &out, &["--bench", &parts("*")], &offline).await;
    assert!(!fine && said.contains("not in the cache"), "{said}");
    let (fine, report, said) = eval_with(&gateway, data, &out, &["--bench", &parts("*")], &at_hub).await;
    assert!(fine && report["benchmarks"][0]["problems"] == 2, "{said}");
    // Without the hub, cached files can be read. For others the error says what to do.
    hub.stop();
    let (fine, report, said) = eval_with(&gateway, data, &out, &["--bench", "gsm8k"], &at_hub).await;
    assert!(fine && report["files"][0] == address.as_str(), "{said}");
    let (fine, _, said) = eval_with(&gateway, data, &out, &["--bench", "gsm8k,amc23"], &offline).await;
    assert!(!fine && said.contains("amc23") && said.contains("HF_HUB_OFFLINE"), "{said}");
}

/// The judge is called only where the rules are undecided, once per answer, and the verdict names its origin.
#[tokio::test]
async fn judge_is_called_only_for_unverifiable_answers() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    let rows = "{\"id\": \"plain\", \"problem\": \"2+2?\", \"answer\": \"4\"}\n\
                {\"id\": \"words\", \"problem\": \"Who?\", \"answer\": \"the smallest prime of them, squared and doubled\"}\n";
    std::fs::write(data.join("own.jsonl"), rows).unwrap();
    let node = Mock::start(answers("I think it is the least one.", "stop")).await;
    let judge = Mock::start(answers("They mean the same thing: 1", "stop")).await;
    let gateway = TestGateway::start(config(pool(&[&node], 8))).await;
    let other = TestGateway::start(config(pool(&[&judge], 8))).await;
    let (without, with) = (data.join("without"), data.join("with"));
    let (fine, report, said) =
        eval(&gateway, data, &without, &["--bench", "own.jsonl", "--samples", "1"]).await;
    assert!(fine && report["benchmarks"][0]["accuracy"] == 0.0, "{said}");
    let undecided = report["benchmarks"][0]["undecided"].as_f64().unwrap();
    assert!(undecided > 0.0);
    let (fine, _, said) = eval(&gateway, data, &with, &["--bench", "own.jsonl", "--judge", "nobody"]).await;
    assert!(!fine && said.contains("does not serve `nobody`"), "{said}");
    let url = other.url("/v1");
    let asked = ["--bench", "own.jsonl", "--samples", "1", "--judge", "m", "--judge-endpoint", &url];
    let (fine, report, said) = eval(&gateway, data, &with, &asked).await;
    assert!(fine, "{said}");
    assert_eq!((&report["judge"], &report["benchmarks"][0]["undecided"]), (&"m".into(), &0.0.into()));
    assert_eq!(judge.asked() as f64, undecided / 100.0 * 2.0);
    let samples = std::fs::read_to_string(with.join("own.jsonl")).unwrap();
    assert!(samples.contains("\"judge\"") && samples.contains("`m` says 1"), "{samples}");
}
