//! The real programs, built once and started as processes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

/// Root folder of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The demonstration's teacher, a small real model.
pub fn teacher() -> PathBuf {
    root().join("trainer/recipes/demo-teacher")
}

/// Builds a program of this workspace in the profile of this test, and returns its path.
pub fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let folder = BUILT.get_or_init(|| {
        // target/PROFILE/deps/this-test
        let folder = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
        let profile = match folder.file_name().unwrap().to_str().unwrap() {
            "debug" => "dev",
            name => name,
        };
        let mut build = Command::new(env!("CARGO"));
        // Cargo sets these variables for a test. They would cause a rebuild of crates that read them.
        let own = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(own)) {
            build.env_remove(name);
        }
        let status = build
            .args([
                "build",
                "--quiet",
                "--profile",
                profile,
                "-p",
                "potstill-trainer",
                "-p",
                "potstill-gateway",
                "--bins",
            ])
            .current_dir(root())
            .status()
            .unwrap();
        assert!(status.success(), "the programs do not build");
        folder
    });
    folder.join(name)
}

/// A process that is killed when it is dropped.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _already_dead = self.0.kill();
        let _status = self.0.wait();
    }
}

/// Returns a free port below the ephemeral range. No port is returned twice, so that no other test takes it.
pub fn free_port() -> u16 {
    const FIRST: u32 = 10_000;
    const PORTS: u32 = 20_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(97);
    let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let next = || start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS + FIRST;
    (0..PORTS).map(|_| next() as u16).find(free).unwrap()
}

/// Starts `potstill serve` with the demonstration's teacher and waits until it responds.
pub async fn serve_teacher(extra: &[&str]) -> (Running, String) {
    serve(&teacher(), "teacher", extra).await
}

/// Starts `potstill serve` with a model and waits until it responds.
pub async fn serve(model: &Path, name: &str, extra: &[&str]) -> (Running, String) {
    let port = free_port();
    let child = Command::new(program("potstill"))
        .args(["serve", "--name", name, "--threads", "1", "--port", &port.to_string(), "--model"])
        .arg(model)
        .args(extra)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let running = Running(child);
    let url = format!("http://127.0.0.1:{port}");
    answers(&format!("{url}/health")).await;
    (running, url)
}

/// Writes an untrained model whose chat template supports functions, so that it can be forced to call them.
pub fn write_caller(folder: &Path) {
    let fixture = root().join("tests/fixtures/qwen2");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(name), folder.join(name)).unwrap();
    }
    let specials = ["<pad>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
    let letters = ('a'..='z').chain("{}[]\":,<>_|/ĠĊ".chars()).map(String::from);
    let vocabulary: serde_json::Map<_, _> =
        specials.clone().into_iter().chain(letters).zip(0..).map(|(token, id)| (token, json!(id))).collect();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let added = specials.iter().zip(0..).map(|(content, id)| {
        json!({"id": id, "content": content, "special": true, "normalized": false, "single_word": false,
            "lstrip": false, "rstrip": false})
    });
    let tokenizer = json!({
        "version": "1.0", "normalizer": null, "pre_tokenizer": bytes, "decoder": bytes, "post_processor": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []}
    });
    let template = "{% for message in messages %}{{ message.content or '' }}{% endfor %}{# <tool_call> #}";
    for (name, text) in [
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", json!({"eos_token": "<|im_end|>"}).to_string()),
        ("chat_template.jinja", template.to_owned()),
    ] {
        std::fs::write(folder.join(name), text).unwrap();
    }
}

/// Waits until a URL returns success.
pub async fn answers(url: &str) {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let started = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    loop {
        ticks.tick().await;
        if client.get(url).send().await.is_ok_and(|response| response.status().is_success()) {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "`{url}` does not answer");
    }
}
