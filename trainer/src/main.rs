//! The `potstill` program: distills, trains, evaluates and serves reasoning models. Prepares the process; the
//! subcommands are in `potstill_trainer::cli`.
#![forbid(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::Command;

// Training constantly allocates and frees large buffers. The system allocator returns each to the kernel, which halves
// the speed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<std::process::ExitCode> {
    // The sandbox starts this program as its helper to run model-written programs.
    if std::env::args_os().nth(1).is_some_and(|first| first == potstill_sandbox::HELPER_ARGUMENT) {
        return Ok(potstill_sandbox::child::run_helper(std::env::args_os().skip(2)));
    }
    reexec_with_environment();
    potstill_trainer::cli::main()?;
    Ok(std::process::ExitCode::SUCCESS)
}

/// Subcommands that train, and so reuse large buffers in every step.
const TRAINING_COMMANDS: [&str; 9] = ["bench", "demo", "dpo", "grpo", "kd", "reward", "run", "sft", "train"];

/// Sets environment variables for candle and mimalloc, which read them only at process start, and re-executes the
/// program.
///
/// candle: one thread. Its own threads spin between operations, and the engine's pool already divides large operations.
/// This makes training a quarter faster on two cores.
///
/// mimalloc: the delay before freed memory is returned to the kernel, which must clear the memory before reuse.
/// Training processes never return it (half as fast again for 135 million weights); others return it after ten seconds.
fn reexec_with_environment() {
    const KIND: &str = "POTSTILL_PROCESS";
    const POOL: &str = "CANDLE_NUM_THREADS";
    const PURGE: &str = "MIMALLOC_PURGE_DELAY";
    let command = std::env::args().nth(1).unwrap_or_default();
    let (kind, delay) =
        if TRAINING_COMMANDS.contains(&command.as_str()) { ("trains", "-1") } else { ("serves", "10000") };
    let begun = std::env::var(KIND).ok();
    if begun.as_deref() == Some(kind) {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut again = Command::new(program);
    again.args(std::env::args_os().skip(1)).env(KIND, kind);
    // Variables set by the user are kept. Settings of a training process are not inherited by the nodes that it starts.
    if std::env::var_os(POOL).is_none() {
        again.env(POOL, "1");
    }
    if begun.is_some() || std::env::var_os(PURGE).is_none() {
        again.env(PURGE, delay);
    }
    // `exec` returns only on failure. The program then runs with the environment unchanged.
    let _refused = again.exec();
}
