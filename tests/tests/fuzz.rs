//! Fuzz tests: parsers of external data never panic and never hang. Inputs are mutated from valid ones by flipping,
//! cutting, repeating, splicing, and inserting words of the format.
//!
//! Each target gets 1,500 inputs from a fixed seed. `FUZZ_SECONDS=60 cargo test --release -p system-tests --test fuzz`
//! runs each for a minute with new seeds (`just fuzz-bytes`). A failure prints the input.
#![expect(clippy::unwrap_used, reason = "a test harness")]

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, StatusCode};
use potstill_data::journal::Journal;
use potstill_data::jsonl::{Source, read_problems};
use potstill_engine::config::ModelConfig;
use potstill_engine::gguf::GgufFile;
use potstill_engine::template::ChatTemplate;
use potstill_engine::tokenizer::Tokenizer;
use potstill_engine::weights::WeightBuilder;
use potstill_gateway::api::request_fields::{replace_model, scan};
use potstill_gateway::api::responses::request::to_chat;
use potstill_gateway::config::Config;
use potstill_gateway::config::pools::Reasoning;
use potstill_gateway::normalize::sse_stream::{SseNormalizer, StreamStep};
use potstill_gateway::normalize::stream_chunk::ChunkNormalizer;
use potstill_gateway::normalize::{EndpointKind, completion, error_body};
use potstill_gateway::upstream::response_head;
use potstill_shared::durable::write_file;
use potstill_shared::{reasoning, sse};
use potstill_trainer::recipe::Recipe;
use potstill_verify::{Profile, compare_with_profile};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

/// Number of inputs per target without `FUZZ_SECONDS`.
const INPUTS: usize = 1_500;
/// Largest input in bytes.
const LONGEST: usize = 16 << 10;
/// Time after which an input counts as a hang; normally it takes microseconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// Mutates inputs.
struct Grower {
    random: StdRng,
    /// Valid inputs to start from.
    corpus: Vec<Vec<u8>>,
    /// Words of the format.
    words: Vec<&'static [u8]>,
}

impl Grower {
    fn next(&mut self) -> Vec<u8> {
        let random = &mut self.random;
        let mut input = self.corpus[random.random_range(0..self.corpus.len())].clone();
        for _ in 0..random.random_range(0..8) {
            let at = random.random_range(0..=input.len());
            let end = random.random_range(at..=input.len().min(at + 64));
            match random.random_range(0..7) {
                0 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
                1 => input.insert(at, random.random()),
                2 => drop(input.drain(at..end)),
                3 => {
                    let part = input[at..end].to_vec();
                    let times = random.random_range(1..20);
                    input.splice(at..at, part.repeat(times));
                }
                4 => {
                    let word = self.words[random.random_range(0..self.words.len())];
                    input.splice(at..at, word.iter().copied());
                }
                5 => {
                    let other = &self.corpus[random.random_range(0..self.corpus.len())];
                    let from = random.random_range(0..=other.len());
                    input.truncate(at);
                    input.extend_from_slice(&other[from..]);
                }
                _ => input.truncate(at),
            }
            input.truncate(LONGEST);
        }
        input
    }

    /// Returns two ordered positions at which to cut `input`.
    fn cuts(&mut self, input: &[u8]) -> (usize, usize) {
        let (a, b) = (self.random.random_range(0..=input.len()), self.random.random_range(0..=input.len()));
        (a.min(b), a.max(b))
    }
}

const JSON: [&[u8]; 16] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b":",
    b",",
    b"null",
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"\\ud83d",
    b"\\u0000",
    b"\xff",
    b"{\"a\":",
    b"[[[[[[[[",
];

/// Prints to standard error directly: the test harness loses captured output when the process ends.
fn tell(what: &str, input: &[u8]) {
    let _written = writeln!(std::io::stderr(), "{what}: \"{}\"", input.escape_ascii());
}

