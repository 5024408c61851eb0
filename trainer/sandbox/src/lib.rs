//! Runs Python that a model wrote, and tells from outside whether it is right. The program gets a process of its own in new
//! user, process, network, mount and IPC namespaces, a view of the file system that holds its interpreter and an empty
//! `/tmp` (Landlock), a list of system calls (seccomp), limits on time, memory, files and output, and nothing of the
//! environment. Where the kernel refuses any of these, nothing is run.
//!
//! The verdict is never computed where the program runs: what it prints is compared by us, and what its functions give is
//! handed as plain values to the tests, which run in a process of their own. A program can only answer; it never meets
//! the expected values.
//!
//! Setting up needs a helper process: programs that use this crate call [`child::main`] first thing when they are started
//! with [`HELPER`] as their first argument.
#![forbid(unsafe_code)]

pub mod child;
mod filter;
pub mod process;
pub mod tests_of;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::process::{Ended, Output};
pub use self::tests_of::{Example, Verdict};

/// First argument of the helper process.
pub const HELPER: &str = "sandbox-helper";

/// Why nothing was run.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No interpreter.
    #[error("no Python was found: {0}; install python3, or leave out benchmarks of code")]
    NoPython(String),
    /// The kernel does not allow what isolation needs.
    #[error(
        "this machine cannot isolate programs ({0}), so none is run; it needs user namespaces, Landlock and seccomp"
    )]
    NoIsolation(String),
    /// The program cannot be handed over.
    #[error("the program is longer than {LONGEST} bytes")]
    TooLong,
    /// The helper could not be started.
    #[error("cannot start `{program}`: {source}")]
    Start {
        /// Which.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Longest program or test.
pub const LONGEST: usize = 120_000;

/// What a program may use.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    /// Seconds of processor time.
    pub cpu_s: u64,
    /// Time in all.
    pub wall: Duration,
    /// Bytes of address space.
    pub memory: u64,
    /// Bytes of output that are read.
    pub output: usize,
    /// Bytes of a file, and of `/tmp`.
    pub files: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { cpu_s: 10, wall: Duration::from_secs(12), memory: 1 << 30, output: 1 << 20, files: 16 << 20 }
    }
}

/// An interpreter and what it must be able to read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Python {
    pub(crate) executable: PathBuf,
    pub(crate) readable: Vec<PathBuf>,
}

/// Runs programs.
#[derive(Debug, Clone)]
pub struct Sandbox {
    pub(crate) helper: PathBuf,
    pub(crate) python: Python,
    /// What programs may use.
    pub limits: Limits,
}

impl Sandbox {
    /// A sandbox whose helper is `program` (which must call [`child::main`]). Runs a program that tries to get out; when any
    /// wall is missing, there is no sandbox.
    pub fn new(program: PathBuf, limits: Limits) -> Result<Self, SandboxError> {
        let sandbox = Self { helper: program, python: Python::find()?, limits };
        let probe = sandbox.python_program(PROBE, b"")?;
        if probe.ended == Ended::Exit(0) && probe.stdout == b"isolated\n" {
            return Ok(sandbox);
        }
        let said = String::from_utf8_lossy(&probe.stderr);
        let said = said.trim().lines().last().unwrap_or("the probe gave no reason").to_owned();
        Err(SandboxError::NoIsolation(said))
    }
}

/// Says `isolated` when the network, other processes and the file system are out of reach.
const PROBE: &str = r#"
import os
def fails(act):
    try:
        act()
    except OSError:
        return True
    return False
import socket
assert fails(lambda: socket.socket()), "the network is open"
assert fails(lambda: os.listdir("/")), "the file system is open"
assert fails(lambda: os.fork()), "processes can be started"
assert os.getpid() == 1, "other processes are in sight"
print("isolated")
"#;

impl Python {
    /// The interpreter that `python3` stands for.
    fn find() -> Result<Self, SandboxError> {
        const ASK: &str = "import os, sys, json\nprint(json.dumps([os.path.realpath(sys.executable), [sys.base_prefix + '/lib', \
            os.path.dirname(os.__file__)] + [p for p in sys.path if p]]))";
        let output = Command::new("python3").args(["-I", "-c", ASK]).output();
        let output = output.map_err(|error| SandboxError::NoPython(error.to_string()))?;
        let (executable, mut readable): (PathBuf, Vec<PathBuf>) = serde_json::from_slice(&output.stdout)
            .map_err(|_| SandboxError::NoPython(String::from_utf8_lossy(&output.stderr).trim().to_owned()))?;
        readable.extend(["/usr/lib", "/lib", "/lib64", "/usr/lib64", "/etc/ld.so.cache"].map(PathBuf::from));
        readable.retain(|path| path.exists());
        readable.dedup();
        Ok(Self { executable, readable })
    }
}
