//! Log set-up, the same for every binary: `POTSTILL_LOG` filters, lines go to stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Installs the global subscriber with `level` where `POTSTILL_LOG` does not say otherwise. A second call is a no-op, so
/// that tests may call it freely.
pub fn init_logs(level: &str, json: bool) {
    let filter = EnvFilter::try_from_env("POTSTILL_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    // Colours are for eyes; `NO_COLOR` is followed too.
    let colours =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    let _already_set = if json { builder.json().try_init() } else { builder.with_target(false).try_init() };
}
