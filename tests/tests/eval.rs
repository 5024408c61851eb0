//! `potstill eval`, `compare` and `verify --pairs` as programs: figures from a model that answers what the test says, rows that
//! cannot be read, answers that are cut off, runs that go on, and what the pages hold.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![expect(clippy::disallowed_methods, reason = "files of a test need not outlive a crash")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use system_tests::gateway::{TestGateway, config, pool};
use system_tests::mock::{Behaviour, Mock, chunk};
use system_tests::programs::program;

fn answers(text: &str, finish: &str) -> Behaviour {
    let mut events = String::from_utf8(chunk(text, None).to_vec()).unwrap();
    events.push_str(std::str::from_utf8(&chunk("", Some(finish))).unwrap());
    Behaviour::Events(events + "data: [DONE]\n\n")
}

async fn run(arguments: Vec<String>) -> Output {
    let potstill = program("potstill");
    tokio::task::spawn_blocking(move || Command::new(potstill).args(arguments).output().unwrap())
        .await
        .unwrap()
}

async fn eval(gateway: &TestGateway, data: &Path, out: &Path, more: &[&str]) -> (bool, String, String) {
    let mut arguments: Vec<String> =
        ["eval", "--model", "m", "--data", data.to_str().unwrap(), "--json"].map(Into::into).to_vec();
    arguments.extend([
        "--endpoint".to_owned(),
        gateway.url("/v1"),
        "--out".to_owned(),
        out.to_str().unwrap().to_owned(),
    ]);
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    let output = run(arguments).await;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn figures_pages_and_resumption() {
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
    assert!(said.contains("own line 2") && said.contains("own line 4"), "{said}");
    let report: Value = serde_json::from_str(&report).unwrap();
    let figures = &report["benchmarks"][0];
    assert_eq!(
        (&figures["problems"], &figures["accuracy"], &figures["cons"]),
        (&2.into(), &50.0.into(), &50.0.into())
    );
    assert_eq!(report["bad_rows"].as_array().unwrap().len(), 2);
    // Every sample is kept, with thinking and answer apart, and a page shows it without letting it in.
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
    // The same command asks nothing again.
    let asked = node.asked();
    assert_eq!(asked, 6);
    let (fine, again, _) = eval(&gateway, data, &a, &["--bench", "own.jsonl", "--samples", "3"]).await;
    let again: Value = serde_json::from_str(&again).unwrap();
    assert!(fine && node.asked() == asked && again["benchmarks"] == report["benchmarks"]);
    // A second model, cut off: nothing counts as right, and the comparison says by how much.
    node.behave(answers("\\boxed{4}", "length"));
    let (fine, cut, _) =
        eval(&gateway, data, &b, &["--bench", "own.jsonl", "--samples", "3", "--seed", "1"]).await;
    let cut: Value = serde_json::from_str(&cut).unwrap();
    assert!(fine && cut["benchmarks"][0]["truncated"] == 100.0 && cut["benchmarks"][0]["accuracy"] == 0.0);
    let compared =
        run(vec!["compare".into(), a.to_str().unwrap().into(), b.to_str().unwrap().into(), "--json".into()])
            .await;
    let compared: Value = serde_json::from_slice(&compared.stdout).unwrap();
    assert_eq!((&compared[0]["difference"], &compared[0]["worse"]), (&(-50.0).into(), &1.into()));
}

#[tokio::test]
async fn what_cannot_be_evaluated_is_said_before_anything_is_asked() {
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
