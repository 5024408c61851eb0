//! Compares native and candle families with Hugging Face transformers, on the files of
//! `tests/fixtures/make_fixtures.py`.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Tensor};
use potstill_engine::EngineError;
use potstill_engine::batch::Batch;
use potstill_engine::candle_config::CandleFamily;
use potstill_engine::config::ModelConfig;
use potstill_engine::foreign::CandleLm;
use potstill_engine::kv::KvCache;
use potstill_engine::loader::{LoadedModel, load};
use potstill_engine::model::CausalLm;
use potstill_engine::request::{OutputKind, Pooling, Request, RequestUpdate};
use potstill_engine::sampler::SamplingParams;
use potstill_engine::scheduler::{Engine, EngineConfig};
use potstill_engine::weights::Weights;
use serde_json::{Value, json};

struct Fixture {
    model: CausalLm,
    rows: Vec<Vec<u32>>,
    expected: HashMap<String, Tensor>,
}

fn fixture(name: &str) -> Fixture {
    changed_fixture(name, |_| (), "expected.safetensors")
}

fn changed_fixture(name: &str, change: impl FnOnce(&mut Value), expected: &str) -> Fixture {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name);
    let path = folder.join("config.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut json);
    let config = ModelConfig::from_json(&json.to_string(), &path).unwrap();
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let weights = Weights::new(tensors.into_iter().collect(), &config).unwrap();
    let rows: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("rows.json")).unwrap()).unwrap();
    Fixture {
        model: CausalLm::new(&config, &weights).unwrap(),
        rows: serde_json::from_value(rows["rows"].clone()).unwrap(),
        expected: candle_core::safetensors::load(folder.join(expected), &Device::Cpu).unwrap(),
    }
}

fn cache(model: &CausalLm, blocks: usize) -> KvCache {
    KvCache::new(model.config(), blocks, &Device::Cpu, DType::F32).unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

const FAMILIES: [&str; 3] = ["qwen2", "qwen3", "llama"];

#[test]
fn packed_sequence_logits_match_transformers() {
    let yarn = |config: &mut Value| {
        config["rope_parameters"] = json!({"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
            "original_max_position_embeddings": 128});
    };
    let stretched = ("qwen2 with YaRN", changed_fixture("qwen2", yarn, "yarn.safetensors"));
    for (name, fixture) in FAMILIES.map(|name| (name, fixture(name))).into_iter().chain([stretched]) {
        let batch = Batch::new(fixture.rows.iter().map(|row| (row.as_slice(), 0)));
        let logits = fixture.model.logits(&fixture.model.hidden_states(&batch).unwrap()).unwrap();
        for (i, segment) in batch.segments.iter().enumerate() {
            let ours = logits.narrow(0, segment.start, segment.len).unwrap();
            let difference = largest_difference(&ours, &fixture.expected[&format!("logits.{i}")]);
            assert!(difference <= 1e-4, "{name} row {i}: logits differ by {difference}");
        }
    }
}

#[test]
fn kv_cache_logits_match_transformers_for_every_split() {
    for name in FAMILIES {
        let fixture = fixture(name);
        for cuts in [vec![83], vec![1, 82], vec![40, 1, 1, 41], vec![70, 13]] {
            let row = &fixture.rows[0];
            let mut cache = cache(&fixture.model, 6);
            let mut parts = Vec::new();
            let mut done = 0;
            for cut in cuts {
                let batch = Batch::new([(&row[done..done + cut], done)]);
                let hidden =
                    fixture.model.hidden_states_cached(&batch, &mut cache, &[&[3, 0, 4, 1, 5, 2]]).unwrap();
                parts.push(fixture.model.logits(&hidden).unwrap());
                done += cut;
            }
            let difference =
                largest_difference(&Tensor::cat(&parts, 0).unwrap(), &fixture.expected["logits.0"]);
            assert!(difference <= 1e-4, "{name}: logits differ by {difference}");
        }
    }
}

#[test]
fn batched_decoding_matches_single_sequences() {
    let fixture = fixture("qwen2");
    let mut cache = cache(&fixture.model, 4);
    let mut last = Vec::new();
    for range in [0..9, 9..10, 10..21] {
        let batch = Batch::new(fixture.rows.iter().map(|row| (&row[range.clone()], range.start)));
        let hidden = fixture.model.hidden_states_cached(&batch, &mut cache, &[&[0, 3], &[2, 1]]).unwrap();
        let logits = fixture.model.logits(&hidden).unwrap();
        last = batch.segments.iter().map(|s| logits.narrow(0, s.start, s.len).unwrap()).collect::<Vec<_>>();
    }
    for (i, ours) in last.iter().enumerate() {
        let expected = fixture.expected[&format!("logits.{i}")].narrow(0, 10, 11).unwrap();
        assert!(largest_difference(ours, &expected) <= 1e-4);
    }
}

/// Returns the largest difference of a candle family's logits over several ways of splitting the sequence
/// into steps.
fn foreign_difference(family: CandleFamily) -> Result<f32, EngineError> {
    let folder =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/foreign").join(family.name());
    let path = folder.join("config.json");
    let config = ModelConfig::from_json(&std::fs::read_to_string(&path).unwrap(), &path)?;
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let weights = Weights::new(tensors.into_iter().collect(), &config)?;
    let model = CandleLm::new(config.candle.as_ref().unwrap(), &weights)?;
    let rows: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("rows.json")).unwrap()).unwrap();
    let row: Vec<u32> = serde_json::from_value(rows["rows"][0].clone()).unwrap();
    let row = &row[..row.len().min(config.max_positions)];
    let expected = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
    let mut largest = 0f32;
    for cuts in [vec![row.len()], vec![1; row.len()], vec![7, 1, row.len() - 9, 1]] {
        let (mut state, mut done) = (model.new_state(), 0);
        for cut in cuts {
            let logits = state.forward(&row[done..done + cut], done)?;
            done += cut;
            largest = largest.max(largest_difference(&logits, &expected["logits"].get(done - 1)?));
        }
    }
    let refused = CausalLm::new(&config, &weights).err().unwrap().to_string();
    assert!(refused.contains(&format!("family `{}`", family.name())), "{refused}");
    Ok(largest)
}

