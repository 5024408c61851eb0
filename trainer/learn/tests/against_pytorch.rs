//! Tests of supervised fine-tuning: loss and gradients of all trainable tensors match PyTorch, and runs resume bit for
//! bit. Other algorithms are tested in `algorithms.rs`.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "fixture/models.rs"]
mod fixture;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use fixture::{assert_same_gradient, folder, load, model, tensor_bits};
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::ops::Precision;
use potstill_engine::training::GradientCheckpoint;
use potstill_engine::weights::Weights;
use potstill_learn::LearnError;
use potstill_learn::curriculum::Phase;
use potstill_learn::examples::Example;
use potstill_learn::run::RunConfig;
use potstill_learn::sft::{sft, sft_loss};

/// Covers f32 with the CPU's fused operations, and f64 with candle's stock operations, which every other device uses.
#[test]
fn sft_loss_and_gradients_match_pytorch() {
    for name in ["qwen2", "qwen3", "llama"] {
        let (config, weights, examples) = load(name);
        for (dtype, recompute) in [(DType::F32, false), (DType::F32, true), (DType::F64, false)] {
            let variable =
                |tensor: &Tensor| Var::from_tensor(&tensor.to_dtype(dtype).unwrap().copy().unwrap());
            let variables: BTreeMap<String, Var> =
                weights.iter().map(|(name, tensor)| (name.clone(), variable(tensor).unwrap())).collect();
            let tensors =
                variables.iter().map(|(name, variable)| (name.clone(), variable.as_tensor().clone()));
            let weights = Weights::new(tensors.collect(), &config).unwrap();
            let lm = CausalLm::trainable(
                &config,
                &weights,
                GradientCheckpoint::new(&variables, recompute, Precision::F32),
            )
            .unwrap();
            let targets: usize = examples.iter().map(Example::num_targets).sum();
            let loss = sft_loss(&lm, &examples, targets as f64).unwrap();
            let expected =
                candle_core::safetensors::load(folder(name).join("expected.safetensors"), &Device::Cpu)
                    .unwrap();
            let reference = expected["loss"].to_vec1::<f32>().unwrap()[0];
            let ours = loss.to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap();
            assert!((ours - reference).abs() <= 1e-4 * reference, "{name}: loss {ours}, PyTorch {reference}");
            lm.backward(&loss).unwrap();
            let gradients = lm.take_gradients();
            for tensor in variables.keys() {
                let ours =
                    gradients.get(tensor).unwrap_or_else(|| panic!("{name}: `{tensor}` got no gradient"));
                let ours = ours.to_dtype(DType::F32).unwrap();
                assert_same_gradient(
                    &format!("{name}: {tensor}"),
                    &ours,
                    &expected[&format!("grad.{tensor}")],
                );
            }
        }
    }
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

#[test]
fn sft_resumes_bit_for_bit_after_a_stop_at_any_step() {
    let (model, examples) = model();
    let config =
        RunConfig { batch_tokens: 60, micro_batch_tokens: 30, checkpoint_every: 3, ..RunConfig::default() };
    let whole = tempfile::tempdir().unwrap();
    let (learner, report) = sft(&model, &examples, &phases(), &config, whole.path(), &mut |_| true).unwrap();
    let expected = learner.trained_model().unwrap();
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
        assert_eq!(
            tensor_bits(&resumed.trained_model().unwrap()),
            tensor_bits(&expected),
            "stopped after {stop_at} steps"
        );
    }
    let (first, _) = model_loss(&model, &examples);
    let (last, _) = model_loss(&expected, &examples);
    assert!(last < 0.7 * first, "training lowers the loss: {first} to {last}");
}

fn model_loss(model: &LoadedModel, examples: &[Example]) -> (f32, usize) {
    let lm = CausalLm::new(&model.config, &model.weights).unwrap();
    let targets: usize = examples.iter().map(Example::num_targets).sum();
    (sft_loss(&lm, examples, targets as f64).unwrap().to_scalar::<f32>().unwrap(), targets)
}

#[test]
fn resume_rejects_a_checkpoint_of_other_data() {
    let (model, examples) = model();
    let config = RunConfig { batch_tokens: 100, max_steps: 2, ..RunConfig::default() };
    let folder = tempfile::tempdir().unwrap();
    sft(&model, &examples, &phases(), &config, folder.path(), &mut |_| true).unwrap();
    let other = sft(&model, &examples[..39], &[phases().remove(0)], &config, folder.path(), &mut |_| true);
    assert!(other.err().unwrap().to_string().contains("other data or settings"));
}

#[test]
fn run_stops_when_the_loss_is_not_finite() {
    let (model, examples) = model();
    let mut phases = phases();
    phases[0].learning_rate = 1e30;
    let config = RunConfig { batch_tokens: 60, warmup_ratio: 0.0, ..RunConfig::default() };
    let folder = tempfile::tempdir().unwrap();
    let error = sft(&model, &examples, &phases, &config, folder.path(), &mut |_| true).err().unwrap();
    assert!(matches!(error, LearnError::NotFinite { .. }), "{error}");
}
