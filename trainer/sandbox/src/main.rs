//! `potstill-sandbox`: the helper process as a separate executable, for tests and for programs that cannot be
//! their own helper.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    potstill_sandbox::child::run_helper(std::env::args_os().skip(2))
}
