//! Process in the sandbox, with its input, bounded output and deadline.
//!
//! Deliberately absent: the isolation itself, which the helper does (see [`crate::child`]).

use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::child::{HelperConfig, ISOLATION_FAILED};
use crate::{HELPER_ARGUMENT, MAX_PROGRAM_BYTES, Sandbox, SandboxError};

/// End of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// Exit with this status.
    Exit(u8),
    /// Death by this signal. The limit on processor time sends 9 (`SIGKILL`) or 24 (`SIGXCPU`).
    Signal(u8),
    /// Killed at the limit on elapsed time.
    TimedOut,
    /// Killed for output beyond the limit.
    TooMuchOutput,
    /// Not run, because the helper could not isolate itself.
    Refused,
}

/// Result of a program.
#[derive(Debug, Clone)]
pub struct ProgramOutput {
    /// End of the program.
    pub ended: ExitReason,
    /// Standard output, within the limit; empty if its end was not read.
    pub stdout: Vec<u8>,
    /// Last 4,096 bytes of standard error; empty if its end was not read.
    pub stderr: Vec<u8>,
}

/// Running process, which is killed when the value is dropped.
pub(crate) struct RunningProcess {
    child: Child,
    /// Prefix of the error message of a helper that could not isolate itself.
    sign: String,
}

impl RunningProcess {
    /// Kills the helper and all processes in its namespaces.
    fn kill(&mut self) {
        let id = Pid::from_raw(self.child.id() as i32);
        // The first call fails while the helper has not yet created its session.
        let _gone = killpg(id, Signal::SIGKILL);
        let _gone = kill(id, Signal::SIGKILL);
    }
}

impl Drop for RunningProcess {
    fn drop(&mut self) {
        self.kill();
        let _ended = self.child.wait();
    }
}

impl Sandbox {
    /// Starts a helper that runs the interpreter with `arguments`.
    pub(crate) fn spawn(
        &self,
        arguments: Vec<String>,
        stdin: Stdio,
        stdout: Stdio,
    ) -> Result<RunningProcess, SandboxError> {
        if arguments.iter().any(|argument| argument.len() > MAX_PROGRAM_BYTES) {
            return Err(SandboxError::TooLong);
        }
        let sign = format!("{:016x} ", RandomState::new().hash_one(arguments.len()));
        let order = HelperConfig {
            python: self.python.clone(),
            limits: self.limits.clone(),
            sign: sign.clone(),
            arguments,
        };
        let order = serde_json::to_string(&order).map_err(|_| SandboxError::TooLong)?;
        let started = Command::new(&self.helper)
            .args([HELPER_ARGUMENT, "outer", &order])
            .env_clear()
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn();
        let child = started.map_err(|source| match source.raw_os_error() {
            // `E2BIG`: the instructions exceed the size of an argument.
            Some(7) => SandboxError::TooLong,
            _ => SandboxError::Start { program: self.helper.clone(), source },
        })?;
        Ok(RunningProcess { child, sign })
    }

    /// Runs a Python program with `input` as its standard input and waits for its end.
    ///
    /// Fails with [`SandboxError::TooLong`] or [`SandboxError::Start`] if the helper cannot be started.
    pub fn run_program(&self, program: &str, input: &[u8]) -> Result<ProgramOutput, SandboxError> {
        let arguments = ["-I", "-c", program].map(str::to_owned).to_vec();
        let mut running = self.spawn(arguments, Stdio::piped(), Stdio::piped())?;
        if let Some(mut stdin) = running.child.stdin.take() {
            let input = input.to_vec();
            // If the program ends without reading, the write fails and the thread ends.
            std::thread::spawn(move || stdin.write_all(&input));
        }
        Ok(running.wait_with_limits(self.limits.wall_time, self.limits.output_bytes))
    }
}

/// Message of a thread that reads a pipe.
enum PipeMessage {
    /// Standard output up to its end.
    Ended(Vec<u8>),
    /// Tail of standard error up to its end.
    Errors(Vec<u8>),
    /// Standard output beyond the limit.
    TooMuch,
}

