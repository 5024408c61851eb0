//! Our one model definition against Hugging Face transformers, on the files of `tests/fixtures/make_fixtures.py`.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use potstill_engine::batch::Batch;
use potstill_engine::config::ModelConfig;
use potstill_engine::kv::KvCache;
use potstill_engine::model::CausalLm;
use potstill_engine::weights::Weights;

struct Fixture {
    model: CausalLm,
    rows: Vec<Vec<u32>>,
    expected: HashMap<String, Tensor>,
}

fn fixture(name: &str) -> Fixture {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name);
    let path = folder.join("config.json");
    let config = ModelConfig::from_json(&std::fs::read_to_string(&path).unwrap(), &path).unwrap();
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let weights = Weights::new(tensors.into_iter().collect(), &config).unwrap();
    let rows: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("rows.json")).unwrap()).unwrap();
    Fixture {
        model: CausalLm::new(&config, &weights).unwrap(),
        rows: serde_json::from_value(rows["rows"].clone()).unwrap(),
        expected: candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap(),
    }
}

fn cache(model: &CausalLm, blocks: usize) -> KvCache {
    KvCache::new(model.config(), 16, blocks, &Device::Cpu, DType::F32).unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

const FAMILIES: [&str; 3] = ["qwen2", "qwen3", "llama"];

#[test]
fn logits_of_packed_rows_agree() {
    for name in FAMILIES {
        let fixture = fixture(name);
        let batch = Batch::new(fixture.rows.iter().map(|row| (row.as_slice(), 0)));
        let logits = fixture.model.logits(&fixture.model.hidden(&batch).unwrap()).unwrap();
        for (i, segment) in batch.segments.iter().enumerate() {
            let ours = logits.narrow(0, segment.start, segment.len).unwrap();
            let difference = largest_difference(&ours, &fixture.expected[&format!("logits.{i}")]);
            assert!(difference <= 1e-4, "{name} row {i}: logits differ by {difference}");
        }
    }
}

#[test]
fn logits_with_a_cache_agree_for_every_cut() {
    for name in FAMILIES {
        let fixture = fixture(name);
        for cuts in [vec![83], vec![1, 82], vec![40, 1, 1, 41], vec![70, 13]] {
            let row = &fixture.rows[0];
            let mut cache = cache(&fixture.model, 6);
            let mut parts = Vec::new();
            let mut done = 0;
            for cut in cuts {
                let batch = Batch::new([(&row[done..done + cut], done)]);
                let hidden = fixture.model.hidden_cached(&batch, &mut cache, &[&[3, 0, 4, 1, 5, 2]]).unwrap();
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
fn sequences_decoded_together_do_not_mix() {
    let fixture = fixture("qwen2");
    let mut cache = cache(&fixture.model, 4);
    let mut last = Vec::new();
    for range in [0..9, 9..10, 10..21] {
        let batch = Batch::new(fixture.rows.iter().map(|row| (&row[range.clone()], range.start)));
        let hidden = fixture.model.hidden_cached(&batch, &mut cache, &[&[0, 3], &[2, 1]]).unwrap();
        let logits = fixture.model.logits(&hidden).unwrap();
        last = batch.segments.iter().map(|s| logits.narrow(0, s.start, s.len).unwrap()).collect::<Vec<_>>();
    }
    for (i, ours) in last.iter().enumerate() {
        let expected = fixture.expected[&format!("logits.{i}")].narrow(0, 10, 11).unwrap();
        assert!(largest_difference(ours, &expected) <= 1e-4);
    }
}
