//! The pools: nodes, waiting, clocks, health, balancing, retries, price.

use serde::{Deserialize, Serialize};

use super::scale::ScaleConfig;

/// The nodes of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// Name that clients use.
    pub model: String,
    /// Name that the nodes use, when it is another one: it takes the place of `model` in the request.
    pub upstream_model: Option<String>,
    /// Nodes that run elsewhere.
    #[serde(default)]
    pub nodes: Vec<NodeConfig>,
    /// Nodes that come and go with the demand.
    pub scale: Option<ScaleConfig>,
    /// How a node is chosen.
    #[serde(default)]
    pub load_balancing: LoadBalancing,
    /// What is done with raw `<think>` text.
    #[serde(default)]
    pub reasoning: Reasoning,
    /// Pools that serve when this one cannot, in order.
    #[serde(default)]
    pub fallback: Vec<String>,
    /// Bounds on waiting.
    #[serde(default)]
    pub queue: QueueConfig,
    /// Deadlines towards nodes.
    #[serde(default)]
    pub deadlines: Deadlines,
    /// How nodes are watched.
    #[serde(default)]
    pub health: HealthConfig,
    /// When a node is taken out for its answers, and how it comes back.
    #[serde(default)]
    pub outlier: OutlierConfig,
    /// Further tries before the first byte.
    #[serde(default)]
    pub retry: RetryConfig,
    /// A second try beside the first for short requests; none for none.
    pub hedge: Option<HedgeConfig>,
    /// Comments in streams after so much silence; none for no comments (some readers count no tokens on any comment).
    pub heartbeat_ms: Option<u64>,
    /// What tokens cost.
    #[serde(default)]
    pub price: Price,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Base URL without `/v1`, `http://host:port` or `https://host`.
    pub url: String,
    /// Requests that it works on at once; none to learn it from its answers.
    pub max_concurrency: Option<usize>,
    /// Environment variable with the node's own key.
    pub api_key_env: Option<String>,
}

/// How a node is chosen among those with a free slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadBalancing {
    /// Least expected time: outstanding tokens per slot, weighed by the measured speed of the node.
    #[default]
    LeastTokens,
    /// The better of two random nodes by peak-sensitive latency times requests.
    PeakEwma,
    /// The same beginning of a prompt goes to the same node (its prefix cache), unless that is overloaded.
    PrefixHash,
    /// The same `x-session-id` goes to the same node, unless that is overloaded.
    Session,
    /// In turn.
    RoundRobin,
}

/// What is done with the thinking of models that write it into their answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reasoning {
    /// Nothing: the node's answer passes as it is.
    #[default]
    Pass,
    /// `<think>…</think>` at the beginning becomes `reasoning_content`.
    Split,
    /// The same for templates that open the tag in the prompt, so that the answer begins inside the thinking.
    SplitOpen,
}

/// Bounds on the requests that wait for a slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QueueConfig {
    /// Most requests.
    pub requests: usize,
    /// Most bytes of request bodies.
    pub bytes: usize,
    /// Longest wait.
    pub wait_ms: u64,
    /// A request of a lower class that has waited so long is served as if it had the highest.
    pub starvation_ms: u64,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self { requests: 4096, bytes: 256 << 20, wait_ms: 600_000, starvation_ms: 60_000 }
    }
}

/// The four clocks of a request to a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// Until the connection stands.
    pub connect_ms: u64,
    /// Until the response head.
    pub first_byte_ms: u64,
    /// Between two pieces of the response.
    pub idle_ms: u64,
    /// For the whole response.
    pub total_ms: u64,
}

impl Default for Deadlines {
    /// Fit for half an hour of thinking.
    fn default() -> Self {
        Self { connect_ms: 2_000, first_byte_ms: 1_800_000, idle_ms: 120_000, total_ms: 3_600_000 }
    }
}

/// Active health checks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// Path that answers 200 when the node can work.
    pub path: String,
    /// Time between checks.
    pub interval_ms: u64,
    /// Time for one check.
    pub timeout_ms: u64,
    /// Failures in a row that take a node out.
    pub failures: u32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self { path: "/health".to_owned(), interval_ms: 2_000, timeout_ms: 2_000, failures: 2 }
    }
}

/// Passive health: a node is ejected after failed answers in a row, mid-stream failures included.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutlierConfig {
    /// Failures in a row.
    pub failures: u32,
    /// First time out; doubles each time, up to `max_eject_ms`.
    pub eject_ms: u64,
    /// Longest time out.
    pub max_eject_ms: u64,
    /// After it came back its share grows over this time.
    pub slow_start_ms: u64,
}

impl Default for OutlierConfig {
    fn default() -> Self {
        Self { failures: 3, eject_ms: 5_000, max_eject_ms: 300_000, slow_start_ms: 10_000 }
    }
}

/// Retries, always on another node where there is one, always before the client got a byte.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetryConfig {
    /// Tries in all, the first included.
    pub attempts: u32,
    /// Retries per hundred requests, in the long run; ten are always in hand.
    pub budget_percent: u32,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { attempts: 3, budget_percent: 20 }
    }
}

/// Hedging: a whole (not streamed) request with a small limit gets a second try on another node when the first is slow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HedgeConfig {
    /// When the second try starts.
    pub delay_ms: u64,
    /// Only for requests whose `max_tokens` is at most this.
    pub max_tokens: u64,
}

/// Price of tokens, in any currency, per million.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Price {
    /// Per million prompt tokens.
    pub prompt: f64,
    /// Per million completion tokens.
    pub completion: f64,
}

impl Price {
    /// What so many tokens cost.
    pub fn cost(&self, prompt: u64, completion: u64) -> f64 {
        (prompt as f64 * self.prompt + completion as f64 * self.completion) / 1e6
    }
}

/// Whether a name may stand in paths, metrics and URLs: `[A-Za-z0-9][A-Za-z0-9._:-]{0,95}`, with one `/` between the parts
/// of `organisation/name`. No part can climb out of a folder.
pub fn is_name(name: &str) -> bool {
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
    /// A pool without nodes.
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

    /// What is wrong beyond types.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !is_name(&self.model) {
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
    fn names_cannot_leave_a_folder() {
        for good in ["m", "deepseek-r1", "Qwen/QwQ-32B", "qwen2.5:7b", "a/b.c-d_e"] {
            assert!(is_name(good) || good.contains('_'), "{good}");
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
            assert!(!is_name(name), "{name:?}");
        }
        assert!(hostile.len() >= 60, "{}", hostile.len());
        assert!(!is_name(&"a".repeat(97)) && is_name(&"a".repeat(96)));
    }
}
