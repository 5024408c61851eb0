//! Programs of the benchmark, and the cores that they run on.

use std::path::PathBuf;

/// Paths of the programs.
pub(crate) struct Programs {
    pub(crate) gateway: PathBuf,
    pub(crate) envoy: PathBuf,
    pub(crate) nginx: PathBuf,
    pub(crate) own: PathBuf,
}

/// Core of the proxies.
pub(crate) const PROXY_CORE: &str = "0";

/// Core of nodes and load.
pub(crate) const LOAD_CORE: &str = "1";

/// Environment variable of the process that runs pinned to a core.
pub(crate) const PINNED: &str = "POTSTILL_BENCH_PINNED";