/// Calls `check` with inputs that are mutated from `corpus`.
fn fuzz(corpus: &[&[u8]], words: &[&'static [u8]], mut check: impl FnMut(&[u8], (usize, usize)) + Send) {
    let seconds = std::env::var("FUZZ_SECONDS").ok().map(|text| text.parse::<u64>().unwrap());
    let seed = seconds.map_or(1, |_| rand::rng().random());
    let corpus = corpus.iter().map(|input| input.to_vec()).collect();
    let mut grower = Grower { random: StdRng::seed_from_u64(seed), corpus, words: words.to_vec() };
    let (told, begun) = mpsc::channel::<Option<Vec<u8>>>();
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let begin = Instant::now();
            for done in 0.. {
                let over = seconds.map_or(done >= INPUTS, |most| begin.elapsed().as_secs() >= most);
                if over {
                    break;
                }
                let input = grower.next();
                let cuts = grower.cuts(&input);
                told.send(Some(input.clone())).unwrap();
                if let Err(cause) = catch_unwind(AssertUnwindSafe(|| check(&input, cuts))) {
                    tell(&format!("seed {seed}, input {done}"), &input);
                    std::panic::resume_unwind(cause);
                }
            }
            told.send(None).unwrap();
        });
        let mut last = Vec::new();
        loop {
            match begun.recv_timeout(PATIENCE) {
                Ok(Some(input)) => last = input,
                Ok(None) | Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    // A hanging thread cannot be stopped, so the process ends.
                    tell(&format!("an input takes more than {PATIENCE:?}"), &last);
                    std::process::abort();
                }
            }
        }
        if let Err(cause) = worker.join() {
            std::panic::resume_unwind(cause);
        }
    });
}

/// Like `fuzz`, with the input in a file whose name ends in `name`.
fn fuzz_file(name: &str, corpus: &[&[u8]], words: &[&'static [u8]], mut check: impl FnMut(&Path) + Send) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fuzz(corpus, words, |input, _| {
        write_file(&path, input).unwrap();
        check(&path);
    });
}

const CHAT: &[u8] = br#"{"model":"m","messages":[{"role":"user","content":"hi \u00e9 \"x\""}],"stream":true,"n":2,"stop":["a","b"],"max_tokens":5,"stream_options":{"include_usage":true}}"#;
const ANSWER: &[u8] = br#"{"id":"a","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"<think>x</think>y","tool_calls":[{"function":{"name":"f","arguments":{}}}]},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}"#;
const STREAM: &[u8] = b"data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"<think>a\"},\"finish_reason\":null}]}\n\n: comment\r\ndata: {\"choices\":[{\"delta\":{\"content\":\"b</think>c\"},\"finish_reason\":\"eos\"}],\"usage\":{\"prompt_tokens\":1}}\n\nevent: x\nid: 1\ndata: [DONE]\n\n";

