//! Sandbox for Python programs that a model wrote, with tests whose verdict the program cannot forge.
//!
//! A program runs in its own user, process, network, mount and IPC namespaces. Landlock allows only the
//! interpreter and an empty `/tmp`; seccomp allows only listed system calls. Time, memory, files and output
//! are limited; the environment is empty. If the kernel lacks one of these, no program runs.
//!
//! Expected values stay outside: printed output is compared in this process, and tests of functions run in a
//! second sandboxed process. Programs that use this crate call [`child::main`] first when [`HELPER`] is their
//! first argument.
#![forbid(unsafe_code)]

pub mod child;
mod filter;
pub mod process;
pub mod tests_of;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::process::{ExitReason, ProgramOutput};
pub use self::tests_of::{Example, TestResult};

/// First argument of a helper process.
pub const HELPER_ARGUMENT: &str = "sandbox-helper";

/// Reason for which a program was not run.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No Python interpreter was found; the value is the error.
    #[error("no Python was found: {0}; install python3, or leave out benchmarks of code")]
    NoPython(String),
    /// The kernel refuses a part of the isolation; the value is the error.
    #[error(
        "this machine cannot isolate programs ({0}), so none is run; it needs user namespaces, Landlock and seccomp"
    )]
    NoIsolation(String),
    /// The program, its tests or their JSON encoding exceed the size of a process argument.
    #[error("the program is longer than {MAX_PROGRAM_BYTES} bytes")]
    TooLong,
    /// A process or pipe could not be created.
    #[error("cannot start `{program}`: {source}")]
    Start {
        /// Executable of the helper.
        program: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
}

/// Largest size of a program or of its tests, in bytes.
pub const MAX_PROGRAM_BYTES: usize = 120_000;

/// Resource limits of a program.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    /// Processor time, in seconds.
    pub cpu_s: u64,
    /// Elapsed time.
    pub wall_time: Duration,
    /// Address space, in bytes.
    pub memory_bytes: u64,
    /// Largest size of standard output, in bytes.
    pub output_bytes: usize,
    /// Largest size of a file and total size of `/tmp`, in bytes.
    pub file_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu_s: 10,
            wall_time: Duration::from_secs(12),
            memory_bytes: 1 << 30,
            output_bytes: 1 << 20,
            file_bytes: 16 << 20,
        }
    }
}

/// Python interpreter and its readable paths.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Interpreter {
    /// Absolute path without symbolic links.
    pub(crate) executable: PathBuf,
    /// Files and folders that the interpreter needs: its library and the shared libraries.
    pub(crate) readable: Vec<PathBuf>,
}

/// Isolated runner of Python programs.
#[derive(Debug, Clone)]
pub struct Sandbox {
    /// Executable of the helper.
    pub(crate) helper: PathBuf,
    /// Interpreter of the programs.
    pub(crate) python: Interpreter,
    /// Resource limits of each program.
    pub limits: Limits,
}

impl Sandbox {
    /// Returns a sandbox whose helper is the executable `program`, which must call [`child::main`].
    ///
    /// Runs a probe that tries to leave the sandbox. Fails with [`SandboxError::NoPython`] without an
    /// interpreter, and with [`SandboxError::NoIsolation`] if the probe finds a gap.
    pub fn new(program: PathBuf, limits: Limits) -> Result<Self, SandboxError> {
        let sandbox = Self { helper: program, python: Interpreter::find()?, limits };
        let probe = sandbox.run_program(ISOLATION_PROBE, b"")?;
        if probe.ended == ExitReason::Exit(0) && probe.stdout == b"isolated\n" {
            return Ok(sandbox);
        }
        let said = String::from_utf8_lossy(&probe.stderr);
        let said = said.trim().lines().last().unwrap_or("the probe gave no reason").to_owned();
        Err(SandboxError::NoIsolation(said))
    }
}

/// Python program that prints `isolated` if sockets, the file system, new processes and other processes are
/// out of reach.
const ISOLATION_PROBE: &str = r#"
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

impl Interpreter {
    /// Returns the interpreter behind the command `python3`.
    fn find() -> Result<Self, SandboxError> {
        const PATHS_SCRIPT: &str = "import os, sys, json\nprint(json.dumps([os.path.realpath(sys.executable), [sys.base_prefix + '/lib', \
            os.path.dirname(os.__file__)] + [p for p in sys.path if p]]))";
        let output = Command::new("python3").args(["-I", "-c", PATHS_SCRIPT]).output();
        let output = output.map_err(|error| SandboxError::NoPython(error.to_string()))?;
        let (executable, mut readable): (PathBuf, Vec<PathBuf>) = serde_json::from_slice(&output.stdout)
            .map_err(|_| SandboxError::NoPython(String::from_utf8_lossy(&output.stderr).trim().to_owned()))?;
        readable.extend(["/usr/lib", "/lib", "/lib64", "/usr/lib64", "/etc/ld.so.cache"].map(PathBuf::from));
        readable.retain(|path| path.exists());
        readable.dedup();
        Ok(Self { executable, readable })
    }
}
