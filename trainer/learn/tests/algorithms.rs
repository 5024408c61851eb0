//! Tests of DPO, GRPO, reward models, logit distillation and LoRA. Losses and gradients are compared with PyTorch; runs
//! resume bit for bit and improve their metric. SFT has its own file, `against_pytorch.rs`.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "fixture/models.rs"]
mod fixture;
#[path = "fixture/pytorch.rs"]
mod pytorch;

use candle_core::{DType, Device, Tensor, Var};
use fixture::{assert_same_gradient, model, tensor_bits};
use potstill_engine::batch::Batch;
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::ops::Precision;
use potstill_engine::ops::log_prob::linear_log_prob;
use potstill_learn::LearnError;
use potstill_learn::divergence::Divergence;
use potstill_learn::dpo::{DpoConfig, PreferencePair, dpo, dpo_loss};
use potstill_learn::examples::Example;
use potstill_learn::grpo::{GrpoConfig, Prompt, RewardFunction, grpo, policy_loss};
use potstill_learn::kd::{
    KdConfig, TeacherLogits, TopK, kd, kd_loss, kd_on_policy, read_top_k, top_k, write_top_k,
};
use potstill_learn::learner::Learner;
use potstill_learn::lora::{FrozenFormat, LoraConfig};
use potstill_learn::reward_model::{
    RewardConfig, RewardLoss, RewardModel, ScoredTrace, reward_loss, train_reward_model,
};
use potstill_learn::run::{Progress, RunConfig, RunReport, StepObserver};
use potstill_learn::sft::sft_loss;
use potstill_verify::verifier::Reference;
use pytorch::{Fixture, fixture};

#[test]
fn dpo_loss_and_gradients_match_pytorch() {
    let f = fixture();
    let betas: Vec<f64> = serde_json::from_value(f.facts["betas"].clone()).unwrap();
    let reference: Vec<[f32; 2]> = serde_json::from_value(f.facts["reference"].clone()).unwrap();
    let pairs: Vec<PreferencePair> = f
        .examples
        .chunks_exact(2)
        .zip(betas)
        .map(|(pair, beta)| PreferencePair {
            chosen: pair[0].clone(),
            rejected: pair[1].clone(),
            beta: Some(beta),
        })
        .collect();
    let config = DpoConfig { nll: 0.1, ..DpoConfig::default() };
    let found = dpo_loss(&f.lm, &pairs.iter().collect::<Vec<_>>(), &reference, &config, 2.0).unwrap();
    f.assert_matches_pytorch("dpo", &found.loss);
}

#[test]
fn grpo_loss_and_gradients_match_pytorch() {
    let f = fixture();
    let (hidden, targets) = f.loss_rows();
    let log_probs = linear_log_prob(&hidden, f.lm.lm_head().unwrap(), &targets, Precision::F32).unwrap();
    let n = targets.len();
    let weights = Tensor::full(1.0 / n as f32, n, &Device::Cpu).unwrap();
    let config = GrpoConfig { kl: 0.05, ..GrpoConfig::default() };
    let [old, reference, advantages] =
        ["old", "reference", "advantages"].map(|name| &f.expected[&format!("grpo.{name}")]);
    let found = policy_loss(&log_probs, old, Some(reference), advantages, &weights, &config).unwrap();
    assert!(found.clipped_tokens > 0.0, "the fixture reaches the clip");
    f.assert_matches_pytorch("grpo", &found.loss);
}

#[test]
fn reward_model_losses_and_gradients_match_pytorch() {
    for (name, loss) in [
        ("huber", RewardLoss::Huber),
        ("ordinal", RewardLoss::Ordinal),
        ("bradley_terry", RewardLoss::BradleyTerry),
    ] {
        let f = fixture();
        let head = Var::from_tensor(&f.expected[&format!("{name}.head")]).unwrap();
        let scores: Vec<u8> = serde_json::from_value(f.facts["scores"].clone()).unwrap();
        let scores = if loss == RewardLoss::BradleyTerry { &scores[..2] } else { &scores };
        let batch = Batch::new(f.examples.iter().map(|example| (example.tokens.as_slice(), 0)));
        let last = Tensor::new(batch.last_row_indices(), &Device::Cpu).unwrap();
        let hidden = f.lm.hidden_states(&batch).unwrap().index_select(&last, 0).unwrap();
        let logits = hidden.matmul(&head.t().unwrap()).unwrap();
        let found = reward_loss(&logits, scores, loss).unwrap();
        let of_head = found.backward().unwrap();
        assert_same_gradient(
            name,
            of_head.get(&head).unwrap(),
            &f.expected[&format!("{name}.grad.score.weight")],
        );
        // Discards the block gradients that this backward pass accumulated.
        f.lm.take_gradients();
        let f = Fixture { ..f };
        let hidden = f.lm.hidden_states(&batch).unwrap().index_select(&last, 0).unwrap();
        f.assert_matches_pytorch(
            name,
            &reward_loss(&hidden.matmul(&head.t().unwrap()).unwrap(), scores, loss).unwrap(),
        );
    }
}