#[test]
fn sse_events_do_not_depend_on_boundaries() {
    fuzz(
        &[STREAM],
        &[b"data:", b"\n\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b": ", b"event"],
        |input, (a, b)| {
            let read = |parts: &[&[u8]]| {
                let mut decoder = sse::SseDecoder::default();
                let read: Result<Vec<_>, _> = parts.iter().map(|part| decoder.push(part)).collect();
                read.map(|events| events.concat())
            };
            let whole = read(&[input]);
            let cut = read(&[&input[..a], &input[a..b], &input[b..]]);
            assert_eq!(format!("{whole:?}"), format!("{cut:?}"));
        },
    );
}

#[test]
fn http_responses_do_not_depend_on_boundaries() {
    let corpus: [&[u8]; 3] = [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nc: d\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 429 Busy\r\nretry-after: 5\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\n\r\nhello",
    ];
    let words: [&'static [u8]; 9] = [
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"0\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"content-length: 5\r\n",
        b"transfer-encoding: chunked\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 103 X\r\n\r\n",
    ];
    fuzz(&corpus, &words, |input, (a, b)| {
        let Ok(Some((head, length))) = response_head::parse_response_head(input, &Method::POST) else {
            return;
        };
        let read = |parts: &[&[u8]]| {
            let (mut framing, mut body) = (head.framing, Vec::new());
            for part in parts {
                let mut rest = *part;
                loop {
                    let piece = framing.next_data(&mut rest).map_err(|fault| fault.to_string())?;
                    if piece.is_empty() {
                        break;
                    }
                    body.extend_from_slice(piece);
                }
            }
            framing.on_close().map_err(|fault| fault.to_string())?;
            Ok::<_, String>(body)
        };
        let (a, b) = (a.max(length), b.max(length));
        assert_eq!(read(&[&input[length..]]), read(&[&input[length..a], &input[a..b], &input[b..]]));
    });
}

#[test]
fn request_bodies_never_panic() {
    fuzz(&[CHAT, br#"{"model":"a/b","prompt":["x",[1,2]],"echo":true}"#], &JSON, |input, _| {
        let body = Bytes::copy_from_slice(input);
        for kind in [EndpointKind::Chat, EndpointKind::Text, EndpointKind::Embeddings, EndpointKind::Other] {
            if let Ok(head) = scan(&body, kind) {
                let changed = replace_model(&body, &head, "other");
                assert_eq!(scan(&changed, kind).unwrap().model, "other");
            }
        }
    });
}

#[test]
fn normalized_completions_are_json() {
    fuzz(&[ANSWER, br#"{"object":"list","model":"x","data":[{"embedding":[1.0]}]}"#], &JSON, |input, _| {
        for kind in [EndpointKind::Chat, EndpointKind::Text, EndpointKind::Embeddings, EndpointKind::Other] {
            for reasoning in [Reasoning::Pass, Reasoning::Split, Reasoning::SplitOpen] {
                // Half a surrogate pair in an escape is forwarded unchanged.
                let read = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).is_ok();
                if let completion::Normalized::Changed(body, _) =
                    completion::normalize(input, kind, "m", reasoning)
                {
                    assert!(read(&body) || !read(input));
                }
            }
        }
    });
}

#[test]
fn normalized_streams_do_not_depend_on_boundaries() {
    fuzz(
        &[STREAM],
        &[b"data: ", b"\n\n", b"\r\n", b"[DONE]", b"{\"error\":{}}", b"null", b"[]"],
        |input, (a, b)| {
            for reasoning in [Reasoning::Pass, Reasoning::Split] {
                let mut events = SseNormalizer::new(
                    ChunkNormalizer::new(EndpointKind::Chat, "m".into(), true, reasoning),
                    true,
                );
                for part in [&input[..a], &input[a..b], &input[b..]] {
                    if !matches!(events.push(Bytes::copy_from_slice(part)), StreamStep::Forward(_)) {
                        break;
                    }
                }
            }
        },
    );
}

#[test]
fn error_bodies_become_openais_form() {
    let corpus: [&[u8]; 3] = [
        br#"{"error":{"message":"maximum context length is 5 tokens","type":"x","param":null,"code":400}}"#,
        br#"{"detail":[{"loc":["body"],"msg":"m"}]}"#,
        b"<html>502</html>",
    ];
    fuzz(&corpus, &JSON, |input, _| {
        for status in [StatusCode::BAD_REQUEST, StatusCode::TOO_MANY_REQUESTS, StatusCode::BAD_GATEWAY] {
            let (_, body) = error_body::normalize(status, input);
            let json: Value = serde_json::from_str(&body.to_json()).unwrap();
            assert!(json["error"]["message"].is_string());
        }
        let _event = error_body::normalize_event(input);
    });
}

