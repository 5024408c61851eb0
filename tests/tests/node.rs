//! `potstill serve` as a process, tested over HTTP. The demonstration's teacher is a real model.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use futures_util::StreamExt;
use potstill_shared::client::{Client, Endpoint};
use potstill_shared::openai::{ChatMessage, ChatRequest, GenerationParams};
use potstill_shared::sse::SseDecoder;
use serde_json::{Value, json};
use system_tests::programs::serve_teacher;

const PROBLEM: &str = "A Dan has 11 cards. B Dan buys 2 more. C Eve has 7 cards. How many cards has Dan?";

fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

async fn post(url: &str, body: Value) -> (u16, Value) {
    let response = http().post(url).json(&body).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

fn chat(extra: Value) -> Value {
    let mut body =
        json!({"model": "teacher", "temperature": 0, "messages": [{"role": "user", "content": PROBLEM}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn serves_the_openai_api() {
    let (_running, url) = serve_teacher(&[]).await;
    let chat_url = format!("{url}/v1/chat/completions");

    let (status, whole) = post(&chat_url, chat(json!({}))).await;
    assert_eq!(status, 200, "{whole}");
    let message = &whole["choices"][0]["message"];
    assert_eq!(message["content"], "\\boxed{13}");
    assert!(message["reasoning_content"].as_str().unwrap().starts_with("A=11;B=11+2"), "{message}");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let usage = &whole["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );

    // The stream has the same text, with the usage in a last chunk of its own.
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let response = http().post(&chat_url).json(&body).send().await.unwrap();
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    let events = SseDecoder::default().push(&response.bytes().await.unwrap()).unwrap();
    assert_eq!(events.last().unwrap().data, "[DONE]");
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(&event.data).unwrap()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text = |field: &str| -> String {
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][field].as_str()).collect()
    };
    assert_eq!(text("content"), "\\boxed{13}");
    assert_eq!(text("reasoning_content"), message["reasoning_content"].as_str().unwrap());
    let last = chunks.last().unwrap();
    let total = |usage: &Value| usage["total_tokens"].as_u64().unwrap();
    assert_eq!((&last["choices"], total(&last["usage"])), (&json!([]), total(usage)));

    // Limits, stop strings, several choices, seeds.
    let (_, short) = post(&chat_url, chat(json!({"max_tokens": 3}))).await;
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    assert_eq!(short["usage"]["completion_tokens"], 3);
    let (_, stopped) = post(&chat_url, chat(json!({"stop": [";B=", "never"]}))).await;
    assert_eq!(stopped["choices"][0]["message"]["reasoning_content"], "A=11");
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let several = chat(json!({"n": 4, "temperature": 1.0, "seed": 3}));
    let (_, first) = post(&chat_url, several.clone()).await;
    let (_, again) = post(&chat_url, several).await;
    assert_eq!(first["choices"].as_array().unwrap().len(), 4);
    assert_eq!(first["choices"], again["choices"], "the same seed gives the same choices");

    let (_, models) = post_get(&format!("{url}/v1/models")).await;
    assert_eq!(models["data"][0]["id"], "teacher");
    assert_eq!(models["data"][0]["max_model_len"], 1024);

    let (_, completion) = post(
        &format!("{url}/v1/completions"),
        json!({"model": "teacher", "prompt": ["<|user|>A Dan has 3 cards.", "B Dan"], "max_tokens": 2, "echo": true}),
    )
    .await;
    assert_eq!(completion["choices"].as_array().unwrap().len(), 2);
    assert!(completion["choices"][0]["text"].as_str().unwrap().starts_with("<|user|>A Dan has 3 cards."));

    let metrics = http().get(format!("{url}/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("potstill_node_requests_total{end=\"length\",model=\"teacher\"}"), "{metrics}");
}

async fn post_get(url: &str) -> (u16, Value) {
    let response = http().get(url).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

/// The model split over two devices gives the same completions, also to many concurrent requests.
#[tokio::test]
async fn two_devices_give_the_same_completions_as_one() {
    let (_alone, one) = serve_teacher(&[]).await;
    let (_together, two) = serve_teacher(&["--device", "cpu,cpu"]).await;
    let answers = |url: String| async move {
        let asked = (0..6).map(|number| {
            let problem = PROBLEM.replace("11 cards", &format!("{} cards", 10 + number));
            let body = json!({"model": "teacher", "temperature": 0, "messages": [{"role": "user", "content": problem}]});
            let url = format!("{url}/v1/chat/completions");
            async move { post(&url, body).await }
        });
        let answers = futures_util::future::join_all(asked).await;
        answers.into_iter().map(|(_, answer)| answer["choices"][0]["message"].clone()).collect::<Vec<_>>()
    };
    let (alone, together) = (answers(one).await, answers(two).await);
    assert_eq!(alone[1]["content"], "\\boxed{13}");
    assert_eq!(alone, together);
}

#[tokio::test]
async fn invalid_requests_get_clear_errors() {
    let (_running, url) = serve_teacher(&[]).await;
    let chat_url = format!("{url}/v1/chat/completions");
    for (body, status, code, word) in [
        (chat(json!({"model": "other"})), 404, "model_not_found", "`other`"),
        (chat(json!({"messages": []})), 400, "invalid_value", "messages"),
        (
            chat(json!({"max_tokens": 5000})),
            400,
            "context_length_exceeded",
            "maximum context length is 1024 tokens",
        ),
        (chat(json!({"temperature": -1})), 400, "invalid_value", "temperature"),
        (chat(json!({"top_p": 0})), 400, "invalid_value", "top_p"),
        (chat(json!({"n": 0})), 400, "invalid_value", "`n`"),
        (chat(json!({"max_tokens": 0})), 400, "invalid_value", "max_tokens"),
        (chat(json!({"messages": "hi"})), 400, "invalid_json", "expected a sequence"),
    ] {
        let (found, answer) = post(&chat_url, body.clone()).await;
        assert_eq!((found, answer["error"]["code"].as_str()), (status, Some(code)), "{body} gave {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(word), "{answer}");
    }
    let broken = http().post(&chat_url).body("{").send().await.unwrap();
    assert_eq!(broken.status(), 400);
    assert_eq!(post_get(&format!("{url}/nothing")).await.0, 404);
    assert_eq!(post_get(&chat_url).await.0, 405);
}

#[tokio::test]
async fn full_node_returns_429_and_disconnect_frees_its_slot() {
    let (_running, url) = serve_teacher(&["--max-running", "1", "--max-waiting", "1"]).await;
    let chat_url = format!("{url}/v1/chat/completions");
    // Never ends by itself: the penalty puts the end token out of reach.
    let endless = chat(
        json!({"stream": true, "temperature": 2.0, "top_k": 1, "max_tokens": 900, "repetition_penalty": 5.0}),
    );
    let mut held = Vec::new();
    let refused = loop {
        let response = http().post(&chat_url).json(&endless).send().await.unwrap();
        if response.status() == 429 {
            break response;
        }
        assert_eq!(response.status(), 200);
        held.push(response.bytes_stream());
        assert!(held.len() < 200, "the node takes everything");
    };
    assert_eq!(refused.headers()["retry-after"], "1");
    for stream in &mut held {
        let _first = tokio::time::timeout(Duration::from_millis(1), stream.next()).await;
    }
    drop(held);
    let mut client = Endpoint::new(format!("{url}/v1"));
    client.idle_timeout = Duration::from_secs(20);
    let client = Client::new(client).unwrap();
    let request = ChatRequest {
        model: "teacher".into(),
        messages: vec![ChatMessage::from_text("user", PROBLEM)],
        params: GenerationParams { temperature: Some(0.0), ..GenerationParams::default() },
        ..ChatRequest::default()
    };
    loop {
        match client.chat(&request, &[]).await {
            Ok(completion) => {
                assert_eq!(completion.content, "\\boxed{13}");
                break;
            }
            Err(potstill_shared::client::CallError::Temporary { .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Reads a metric of the node.
async fn number(url: &str, what: &str) -> f64 {
    let metrics = http().get(format!("{url}/metrics")).send().await.unwrap().text().await.unwrap();
    let line = metrics.lines().find(|line| line.contains(&format!("what=\"{what}\""))).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Concurrent, sequential, with few KV blocks, and with cached prompts: the completions are the same.
#[tokio::test]
async fn batched_requests_equal_single_ones() {
    let (_running, url) = serve_teacher(&[]).await;
    let (_other, tight) = serve_teacher(&["--kv-mib", "1", "--step-tokens", "40"]).await;
    let path = "/v1/chat/completions";
    let bodies: Vec<Value> = (0..24)
        .map(|i| {
            let problem =
                format!("A Tom has {} pens. B Tom loses {} away. How many pens has Tom?", 30 + i, 10 + i / 2);
            chat(json!({"messages": [{"role": "user", "content": problem}]}))
        })
        .collect();
    let mut answers = Vec::new();
    for url in [&url, &tight] {
        let all = bodies.iter().map(|body| tokio::spawn(post_owned(format!("{url}{path}"), body.clone())));
        for answer in all.collect::<Vec<_>>() {
            answers.push(answer.await.unwrap());
        }
    }
    for (at, body) in bodies.iter().enumerate() {
        let (_, alone) = post(&format!("{url}{path}"), body.clone()).await;
        assert_eq!(alone["choices"][0]["finish_reason"], "stop", "{alone}");
        assert_eq!(alone["choices"], answers[at]["choices"]);
        assert_eq!(alone["choices"], answers[bodies.len() + at]["choices"]);
        // The prompt was processed before, so its whole blocks are in the prefix cache.
        assert!(alone["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 16, "{alone}");
    }
    assert!(number(&tight, "preempted").await > 0.0);
    assert!(number(&url, "preempted").await == 0.0);
    for url in [&url, &tight] {
        assert_eq!((number(url, "blocks_used").await, number(url, "running").await), (0.0, 0.0));
    }
    // Several completions of one prompt process it once.
    let (computed, long) = (number(&url, "prompt_tokens").await, vec!["A Tom has 3 pens."; 40].join(" "));
    let body = json!({"model": "teacher", "prompt": long, "n": 8, "max_tokens": 3, "temperature": 1.0});
    let (_, answer) = post(&format!("{url}/v1/completions"), body).await;
    let length = answer["usage"]["prompt_tokens"].as_f64().unwrap();
    let computed = number(&url, "prompt_tokens").await - computed;
    assert!(length > 200.0 && computed <= length + 7.0 * 16.0, "{computed} rows for a prompt of {length}");
}

async fn post_owned(url: String, body: Value) -> Value {
    post(&url, body).await.1
}

fn numbers(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap_or(f64::NAN)).collect()
}

#[tokio::test]
async fn returns_logprobs_of_completions_and_prompts() {
    let (_running, url) = serve_teacher(&[]).await;
    let (chat_url, text_url) = (format!("{url}/v1/chat/completions"), format!("{url}/v1/completions"));
    let asked = chat(json!({"logprobs": true, "top_logprobs": 3}));
    let (_, whole) = post(&chat_url, asked.clone()).await;
    let entries = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(entries.len() as u64, whole["usage"]["completion_tokens"].as_u64().unwrap());
    let message = &whole["choices"][0]["message"];
    let said = format!(
        "<think>{}</think>{}<|end|>",
        message["reasoning_content"].as_str().unwrap(),
        message["content"].as_str().unwrap()
    );
    assert_eq!(entries.iter().map(|entry| entry["token"].as_str().unwrap()).collect::<String>(), said);
    for entry in &entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(
            (top.len(), &top[0]["token"], &top[0]["logprob"]),
            (3, &entry["token"], &entry["logprob"])
        );
        assert!(
            entry["logprob"].as_f64().unwrap() <= 0.0
                && top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64()
        );
        assert_eq!(entry["bytes"].as_array().unwrap().len(), entry["token"].as_str().unwrap().len());
    }
    let mut streamed = asked;
    streamed["stream"] = true.into();
    let response = http().post(&chat_url).json(&streamed).send().await.unwrap();
    let events = SseDecoder::default().push(&response.bytes().await.unwrap()).unwrap();
    let chunks =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str::<Value>(&event.data).unwrap());
    let pieces: Vec<Value> = chunks
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(pieces, entries);

    // The log probabilities of a completion equal those in the echo of prompt and completion.
    let prompt = "<|user|>A Dan has 11 cards.";
    let asked =
        json!({"model": "teacher", "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 2});
    let (_, written) = post(&text_url, asked.clone()).await;
    let choice = &written["choices"][0];
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
    let text = tokens.iter().map(|token| token.as_str().unwrap()).collect::<String>();
    let mut by_id = asked.clone();
    by_id["return_tokens_as_token_ids"] = true.into();
    let (_, numbered) = post(&text_url, by_id).await;
    let id = |name: &str| name.strip_prefix("token_id:").unwrap().parse::<u32>().unwrap();
    let names = numbered["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    let ids: Vec<u32> = names.iter().map(|name| id(name.as_str().unwrap())).collect();
    let told = json!({"model": "teacher", "tokens": ids});
    assert_eq!(post(&format!("{url}/detokenize"), told).await.1["prompt"], text);
    let top = numbered["choices"][0]["logprobs"]["top_logprobs"][0].as_object().unwrap();
    assert!(top.len() >= 2 && top.keys().all(|name| id(name) > 0), "{top:?}");
    for (max_tokens, count) in [(0, 0), (1, 1)] {
        let asked = json!({"model": "teacher", "prompt": format!("{prompt}{text}"), "max_tokens": max_tokens, "temperature": 0,
            "logprobs": 2, "echo": true});
        let (status, echoed) = post(&text_url, asked).await;
        assert_eq!(status, 200, "{echoed}");
        let log_probs = &echoed["choices"][0]["logprobs"];
        let all = numbers(&log_probs["token_logprobs"]);
        let length = echoed["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
        assert!(all[0].is_nan() && log_probs["top_logprobs"][0].is_null());
        assert_eq!(
            (all.len(), log_probs["text_offset"].as_array().unwrap().len()),
            (length + count, length + count)
        );
        assert_eq!((&log_probs["text_offset"][0], &log_probs["text_offset"][1]), (&0.into(), &8.into()));
        for (again, first) in
            all[length - tokens.len()..length].iter().zip(numbers(&choice["logprobs"]["token_logprobs"]))
        {
            assert!((again - first).abs() < 1e-3, "{again} {first}");
        }
    }
    for (body, word) in [
        (chat(json!({"top_logprobs": 3})), "top_logprobs"),
        (chat(json!({"logprobs": true, "top_logprobs": 21})), "top_logprobs"),
        (chat(json!({"logprobs": 5})), "logprobs"),
        (chat(json!({"logit_bias": {"x": 1}})), "logit_bias"),
        (chat(json!({"logit_bias": {"99999": 1}})), "logit_bias"),
        (chat(json!({"logit_bias": {"1": 101}})), "logit_bias"),
        (chat(json!({"tools": [{"type": "function"}]})), "tools"),
        (chat(json!({"tool_choice": "required"})), "tool_choice"),
        (chat(json!({"response_format": {"type": "xml"}})), "response_format"),
        (chat(json!({"guided_regex": "("})), "response_format"),
        (chat(json!({"thinking_budget": "much"})), "thinking_budget"),
    ] {
        let (status, answer) = post(&chat_url, body.clone()).await;
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(word)), "{body}: {answer}");
    }
}

#[tokio::test]
async fn supports_logit_bias_thinking_budget_and_embeddings() {
    let (_running, url) = serve_teacher(&[]).await;
    let chat_url = format!("{url}/v1/chat/completions");
    let (_, tokens) = post(
        &format!("{url}/tokenize"),
        json!({"model": "teacher", "prompt": "7", "return_token_strs": true}),
    )
    .await;
    assert_eq!((&tokens["count"], &tokens["token_strs"]), (&1.into(), &json!(["7"])));
    let seven = tokens["tokens"][0].to_string();
    let (_, text) =
        post(&format!("{url}/detokenize"), json!({"model": "teacher", "tokens": tokens["tokens"]})).await;
    assert_eq!(text["prompt"], "7");
    let (_, forced) =
        post(&chat_url, chat(json!({"logit_bias": {seven.clone(): 100}, "max_tokens": 5}))).await;
    assert_eq!(forced["choices"][0]["message"]["content"], "77777");

    let (_, free) = post(&chat_url, chat(json!({}))).await;
    let thinking = free["choices"][0]["message"]["reasoning_content"].as_str().unwrap();
    for extra in [json!({"thinking_budget": 4}), json!({"chat_template_kwargs": {"thinking_budget": 4}})] {
        let (_, short) = post(&chat_url, chat(extra)).await;
        let message = &short["choices"][0]["message"];
        let cut = message["reasoning_content"].as_str().unwrap();
        assert!(cut.len() < thinking.len() && thinking.starts_with(cut.trim_end()), "{cut}");
        // The small teacher never saw this close tag, so its text is arbitrary.
        assert!(message["content"].as_str().unwrap().starts_with("\n\n"), "{short}");
    }
    // The structure binds the answer; its content is arbitrary.
    let (_, one) =
        post(&chat_url, chat(json!({"guided_choice": ["7 cards", "9 cards"], "temperature": 1.0}))).await;
    let text = one["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(["7 cards", "9 cards"].contains(&text) && one["choices"][0]["finish_reason"] == "stop", "{one}");
    let digits = json!({"guided_regex": "[1-4]{3}", "temperature": 1.0, "n": 5});
    let (_, several) = post(&chat_url, chat(digits)).await;
    for choice in several["choices"].as_array().unwrap() {
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(text.len() == 3 && text.chars().all(|c| ('1'..='4').contains(&c)), "{text}");
    }

    // A budget that is not used up changes nothing.
    let (_, ample) = post(&chat_url, chat(json!({"thinking_budget": 500}))).await;
    assert_eq!(ample["choices"], free["choices"]);

    let embed = |extra: Value| {
        let mut body = json!({"model": "teacher", "input": ["A Dan has 3 cards.", "B Eve gets 2 more."]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        post_owned(format!("{url}/v1/embeddings"), body)
    };
    let both = embed(json!({})).await;
    let vector = numbers(&both["data"][1]["embedding"]);
    assert!((vector.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5 && vector.len() == 128);
    let alone = embed(json!({"input": "B Eve gets 2 more."})).await;
    for (one, other) in vector.iter().zip(numbers(&alone["data"][0]["embedding"])) {
        assert!((one - other).abs() < 1e-5);
    }
    let mean = embed(json!({"pooling": "mean", "dimensions": 16})).await;
    let mean = numbers(&mean["data"][1]["embedding"]);
    assert!(
        mean.len() == 16
            && mean[..] != vector[..16]
            && (mean.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5
    );
    let packed = embed(json!({"encoding_format": "base64"})).await;
    assert_eq!(packed["data"][1]["embedding"].as_str().unwrap().len(), (128 * 4usize).div_ceil(3) * 4);
    assert!(embed(json!({"dimensions": 500})).await["error"]["param"] == "dimensions");
}
