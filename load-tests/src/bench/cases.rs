//! The benchmark cases: one struct each, with its parameters, its run, and its output.

use std::cell::RefCell;
use std::time::Duration;

use serde::Deserialize;

use super::load::{Streams, closed, log_normal, open, poisson, streams};
use super::peers::{Peer, Running, node};
use super::{Programs, say};
use crate::wire::{chat, request};

fn title(text: &str, columns: &str) {
    say(&format!("\n### {text}\n\n{columns}"));
    let bars = columns.matches('|').count() - 1;
    say(&format!("|{}", "---|".repeat(bars)));
}

fn cpu(running: &Running) -> Duration {
    running.process.as_ref().map_or(Duration::ZERO, super::process::Process::cpu)
}

/// Formats median, smallest and largest value.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let (Some(first), Some(last)) = (values.first(), values.last()) else { return "-".to_owned() };
    format!("{:.1} [{first:.1}-{last:.1}]", values[values.len() / 2])
}

/// Short responses in a closed loop.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plain {
    connections: usize,
    seconds: u64,
    windows: usize,
}

impl Plain {
    pub(crate) async fn run(&self, programs: &Programs, peers: &[Peer]) -> anyhow::Result<()> {
        title(
            &format!(
                "Tiny answers, {} connections, closed loop, median [min-max] of {} windows",
                self.connections, self.windows
            ),
            "| peer | requests/s | CPU µs/request | p50 µs | p99 µs | failed | start ms | fresh MB |",
        );
        let node = node(programs, None, 1.0).await?;
        let mut contenders = start_all(programs, peers, node.port).await?;
        for contender in &contenders {
            let bytes = request(contender.running.key, &chat("", "hi"));
            let warm_up =
                closed(contender.running.port, bytes, self.connections, Duration::from_millis(500)).await;
            anyhow::ensure!(
                !warm_up.seconds.is_empty(),
                "`{}` answers nothing",
                contender.running.peer.name()
            );
        }
        for round in 0..self.windows {
            // Each round begins with another peer, so that none always follows the same neighbor.
            contenders.rotate_left(usize::from(round > 0));
            for contender in &mut contenders {
                let running = &contender.running;
                let bytes = request(running.key, &chat("", "hi"));
                let before = cpu(running);
                let outcome =
                    closed(running.port, bytes, self.connections, Duration::from_secs(self.seconds)).await;
                let count = outcome.seconds.len() as f64;
                contender.add([
                    count / self.seconds as f64,
                    (cpu(running) - before).as_secs_f64() * 1e6 / count,
                    outcome.at(0.5) * 1e6,
                    outcome.at(0.99) * 1e6,
                ]);
                contender.failed += outcome.failed;
            }
        }
        for contender in &contenders {
            let process = contender.running.process.as_ref();
            let started = process.map_or(0.0, |process| process.started_in.as_secs_f64() * 1e3);
            let fresh = process.map_or(0.0, |process| process.fresh_kb as f64 / 1024.0);
            contender.say(&format!("{started:.0} | {fresh:.1}"));
        }
        Ok(())
    }
}

/// A peer whose measurement windows alternate with those of the others, so that noise of the machine affects all.
struct Contender {
    running: Running,
    windows: Vec<[f64; 4]>,
    failed: usize,
}

async fn start_all(programs: &Programs, peers: &[Peer], node: u16) -> anyhow::Result<Vec<Contender>> {
    let mut contenders = Vec::new();
    for peer in peers {
        let running = peer.start(programs, &[node], None).await?;
        contenders.push(Contender { running, windows: Vec::new(), failed: 0 });
    }
    Ok(contenders)
}

impl Contender {
    fn add(&mut self, values: [f64; 4]) {
        self.windows.push(values);
    }

    fn say(&self, rest: &str) {
        let column = |at: usize| spread(self.windows.iter().map(|window| window[at]).collect());
        let name = self.running.peer.name();
        say(&format!(
            "| {name} | {} | {} | {} | {} | {} | {rest} |",
            column(0),
            column(1),
            column(2),
            column(3),
            self.failed
        ));
    }
}

/// Streams at the pace of decoding.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Paced {
    streams: usize,
    pace_ms: u64,
    seconds: u64,
    windows: usize,
}

