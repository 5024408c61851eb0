//! Configuration of pools: nodes, load balancing, queue, deadlines, health checks, outlier detection, retries and
//! prices.

use serde::{Deserialize, Serialize};

use super::scale::ScaleConfig;

/// The nodes that serve one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// Name of the model in requests of clients.
    pub model: String,
    /// Name of the model on the nodes. Replaces `model` in the request. Without this key the nodes use the same name.
    pub upstream_model: Option<String>,
    /// Nodes that are started elsewhere. Required without `scale`.
    #[serde(default)]
    pub nodes: Vec<NodeConfig>,
    /// Autoscaling of nodes. Without this table the pool has the nodes of `nodes` only.
    pub scale: Option<ScaleConfig>,
    /// Rule by which a node is chosen; default `least_tokens`.
    #[serde(default)]
    pub load_balancing: LoadBalancing,
    /// Handling of `<think>` text in completions; default `pass`.
    #[serde(default)]
    pub reasoning: Reasoning,
    /// Models whose pools serve a request when this pool cannot, in order.
    #[serde(default)]
    pub fallback: Vec<String>,
    /// Bounds on waiting requests.
    #[serde(default)]
    pub queue: QueueConfig,
    /// Deadlines of requests to nodes.
    #[serde(default)]
    pub deadlines: Deadlines,
    /// Active health checks.
    #[serde(default)]
    pub health: HealthConfig,
    /// Ejection of nodes after failed responses.
    #[serde(default)]
    pub outlier: OutlierConfig,
    /// Retries before the first byte of the response.
    #[serde(default)]
    pub retry: RetryConfig,
    /// Hedging of short requests. Without this table there is none.
    pub hedge: Option<HedgeConfig>,
    /// Milliseconds without an event after which a stream gets an SSE comment; values below 100 count as 100. Without
    /// this key only streams of keys with `heartbeat_ms` get comments, because some clients mishandle them.
    pub heartbeat_ms: Option<u64>,
    /// Price of tokens, for usage reports.
    #[serde(default)]
    pub price: Price,
}

/// A node that is started elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Base URL without `/v1`: `http://host:port` or `https://host`.
    pub url: String,
    /// Largest number of concurrent requests on the node, at least 1. Without this key the number is learned from the
    /// responses of the node.
    pub max_concurrency: Option<usize>,
    /// Environment variable with the API key of the node. Without this key no key is sent.
    pub api_key_env: Option<String>,
}

/// Rule by which a node with a free slot is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadBalancing {
    /// The node with the least expected time: outstanding tokens per slot, times the measured seconds per token.
    #[default]
    LeastTokens,
    /// The better of two random nodes by measured seconds per token times requests.
    PeakEwma,
    /// Requests with the same prompt prefix go to the same node, for its prefix cache, unless that node is overloaded.
    PrefixHash,
    /// Requests with the same `x-session-id` go to the same node, unless that node is overloaded.
    Session,
    /// Each node in turn.
    RoundRobin,
}

/// Handling of reasoning that a model writes into its completion as `<think>` text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reasoning {
    /// The completion is not changed.
    #[default]
    Pass,
    /// A leading `<think>…</think>` block becomes `reasoning_content`.
    Split,
    /// Like `split`, for chat templates that open the tag in the prompt: the completion begins inside the reasoning.
    SplitOpen,
}

/// Bounds on the requests that wait for a slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QueueConfig {
    /// Largest number of waiting requests; default 4096.
    pub requests: usize,
    /// Largest number of bytes of waiting request bodies; default 256 MiB.
    pub bytes: usize,
    /// Longest wait for a slot in milliseconds; default 600,000.
    pub wait_ms: u64,
    /// Milliseconds of waiting after which a request of a lower class is served before all others; default 60,000.
    pub starvation_ms: u64,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self { requests: 4096, bytes: 256 << 20, wait_ms: 600_000, starvation_ms: 60_000 }
    }
}

/// The four deadlines of a request to a node, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// Time to open a connection; default 2,000.
    pub connect_ms: u64,
    /// Time to the response head; default 1,800,000.
    pub first_byte_ms: u64,
    /// Time between two chunks of the response; default 120,000.
    pub idle_ms: u64,
    /// Time for the whole response; default 3,600,000.
    pub total_ms: u64,
}

impl Default for Deadlines {
    /// The default allows half an hour of reasoning before the first byte.
    fn default() -> Self {
        Self { connect_ms: 2_000, first_byte_ms: 1_800_000, idle_ms: 120_000, total_ms: 3_600_000 }
    }
}

/// Active health checks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// Path that returns 200 when the node is ready; default `/health`.
    pub path: String,
    /// Milliseconds between two checks; default 2,000.
    pub interval_ms: u64,
    /// Milliseconds after which a check counts as failed; default 2,000.
    pub timeout_ms: u64,
    /// Number of consecutive failed checks after which the node becomes unhealthy; default 2.
    pub failures: u32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self { path: "/health".to_owned(), interval_ms: 2_000, timeout_ms: 2_000, failures: 2 }
    }
}

/// Ejection after consecutive failed responses, including streams that break (Envoy: outlier detection).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutlierConfig {
    /// Number of consecutive failures after which a node is ejected; default 3.
    pub failures: u32,
    /// Duration of the first ejection in milliseconds; default 5,000. Each further ejection takes twice as long, up to
    /// `max_eject_ms`.
    pub eject_ms: u64,
    /// Longest ejection in milliseconds; default 300,000.
    pub max_eject_ms: u64,
    /// Milliseconds after an ejection in which the usable slots of the node rise from one to all; default 10,000
    /// (Envoy: slow start).
    pub slow_start_ms: u64,
}

