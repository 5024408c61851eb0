//! `potstill`: distil, train, evaluate and serve reasoning models.
#![forbid(unsafe_code)]

// Training allocates and frees large buffers all the time; the system allocator hands each back to the kernel, which costs
// half of the speed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    potstill_trainer::cli::main()
}
