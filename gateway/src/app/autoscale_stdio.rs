//! The policy as a program: a hello line, then one decision line for each observation line, until the input ends. Simulators
//! and planners outside judge with it the very function that the gateway runs.

use std::io::{BufRead, Write};

use serde::{Deserialize, Serialize};

use crate::scaling_policy::{Decision, Observation, PolicyState, decide};

/// Version of the lines.
const VERSION: u32 = 1;
/// Longest observation that is read.
const MAX_LINE_BYTES: u64 = 16 << 20;

#[derive(Serialize)]
struct Hello {
    v: u32,
    name: &'static str,
    interval_s: f64,
}

#[derive(Deserialize)]
struct ObservationLine {
    #[serde(default)]
    v: u32,
    #[serde(flatten)]
    seen: Observation,
}

#[derive(Serialize)]
struct DecisionLine {
    v: u32,
    t: f64,
    #[serde(flatten)]
    decision: Decision,
}

/// Answers the observations of `input` on `output`. Fails at the first line that is none, naming it.
pub fn run(interval_s: f64, mut input: impl BufRead, mut output: impl Write) -> anyhow::Result<()> {
    let mut say = |line: &str| -> std::io::Result<()> {
        writeln!(output, "{line}")?;
        output.flush()
    };
    say(&serde_json::to_string(&Hello { v: VERSION, name: "potstill", interval_s })?)?;
    let mut memory = PolicyState::default();
    let mut text = String::new();
    for number in 1.. {
        text.clear();
        if std::io::Read::take(&mut input, MAX_LINE_BYTES).read_line(&mut text)? == 0 {
            break;
        }
        if text.trim().is_empty() {
            continue;
        }
        let line: ObservationLine = serde_json::from_str(&text)
            .map_err(|error| anyhow::anyhow!("line {number} of the input is no observation: {error}"))?;
        anyhow::ensure!(
            line.v == VERSION,
            "line {number} of the input has version {}, this program speaks version {VERSION}",
            line.v
        );
        let decision = decide(&line.seen, &mut memory);
        say(&serde_json::to_string(&DecisionLine { v: VERSION, t: line.seen.t, decision })?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEN: &str = r#"{"v":1,"t":15.0,"budget":16.0,"more":1,"pools":[{"model":"r1","min":0,"max":8,"slots":64,"cost_per_node_s":2.0,"itl_ms":[35.0,0.6],"ready":2,"starting_age_s":[12.0],"active":97,"queued":31,"arrivals":{"10":3,"60":22,"300":140},"finished_60":18}]}"#;

    #[test]
    fn one_answer_a_line_in_order() {
        let mut output = Vec::new();
        run(5.0, format!("{SEEN}\n\n{SEEN}\n").as_bytes(), &mut output).unwrap();
        let lines: Vec<serde_json::Value> = String::from_utf8(output)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!((lines.len(), &lines[0]["interval_s"], &lines[1]["t"]), (3, &5.0.into(), &15.0.into()));
        assert!(lines[2]["desired"]["r1"].as_u64() >= Some(2) && lines[2]["reason"]["r1"].is_string());
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        for (bad, word) in [
            ("{}", "line 2"),
            ("{\"v\":1,\"t\":1}", "pools"),
            ("{\"v\":2,\"t\":1,\"pools\":[]}", "version 2"),
        ] {
            let error = run(5.0, format!("{SEEN}\n{bad}\n").as_bytes(), Vec::new()).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
