//! Logging setup of all programs: filtered by the environment variable `POTSTILL_LOG`, written to stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Installs the global subscriber with the filter of `POTSTILL_LOG`, or with `level` if the variable is
/// absent or invalid.
///
/// Lines are JSON objects if `json` is true, else text. Only the first call has an effect, so that every test
/// can make one.
pub fn init_logging(level: &str, json: bool) {
    let filter = EnvFilter::try_from_env("POTSTILL_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    // Colors only for a terminal, and never with `NO_COLOR` (no-color.org).
    let colours =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    let _already_set = if json { builder.json().try_init() } else { builder.with_target(false).try_init() };
}