#[test]
fn candle_family_logits_match_transformers_for_every_split() {
    let wrong: Vec<_> = CandleFamily::ALL
        .into_iter()
        .map(|family| (family, foreign_difference(family)))
        .filter(|(_, difference)| difference.as_ref().map_or(true, |difference| *difference > 1e-4))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// With a candle family, completions that share steps or are preempted equal the completions of single
/// requests.
#[test]
fn candle_family_completions_are_independent_of_batching_and_preemption() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/foreign/mistral");
    let path = folder.join("config.json");
    let config = ModelConfig::from_json(&std::fs::read_to_string(&path).unwrap(), &path).unwrap();
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let teacher = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../recipes/demo-teacher");
    let model = LoadedModel {
        weights: Weights::new(tensors.into_iter().collect(), &config).unwrap(),
        config,
        ..load(&teacher, &Device::Cpu, DType::F32).unwrap()
    };
    // Four blocks of 16 tokens: too few for all sequences at once, so some are preempted.
    let kv_bytes = 4 * 16 * KvCache::bytes_per_token(&model.config, DType::F32);
    let start = || Engine::start(&model, EngineConfig { kv_bytes, ..EngineConfig::default() }).unwrap();
    let request = |salt: u32| Request {
        prompt: (0..9 + salt).map(|at| 3 + (at * 7 + salt * 5) % 29).collect(),
        max_tokens: 24,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ignore_eos: true,
        ..Request::default()
    };
    let answer = |mut updates: tokio::sync::mpsc::Receiver<RequestUpdate>| {
        let mut text = String::new();
        loop {
            match updates.blocking_recv() {
                Some(RequestUpdate::Text(more)) => text += &more,
                Some(RequestUpdate::Finished { completion_tokens, .. }) => return (text, completion_tokens),
                other => panic!("{other:?}"),
            }
        }
    };
    let engine = start();
    let alone: Vec<_> = (0..5).map(|salt| answer(engine.submit(request(salt)).unwrap())).collect();
    assert!(alone.iter().all(|(text, tokens)| !text.is_empty() && *tokens == 24), "{alone:?}");
    let together: Vec<_> =
        engine.submit_all((0..5).map(request).collect()).unwrap().into_iter().map(answer).collect();
    assert_eq!(together, alone);
    assert!(engine.stats().preempted.load(Ordering::Relaxed) > 0, "nobody had to give blocks back");
    let scored = Request { prompt_logprobs: Some(1), ..request(0) };
    let embedded = Request { output: OutputKind::Embed(Pooling::Mean), ..request(0) };
    for refused in [scored, embedded] {
        let error = engine.submit(refused).err().unwrap().to_string();
        assert!(error.contains("family `mistral`"), "{error}");
    }
}

/// Any value in a candle family's `config.json` gives an error or a working model, never a panic.
#[test]
fn damaged_candle_family_config_never_panics() {
    let values = [
        json!(0),
        json!(1),
        json!(3),
        json!(-1),
        json!(100_000),
        json!(u64::MAX),
        json!(0.3),
        json!(1e300),
        json!(true),
        json!("x"),
        json!([]),
        Value::Null,
    ];
    let mut wrong = Vec::new();
    for family in CandleFamily::ALL {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/foreign");
        let path = folder.join(family.name()).join("config.json");
        let whole: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let tensors =
            candle_core::safetensors::load(path.with_file_name("model.safetensors"), &Device::Cpu).unwrap();
        let names = whole.as_object().unwrap().keys().cloned();
        let more =
            ["head_dim", "rope_theta", "decoder_sparse_step", "partial_rotary_factor", "sliding_window"];
        for name in names.chain(more.map(str::to_owned)) {
            for value in &values {
                let mut damaged = whole.clone();
                damaged[&name] = value.clone();
                let answer = || -> Result<(), EngineError> {
                    let config = ModelConfig::from_json(&damaged.to_string(), &path)?;
                    let weights = Weights::new(tensors.clone().into_iter().collect(), &config)?;
                    let Some(foreign) = &config.candle else { return Ok(()) };
                    let mut state = CandleLm::new(foreign, &weights)?.new_state();
                    let tokens: Vec<u32> = (1..6).take(config.max_positions).collect();
                    state.forward(&tokens, 0).map(drop)
                };
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(answer)).is_err() {
                    wrong.push(format!("{}: {name} = {value}", family.name()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
