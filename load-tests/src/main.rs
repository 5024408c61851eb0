//! Load tests for OpenAI-compatible endpoints: an open-loop generator, a mock node, a bare proxy as the lower bound of
//! a proxy's cost, and `bench`. The latter measures the gateway, nginx, Envoy and the bare proxy in one run.
#![forbid(unsafe_code)]

mod bench;
mod elastic;
mod node;
mod open_loop;
mod proxy;
mod wire;

use clap::{Parser, Subcommand};

/// Load generators and measurements
#[derive(Parser)]
#[command(name = "load-tests")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send open-loop load to an OpenAI-compatible endpoint
    Load(open_loop::Arguments),
    /// Run a mock node
    Node(node::Arguments),
    /// Run a bare reverse proxy over hyper, with one upstream and no rules
    Proxy(proxy::Arguments),
    /// Compare scaling policies on simulated pools
    Elastic(elastic::Arguments),
    /// Benchmark the gateway and its peers
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
