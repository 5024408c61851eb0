//! Load generators: closed loop, open loop, and paced streams.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::Instant;

use crate::node::now;
use crate::wire::{Framing, Wire, chat, request};

/// Results of requests.
#[derive(Default, Clone)]
pub(crate) struct Outcome {
    /// Seconds per successful request, unordered.
    pub(crate) seconds: Vec<f64>,
    /// Number of failed requests.
    pub(crate) failed: usize,
    /// Number of streams that ended with an error event.
    pub(crate) told: usize,
    /// Number of streams that were cut without an error event.
    pub(crate) cut: usize,
}

impl Outcome {
    /// Returns the quantile `share` of the durations.
    pub(crate) fn at(&self, share: f64) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        sorted.get(((sorted.len() as f64 * share) as usize).min(last)).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn mean(&self) -> f64 {
        self.seconds.iter().sum::<f64>() / self.seconds.len().max(1) as f64
    }
}

/// Sends requests one after another on each of several connections.
pub(crate) async fn closed(port: u16, bytes: Vec<u8>, connections: usize, time: Duration) -> Outcome {
    let bytes: Rc<[u8]> = bytes.into();
    let until = Instant::now() + time;
    let local = LocalSet::new();
    let outcome = Rc::new(RefCell::new(Outcome::default()));
    for _ in 0..connections {
        let (bytes, outcome) = (Rc::clone(&bytes), Rc::clone(&outcome));
        local.spawn_local(async move {
            let Ok(mut wire) = Wire::connect(&format!("127.0.0.1:{port}")).await else {
                outcome.borrow_mut().failed += 1;
                return;
            };
            while Instant::now() < until {
                let begun = Instant::now();
                let answered = async {
                    wire.send(&bytes).await?;
                    wire.answer(|_| {}).await
                };
                match answered.await {
                    Ok(200) => outcome.borrow_mut().seconds.push(begun.elapsed().as_secs_f64()),
                    _ => {
                        outcome.borrow_mut().failed += 1;
                        return;
                    }
                }
            }
        });
    }
    local.await;
    outcome.take()
}

/// A scheduled request of an open loop.
pub(crate) struct Due {
    /// Time from the start.
    pub(crate) at: Duration,
    /// The request.
    pub(crate) bytes: Vec<u8>,
    /// Whether the response is a stream.
    pub(crate) stream: bool,
}

/// Returns Poisson arrivals at a rate; `make` builds the bytes of each request.
pub(crate) fn poisson(
    rate: f64,
    time: Duration,
    seed: u64,
    mut make: impl FnMut(&mut rand_chacha::ChaCha8Rng, usize) -> (Vec<u8>, bool),
) -> Vec<Due> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let (mut at, mut due) = (0.0, Vec::new());
    loop {
        at += -(1.0 - rng.random::<f64>()).ln() / rate;
        if at >= time.as_secs_f64() {
            return due;
        }
        let (bytes, stream) = make(&mut rng, due.len());
        due.push(Due { at: Duration::from_secs_f64(at), bytes, stream });
    }
}

/// Returns a log-normal value with this mean and a shape of 0.8.
pub(crate) fn log_normal(rng: &mut rand_chacha::ChaCha8Rng, mean: f64) -> f64 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
    mean * (0.8 * normal - 0.32).exp()
}

/// Sends requests at their scheduled times, independent of responses. Latency counts from the scheduled time. `at_half`
/// is called in the middle.
pub(crate) async fn open(port: u16, due: Vec<Due>, mut at_half: impl FnMut()) -> Outcome {
    let local = LocalSet::new();
    let idle: Rc<RefCell<Vec<Wire>>> = Rc::default();
    let outcome = Rc::new(RefCell::new(Outcome::default()));
    let half = due.len() / 2;
    local
        .run_until(async {
            let start = Instant::now();
            let mut running = JoinSet::new();
            for (number, due) in due.into_iter().enumerate() {
                tokio::time::sleep_until(start + due.at).await;
                if number == half {
                    at_half();
                }
                let (idle, outcome) = (Rc::clone(&idle), Rc::clone(&outcome));
                running.spawn_local(async move {
                    let result = tokio::time::timeout(Duration::from_secs(60), one(port, &due, &idle)).await;
                    let took = (start + due.at).elapsed().as_secs_f64();
                    let mut outcome = outcome.borrow_mut();
                    match result {
                        Ok(Ok(End::Good)) => outcome.seconds.push(took),
                        Ok(Ok(End::Told)) => outcome.told += 1,
                        Ok(Ok(End::Cut)) => outcome.cut += 1,
                        _ if due.stream => outcome.cut += 1,
                        _ => outcome.failed += 1,
                    }
                });
            }
            while running.join_next().await.is_some() {}
        })
        .await;
    outcome.take()
}