#[test]
fn kd_loss_and_gradients_match_pytorch() {
    for (name, divergence) in [
        ("forward_kl", Divergence::ForwardKl),
        ("reverse_kl", Divergence::ReverseKl),
        ("jsd", Divergence::Jsd(0.3)),
        ("adaptive_kl", Divergence::AdaptiveKl),
    ] {
        let f = fixture();
        let ids = f.expected["kd.ids"].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
        let log_probs = f.expected["kd.log_probs"].to_vec2::<f32>().unwrap();
        let mut start = 0;
        let rows: Vec<TopK> = f
            .examples
            .iter()
            .map(|example| {
                let range = start..start + example.num_targets();
                start = range.end;
                TopK { k: 4, ids: ids[range.clone()].concat(), log_probs: log_probs[range].concat() }
            })
            .collect();
        let config = KdConfig { divergence, ratio: 0.6, ..KdConfig::default() };
        let chosen: Vec<(&Example, &TopK)> = f.examples.iter().zip(&rows).collect();
        f.assert_matches_pytorch(name, &kd_loss(&f.lm, &chosen, &config, start as f64).unwrap());
    }
}

fn run_config() -> RunConfig {
    RunConfig { batch_tokens: 60, micro_batch_tokens: 30, checkpoint_every: 3, ..RunConfig::default() }
}

type TrainResult = Result<(LoadedModel, RunReport), LearnError>;

