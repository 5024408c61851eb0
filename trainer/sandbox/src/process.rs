//! A process in the sandbox: started, fed, read up to a limit, ended in time.

use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::child::{Order, REFUSED};
use crate::{HELPER, LONGEST, Sandbox, SandboxError};

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exit(u8),
    /// By this signal; 9 and 24 are what limits on processor time send.
    Signal(u8),
    /// It took too long.
    TimedOut,
    /// It printed more than is read.
    TooMuchOutput,
    /// The helper could not isolate it; it was not run.
    Refused,
}

/// What a program did.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub ended: Ended,
    /// What it printed.
    pub stdout: Vec<u8>,
    /// What it complained about, the end of it.
    pub stderr: Vec<u8>,
}

/// A process that is ended when it is forgotten.
pub(crate) struct Running {
    child: Child,
    /// What a helper says first that could not isolate.
    sign: String,
}

impl Running {
    /// Ends the helper and, through it, everything in its namespaces.
    fn end(&mut self) {
        let id = Pid::from_raw(self.child.id() as i32);
        // The helper leads a session of its own, unless it has not come so far yet.
        let _gone = killpg(id, Signal::SIGKILL);
        let _gone = kill(id, Signal::SIGKILL);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
        let _ended = self.child.wait();
    }
}

impl Sandbox {
    pub(crate) fn start(
        &self,
        arguments: Vec<String>,
        stdin: Stdio,
        stdout: Stdio,
    ) -> Result<Running, SandboxError> {
        if arguments.iter().any(|argument| argument.len() > LONGEST) {
            return Err(SandboxError::TooLong);
        }
        let sign = format!("{:016x} ", RandomState::new().hash_one(arguments.len()));
        let order =
            Order { python: self.python.clone(), limits: self.limits.clone(), sign: sign.clone(), arguments };
        let order = serde_json::to_string(&order).map_err(|_| SandboxError::TooLong)?;
        let started = Command::new(&self.helper)
            .args([HELPER, "outer", &order])
            .env_clear()
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn();
        let child = started.map_err(|source| match source.raw_os_error() {
            // The order is longer than arguments may be.
            Some(7) => SandboxError::TooLong,
            _ => SandboxError::Start { program: self.helper.clone(), source },
        })?;
        Ok(Running { child, sign })
    }

    /// Runs a program on some input.
    pub fn python_program(&self, program: &str, input: &[u8]) -> Result<Output, SandboxError> {
        let arguments = ["-I", "-c", program].map(str::to_owned).to_vec();
        let mut running = self.start(arguments, Stdio::piped(), Stdio::piped())?;
        if let Some(mut stdin) = running.child.stdin.take() {
            let input = input.to_vec();
            // A program that does not read its input ends this thread with it.
            std::thread::spawn(move || stdin.write_all(&input));
        }
        Ok(running.finish(self.limits.wall, self.limits.output))
    }
}

enum Heard {
    Ended(Vec<u8>),
    Errors(Vec<u8>),
    TooMuch,
}

impl Running {
    /// Waits for the end, at most so long.
    pub(crate) fn finish(mut self, wall: Duration, most: usize) -> Output {
        let deadline = Instant::now() + wall;
        let (say, heard) = mpsc::channel();
        if let Some(stdout) = self.child.stdout.take() {
            let say = say.clone();
            std::thread::spawn(move || {
                let (text, whole) = read(stdout, most);
                let _nobody_waits = say.send(if whole { Heard::Ended(text) } else { Heard::TooMuch });
            });
        } else {
            let _nobody_waits = say.send(Heard::Ended(Vec::new()));
        }
        if let Some(stderr) = self.child.stderr.take() {
            std::thread::spawn(move || {
                let _nobody_waits = say.send(Heard::Errors(tail(stderr)));
            });
        }
        let (mut stdout, mut stderr) = (None, None);
        let mut ended = None;
        while stdout.is_none() || stderr.is_none() {
            match heard.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Heard::Ended(text)) => stdout = Some(text),
                Ok(Heard::Errors(text)) => stderr = Some(text),
                Ok(Heard::TooMuch) => {
                    ended = Some(Ended::TooMuchOutput);
                    break;
                }
                Err(_) => {
                    ended = Some(Ended::TimedOut);
                    break;
                }
            }
        }
        // Both pipes are closed when the last process has ended, or closed them itself and goes on.
        let mut ended = ended.unwrap_or_else(|| self.status(deadline));
        self.end();
        let mut stderr = stderr.unwrap_or_default();
        if ended == Ended::Exit(REFUSED) && stderr.starts_with(self.sign.as_bytes()) {
            ended = Ended::Refused;
            stderr.drain(..self.sign.len());
        }
        Output { ended, stdout: stdout.unwrap_or_default(), stderr }
    }

    fn status(&mut self, deadline: Instant) -> Ended {
        let id = Pid::from_raw(self.child.id() as i32);
        let (say, done) = mpsc::channel::<()>();
        // Ends it when the time is over; told to stop when it has ended before.
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
            _ if late => Ended::TimedOut,
            Ok(status) => match status.code() {
                Some(code) if code > 128 => Ended::Signal((code - 128) as u8),
                Some(code) => Ended::Exit(code as u8),
                None => Ended::Signal(9),
            },
            Err(_) => Ended::Signal(9),
        }
    }
}

/// Reads to the end and keeps the last of it.
fn tail(mut from: impl Read) -> Vec<u8> {
    const KEPT: usize = 4_096;
    let (mut text, mut piece) = (Vec::new(), [0u8; KEPT]);
    while let Ok(count @ 1..) = from.read(&mut piece) {
        text.extend_from_slice(&piece[..count]);
        let old = text.len().saturating_sub(KEPT);
        text.drain(..old);
    }
    text
}

/// Reads to the end, at most so much; whether that was all.
fn read(mut from: impl Read, most: usize) -> (Vec<u8>, bool) {
    let mut text = Vec::new();
    let read = from.by_ref().take(most as u64 + 1).read_to_end(&mut text);
    let whole = text.len() <= most && read.is_ok();
    text.truncate(most);
    (text, whole)
}