impl Paced {
    pub(crate) async fn run(&self, programs: &Programs, peers: &[Peer]) -> anyhow::Result<()> {
        title(
            &format!("{} streams, a token every {} ms", self.streams, self.pace_ms),
            "| peer | tokens/s | CPU µs/token | late p50 µs | late p99 µs | failed | |",
        );
        let node = node(programs, None, 1.0).await?;
        let pace = Duration::from_millis(self.pace_ms);
        let time = Duration::from_secs(self.seconds);
        let mut contenders = start_all(programs, peers, node.port).await?;
        for round in 0..self.windows {
            contenders.rotate_left(usize::from(round > 0));
            for contender in &mut contenders {
                let running = &contender.running;
                let (mut cost, mut rate) = (0.0, 0.0);
                let watch = async |seen: &RefCell<Streams>| {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    seen.borrow_mut().late.clear();
                    let (before, tokens) = (cpu(running), seen.borrow().tokens);
                    tokio::time::sleep(time).await;
                    let count = (seen.borrow().tokens - tokens) as f64;
                    cost = (cpu(running) - before).as_secs_f64() * 1e6 / count;
                    rate = count / time.as_secs_f64();
                };
                let longest = time + Duration::from_secs(30);
                let seen = streams(running.port, running.key, self.streams, pace, longest, watch).await;
                let outcome = super::load::Outcome { seconds: seen.late, ..Default::default() };
                contender.add([rate, cost, outcome.at(0.5) * 1e6, outcome.at(0.99) * 1e6]);
                contender.failed += seen.failed;
            }
        }
        contenders.iter().for_each(|contender| contender.say(""));
        Ok(())
    }
}

/// Added latency under Poisson arrivals.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Open {
    rate: f64,
    seconds: u64,
    windows: usize,
}

impl Open {
    pub(crate) async fn run(&self, programs: &Programs, peers: &[Peer]) -> anyhow::Result<()> {
        title(
            &format!("Poisson arrivals, {}/s, tiny answers; added = minus direct", self.rate),
            "| peer | added p50 µs | added p99 µs | p50 µs | CPU µs/request | failed | |",
        );
        let node = node(programs, None, 1.0).await?;
        let mut contenders = start_all(programs, peers, node.port).await?;
        let mut floor = [f64::NAN; 2];
        for round in 0..self.windows {
            for contender in &mut contenders {
                let running = &contender.running;
                let bytes = request(running.key, &chat("", "hi"));
                let _warm_up = closed(running.port, bytes.clone(), 8, Duration::from_millis(100)).await;
                let before = cpu(running);
                let time = Duration::from_secs(self.seconds);
                let due = poisson(self.rate, time, round as u64, |_, _| (bytes.clone(), false));
                let outcome = open(running.port, due, || {}).await;
                let cost = (cpu(running) - before).as_secs_f64() * 1e6 / outcome.seconds.len().max(1) as f64;
                let (p50, p99) = (outcome.at(0.5) * 1e6, outcome.at(0.99) * 1e6);
                if running.peer == Peer::Direct {
                    floor = [p50, p99];
                }
                contender.add([p50 - floor[0], p99 - floor[1], p50, cost]);
                contender.failed += outcome.failed;
            }
        }
        contenders.iter().for_each(|contender| contender.say(""));
        Ok(())
    }
}

/// Memory of slow streams.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Memory {
    streams: usize,
    pace_ms: u64,
    seconds: u64,
}

impl Memory {
    pub(crate) async fn run(&self, programs: &Programs, peers: &[Peer]) -> anyhow::Result<()> {
        title(
            &format!("{} streams held open, a token every {} ms", self.streams, self.pace_ms),
            "| peer | fresh MB | with streams MB | KB/stream | delivered | failed |",
        );
        let node = node(programs, None, 1.0).await?;
        for peer in peers.iter().filter(|peer| **peer != Peer::Direct) {
            let running = peer.start(programs, &[node.port], None).await?;
            let Some(process) = &running.process else { continue };
            let (fresh, mut full, mut share) = (process.fresh_kb, 0, 0.0);
            let time = Duration::from_secs(self.seconds);
            let pace = Duration::from_millis(self.pace_ms);
            let watch = async |seen: &RefCell<Streams>| {
                let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
                while seen.borrow().begun < self.streams && tokio::time::Instant::now() < deadline {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let before = seen.borrow().tokens;
                tokio::time::sleep(time).await;
                let wanted = self.streams as f64 * time.as_secs_f64() / pace.as_secs_f64();
                share = (seen.borrow().tokens - before) as f64 / wanted;
                full = process.memory_kb();
            };
            let longest = time + Duration::from_secs(120);
            let seen = streams(running.port, running.key, self.streams, pace, longest, watch).await;
            say(&format!(
                "| {} | {:.1} | {:.1} | {:.1} | {:.0} % | {} |",
                peer.name(),
                fresh as f64 / 1024.0,
                full as f64 / 1024.0,
                (full.saturating_sub(fresh)) as f64 / self.streams as f64,
                share * 100.0,
                seen.failed
            ));
        }
        Ok(())
    }
}

/// Long prompts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Prompt {
    kilobytes: [usize; 2],
    connections: usize,
    seconds: u64,
}

