//! `potstill-gateway`: reads the configuration, serves requests until SIGTERM or Ctrl-C, reloads the configuration on
//! SIGHUP, and drains on shutdown.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Parser, Subcommand};
use potstill_gateway::Gateway;
use potstill_gateway::config::{Config, KeyConfig, Priority, keys};
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
    /// Serve requests
    Serve {
        /// TOML configuration file
        config: PathBuf,
        /// Write logs as JSON lines
        #[arg(long)]
        log_json: bool,
        /// Number of worker threads; default: the cores available to the process
        #[arg(long)]
        threads: Option<usize>,
    },
    /// Check a configuration and print its problems
    Check {
        /// TOML configuration file
        config: PathBuf,
    },
    /// Run the scaling policy as a filter: one observation in, one decision out, as JSON lines
    Autoscale {
        /// Use standard input and output; required, as there is no other transport
        #[arg(long, required = true)]
        stdio: bool,
        /// Requested seconds between observations
        #[arg(long, default_value_t = 5.0)]
        interval: f64,
    },
    /// Manage client keys
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
}

#[derive(Subcommand)]
enum KeyCommand {
    /// Generate a key; print it once, with its hash for the configuration
    New {
        /// Add the hash to this keys file; a running gateway reads it on SIGHUP
        #[arg(long, requires = "name")]
        file: Option<PathBuf>,
        /// Name of the key
        #[arg(long)]
        name: Option<String>,
        /// Highest priority class of its requests: interactive, default or bulk
        #[arg(long, default_value = "default", value_parser = parse_priority)]
        priority: Priority,
    },
    /// Print the hash of a client certificate, for `certificate` in the configuration
    Certificate {
        /// PEM file
        file: PathBuf,
    },
}

fn parse_priority(text: &str) -> Result<Priority, String> {
    Priority::from_name(text).ok_or_else(|| "one of interactive, default, bulk".to_owned())
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Serve { config, log_json, threads } => {
            potstill_shared::telemetry::init_logging("info", log_json);
            let loaded = Config::read(&config)?;
            runtime(threads)?.block_on(serve(config, loaded))
        }
        Command::Check { config } => check_config(&config),
        Command::Autoscale { stdio: _, interval } => potstill_gateway::app::autoscale_stdio::run(
            interval,
            std::io::stdin().lock(),
            std::io::stdout().lock(),
        ),
        Command::Key { command: KeyCommand::New { file, name, priority } } => new_key(file, name, priority),
        Command::Key { command: KeyCommand::Certificate { file } } => {
            let chain = potstill_gateway::certificates(&file).map_err(anyhow::Error::msg)?;
            let hash = chain.first().map(|der| blake3::hash(der).to_hex().to_string());
            print_line(&hash.unwrap_or_default());
            Ok(())
        }
    }
}

/// With one core, the single-threaded runtime avoids handing tasks between threads.
fn runtime(threads: Option<usize>) -> std::io::Result<tokio::runtime::Runtime> {
    let threads = match threads {
        Some(threads) => threads.max(1),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    if threads == 1 {
        return tokio::runtime::Builder::new_current_thread().enable_all().build();
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()
}

#[expect(clippy::print_stdout, reason = "the answer of a command")]
fn print_line(text: &str) {
    println!("{text}");
}

fn check_config(path: &Path) -> anyhow::Result<()> {
    let config = Config::read(path)?;
    print_line(&format!(
        "`{}` is fine: {} pools, {} keys",
        path.display(),
        config.pools.len(),
        config.keys.len()
    ));
    Ok(())
}

fn new_key(file: Option<PathBuf>, name: Option<String>, priority: Priority) -> anyhow::Result<()> {
    let (key, hash) = potstill_gateway::auth::keys::generate_key();
    if let (Some(file), Some(name)) = (&file, name) {
        let mut list = keys::read_keys_file(file)?;
        list.push(KeyConfig { name, hash: Some(hash.clone()), priority, ..KeyConfig::default() });
        let problems = keys::problems(&list, "keys");
        anyhow::ensure!(problems.is_empty(), "`{}`: {}", file.display(), problems.join("; "));
        keys::write_keys_file(file, &list).with_context(|| format!("cannot write `{}`", file.display()))?;
    }
    print_line(&format!("key   {key}\nhash  {hash}"));
    Ok(())
}

async fn serve(path: PathBuf, config: Config) -> anyhow::Result<()> {
    let open = config.keys.is_empty() && config.keys_file.is_none() && config.jwt.is_none();
    if open && !config.listen.ip().is_loopback() {
        tracing::warn!("no keys are configured: everyone who reaches {} is let in", config.listen);
    }
    let bind = async |address| {
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on `{address}`"))
    };
    let listener = bind(config.listen).await?;
    let admin = match &config.admin {
        Some(admin) => Some(bind(admin.listen).await?),
        None => None,
    };
    #[cfg(feature = "kubernetes")]
    let keda = match config.autoscale.keda_listen {
        Some(address) => Some(bind(address).await?),
        None => None,
    };
    tracing::info!(address = %listener.local_addr()?, pools = config.pools.len(), "listening");
    let gateway = Gateway::build(config)?;
    let admin = admin.map(|listener| {
        let (gateway, path) = (gateway.clone(), path.clone());
        tokio::spawn(async move {
            potstill_gateway::app::admin::serve(gateway.clone(), listener, Some(path)).await
        })
    });
    #[cfg(feature = "kubernetes")]
    let keda = keda.map(|listener| {
        let gateway = gateway.clone();
        tokio::spawn(async move { gateway.serve_keda(listener).await })
    });
    let reloads = tokio::spawn(reload_on_hangup(gateway.clone(), path));
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        tracing::info!("draining");
    };
    gateway.serve(listener, stop).await;
    reloads.abort();
    let sides = admin.into_iter();
    #[cfg(feature = "kubernetes")]
    let sides = sides.chain(keda);
    for side in sides {
        side.await?;
    }
    Ok(())
}

async fn reload_on_hangup(gateway: Gateway, path: PathBuf) -> anyhow::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    while hangup.recv().await.is_some() {
        let config = Config::read(&path).map_err(anyhow::Error::from);
        match config.and_then(|config| gateway.reload(config).map_err(anyhow::Error::from)) {
            Ok(()) => tracing::info!("the configuration was read again"),
            Err(error) => tracing::error!(%error, "the new configuration is refused; the old one stays"),
        }
    }
    Ok(())
}