/// Stops a run after several steps, restarts it, and checks that the final weights equal those of an uninterrupted run
/// bit for bit.
fn assert_resumes_bit_for_bit(run: &dyn Fn(&std::path::Path, StepObserver<'_>) -> TrainResult) {
    let whole = tempfile::tempdir().unwrap();
    let (expected, report) = run(whole.path(), &mut |_| true).unwrap();
    assert!(report.steps >= 6, "{report:?}");
    for stop_at in [1, 4, report.steps - 1] {
        let cut = tempfile::tempdir().unwrap();
        let mut seen = 0;
        let stopped = run(cut.path(), &mut |_| {
            seen += 1;
            seen < stop_at
        });
        assert!(matches!(stopped, Err(LearnError::Stopped { .. })), "{:?}", stopped.err());
        let (resumed, again) = run(cut.path(), &mut |_| true).unwrap();
        assert!(again.resumed_from >= stop_at);
        assert_eq!(tensor_bits(&resumed), tensor_bits(&expected), "stopped after {stop_at} steps");
    }
}

fn preference_pairs() -> (LoadedModel, Vec<PreferencePair>) {
    let (model, examples) = model();
    let pairs = examples
        .chunks_exact(2)
        .map(|pair| PreferencePair { chosen: pair[0].clone(), rejected: pair[1].clone(), beta: None })
        .collect();
    (model, pairs)
}

#[test]
fn dpo_resumes_bit_for_bit_and_widens_the_margin() {
    let (model, pairs) = preference_pairs();
    let config = DpoConfig { learning_rate: 1e-3, epochs: 2.0, run: run_config(), ..DpoConfig::default() };
    assert_resumes_bit_for_bit(&|folder, observe| {
        let (learner, report) = dpo(&model, &pairs, &config, folder, observe)?;
        Ok((learner.trained_model()?, report))
    });
    let folder = tempfile::tempdir().unwrap();
    let mut entries = Vec::new();
    dpo(&model, &pairs, &config, folder.path(), &mut |progress| {
        entries.push(progress.entry.clone());
        true
    })
    .unwrap();
    let (first, last) = (&entries[0], entries.last().unwrap());
    assert!(first.metrics["rewards/margin"].abs() < 1e-3, "training starts at the reference: {first:?}");
    assert!(last.metrics["rewards/margin"] > 0.1 && last.metrics["rewards/accuracy"] > 0.5, "{last:?}");
    let same = PreferencePair { rejected: pairs[0].chosen.clone(), ..pairs[0].clone() };
    let refused = dpo(&model, &[same], &config, folder.path(), &mut |_| true).err().unwrap();
    assert!(refused.to_string().contains("pair 0"), "{refused}");
}

fn scored_traces() -> (LoadedModel, Vec<ScoredTrace>) {
    let (model, _) = model();
    // The score depends on the last token, so that the model can learn it: token 5 scores 8, token 30 scores 1.
    let traces = (0..80u32)
        .map(|i| ScoredTrace {
            tokens: vec![4 + i % 7, 10 + i % 11, if i % 2 == 0 { 5 } else { 30 }],
            score: if i % 2 == 0 { 8 } else { 1 },
            problem: format!("problem {}", i / 2),
        })
        .collect();
    (model, traces)
}

#[test]
fn reward_models_resume_bit_for_bit_and_rank_held_out_traces() {
    let (model, traces) = scored_traces();
    for loss in [RewardLoss::Huber, RewardLoss::Ordinal, RewardLoss::BradleyTerry] {
        let run = RunConfig {
            batch_tokens: 48,
            micro_batch_tokens: 24,
            checkpoint_every: 3,
            ..RunConfig::default()
        };
        let config = RewardConfig { loss, learning_rate: 1e-2, epochs: 6.0, held_out: 0.2, run };
        let fit = |folder: &std::path::Path, observe: StepObserver<'_>| {
            train_reward_model(&model, &traces, &config, folder, observe)
        };
        if loss == RewardLoss::Huber {
            assert_resumes_bit_for_bit(&|folder, observe| {
                let (model, report, _) = fit(folder, observe)?;
                Ok((model.model().clone(), report))
            });
        }
        let folder = tempfile::tempdir().unwrap();
        let (trained, _, agreement) = fit(folder.path(), &mut |_| true).unwrap();
        assert!(agreement.spearman > 0.8, "{loss:?}: {agreement:?}");
        if loss != RewardLoss::BradleyTerry {
            assert!(agreement.mae < 0.4 * agreement.mae_of_mean, "{loss:?}: {agreement:?}");
        }
        let predictions =
            trained.predict(&[traces[0].tokens.clone(), traces[1].tokens.clone()], 100).unwrap();
        assert!(predictions.iter().all(|value| (0.0..=1.0).contains(value)));
        assert!(predictions[0] > predictions[1]);
    }
    let bad = ScoredTrace { score: 10, ..traces[0].clone() };
    let folder = tempfile::tempdir().unwrap();
    let refused = train_reward_model(&model, &[bad], &RewardConfig::default(), folder.path(), &mut |_| true)
        .err()
        .unwrap();
    assert!(refused.to_string().contains("outside 0 to 9"), "{refused}");
}