#[test]
fn reasoning_split_does_not_depend_on_boundaries() {
    let words: [&'static [u8]; 5] = [b"<think>", b"</think>", b"<", b"</thi", b"\n"];
    fuzz(&[b"<think>\na < b </think>\n\nanswer", b"no thinking </think>"], &words, |input, _| {
        let text = String::from_utf8_lossy(input);
        for inside in [false, true] {
            let whole = reasoning::split_reasoning(&text, inside);
            let mut splitter = reasoning::ReasoningSplitter::new(inside);
            let mut pieces: Vec<_> = text.chars().flat_map(|c| splitter.push(&c.to_string())).collect();
            pieces.extend(splitter.finish());
            let answer: String = pieces
                .iter()
                .filter_map(|piece| match piece {
                    reasoning::Piece::Answer(text) => Some(text.as_str()),
                    reasoning::Piece::Reasoning(_) => None,
                })
                .collect();
            assert_eq!(answer.trim(), whole.1.trim());
        }
        let _read = reasoning::split_any_format(&text);
    });
}

#[test]
fn responses_requests_never_panic() {
    let corpus: [&[u8]; 2] = [
        br#"{"model":"m","input":"hi","instructions":"be brief","tools":[{"type":"function","name":"f","parameters":{}}],"text":{"format":{"type":"json_schema","name":"n","schema":{}}}}"#,
        br#"{"model":"m","input":[{"role":"user","content":[{"type":"input_text","text":"a"}]},{"type":"function_call_output","call_id":"c","output":"o"}],"reasoning":{"effort":"low"}}"#,
    ];
    fuzz(&corpus, &JSON, |input, _| {
        if let Ok((chat, _)) = to_chat(&Bytes::copy_from_slice(input)) {
            assert!(serde_json::from_slice::<Value>(&chat).is_ok());
        }
    });
}

#[test]
fn answer_comparison_never_panics() {
    // Reference answer, ` = `, and the answer of the model.
    let corpus: [&[u8]; 4] = [
        br"\frac{3}{4}x^2 - \sqrt{2} = So the answer is \boxed{\frac{3x^2}{4} - 2^{1/2}}.",
        br"$[0, 1) \cup \{2, 3\}$ = $x \in [0,1) \cup \{2\} \cup \{3\}$",
        br"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} = x = 3 \text{ or } x = -2\pi",
        b"12,345.67 km/h = Answer: 12345\\frac{67}{100}\n#### 42",
    ];
    let words: [&'static [u8]; 14] = [
        b"\\frac",
        b"{",
        b"}",
        b"^",
        b"_",
        b"\\sqrt",
        b"!",
        b"^{99999}",
        b"\\boxed{",
        b"\\infty",
        b"%",
        b"(",
        b"10^",
        b"\\pi",
    ];
    fuzz(&corpus, &words, |input, _| {
        let text = String::from_utf8_lossy(&input[..input.len().min(800)]);
        let (gold, answer) = text.split_once(" = ").unwrap_or((&text, "1"));
        for profile in [Profile::Strict, Profile::Compat] {
            let _verdict = compare_with_profile(gold, answer, profile);
        }
    });
}

#[test]
fn journal_is_read_up_to_a_torn_end() {
    let line = br#"{"id":"00112233445566778899aabbccddeeff","stage":"generate","model":"m","prompt_tokens":1,"completion_tokens":2,"seconds":0.5,"content":"x","reasoning":null,"finish_reason":"stop"}"#;
    let two = [&line[..], b"\n", &line[..], b"\n"].concat();
    fuzz_file("journal.jsonl", &[&two, line], &JSON, |path| {
        let seen = Journal::read_only(path).map(|journal| (journal.len(), journal.totals()));
        // Opening removes the torn end and nothing else.
        for _ in 0..2 {
            let opened = Journal::open(path).map(|journal| (journal.len(), journal.totals()));
            assert_eq!(opened.ok(), seen.as_ref().ok().cloned());
        }
    });
}

#[test]
fn problem_files_never_panic() {
    let corpus: [&[u8]; 2] = [
        b"{\"problem\":\"1+1?\",\"answer\":\"2\",\"level\":3}\n{\"problem\":\"p\",\"answer\":4}\n",
        b"[{\"problem\":\"a\",\"answer\":\"b\"}]",
    ];
    for name in ["rows.jsonl", "rows.json", "rows.csv"] {
        fuzz_file(name, &corpus, &JSON, |path| {
            let _read = read_problems(&Source::new(path));
        });
    }
}

#[test]
fn configurations_never_panic() {
    let corpus: [&[u8]; 2] = [
        b"listen = \"127.0.0.1:8080\"\n[[keys]]\nname = \"a\"\nhash = \"00\"\nrequests_per_minute = 5\n[[pools]]\nmodel = \"m\"\nnodes = [{ url = \"http://h:1\", max_concurrency = 4 }]\nqueue = { requests = 10 }\n[pools.scale]\nmin = 0\nmax = 4\nprocess = { command = [\"x\"] }\n",
        b"[limits]\nbody_bytes = 1\n[admin]\nlisten = \"127.0.0.1:1\"\n",
    ];
    let words: [&'static [u8]; 8] =
        [b"[[pools]]", b"[", b"]", b" = ", b"\"", b"-1", b"nan", b"99999999999999999999"];
    fuzz_file("gateway.toml", &corpus, &words, |path| {
        let _config = Config::read(path);
    });
}

#[test]
fn recipes_never_panic() {
    let corpus: [&[u8]; 2] = [
        b"name = \"r\"\nseed = 1\n[problems]\npath = \"p.jsonl\"\n[teacher]\nurl = \"http://h/v1\"\nmodel = \"m\"\n[generate]\nsamples = 4\n[student]\nmodel = \"s\"\n[sft]\nsteps = 5\nlr = 1e-4\n[grpo]\nsteps = 2\n",
        b"[evaluate]\nproblems = 5\n[compress]\nformats = [\"q8_0\"]\n",
    ];
    let words: [&'static [u8]; 8] =
        [b"[sft]", b"[", b"]", b" = ", b"\"", b"-1", b"inf", b"99999999999999999999"];
    fuzz_file("recipe.toml", &corpus, &words, |path| {
        let _recipe = Recipe::load(path);
    });
}

#[test]
fn chat_templates_never_panic() {
    let corpus: [&[u8]; 2] = [
        b"{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        b"{%- if tools %}{{ tools | tojson }}{% endif %}{% set ns = namespace(x=1) %}{{ raise_exception('no') }}{{ messages[-1].content.split('</think>')[-1] }}",
    ];
    let words: [&'static [u8]; 8] =
        [b"{%", b"%}", b"{{", b"}}", b"{% for x in range(9) %}", b"{% endfor %}", b"| tojson", b"[::-1]"];
    let messages =
        json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>b"}]);
    fuzz(&corpus, &words, |input, _| {
        if let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(input), "<s>", "</s>") {
            let _text = template.render(&messages, true, &json!({"tools": [{"a": 1}]}));
        }
    });
}

#[test]
fn model_files_never_panic() {
    let gguf = [
        &b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"[..],
        b"\x14\0\0\0\0\0\0\0general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        b"\x01\0\0\0\0\0\0\0t\x01\0\0\0\x20\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\0\0\0\0",
        &[0; 64],
    ]
    .concat();
    let alignment = [
        &b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"[..],
        b"\x11\0\0\0\0\0\0\0general.alignment\x04\0\0\0\0\0\0\0",
    ]
    .concat();
    let config: &[u8] = br#"{"model_type":"qwen2","vocab_size":64,"hidden_size":32,"intermediate_size":64,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"rms_norm_eps":1e-6,"rope_theta":10000.0,"max_position_embeddings":128,"tie_word_embeddings":true}"#;
    let shape = ModelConfig::from_json(&String::from_utf8_lossy(config), Path::new("config.json")).unwrap();
    let pieces: [&[u8]; 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x09\0\0\0", b"GGUF"];
    fuzz_file("model.gguf", &[&gguf, &alignment], &pieces, |path| {
        if let Ok(mut file) = GgufFile::open(path) {
            let _config = file.config();
            let _tensors = file.load_tensors(&shape, &mut WeightBuilder::unconverted(&shape));
            let _tokenizer = file.build_tokenizer();
        }
    });
    fuzz(&[config], &JSON, |input, _| {
        let text = String::from_utf8_lossy(input);
        if let Ok(config) = ModelConfig::from_json(&text, Path::new("config.json")) {
            let _checked = config.validate(Path::new("config.json"));
        }
    });
    let tokenizer: &[u8] = br#"{"version":"1.0","added_tokens":[{"id":3,"content":"<e>","special":true,"single_word":false,"lstrip":false,"rstrip":false,"normalized":false}],"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]}}"#;
    fuzz(&[tokenizer], &JSON, |input, _| {
        let text = String::from_utf8_lossy(input);
        if let Ok(tokenizer) = Tokenizer::from_json(&text, Path::new("tokenizer.json")) {
            let _ids = tokenizer.encode("ab b<e>");
        }
    });
}
