//! `potstill demo --quick` as CI runs it: the distilled student must be the best.

use std::process::Command;

use serde_json::Value;
use system_tests::programs::program;

#[test]
fn distilled_student_beats_answer_only_student() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let output = Command::new(program("potstill"))
        .args(["demo", "--quick", "--exit", "--json", "--port", "0", "--out"])
        .arg(&out)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let students = report["students"].as_array().unwrap();
    let names: Vec<&str> = students.iter().map(|student| student["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["raw", "answers_only", "distilled"]);
    for student in students {
        let figure = |key: &str| student[key].as_f64().unwrap();
        assert!(
            figure("ci_low") <= figure("accuracy") && figure("accuracy") <= figure("ci_high"),
            "{student}"
        );
        for level in ["easy", "medium", "hard"] {
            assert!(student["mean_cot_tokens"][level].as_f64().unwrap() > 0.0, "{student}");
        }
        assert!(student["pass_at_k"]["1"].is_number(), "{student}");
    }
    let accuracy = |index: usize| students[index]["accuracy"].as_f64().unwrap();
    assert!(accuracy(2) > accuracy(1) + 15.0, "distilled {}, answers only {}", accuracy(2), accuracy(1));
    assert!(accuracy(0) < 5.0, "an untrained student cannot know: {}", accuracy(0));
    assert!(report["wall_seconds"].as_f64().unwrap() > 0.0);
    let html = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("answers_only") && html.contains("pass@k"));
}