impl RunningProcess {
    /// Waits at most `wall` for the end of the process and reads at most `most` bytes of its output.
    pub(crate) fn wait_with_limits(mut self, wall: Duration, most: usize) -> ProgramOutput {
        let deadline = Instant::now() + wall;
        let (say, heard) = mpsc::channel();
        if let Some(stdout) = self.child.stdout.take() {
            let say = say.clone();
            std::thread::spawn(move || {
                let (text, whole) = read_limited(stdout, most);
                let _nobody_waits =
                    say.send(if whole { PipeMessage::Ended(text) } else { PipeMessage::TooMuch });
            });
        } else {
            let _nobody_waits = say.send(PipeMessage::Ended(Vec::new()));
        }
        if let Some(stderr) = self.child.stderr.take() {
            std::thread::spawn(move || {
                let _nobody_waits = say.send(PipeMessage::Errors(read_tail(stderr)));
            });
        }
        let (mut stdout, mut stderr) = (None, None);
        let mut ended = None;
        while stdout.is_none() || stderr.is_none() {
            match heard.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(PipeMessage::Ended(text)) => stdout = Some(text),
                Ok(PipeMessage::Errors(text)) => stderr = Some(text),
                Ok(PipeMessage::TooMuch) => {
                    ended = Some(ExitReason::TooMuchOutput);
                    break;
                }
                Err(_) => {
                    ended = Some(ExitReason::TimedOut);
                    break;
                }
            }
        }
        // Closed pipes do not prove the end: a process can close both and continue.
        let mut ended = ended.unwrap_or_else(|| self.wait_until(deadline));
        self.kill();
        let mut stderr = stderr.unwrap_or_default();
        if ended == ExitReason::Exit(ISOLATION_FAILED) && stderr.starts_with(self.sign.as_bytes()) {
            ended = ExitReason::Refused;
            stderr.drain(..self.sign.len());
        }
        ProgramOutput { ended, stdout: stdout.unwrap_or_default(), stderr }
    }

    /// Waits for the end of the process; kills the process at the deadline.
    fn wait_until(&mut self, deadline: Instant) -> ExitReason {
        let id = Pid::from_raw(self.child.id() as i32);
        let (say, done) = mpsc::channel::<()>();
        // The thread kills the process at the deadline, unless `say` is dropped before.
        let watch = std::thread::spawn(move || {
            let left = deadline.saturating_duration_since(Instant::now());
            if done.recv_timeout(left) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _gone = killpg(id, Signal::SIGKILL);
                return true;
            }
            false
        });
        let status = self.child.wait();
        drop(say);
        let late = watch.join().unwrap_or(true);
        match status {
            _ if late => ExitReason::TimedOut,
            Ok(status) => match status.code() {
                Some(code) if code > 128 => ExitReason::Signal((code - 128) as u8),
                Some(code) => ExitReason::Exit(code as u8),
                None => ExitReason::Signal(9),
            },
            Err(_) => ExitReason::Signal(9),
        }
    }
}

/// Reads to the end and returns the last 4,096 bytes.
fn read_tail(mut from: impl Read) -> Vec<u8> {
    const KEPT: usize = 4_096;
    let (mut text, mut piece) = (Vec::new(), [0u8; KEPT]);
    while let Ok(count @ 1..) = from.read(&mut piece) {
        text.extend_from_slice(&piece[..count]);
        let old = text.len().saturating_sub(KEPT);
        text.drain(..old);
    }
    text
}

/// Reads at most `most` bytes; returns true if they are the whole stream.
fn read_limited(mut from: impl Read, most: usize) -> (Vec<u8>, bool) {
    let mut text = Vec::new();
    let read = from.by_ref().take(most as u64 + 1).read_to_end(&mut text);
    let whole = text.len() <= most && read.is_ok();
    text.truncate(most);
    (text, whole)
}
