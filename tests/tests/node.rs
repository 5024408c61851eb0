//! `potstill serve` as a process, asked over HTTP: the demonstration's teacher is a real model.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use futures_util::StreamExt;
use potstill_shared::client::{Client, Endpoint};
use potstill_shared::openai::{ChatMessage, ChatRequest, GenerationOptions};
use potstill_shared::sse::Decoder;
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
async fn the_api_of_a_node() {
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

    // The stream says the same, with its usage in a last chunk of its own.
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let response = http().post(&chat_url).json(&body).send().await.unwrap();
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    let events = Decoder::default().push(&response.bytes().await.unwrap()).unwrap();
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
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), usage));

    // Limits, stops, several choices, seeds.
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

#[tokio::test]
async fn wrong_requests_get_clear_errors() {
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
async fn a_full_node_answers_429_and_a_client_that_leaves_frees_it() {
    let (_running, url) = serve_teacher(&["--max-running", "1", "--max-waiting", "1"]).await;
    let chat_url = format!("{url}/v1/chat/completions");
    // Never stops by itself: the end token is out of reach at this penalty's other side.
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
    client.idle = Duration::from_secs(20);
    let client = Client::new(client).unwrap();
    let request = ChatRequest {
        model: "teacher".into(),
        messages: vec![ChatMessage::text("user", PROBLEM)],
        options: GenerationOptions { temperature: Some(0.0), ..GenerationOptions::default() },
        ..ChatRequest::default()
    };
    loop {
        match client.chat(&request, &[]).await {
            Ok(completion) => {
                assert_eq!(completion.content, "\\boxed{13}");
                break;
            }
            Err(potstill_shared::client::CallError::Retry { .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn requests_decoded_together_give_what_they_give_alone() {
    let (_running, url) = serve_teacher(&[]).await;
    let chat_url = format!("{url}/v1/chat/completions");
    let bodies: Vec<Value> = (0..24)
        .map(|i| {
            let problem =
                format!("A Tom has {} pens. B Tom loses {} away. How many pens has Tom?", 30 + i, 10 + i / 2);
            chat(json!({"messages": [{"role": "user", "content": problem}]}))
        })
        .collect();
    let together: Vec<_> =
        bodies.iter().map(|body| tokio::spawn(post_owned(chat_url.clone(), body.clone()))).collect();
    let mut answers = Vec::new();
    for answer in together {
        answers.push(answer.await.unwrap());
    }
    for (body, together) in bodies.into_iter().zip(answers) {
        let (_, alone) = post(&chat_url, body).await;
        assert_eq!(alone["choices"], together["choices"]);
    }
}

async fn post_owned(url: String, body: Value) -> Value {
    post(&url, body).await.1
}