/// A reward model that is written to a folder and loaded again predicts the same values.
#[test]
fn reward_model_predicts_the_same_after_saving_and_loading() {
    let (model, traces) = scored_traces();
    let config = RewardConfig {
        learning_rate: 1e-2,
        epochs: 1.0,
        held_out: 0.2,
        run: run_config(),
        ..RewardConfig::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let (trained, _, _) = train_reward_model(&model, &traces, &config, folder.path(), &mut |_| true).unwrap();
    let out = folder.path().join("model");
    potstill_shared::durable::create_folder(&out).unwrap();
    potstill_engine::checkpoint_files::write_model(&out, trained.model(), DType::F32).unwrap();
    let text = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(text.contains("Qwen2ForSequenceClassification") && text.contains("\"num_labels\": 1"), "{text}");
    let read =
        RewardModel::new(potstill_engine::loader::load(&out, &Device::Cpu, DType::F32).unwrap()).unwrap();
    let rows = [traces[0].tokens.clone(), traces[3].tokens.clone()];
    assert_eq!(read.predict(&rows, 100).unwrap(), trained.predict(&rows, 100).unwrap());
}

fn grpo_setup() -> (LoadedModel, Vec<Prompt>, GrpoConfig) {
    let (mut model, _) = model();
    model.config.eos_token_ids = vec![2];
    let prompts = (0..12u32)
        .map(|i| Prompt {
            problem: format!("w{}", 3 + i),
            tokens: vec![3 + i, 20 + i, 4],
            starts_in_think: false,
            reference: Reference::Answer("7".to_owned()),
        })
        .collect();
    let config = GrpoConfig {
        learning_rate: 2e-3,
        prompts: 4,
        epochs: 4.0,
        group: 8,
        max_tokens: 3,
        kl: 0.01,
        learn_truncated: true,
        max_truncated: 1.0,
        run: RunConfig { micro_batch_tokens: 64, checkpoint_every: 3, ..RunConfig::default() },
        ..GrpoConfig::default()
    };
    (model, prompts, config)
}

#[test]
fn grpo_resumes_bit_for_bit() {
    let (model, prompts, config) = grpo_setup();
    for updates in [1, 2] {
        let config = GrpoConfig { updates, ..config.clone() };
        assert_resumes_bit_for_bit(&|folder, observe| {
            let (learner, report) =
                grpo(&model, &prompts, &RewardFunction::default(), &config, folder, observe)?;
            Ok((learner.trained_model()?, report))
        });
    }
}

/// One token of the vocabulary is a complete correct answer. The model learns to sample it and then stop.
#[test]
fn grpo_learns_the_rewarded_completion() {
    let (model, prompts, config) = grpo_setup();
    let config = GrpoConfig { learning_rate: 1e-2, epochs: 40.0, kl: 0.0, ..config };
    let folder = tempfile::tempdir().unwrap();
    let mut rewards = Vec::new();
    grpo(&model, &prompts, &RewardFunction::default(), &config, folder.path(), &mut |progress| {
        rewards.push(progress.entry.metrics["reward"]);
        true
    })
    .unwrap();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&rewards[..10]), mean(&rewards[rewards.len() - 10..]));
    assert!(last > 1.0 && first < 0.3, "rewards {first} to {last}");
}

#[test]
fn grpo_stops_when_most_completions_are_truncated() {
    let (mut model, prompts, config) = grpo_setup();
    model.config.eos_token_ids = vec![];
    let config = GrpoConfig { max_truncated: 0.5, learn_truncated: false, ..config };
    let folder = tempfile::tempdir().unwrap();
    let mut steps = 0;
    let refused =
        grpo(&model, &prompts, &RewardFunction::default(), &config, folder.path(), &mut |progress| {
            steps = progress.entry.step;
            assert_eq!(progress.entry.metrics["completions/truncated"], 1.0);
            true
        });
    assert!(matches!(refused, Err(LearnError::Truncated { .. })), "{:?}", refused.err());
    assert_eq!(steps, 9, "ten steps are looked at");
}

#[test]
fn kd_learns_from_the_teacher_and_on_policy_resumes_bit_for_bit() {
    let (teacher, examples) = model();
    let (mut student, _) = model();
    student.weights = potstill_engine::init::random_weights(&student.config, 5).unwrap();
    let run = RunConfig { checkpoint_every: 1000, ..run_config() };
    let config = KdConfig {
        ratio: 1.0,
        top_k: 8,
        learning_rate: 1e-2,
        epochs: 12.0,
        max_tokens: 8,
        run,
        ..KdConfig::default()
    };
    let rows = top_k(&teacher, &examples, 8, 100).unwrap();
    let file = tempfile::tempdir().unwrap();
    let path = file.path().join("rows.safetensors");
    write_top_k(&path, &rows, &teacher.tokenizer).unwrap();
    assert_eq!(read_top_k(&path, &student.tokenizer).unwrap(), rows);
    let mut losses = Vec::new();
    let mut observe = |progress: &Progress<'_>| {
        losses.push(progress.entry.loss);
        true
    };
    let folder = tempfile::tempdir().unwrap();
    kd(&student, &examples, &rows, &config, folder.path(), &mut observe).unwrap();
    let last = *losses.last().unwrap();
    assert!(last < 0.5 * losses[0], "{} to {last}", losses[0]);
    let short =
        kd(&student, &examples[1..], &rows[..39], &config, folder.path(), &mut |_| true).err().unwrap();
    assert!(short.to_string().contains("learnt tokens"), "{short}");

    let prompts: Vec<Vec<u32>> = (0..16u32).map(|i| vec![3 + i, 20 + i]).collect();
    let run =
        RunConfig { batch_tokens: 80, micro_batch_tokens: 80, checkpoint_every: 3, ..RunConfig::default() };
    let config = KdConfig {
        divergence: Divergence::ReverseKl,
        top_k: 48,
        learning_rate: 2e-3,
        epochs: 6.0,
        run,
        ..config
    };
    assert_resumes_bit_for_bit(&|folder, observe| {
        let teacher = TeacherLogits::local(&teacher, &config)?;
        let (learner, report) = kd_on_policy(&student, &teacher, &prompts, &config, folder, observe)?;
        Ok((learner.trained_model()?, report))
    });
}

