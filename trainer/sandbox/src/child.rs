//! Helper process, which isolates itself in two steps.
//!
//! The outer process creates the namespaces and mounts, then starts the inner process and waits. The inner
//! process has number 1 in the new process namespace. The inner process applies the resource limits, Landlock
//! and seccomp, and then becomes the interpreter.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope, path_beneath_rules,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{getgid, getuid, setsid};
use serde::{Deserialize, Serialize};

use crate::{HELPER_ARGUMENT, Interpreter, Limits, filter};

/// Exit status of a helper that could not isolate itself.
pub(crate) const ISOLATION_FAILED: u8 = 125;
/// User and group id inside the namespace.
const SANDBOX_UID: u32 = 65_534;

/// Instructions for a helper, passed as JSON in an argument.
#[derive(Serialize, Deserialize)]
pub(crate) struct HelperConfig {
    /// Interpreter.
    pub(crate) python: Interpreter,
    /// Resource limits.
    pub(crate) limits: Limits,
    /// Random prefix of the error message of a helper that could not isolate itself.
    ///
    /// The program does not know the prefix and cannot imitate the message.
    pub(crate) sign: String,
    /// Arguments of the interpreter.
    pub(crate) arguments: Vec<String>,
}

/// Result of a step, with a message if the isolation fails.
type IsolationResult<T> = Result<T, String>;

/// Runs the helper process with the arguments behind [`HELPER`].
///
/// Writes an error to stderr and exits with status 125 if a step of the isolation fails.
pub fn run_helper(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<String> = arguments.filter_map(|argument| argument.into_string().ok()).collect();
    let done = match arguments.as_slice() {
        [step, order] if step == "outer" => run_outer(order),
        [step, order] if step == "inner" => run_inner(order),
        _ => Err("this command is for the program itself".to_owned()),
    };
    match done {
        Ok(code) => code,
        Err(problem) => {
            let order = arguments.get(1).and_then(|order| serde_json::from_str::<HelperConfig>(order).ok());
            let sign = order.map_or_else(String::new, |order| order.sign);
            let _nobody_reads = writeln!(std::io::stderr(), "{sign}{problem}");
            ExitCode::from(ISOLATION_FAILED)
        }
    }
}

/// Returns a converter that puts the name of the step before an error.
fn step_error<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> String + '_ {
    move |error| format!("{what}: {error}")
}

/// Creates the namespaces, the user mapping and `/tmp`, and waits for the inner process.
fn run_outer(order: &str) -> IsolationResult<ExitCode> {
    let limits = serde_json::from_str::<HelperConfig>(order).map_err(step_error("order"))?.limits;
    setsid().map_err(step_error("session"))?;
    set_pdeathsig(Signal::SIGKILL).map_err(step_error("death signal"))?;
    let (uid, gid) = (getuid(), getgid());
    unshare(
        CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWPID,
    )
    .map_err(step_error("namespaces"))?;
    let set = |file: &str, text: String| -> IsolationResult<()> {
        let opened = std::fs::OpenOptions::new().write(true).open(file);
        opened.and_then(|mut file| file.write_all(text.as_bytes())).map_err(step_error(file))
    };
    set("/proc/self/setgroups", "deny".to_owned())?;
    set("/proc/self/uid_map", format!("{SANDBOX_UID} {uid} 1"))?;
    set("/proc/self/gid_map", format!("{SANDBOX_UID} {gid} 1"))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(step_error("mounts"))?;
    let size = format!("size={},nr_inodes=256,mode=700", limits.file_bytes);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), "/tmp", Some("tmpfs"), flags, Some(size.as_str())).map_err(step_error("/tmp"))?;
    let own = std::env::current_exe().map_err(step_error("own program"))?;
    // The inner process has number 1 in its namespace. With its end, the kernel kills all other processes
    // there.
    let status = Command::new(own)
        .args([HELPER_ARGUMENT, "inner", order])
        .env_clear()
        .status()
        .map_err(step_error("inner"))?;
    Ok(ExitCode::from(match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, signal) => 128 + signal.unwrap_or(0) as u8,
    }))
}

/// Applies the limits and filters, and replaces this process by the interpreter; returns only on failure.
fn run_inner(order: &str) -> IsolationResult<ExitCode> {
    let order: HelperConfig = serde_json::from_str(order).map_err(step_error("order"))?;
    set_pdeathsig(Signal::SIGKILL).map_err(step_error("death signal"))?;
    std::env::set_current_dir("/tmp").map_err(step_error("/tmp"))?;
    let Limits { cpu_s, memory_bytes: memory, file_bytes: files, .. } = order.limits;
    for (resource, most) in [
        (Resource::RLIMIT_CPU, cpu_s),
        (Resource::RLIMIT_AS, memory),
        (Resource::RLIMIT_FSIZE, files),
        (Resource::RLIMIT_NOFILE, 64),
        (Resource::RLIMIT_NPROC, 32),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MEMLOCK, 0),
    ] {
        setrlimit(resource, most, most).map_err(step_error("limits"))?;
    }
    apply_landlock(&order.python)?;
    filter::install_filter().map_err(step_error("seccomp"))?;
    let error = Command::new(&order.python.executable)
        .args(&order.arguments)
        .env_clear()
        .env("PYTHONHASHSEED", "0")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PYTHONIOENCODING", "utf-8")
        .exec();
    Err(format!("interpreter: {error}"))
}

/// Restricts this process with Landlock.
///
/// The interpreter is readable. `/tmp`, `/dev/null` and `/dev/urandom` are writable; every other path is
/// denied. TCP, abstract Unix sockets and signals to other processes are denied too. Fails unless the kernel
/// enforces all rules.
fn apply_landlock(python: &Interpreter) -> IsolationResult<()> {
    let abi = ABI::V6;
    let failed = step_error::<landlock::RulesetError>("Landlock");
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(abi))
        .map_err(&failed)?
        .handle_access(AccessNet::from_all(abi))
        .map_err(&failed)?
        .scope(Scope::Signal | Scope::AbstractUnixSocket)
        .map_err(&failed)?
        .create()
        .map_err(&failed)?
        .add_rules(path_beneath_rules(&python.readable, read | AccessFs::Execute))
        .map_err(&failed)?
        .add_rules(path_beneath_rules([&python.executable], AccessFs::ReadFile | AccessFs::Execute))
        .map_err(&failed)?
        .add_rules(path_beneath_rules(
            ["/dev/null", "/dev/urandom"],
            AccessFs::ReadFile | AccessFs::WriteFile,
        ))
        .map_err(&failed)?
        .add_rules(path_beneath_rules(
            ["/tmp"],
            read | AccessFs::WriteFile
                | AccessFs::MakeReg
                | AccessFs::MakeDir
                | AccessFs::RemoveFile
                | AccessFs::RemoveDir
                | AccessFs::Truncate,
        ))
        .map_err(&failed)?
        .restrict_self()
        .map_err(&failed)?;
    if status.ruleset == RulesetStatus::FullyEnforced && status.no_new_privs {
        Ok(())
    } else {
        Err("Landlock: only a part of the rules would hold".to_owned())
    }
}