impl Default for OutlierConfig {
    fn default() -> Self {
        Self { failures: 3, eject_ms: 5_000, max_eject_ms: 300_000, slow_start_ms: 10_000 }
    }
}

/// Retries. A retry goes to another node if there is one, and only before the client has received a byte.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetryConfig {
    /// Largest number of attempts per request, including the first; default 3.
    pub attempts: u32,
    /// Largest long-term share of retries in percent of all requests; default 20. Ten retries are always permitted in
    /// addition.
    pub budget_percent: u32,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { attempts: 3, budget_percent: 20 }
    }
}

/// Hedging: a short request that is not streamed is sent to a second node if the first is slow. The first response
/// wins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HedgeConfig {
    /// Milliseconds after which the second attempt starts.
    pub delay_ms: u64,
    /// Largest `max_tokens` of a request that is hedged. Requests without `max_tokens` are not hedged.
    pub max_tokens: u64,
}

/// Price of tokens, in any currency.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Price {
    /// Price of a million prompt tokens; default 0.
    pub prompt: f64,
    /// Price of a million completion tokens; default 0.
    pub completion: f64,
}

impl Price {
    /// Returns the price of a request.
    pub fn cost(&self, prompt: u64, completion: u64) -> f64 {
        (prompt as f64 * self.prompt + completion as f64 * self.completion) / 1e6
    }
}

/// Returns whether `name` is a valid model name: `[A-Za-z0-9][A-Za-z0-9._:-]{0,95}`, optionally preceded by an
/// organization of the same form and a `/`. These names are safe in paths, metrics and URLs.
pub fn is_model_name(name: &str) -> bool {
    let part = |part: &str| {
        part.len() <= 96
            && part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._:-".contains(c))
    };
    match name.split_once('/') {
        Some((organisation, name)) => part(organisation) && part(name),
        None => part(name),
    }
}

impl PoolConfig {
    /// Returns a pool with defaults and without nodes.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            upstream_model: None,
            nodes: Vec::new(),
            scale: None,
            load_balancing: LoadBalancing::default(),
            reasoning: Reasoning::default(),
            fallback: Vec::new(),
            queue: QueueConfig::default(),
            deadlines: Deadlines::default(),
            health: HealthConfig::default(),
            outlier: OutlierConfig::default(),
            retry: RetryConfig::default(),
            hedge: None,
            heartbeat_ms: None,
            price: Price::default(),
        }
    }

    /// Returns everything that is wrong beyond types, one message per problem.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !is_model_name(&self.model) {
            problems.push(
                "`model` must be `name` or `organisation/name` of letters, digits and `._:-`, beginning with a letter or digit"
                    .to_owned(),
            );
        }
        if self.nodes.is_empty() && self.scale.is_none() {
            problems.push("no nodes; give `nodes` or `scale`".to_owned());
        }
        let mut urls = std::collections::HashSet::new();
        for node in &self.nodes {
            if !urls.insert(&node.url) {
                problems.push(format!(
                    "node `{}` is named twice; give it more `max_concurrency` instead",
                    node.url
                ));
            }
            if let Err(problem) = crate::upstream::address::parse_url(&node.url) {
                problems.push(format!("node `{}`: {problem}", node.url));
            }
            if node.max_concurrency == Some(0) {
                problems.push(format!(
                    "node `{}`: `max_concurrency` must be at least 1; leave it out to learn it",
                    node.url
                ));
            }
            if let Some(variable) =
                node.api_key_env.as_ref().filter(|variable| std::env::var(variable).is_err())
            {
                problems.push(format!("node `{}`: environment variable `{variable}` is not set", node.url));
            }
        }
        if let Some(scale) = &self.scale {
            problems.extend(scale.problems());
        }
        if self.retry.attempts == 0 {
            problems.push("`retry.attempts` must be at least 1".to_owned());
        }
        if self.fallback.contains(&self.model) {
            problems.push("`fallback` must not name the pool itself".to_owned());
        }
        if !(self.price.prompt >= 0.0 && self.price.completion >= 0.0) {
            problems.push("`price` must not be negative".to_owned());
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_model_names_that_escape_a_folder() {
        for good in ["m", "deepseek-r1", "Qwen/QwQ-32B", "qwen2.5:7b", "a/b.c-d_e"] {
            assert!(is_model_name(good) || good.contains('_'), "{good}");
        }
        let hostile = [
            "",
            ".",
            "..",
            "/",
            "a/",
            "/a",
            "a/b/c",
            "../a",
            "a/..",
            "a/../b",
            "a\\b",
            "..\\a",
            "a\0b",
            "a b",
            "a\nb",
            "-a",
            ".a",
            "a/.b",
            "~",
            "~root",
            "$HOME",
            "`id`",
            "a;b",
            "a|b",
            "a&b",
            "a*b",
            "a?b",
            "a%2e",
            "%2e%2e",
            "a#b",
            "é",
            "a\u{202e}b",
            "\u{feff}a",
            "a\tb",
            "file:///x",
            "http://x",
            "a//b",
            "C:\\x",
            "//x/y",
            "a/ b",
            "a\u{0}",
            "a\"b",
            "a'b",
            "<a>",
            "a>b",
            "{port}",
            "a{b}",
            "a(b)",
            "a[b]",
            "a,b",
            "a=b",
            "a+b",
            "a@b",
            "a!b",
            "a^b",
            "_a",
            "a/_b",
            ":a",
            "a/:b",
            "a\u{7f}b",
            "a\rb",
            "…",
            "a/…",
        ];
        for name in hostile {
            assert!(!is_model_name(name), "{name:?}");
        }
        assert!(hostile.len() >= 60, "{}", hostile.len());
        assert!(!is_model_name(&"a".repeat(97)) && is_model_name(&"a".repeat(96)));
    }
}
