//! A mock node. It responds at once, after a time that the request names (with slots and a queue, as an engine has), or
//! streams at a fixed pace. Every token contains its send time, so that the client can measure the delay.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::wire::{Framing, Wire};

/// Arguments of `node`.
#[derive(Args, Clone)]
pub(crate) struct Arguments {
    /// Port to listen on
    #[arg(long)]
    port: u16,
    /// Concurrent requests; further ones wait
    #[arg(long, default_value_t = 1_000_000)]
    slots: usize,
    /// Factor on the times that requests name
    #[arg(long, default_value_t = 1.0)]
    slower: f64,
    /// Act as a teacher: respond at once with a chain of thought of this many bytes and the answer 7
    #[arg(long, value_name = "BYTES")]
    teacher: Option<usize>,
}

/// Serves until the process is killed.
pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", arguments.port)).await?;
    let slots = Arc::new(Semaphore::new(arguments.slots.min(Semaphore::MAX_PERMITS)));
    loop {
        let (stream, _) = listener.accept().await?;
        match arguments.teacher {
            None => drop(tokio::spawn(serve(stream, Arc::clone(&slots), arguments.slower))),
            Some(bytes) => drop(tokio::spawn(teach(stream, bytes))),
        }
    }
}

/// Returns the nanoseconds since 1970, which all processes of the machine share.
pub(crate) fn now() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos())
}

/// Returns the integer field `name` of a request.
fn number(body: &[u8], name: &str) -> Option<u64> {
    let at = memchr::memmem::find(body, format!("\"{name}\":").as_bytes())? + name.len() + 3;
    let digits: Vec<u8> = body[at..].iter().copied().take_while(u8::is_ascii_digit).collect();
    std::str::from_utf8(&digits).ok()?.parse().ok()
}

async fn serve(stream: TcpStream, slots: Arc<Semaphore>, slower: f64) -> std::io::Result<()> {
    let mut wire = Wire::new(stream);
    let mut body = Vec::new();
    while let Some(head) = wire.head().await? {
        body.clear();
        // The fields that control the node are at the end of the body; the middle of a long prompt is not kept.
        let keep = |part: &[u8], body: &mut Vec<u8>| {
            if body.len() > 4096 {
                body.drain(..body.len() - 256);
            }
            body.extend_from_slice(&part[part.len().saturating_sub(4096)..]);
        };
        match head.framing {
            Framing::Length(length) => wire.body(length, |part| keep(part, &mut body)).await?,
            Framing::Chunked => while wire.chunk(|part| keep(part, &mut body)).await? {},
        }
        if memchr::memmem::find(&body, b"\"stream\":true").is_some() {
            let tokens = number(&body, "max_tokens").unwrap_or(16);
            let pace = Duration::from_millis(number(&body, "x_pace_ms").unwrap_or(0));
            stream_tokens(&mut wire, tokens, pace).await?;
            continue;
        }
        if let Some(ms) = number(&body, "x_ms") {
            let _slot = slots.acquire().await;
            tokio::time::sleep(Duration::from_secs_f64(ms as f64 * slower / 1e3)).await;
        }
        const ANSWER: &str = r#"{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#;
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{ANSWER}",
            ANSWER.len()
        );
        wire.send(answer.as_bytes()).await?;
    }
    Ok(())
}

/// Serves a teacher that gives one fixed answer at once.
async fn teach(stream: TcpStream, bytes: usize) -> std::io::Result<()> {
    let thought = "Seven is the number after six. ".repeat(bytes / 31 + 1);
    let content = format!("<think>{}</think>\\\\boxed{{7}}", &thought[..bytes]);
    let usage =
        format!(r#""usage":{{"prompt_tokens":50,"completion_tokens":{0},"total_tokens":{0}}}"#, bytes / 4);
    let kind = r#""id":"c","created":1,"model":"m","#;
    let json = |body: &str| {
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let models = json(r#"{"object":"list","data":[{"id":"m","object":"model","created":1,"owned_by":"m"}]}"#);
    let whole = json(&format!(
        r#"{{{kind}"object":"chat.completion","choices":[{{"index":0,"message":{{"role":"assistant","content":"{content}"}},"finish_reason":"stop"}}],{usage}}}"#
    ));
    let event = |rest: &str| format!("data: {{{kind}\"object\":\"chat.completion.chunk\",{rest}}}\n\n");
    let events = [
        event(&format!(
            r#""choices":[{{"index":0,"delta":{{"role":"assistant","content":"{content}"}},"finish_reason":"stop"}}]"#
        )),
        event(&format!(r#""choices":[],{usage}"#)),
        "data: [DONE]\n\n".to_owned(),
    ]
    .concat();
    let streamed = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {}\r\n\r\n{events}",
        events.len()
    );
    let mut wire = Wire::new(stream);
    while let Some(head) = wire.head().await? {
        let mut end = Vec::new();
        let mut asked = 0;
        let mut keep = |part: &[u8]| {
            asked += part.len();
            if end.len() < 1 << 16 {
                end.extend_from_slice(part);
            }
        };
        match head.framing {
            Framing::Length(length) => wire.body(length, &mut keep).await?,
            Framing::Chunked => while wire.chunk(&mut keep).await? {},
        }
        let answer = if asked == 0 {
            &models
        } else if memchr::memmem::find(&end, b"\"stream\":true").is_some() {
            &streamed
        } else {
            &whole
        };
        wire.send(answer.as_bytes()).await?;
    }
    Ok(())
}

fn chunk(payload: &str) -> Vec<u8> {
    format!("{:x}\r\n{payload}\r\n", payload.len()).into_bytes()
}

async fn stream_tokens(wire: &mut Wire, tokens: u64, pace: Duration) -> std::io::Result<()> {
    wire.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        .await?;
    let event = |delta: &str, reason: &str| {
        format!(
            "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":{reason}}}]}}\n\n"
        )
    };
    let mut due = Instant::now();
    for token in 0..tokens {
        if !pace.is_zero() {
            due += pace;
            tokio::time::sleep_until(due).await;
        }
        let role = if token == 0 { "\"role\":\"assistant\"," } else { "" };
        let delta = format!("{{{role}\"content\":\"t{:020}\"}}", now());
        wire.send(&chunk(&event(&delta, "null"))).await?;
    }
    let end = format!("{}data: [DONE]\n\n", event("{}", "\"stop\""));
    wire.send(&[chunk(&end), b"0\r\n\r\n".to_vec()].concat()).await
}
