//! The gateway beside its peers, in one run: proxies on the first core, nodes and load on the second. Ratios count; absolute
//! times belong to the machine. Peers that are not installed are left out.

mod cases;
mod load;
mod peers;
mod process;

use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use clap::Args;
use serde::Deserialize;

use self::peers::Peer;

/// What to measure.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The scenario file.
    #[arg(long, default_value = "load-tests/scenarios/gateway.toml")]
    scenario: PathBuf,
    /// Only these cases, by comma.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these peers, by comma: direct, hyper, nginx, envoy, potstill.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// The gateway's program; next to this one if not given.
    #[arg(long)]
    gateway: Option<PathBuf>,
    /// Envoy's program, or the one in the search path.
    #[arg(long, default_value = "envoy")]
    envoy: PathBuf,
    /// nginx's program, or the one in the search path.
    #[arg(long, default_value = "nginx")]
    nginx: PathBuf,
}

/// The cases; each is left out when the file does not have it.
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

/// Where things are.
pub(crate) struct Programs {
    gateway: PathBuf,
    envoy: PathBuf,
    nginx: PathBuf,
    own: PathBuf,
}

/// The core of the proxies, and that of nodes and load.
const PROXY_CORE: &str = "0";
const LOAD_CORE: &str = "1";

/// Set in the process that runs pinned.
const PINNED: &str = "POTSTILL_BENCH_PINNED";

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

/// Prints a line of a result.
#[expect(clippy::print_stdout, reason = "the result of a command")]
pub(crate) fn say(line: &str) {
    println!("{line}");
}
