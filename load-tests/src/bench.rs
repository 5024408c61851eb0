//! Benchmarks the gateway and its peers in one run: proxies on the first core, nodes and load on the second. Only
//! ratios are meaningful; absolute times depend on the machine. Peers that are not installed are skipped.

mod cases;
mod load;
mod peers;
mod process;
mod programs;

use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use clap::Args;
use serde::Deserialize;

use self::peers::Peer;
use self::programs::{LOAD_CORE, PINNED, Programs};

/// Arguments of `bench`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Scenario file
    #[arg(long, default_value = "load-tests/scenarios/gateway.toml")]
    scenario: PathBuf,
    /// Cases to run, separated by commas; default: all
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Peers to run, separated by commas: direct, hyper, nginx, envoy, potstill; default: all
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Program of the gateway; default: next to this program
    #[arg(long)]
    gateway: Option<PathBuf>,
    /// Program of Envoy; default: on the search path
    #[arg(long, default_value = "envoy")]
    envoy: PathBuf,
    /// Program of nginx; default: on the search path
    #[arg(long, default_value = "nginx")]
    nginx: PathBuf,
}

/// The cases. A case that is missing in the file is skipped.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scenario {
    plain: Option<cases::Plain>,
    paced: Option<cases::Paced>,
    open: Option<cases::Open>,
    memory: Option<cases::Memory>,
    prompt: Option<cases::Prompt>,
    slow_node: Option<cases::SlowNode>,
    killed: Option<cases::Killed>,
}

pub(crate) fn run(arguments: &Arguments, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
    let own = std::env::current_exe()?;
    if std::env::var_os(PINNED).is_none() {
        let status = Command::new("taskset")
            .args(["-c", LOAD_CORE])
            .arg(&own)
            .args(std::env::args_os().skip(1))
            .env(PINNED, "1")
            .status()
            .context("`taskset` (package util-linux) is needed to give the proxies a core of their own")?;
        anyhow::ensure!(status.success(), "the measurement failed");
        return Ok(());
    }
    let text = std::fs::read_to_string(&arguments.scenario)
        .with_context(|| format!("cannot read `{}`", arguments.scenario.display()))?;
    let scenario: Scenario =
        toml::from_str(&text).with_context(|| format!("`{}`", arguments.scenario.display()))?;
    let programs = Programs {
        gateway: arguments.gateway.clone().unwrap_or_else(|| own.with_file_name("potstill-gateway")),
        envoy: arguments.envoy.clone(),
        nginx: arguments.nginx.clone(),
        own,
    };
    let wanted =
        |peer: &Peer| arguments.peers.is_empty() || arguments.peers.iter().any(|name| name == peer.name());
    let peers: Vec<Peer> =
        Peer::ALL.into_iter().filter(|peer| wanted(peer) && peer.installed(&programs)).collect();
    let run = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == name);
    runtime.block_on(async {
        if let Some(case) = scenario.plain.filter(|_| run("plain")) {
            case.run(&programs, &peers).await?;
        }
        if let Some(case) = scenario.paced.filter(|_| run("paced")) {
            case.run(&programs, &peers).await?;
        }
        if let Some(case) = scenario.open.filter(|_| run("open")) {
            case.run(&programs, &peers).await?;
        }
        if let Some(case) = scenario.memory.filter(|_| run("memory")) {
            case.run(&programs, &peers).await?;
        }
        if let Some(case) = scenario.prompt.filter(|_| run("prompt")) {
            case.run(&programs, &peers).await?;
        }
        if let Some(case) = scenario.slow_node.filter(|_| run("slow_node")) {
            case.run(&programs, &peers).await?;
        }
        if let Some(case) = scenario.killed.filter(|_| run("killed")) {
            case.run(&programs, &peers).await?;
        }
        Ok(())
    })
}

/// Prints a line of results.
#[expect(clippy::print_stdout, reason = "the result of a command")]
pub(crate) fn say(line: &str) {
    println!("{line}");
}