enum End {
    Good,
    Told,
    Cut,
}

async fn one(port: u16, due: &Due, idle: &RefCell<Vec<Wire>>) -> std::io::Result<End> {
    let kept = idle.borrow_mut().pop();
    let mut wire = match kept {
        Some(wire) => wire,
        None => Wire::connect(&format!("127.0.0.1:{port}")).await?,
    };
    wire.send(&due.bytes).await?;
    let (mut done, mut told) = (false, false);
    let status = wire
        .answer(|part| {
            done |= memchr::memmem::find(part, b"[DONE]").is_some();
            told |= memchr::memmem::find(part, b"\"error\"").is_some();
        })
        .await;
    let end = match status {
        Ok(200) if due.stream && told && !done => End::Told,
        Ok(200) if due.stream && !done => End::Cut,
        Ok(200) if !told => End::Good,
        Ok(status) => return Err(std::io::Error::other(format!("status {status}"))),
        Err(_) if due.stream => return Ok(if told { End::Told } else { End::Cut }),
        Err(error) => return Err(error),
    };
    idle.borrow_mut().push(wire);
    Ok(end)
}

/// Results of paced streams so far.
#[derive(Default)]
pub(crate) struct Streams {
    /// Number of received tokens.
    pub(crate) tokens: usize,
    /// Delay of each token in seconds.
    pub(crate) late: Vec<f64>,
    /// Number of streams with a first token.
    pub(crate) begun: usize,
    /// Number of broken streams.
    pub(crate) failed: usize,
}

/// Opens streams for the duration `time` and calls `watch` meanwhile.
pub(crate) async fn streams(
    port: u16,
    key: Option<&str>,
    count: usize,
    pace: Duration,
    time: Duration,
    watch: impl AsyncFnOnce(&RefCell<Streams>),
) -> Streams {
    let tokens = (time.as_secs_f64() / pace.as_secs_f64()).ceil() as u64;
    let fields = format!(",\"stream\":true,\"max_tokens\":{tokens},\"x_pace_ms\":{}", pace.as_millis());
    let bytes: Rc<[u8]> = request(key, &chat(&fields, "hi")).into();
    let seen: Rc<RefCell<Streams>> = Rc::default();
    let local = LocalSet::new();
    local
        .run_until(async {
            let mut running = JoinSet::new();
            for number in 0..count {
                let (bytes, seen) = (Rc::clone(&bytes), Rc::clone(&seen));
                running.spawn_local(async move {
                    // Starts are spread over the pace, as with streams of different age.
                    tokio::time::sleep(pace.mul_f64(number as f64 / count as f64)).await;
                    if follow(port, &bytes, &seen).await.is_err() {
                        seen.borrow_mut().failed += 1;
                    }
                });
            }
            watch(&seen).await;
            running.abort_all();
        })
        .await;
    seen.take()
}

async fn follow(port: u16, bytes: &[u8], seen: &RefCell<Streams>) -> std::io::Result<()> {
    let mut wire = Wire::connect(&format!("127.0.0.1:{port}")).await?;
    wire.send(bytes).await?;
    let head = wire.head().await?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
    if head.status != 200 || head.framing != Framing::Chunked {
        return Err(std::io::Error::other("no stream"));
    }
    let mut first = true;
    loop {
        let more = wire
            .chunk(|part| {
                let arrived = now();
                let mut seen = seen.borrow_mut();
                for at in memchr::memmem::find_iter(part, b"\"content\":\"t") {
                    let digits = part.get(at + 12..at + 32).and_then(|text| std::str::from_utf8(text).ok());
                    if let Some(sent) = digits.and_then(|text| text.parse::<u128>().ok()) {
                        seen.tokens += 1;
                        seen.late.push(arrived.saturating_sub(sent) as f64 / 1e9);
                    }
                }
                if std::mem::take(&mut first) {
                    seen.begun += 1;
                }
            })
            .await?;
        if !more {
            return Ok(());
        }
    }
}
