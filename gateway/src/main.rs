//! `potstill-gateway`: reads a configuration, serves until SIGTERM or Ctrl-C, drains.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Parser, Subcommand};
use potstill_gateway::Gateway;
use potstill_gateway::config::Config;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// OpenAI-compatible gateway in front of elastic pools of inference nodes.
#[derive(Parser)]
#[command(name = "potstill-gateway", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve.
    Serve {
        /// The TOML configuration.
        config: PathBuf,
        /// Log as JSON lines.
        #[arg(long)]
        log_json: bool,
    },
    /// Check a configuration and say what is wrong with it.
    Check {
        /// The TOML configuration.
        config: PathBuf,
    },
    /// Make a client key: prints the key once, and the hash for the configuration.
    Key,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Serve { config, log_json } => {
            potstill_shared::telemetry::init_logs("info", log_json);
            let config = Config::read(&config)?;
            tokio::runtime::Runtime::new()?.block_on(serve(config))
        }
        Command::Check { config } => check(&config),
        Command::Key => {
            let (key, hash) = potstill_gateway::keys::generate();
            say(&format!("key   {key}\nhash  {hash}"));
            Ok(())
        }
    }
}

#[expect(clippy::print_stdout, reason = "the answer of a command")]
fn say(text: &str) {
    println!("{text}");
}

fn check(path: &Path) -> anyhow::Result<()> {
    let config = Config::read(path)?;
    say(&format!("`{}` is fine: {} pools, {} keys", path.display(), config.pools.len(), config.keys.len()));
    Ok(())
}

async fn serve(config: Config) -> anyhow::Result<()> {
    if config.keys.is_empty() && !config.listen.ip().is_loopback() {
        tracing::warn!("no keys are configured: everyone who reaches {} is let in", config.listen);
    }
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on `{}`", config.listen))?;
    tracing::info!(address = %listener.local_addr()?, pools = config.pools.len(), "listening");
    let gateway = Gateway::build(config)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        tracing::info!("stopping: open streams may finish");
    };
    gateway.serve(listener, stop).await;
    Ok(())
}
