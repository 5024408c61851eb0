//! `potstill`: distil, train, evaluate and serve reasoning models.
#![forbid(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::Command;

// Training allocates and frees large buffers all the time; the system allocator hands each back to the kernel, which costs
// half of the speed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<std::process::ExitCode> {
    // Programs that models wrote are run by this program under another name.
    if std::env::args_os().nth(1).is_some_and(|first| first == potstill_sandbox::HELPER) {
        return Ok(potstill_sandbox::child::main(std::env::args_os().skip(2)));
    }
    begin_prepared();
    potstill_trainer::cli::main()?;
    Ok(std::process::ExitCode::SUCCESS)
}

/// Commands that train: they allocate and free the same large buffers in every step.
const TRAINING: [&str; 9] = ["bench", "demo", "dpo", "grpo", "kd", "reward", "run", "sft", "train"];

/// Two libraries read what they shall do from the environment that a process begins with, so this one begins again with it.
///
/// candle keeps threads of its own that spin between operations, whatever `--threads` says: it gets none, what is large is shared out
/// by the engine's one pool (a quarter faster in training on two cores). mimalloc hands freed memory back to the kernel, which
/// has to clear it before it gives it out again: a training process keeps it (half as fast again for 135 million
/// weights), others hand it back when it was not needed for ten seconds.
fn begin_prepared() {
    const KIND: &str = "POTSTILL_PROCESS";
    const POOL: &str = "CANDLE_NUM_THREADS";
    const PURGE: &str = "MIMALLOC_PURGE_DELAY";
    let command = std::env::args().nth(1).unwrap_or_default();
    let (kind, delay) =
        if TRAINING.contains(&command.as_str()) { ("trains", "-1") } else { ("serves", "10000") };
    let begun = std::env::var(KIND).ok();
    if begun.as_deref() == Some(kind) {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut again = Command::new(program);
    again.args(std::env::args_os().skip(1)).env(KIND, kind);
    // What a user has set stays; what a training process set for itself is not for the nodes that it starts.
    if std::env::var_os(POOL).is_none() {
        again.env(POOL, "1");
    }
    if begun.is_some() || std::env::var_os(PURGE).is_none() {
        again.env(PURGE, delay);
    }
    // Comes back only if it cannot be done; then it goes on as it is.
    let _refused = again.exec();
}