impl Prompt {
    pub(crate) async fn run(&self, programs: &Programs, peers: &[Peer]) -> anyhow::Result<()> {
        let [small, large] = self.kilobytes;
        title(
            "Long prompts",
            &format!("| peer | CPU µs/request at {small} KB | at {large} KB | µs per further KB | failed |"),
        );
        let node = node(programs, None, 1.0).await?;
        for peer in peers {
            let running = peer.start(programs, &[node.port], None).await?;
            let (mut costs, mut failed) = (Vec::new(), 0);
            for kilobytes in self.kilobytes {
                // Words and line breaks, as in real prompts.
                let prompt = "What is 58 + 67? Think step by step.\\n".repeat(kilobytes * 1024 / 38);
                let bytes = request(running.key, &chat("", &prompt));
                let _warm_up =
                    closed(running.port, bytes.clone(), self.connections, Duration::from_millis(300)).await;
                let before = cpu(&running);
                let outcome =
                    closed(running.port, bytes, self.connections, Duration::from_secs(self.seconds)).await;
                costs
                    .push((cpu(&running) - before).as_secs_f64() * 1e6 / outcome.seconds.len().max(1) as f64);
                failed += outcome.failed;
            }
            let slope = (costs[1] - costs[0]) / (large - small) as f64;
            say(&format!("| {} | {:.1} | {:.1} | {slope:.3} | {failed} |", peer.name(), costs[0], costs[1]));
        }
        Ok(())
    }
}

/// Nodes of different speed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SlowNode {
    rate: f64,
    seconds: u64,
    mean_ms: f64,
    slots: usize,
    slower: f64,
    seed: u64,
}

impl SlowNode {
    pub(crate) async fn run(&self, programs: &Programs, peers: &[Peer]) -> anyhow::Result<()> {
        title(
            &format!(
                "4 nodes of {} slots, one {}x slower, {}/s, log-normal answers of {} ms",
                self.slots, self.slower, self.rate, self.mean_ms
            ),
            "| peer | mean ms | p50 ms | p99 ms | failed |",
        );
        for peer in peers.iter().filter(|peer| !matches!(peer, Peer::Direct | Peer::Hyper)) {
            let mut nodes = Vec::new();
            for number in 0..4 {
                let slower = if number == 0 { self.slower } else { 1.0 };
                nodes.push(node(programs, Some(self.slots), slower).await?);
            }
            let ports: Vec<u16> = nodes.iter().map(|node| node.port).collect();
            let running = peer.start(programs, &ports, Some(self.slots)).await?;
            let key = running.key;
            let due = poisson(self.rate, Duration::from_secs(self.seconds), self.seed, |rng, _| {
                let ms = log_normal(rng, self.mean_ms).round() as u64;
                (request(key, &chat(&format!(",\"x_ms\":{ms}"), "hi")), false)
            });
            let outcome = open(running.port, due, || {}).await;
            say(&format!(
                "| {} | {:.0} | {:.0} | {:.0} | {} |",
                peer.name(),
                outcome.mean() * 1e3,
                outcome.at(0.5) * 1e3,
                outcome.at(0.99) * 1e3,
                outcome.failed
            ));
        }
        Ok(())
    }
}

/// A node that is killed under load.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Killed {
    rate: f64,
    seconds: u64,
    answer_ms: u64,
}

impl Killed {
    pub(crate) async fn run(&self, programs: &Programs, peers: &[Peer]) -> anyhow::Result<()> {
        title(
            &format!(
                "One of three nodes killed, {}/s, half of them streams, answers of {} ms",
                self.rate, self.answer_ms
            ),
            "| peer | whole | plain failed | streams ended by an error event | streams cut without a word |",
        );
        for peer in peers.iter().filter(|peer| !matches!(peer, Peer::Direct | Peer::Hyper)) {
            let mut nodes = Vec::new();
            for _ in 0..3 {
                nodes.push(node(programs, None, 1.0).await?);
            }
            let ports: Vec<u16> = nodes.iter().map(|node| node.port).collect();
            let running = peer.start(programs, &ports, None).await?;
            debug_assert!(running.peer == *peer);
            let key = running.key;
            let due = poisson(self.rate, Duration::from_secs(self.seconds), 1, |_, number| {
                let stream = number % 2 == 1;
                let fields = if stream {
                    format!(",\"stream\":true,\"max_tokens\":10,\"x_pace_ms\":{}", self.answer_ms / 10)
                } else {
                    format!(",\"x_ms\":{}", self.answer_ms)
                };
                (request(key, &chat(&fields, "hi")), stream)
            });
            let victim = &mut nodes[0].process;
            let outcome = open(running.port, due, || victim.kill()).await;
            say(&format!(
                "| {} | {} | {} | {} | {} |",
                peer.name(),
                outcome.seconds.len(),
                outcome.failed,
                outcome.told,
                outcome.cut
            ));
        }
        Ok(())
    }
}