#[test]
fn lora_trains_only_adapters_and_merges_them() {
    let (model, pairs) = preference_pairs();
    for quantise in [None, Some(FrozenFormat::Q8_0)] {
        let lora = LoraConfig { rank: 4, alpha: 8.0, quantise, ..LoraConfig::default() };
        let config = DpoConfig {
            learning_rate: 1e-2,
            epochs: 3.0,
            run: RunConfig { lora: Some(lora), ..run_config() },
            ..DpoConfig::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let (learner, _) = dpo(&model, &pairs, &config, folder.path(), &mut |_| true).unwrap();
        assert!(learner.variables().keys().all(|name| name.contains(".lora_")));
        assert_eq!(learner.variables().len(), 2 * 7 * model.config.num_layers);
        let merged = learner.trained_model().unwrap();
        let embedding = "model.embed_tokens.weight";
        assert_eq!(tensor_bits(&merged)[embedding], tensor_bits(&model)[embedding], "what is frozen stays");
        // The unmerged adapters and the merged weights give equal logits, up to the error of 8-bit storage.
        let logits = |model: &LoadedModel| {
            let lm = CausalLm::new(&model.config, &model.weights).unwrap();
            lm.logits(&lm.hidden_states(&Batch::new([(&pairs[0].chosen.tokens[..], 0)])).unwrap()).unwrap()
        };
        let (apart, together) = (logits(&learner.inference_models()[0]), logits(&merged));
        let gap = (&apart - &together).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let moved = (&logits(&model) - &together)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(
            gap < if quantise.is_some() { 0.2 } else { 1e-3 } && moved > 0.05,
            "gap {gap}, moved {moved}"
        );
        let out = folder.path().join("adapter");
        potstill_shared::durable::create_folder(&out).unwrap();
        learner.lora().unwrap().write_adapter(&out, learner.variables(), "base").unwrap();
        let tensors =
            candle_core::safetensors::load(out.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].dims(), [4, 56]);
    }
    let lora = LoraConfig { targets: vec!["query".to_owned()], ..LoraConfig::default() };
    let refused = Learner::new(&model, &RunConfig { lora: Some(lora), ..run_config() }, &[]).err().unwrap();
    assert!(refused.to_string().contains("no module `query`"), "{refused}");
}

