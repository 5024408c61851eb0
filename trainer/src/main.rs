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
    no_second_pool();
    potstill_trainer::cli::main()?;
    Ok(std::process::ExitCode::SUCCESS)
}

/// candle keeps threads of its own that spin between operations, whatever `--threads` says; without them training on two cores is a
/// quarter faster. What is large is shared out by the one pool of the engine. They are counted by the environment that a process
/// begins with, so this one begins again.
fn no_second_pool() {
    const VARIABLE: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_some() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        // Comes back only if it cannot be done; then it goes on with those threads.
        let _refused = Command::new(program).args(std::env::args_os().skip(1)).env(VARIABLE, "1").exec();
    }
}
