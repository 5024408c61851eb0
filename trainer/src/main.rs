//! `potstill`: distil, train, evaluate and serve reasoning models.
#![forbid(unsafe_code)]

// Training allocates and frees large buffers all the time; the system allocator hands each back to the kernel, which costs
// half of the speed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<std::process::ExitCode> {
    // Programs that models wrote are run by this program under another name.
    if std::env::args_os().nth(1).is_some_and(|first| first == potstill_sandbox::HELPER) {
        return Ok(potstill_sandbox::child::main(std::env::args_os().skip(2)));
    }
    potstill_trainer::cli::main()?;
    Ok(std::process::ExitCode::SUCCESS)
}