/// Three replicas that divide every step train like one. They also resume bit for bit.
#[test]
fn several_devices_train_like_one() {
    let run = |devices: usize| RunConfig { devices: vec!["cpu".to_owned(); devices], ..run_config() };
    let (model, pairs) = preference_pairs();
    let lora = LoraConfig { rank: 4, ..LoraConfig::default() };
    for lora in [None, Some(lora)] {
        let trained = |devices: usize, folder: &std::path::Path, observe: StepObserver<'_>| {
            let run = RunConfig { lora: lora.clone(), ..run(devices) };
            dpo(
                &model,
                &pairs,
                &DpoConfig { learning_rate: 1e-4, run, ..DpoConfig::default() },
                folder,
                observe,
            )
        };
        let entries = |devices: usize| {
            let (folder, mut entries) = (tempfile::tempdir().unwrap(), Vec::new());
            let mut keep = |progress: &Progress<'_>| {
                entries.push((progress.entry.loss, progress.entry.grad_norm, progress.tokens));
                true
            };
            trained(devices, folder.path(), &mut keep).unwrap();
            entries
        };
        let (alone, together) = (entries(1), entries(3));
        assert_eq!(alone.len(), together.len());
        for (one, three) in alone.iter().zip(&together) {
            let near = |a: f64, b: f64| (a - b).abs() < 1e-3 * a.abs();
            assert!(near(one.0, three.0) && near(one.1, three.1) && one.2 == three.2, "{one:?} {three:?}");
        }
        assert_resumes_bit_for_bit(&|folder, observe| {
            let (learner, report) = trained(3, folder, observe)?;
            Ok((learner.trained_model()?, report))
        });
    }
    let (model, prompts, config) = grpo_setup();
    let config = GrpoConfig { updates: 2, run: RunConfig { checkpoint_every: 3, ..run(3) }, ..config };
    assert_resumes_bit_for_bit(&|folder, observe| {
        let (learner, report) = grpo(&model, &prompts, &RewardFunction::default(), &config, folder, observe)?;
        Ok((learner.trained_model()?, report))
    });
    let refused = Learner::new(&model, &RunConfig { devices: vec!["gpu".to_owned()], ..run_config() }, &[]);
    assert!(refused.err().unwrap().to_string().contains("`cpu`, `cuda` or `cuda:N`"));
}

/// A step with one example leaves two of three devices without a micro batch. All replicas stay equal nevertheless.
#[test]
fn device_without_a_micro_batch_applies_the_update() {
    let (model, examples) = model();
    let config = RunConfig { devices: vec!["cpu".to_owned(); 3], ..run_config() };
    let mut learner = Learner::new(&model, &config, &[]).unwrap();
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    for step in [&[0usize][..], &[1, 2, 3, 4], &[5, 6]] {
        let losses = learner
            .map_micro_batches(step, &lengths, 1 << 20, |replica, micro| {
                let rows = micro.iter().map(|&index| &examples[index]);
                let loss = sft_loss(&replica.lm, rows, 10.0)?;
                replica.lm.backward(&loss)?;
                Ok((micro.to_vec(), replica.rank))
            })
            .unwrap();
        let shared: Vec<usize> = losses.iter().flat_map(|(micro, _)| micro.clone()).collect();
        assert_eq!(shared, step, "in order, each once");
        assert!(losses.iter().enumerate().all(|(at, (_, rank))| *rank == at % 3));
        assert!(learner.optimizer_step(1e-3).unwrap() > 0.0);
    }
    let copies: Vec<_> = learner.inference_models().iter().map(tensor_bits).collect();
    assert!(copies[0] == copies[1] && copies[0] == copies[2], "the copies differ");
    assert!(copies[0] != tensor_bits(&model), "nothing moved");
}

/// 8-bit moments lower the loss like 32-bit ones, make the checkpoint smaller, and resume bit for bit.
#[test]
fn eight_bit_moments_train_like_32_bit_ones() {
    let (model, pairs) = preference_pairs();
    let last_loss = |eight_bit_moments: bool, folder: &std::path::Path| {
        let run = RunConfig { eight_bit_moments, ..run_config() };
        let config = DpoConfig { learning_rate: 1e-3, epochs: 4.0, nll: 1.0, run, ..DpoConfig::default() };
        let mut entries = Vec::new();
        dpo(&model, &pairs, &config, folder, &mut |progress| {
            entries.push(progress.entry.loss);
            true
        })
        .unwrap();
        if eight_bit_moments {
            assert_resumes_bit_for_bit(&|folder, observe| {
                let (learner, report) = dpo(&model, &pairs, &config, folder, observe)?;
                Ok((learner.trained_model()?, report))
            });
        }
        (entries[0], *entries.last().unwrap())
    };
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (first, exact) = last_loss(false, folders[0].path());
    let (_, eight) = last_loss(true, folders[1].path());
    assert!((eight - exact).abs() < 0.05 * (first - exact), "from {first} to {exact} and {eight}");
    let size = |folder: &tempfile::TempDir| {
        let newest = std::fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.path());
        let newest = newest.filter(|path| path.join("optimizer.safetensors").exists()).max().unwrap();
        std::fs::metadata(newest.join("optimizer.safetensors")).unwrap().len()
    };
    assert!(3 * size(&folders[1]) < size(&folders[0]), "a quarter, and names");
}
