//! Load on OpenAI-compatible endpoints: an open-loop generator for any endpoint, a mock node, a bare proxy as the floor of what
//! a proxy costs, and `bench`, which measures the gateway beside nginx, Envoy and that floor in one run.
#![forbid(unsafe_code)]

mod bench;
mod elastic;
mod node;
mod open_loop;
mod proxy;
mod wire;

use clap::{Parser, Subcommand};

/// Load generators and measurements.
#[derive(Parser)]
#[command(name = "load-tests")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Open-loop load on any OpenAI-compatible endpoint.
    Load(open_loop::Arguments),
    /// A mock node.
    Node(node::Arguments),
    /// A bare reverse proxy over hyper: one upstream, no rules.
    Proxy(proxy::Arguments),
    /// Compares scaling laws on simulated pools.
    Elastic(elastic::Arguments),
    /// Measures the gateway beside its peers.
    Bench(bench::Arguments),
}

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match Arguments::parse().command {
        Command::Load(arguments) => runtime.block_on(open_loop::run(&arguments)),
        Command::Node(arguments) => runtime.block_on(node::run(arguments)),
        Command::Proxy(arguments) => runtime.block_on(proxy::run(arguments)),
        Command::Elastic(arguments) => elastic::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments, &runtime),
    }
}
