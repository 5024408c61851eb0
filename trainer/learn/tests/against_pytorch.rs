//! Loss and gradients of supervised fine-tuning against PyTorch, and the promises of a training run: exact resume, and a
//! gradient for every trainable tensor.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use potstill_engine::config::ModelConfig;
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::template::ChatTemplate;
use potstill_engine::tokenizer::Tokenizer;
use potstill_engine::weights::Weights;
use potstill_learn::LearnError;
use potstill_learn::curriculum::Phase;
use potstill_learn::examples::Example;
use potstill_learn::sft::{SftConfig, sft, sft_loss};

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn load(name: &str) -> (ModelConfig, Weights, Vec<Example>) {
    let path = folder(name).join("config.json");
    let config = ModelConfig::from_json(&std::fs::read_to_string(&path).unwrap(), &path).unwrap();
    let tensors =
        candle_core::safetensors::load(folder(name).join("model.safetensors"), &Device::Cpu).unwrap();
    let weights = Weights::new(tensors.into_iter().collect(), &config).unwrap();
    let rows: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder(name).join("rows.json")).unwrap()).unwrap();
    let tokens: Vec<Vec<u32>> = serde_json::from_value(rows["rows"].clone()).unwrap();
    let from: Vec<usize> = serde_json::from_value(rows["learnt_from"].clone()).unwrap();
    let examples = tokens
        .into_iter()
        .zip(from)
        .map(|(tokens, from)| Example { learnt: (0..tokens.len()).map(|i| i >= from).collect(), tokens })
        .collect();
    (config, weights, examples)
}

#[test]
fn loss_and_gradients_agree() {
    for name in ["qwen2", "qwen3", "llama"] {
        let (config, weights, examples) = load(name);
        let (weights, variables) = weights.trainable().unwrap();
        let lm = CausalLm::new(&config, &weights).unwrap();
        let targets: usize = examples.iter().map(Example::targets).sum();
        let loss = sft_loss(&lm, &examples, targets as f64).unwrap();
        let expected =
            candle_core::safetensors::load(folder(name).join("expected.safetensors"), &Device::Cpu).unwrap();
        let reference = expected["loss"].to_vec1::<f32>().unwrap()[0];
        let ours = loss.to_scalar::<f32>().unwrap();
        assert!((ours - reference).abs() <= 1e-4 * reference, "{name}: loss {ours}, PyTorch {reference}");
        let gradients = loss.backward().unwrap();
        for (tensor, variable) in &variables {
            let ours =
                gradients.get(variable).unwrap_or_else(|| panic!("{name}: `{tensor}` got no gradient"));
            let theirs = &expected[&format!("grad.{tensor}")];
            let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let (error, size) = (norm(&(ours - theirs).unwrap()), norm(theirs));
            // A key bias shifts all scores of a row alike: its true gradient is zero, both sides hold rounding noise.
            assert!(
                error <= 1e-4 * size.max(1e-3),
                "{name}: gradient of `{tensor}` is off by {error} of {size}"
            );
            assert!(size > 0.0, "{name}: the fixture's gradient of `{tensor}` is zero");
        }
    }
}

fn model() -> (LoadedModel, Vec<Example>) {
    let (config, weights, examples) = load("qwen2");
    let tokenizer = Tokenizer::from_json(
        r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,
            "post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}"#,
        Path::new("inline"),
    )
    .unwrap();
    let template = Arc::new(ChatTemplate::chatml().unwrap());
    let examples = (0..40)
        .map(|i| {
            let source = &examples[i % 2];
            let cut = 8 + i % 13;
            Example { tokens: source.tokens[..cut].to_vec(), learnt: (0..cut).map(|at| at >= 3).collect() }
        })
        .collect();
    (LoadedModel { config, weights, tokenizer, template, quantised: false }, examples)
}

fn phases() -> Vec<Phase> {
    let phase = |name: &str, from, to, epochs| Phase {
        name: name.to_owned(),
        examples: (from..to).collect(),
        epochs,
        learning_rate: 1e-2,
    };
    vec![phase("medium", 0, 30, 2.0), phase("hard", 25, 40, 1.5)]
}

fn bits(model: &LoadedModel) -> BTreeMap<String, Vec<u32>> {
    let values =
        |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    model.weights.iter().map(|(n, t)| (n.clone(), values(t).iter().map(|v| v.to_bits()).collect())).collect()
}

#[test]
fn a_run_cut_anywhere_gives_the_same_bits() {
    let (model, examples) = model();
    let config =
        SftConfig { batch_tokens: 60, micro_batch_tokens: 30, checkpoint_every: 3, ..SftConfig::default() };
    let whole = tempfile::tempdir().unwrap();
    let (expected, report) = sft(&model, &examples, &phases(), &config, whole.path(), &mut |_| true).unwrap();
    assert!(report.steps > 15, "{report:?}");
    for stop_at in [1, 4, report.steps - 1] {
        let cut = tempfile::tempdir().unwrap();
        let mut seen = 0;
        let stopped = sft(&model, &examples, &phases(), &config, cut.path(), &mut |_| {
            seen += 1;
            seen < stop_at
        });
        assert!(matches!(stopped, Err(LearnError::Stopped { .. })));
        let (resumed, again) = sft(&model, &examples, &phases(), &config, cut.path(), &mut |_| true).unwrap();
        assert_eq!(again.resumed_from, stop_at);
        assert_eq!(bits(&resumed), bits(&expected), "stopped after {stop_at} steps");
    }
    let (first, _) = model_loss(&model, &examples);
    let (last, _) = model_loss(&expected, &examples);
    assert!(last < 0.7 * first, "training lowers the loss: {first} to {last}");
}

fn model_loss(model: &LoadedModel, examples: &[Example]) -> (f32, usize) {
    let lm = CausalLm::new(&model.config, &model.weights).unwrap();
    let targets: usize = examples.iter().map(Example::targets).sum();
    (sft_loss(&lm, examples, targets as f64).unwrap().to_scalar::<f32>().unwrap(), targets)
}

#[test]
fn a_checkpoint_of_other_data_is_refused() {
    let (model, examples) = model();
    let config = SftConfig { batch_tokens: 100, max_steps: 2, ..SftConfig::default() };
    let folder = tempfile::tempdir().unwrap();
    sft(&model, &examples, &phases(), &config, folder.path(), &mut |_| true).unwrap();
    let other = sft(&model, &examples[..39], &[phases().remove(0)], &config, folder.path(), &mut |_| true);
    assert!(other.err().unwrap().to_string().contains("other data or settings"));
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let (model, examples) = model();
    let mut phases = phases();
    phases[0].learning_rate = 1e30;
    let config = SftConfig { batch_tokens: 60, warmup_ratio: 0.0, ..SftConfig::default() };
    let folder = tempfile::tempdir().unwrap();
    let error = sft(&model, &examples, &phases, &config, folder.path(), &mut |_| true).err().unwrap();
    assert!(matches!(error, LearnError::NotFinite { .. }), "{error}");
}
