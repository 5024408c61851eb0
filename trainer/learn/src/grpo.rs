//! Group relative policy optimization (Shao et al. 2024, equation 3) with the rewards of "Thinking with DistilQwen".
//!
//! Per step the current model samples a group of completions for every prompt. Their rewards ([`crate::rewards`]),
//! centered within the group, are the advantages `A`. The loss per token, with `r = exp(log π - log π_old)`, is `L =
//! -min(r A, clip(r, 1 - ε_low, 1 + ε_high) A) + β (exp(d) - d - 1)`. `d = log π₀ - log π` compares with the starting
//! model `π₀`; the last term is the k3 estimate of the KL divergence.
//!
//! Two defaults follow DAPO: a higher upper clip, and equal weight for all tokens. Truncated completions are masked
//! out.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::ops::log_prob::{linear_log_prob, mean_entropy};
use potstill_verify::verifier::{Reference, Verifier};
use serde::{Deserialize, Serialize};

use crate::curriculum::Phase;
use crate::error::LearnError;
use crate::examples::Example;
use crate::learner::Learner;
use crate::reward_model::RewardModel;
use crate::rewards::{RewardTerms, ScoreInterval, advantages, combine_rewards, is_well_formed};
use crate::rollouts::{Completion, RolloutEngines, RolloutParams};
use crate::run::{
    PlannedPhase, RunConfig, RunReport, StepObserver, StepOutcome, plan_steps, run_hash, run_plan,
    tokens_hash,
};
use crate::sft::LossRows;

/// Weights of tokens in completions of different length (TRL: `loss_type`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// Every token of the step has equal weight (DAPO; TRL: `dapo`).
    #[default]
    Token,
    /// Every completion has equal weight (DeepSeekMath; TRL: `grpo`).
    Sequence,
    /// Every token has equal weight, normalized by `max_tokens` instead of the actual length (Dr. GRPO; TRL:
    /// `dr_grpo`).
    Limit,
}

/// Settings of GRPO.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Prompts per step.
    pub prompts: usize,
    /// Number of passes over the prompts.
    pub epochs: f64,
    /// Completions per prompt, at least 2 (TRL: `num_generations`).
    pub group: usize,
    /// Optimizer steps per batch of rollouts (TRL: `num_iterations`).
    pub updates: usize,
    /// Sampling temperature, above 0 and at most 2.
    pub temperature: f64,
    /// Nucleus sampling: probability mass of the tokens to sample from, above 0 and at most 1.
    pub top_p: f64,
    /// Maximum number of new tokens per completion.
    pub max_tokens: usize,
    /// Lower clipping range of the probability ratio, 0 to 1 (TRL: `epsilon`).
    pub clip_low: f64,
    /// Upper clipping range of the probability ratio, at least 0 (TRL: `epsilon_high`).
    pub clip_high: f64,
    /// Weight of the KL divergence from the starting model (TRL: `beta`). With 0 no reference model is kept in memory.
    pub kl: f64,
    /// Whether advantages are divided by the standard deviation of their group (TRL: `scale_rewards`).
    pub by_deviation: bool,
    /// Weights of tokens in completions of different length.
    pub weighting: LossType,
    /// Whether truncated completions count in the loss (the opposite of TRL's `mask_truncated_completions`).
    pub learn_truncated: bool,
    /// Maximum fraction of truncated completions, 0 to 1, as mean of the last ten steps. Above it the run stops.
    pub max_truncated: f64,
    /// Interval without penalty for RV, on the reward model's scale of 0 to 1. Needs an RV reward model.
    pub rv: ScoreInterval,
    /// Interval without penalty for CD, on the reward model's scale of 0 to 1. Needs a CD reward model.
    pub cd: ScoreInterval,
    /// Whether RV and CD penalties apply to correct answers only.
    pub style_if_correct: bool,
    /// Settings of the training loop; `batch_tokens` is ignored.
    pub run: RunConfig,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-6,
            prompts: 16,
            epochs: 1.0,
            group: 8,
            updates: 1,
            temperature: 1.0,
            top_p: 1.0,
            max_tokens: 8192,
            clip_low: 0.2,
            clip_high: 0.28,
            kl: 0.001,
            by_deviation: true,
            weighting: LossType::Token,
            learn_truncated: false,
            max_truncated: 0.5,
            rv: ScoreInterval::default(),
            cd: ScoreInterval::default(),
            style_if_correct: false,
            run: RunConfig { weight_decay: 0.0, checkpoint_every: 20, ..RunConfig::default() },
        }
    }
}

impl GrpoConfig {
    /// Returns one message per invalid setting; empty if all are valid.
    pub fn validation_errors(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut need = |fine: bool, problem: &str| {
            if !fine {
                problems.push(problem.to_owned());
            }
        };
        need(self.group >= 2, "`group` must be at least 2: advantages are differences within a group");
        need(self.prompts >= 1 && self.updates >= 1, "`prompts` and `updates` must be at least 1");
        need(self.max_tokens >= 1, "`max_tokens` must be at least 1");
        need(
            self.temperature > 0.0 && self.temperature <= 2.0,
            "`temperature` must be above 0 and at most 2",
        );
        need(self.top_p > 0.0 && self.top_p <= 1.0, "`top_p` must be above 0 and at most 1");
        need(
            (0.0..1.0).contains(&self.clip_low) && self.clip_high >= 0.0,
            "`clip_low` must be 0 to 1, `clip_high` at least 0",
        );
        need(self.kl >= 0.0, "`kl` must be at least 0");
        need(
            self.rv.is_valid() && self.cd.is_valid(),
            "`rv` and `cd` need 0 <= low <= high <= 1 and lambda >= 0",
        );
        need((0.0..=1.0).contains(&self.max_truncated), "`max_truncated` must be 0 to 1");
        problems
    }
}

/// A training prompt with its reference answer.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Text of the problem, as reward models read it.
    pub problem: String,
    /// Token ids of the rendered prompt, up to the start of the completion.
    pub tokens: Vec<u32>,
    /// Whether the prompt ends inside an open `<think>` block.
    pub starts_in_think: bool,
    /// Reference answer or tests for the verifier.
    pub reference: Reference,
}

/// Computes rewards: rules for format and accuracy, and optional reward models for RV and CD.
#[derive(Default)]
pub struct RewardFunction {
    /// Decides whether an answer is correct.
    pub verifier: Verifier,
    /// Predicts reasoning verbosity, 0 to 1.
    pub rv: Option<RewardModel>,
    /// Predicts cognitive difficulty, 0 to 1.
    pub cd: Option<RewardModel>,
}

impl RewardFunction {
    /// Returns one reward per completion, in the same order. A truncated completion gets 0 for format and accuracy.
    /// Fails if the sandbox for programs cannot run.
    pub fn score(
        &self,
        completions: &[(&Prompt, &Completion)],
        config: &GrpoConfig,
    ) -> Result<Vec<RewardTerms>, LearnError> {
        let texts: Vec<String> = completions
            .iter()
            .map(|(prompt, completion)| {
                let opened = prompt.starts_in_think && !completion.text.trim_start().starts_with("<think>");
                format!("{}{}", if opened { "<think>" } else { "" }, completion.text)
            })
            .collect();
        let predict = |model: &Option<RewardModel>| -> Result<Option<Vec<f32>>, LearnError> {
            let Some(model) = model else { return Ok(None) };
            let rows = completions
                .iter()
                .zip(&texts)
                .map(|((prompt, _), text)| RewardModel::encode(model.model(), &prompt.problem, text))
                .collect::<Result<Vec<_>, _>>()?;
            model.predict(&rows, config.run.micro_batch_tokens).map(Some)
        };
        let (rv, cd) = (predict(&self.rv)?, predict(&self.cd)?);
        let mut rewards = Vec::with_capacity(completions.len());
        for (index, ((prompt, completion), text)) in completions.iter().zip(&texts).enumerate() {
            let verdict = self
                .verifier
                .verify(&prompt.reference, text)
                .map_err(|error| LearnError::Data(format!("cannot judge a program: {error}")))?;
            let correct = verdict.correct == Some(true) && !completion.is_truncated;
            let scored = |values: &Option<Vec<f32>>, interval| {
                values.as_ref().map(|values| (f64::from(values[index]), interval))
            };
            let formed = is_well_formed(text, false) && !completion.is_truncated;
            rewards.push(combine_rewards(
                formed,
                correct,
                scored(&rv, config.rv),
                scored(&cd, config.cd),
                config.style_if_correct,
            ));
        }
        Ok(rewards)
    }
}

/// The rollouts of one step with their advantages.
struct RolloutBatch {
    rollout: usize,
    examples: Vec<Example>,
    advantages: Vec<f64>,
    /// Weight of each token of a completion in the loss, per completion; 0 masks the completion out.
    weights: Vec<f64>,
    /// `log π_old` of the completions' tokens, per completion. Only present with several updates per rollout.
    old: Option<Vec<Vec<f32>>>,
    /// `log π₀` of the completions' tokens, per completion. Only present with a KL term.
    reference: Option<Vec<Vec<f32>>>,
    metrics: BTreeMap<String, f64>,
    /// One problem with a completion and its reward, for display.
    sample: Option<String>,
}

/// Trains a copy of `model` on `prompts`. Checkpoints and logs go to `folder`.
///
/// Prompts without room for `max_tokens` new tokens are dropped. Fails if fewer than `config.prompts` remain or a
/// setting is invalid. Stops with [`LearnError::Truncated`] if too many completions are truncated.
pub fn grpo(
    model: &LoadedModel,
    prompts: &[Prompt],
    rewards: &RewardFunction,
    config: &GrpoConfig,
    folder: &Path,
    observe: StepObserver<'_>,
) -> Result<(Learner, RunReport), LearnError> {
    let problems = config.validation_errors();
    if !problems.is_empty() {
        return Err(LearnError::Data(problems.join("; ")));
    }
    let room = model.config.max_positions.min(config.run.max_length);
    let fits = |prompt: &Prompt| prompt.tokens.len() + config.max_tokens <= room;
    let usable: Vec<usize> = (0..prompts.len()).filter(|&index| fits(&prompts[index])).collect();
    let too_long = prompts.len() - usable.len();
    if usable.len() < config.prompts {
        return Err(LearnError::Data(format!(
            "{} of {} prompts leave room for {} new tokens in a context of {room}; a step needs {}",
            usable.len(),
            prompts.len(),
            config.max_tokens,
            config.prompts
        )));
    }
    let phase = Phase {
        name: "grpo".to_owned(),
        examples: usable,
        epochs: config.epochs,
        learning_rate: config.learning_rate,
    };
    let plan = plan_rollout_steps(phase, prompts.len(), config);
    let mut parts =
        vec![format!("grpo {:?}", GrpoConfig { run: config.run.without_devices(), ..config.clone() })];
    for prompt in prompts {
        parts.push(tokens_hash(&prompt.tokens));
        parts.push(format!("{:?}", prompt.reference));
    }
    for reward_model in [&rewards.rv, &rewards.cd] {
        parts.push(match reward_model {
            Some(reward_model) => run_hash(reward_model.model(), Vec::new())?,
            None => "none".to_owned(),
        });
    }
    let hash = run_hash(model, parts)?;
    // Checkpoints fall between rollouts: after an update, the rollouts of a half-used step cannot be sampled again.
    let settings =
        RunConfig { checkpoint_every: config.run.checkpoint_every * config.updates, ..config.run.clone() };
    let mut learner = Learner::new(model, &settings, &[])?;
    let rollouts = RolloutEngines::start(&learner.inference_models(), config.prompts * config.group)?;
    let reference =
        if config.kl > 0.0 { Some(learner.reference_models(model, config.run.dtype)?) } else { None };
    let mut experience: Option<RolloutBatch> = None;
    let mut truncated = std::collections::VecDeque::new();
    let mut gradients = |learner: &Learner, step: usize, items: &[usize]| {
        let rollout = step / config.updates;
        if experience.as_ref().is_none_or(|held| held.rollout != rollout) {
            let asked: Vec<&Prompt> = items.iter().map(|&index| &prompts[index]).collect();
            let mut fresh = collect_rollouts(&rollouts, rollout, &asked, rewards, config)?;
            if let Some(frozen) = &reference {
                fresh.reference = Some(token_log_probs(learner, Some(frozen), &fresh.examples, config)?);
            }
            if config.updates > 1 {
                fresh.old = Some(token_log_probs(learner, None, &fresh.examples, config)?);
            }
            truncated.push_back(fresh.metrics["completions/truncated"]);
            if truncated.len() > 10 {
                truncated.pop_front();
            }
            let share = truncated.iter().sum::<f64>() / truncated.len() as f64;
            if truncated.len() == 10 && share > config.max_truncated {
                return Err(LearnError::Truncated { share, limit: config.max_tokens });
            }
            experience = Some(fresh);
        }
        match &experience {
            Some(experience) => accumulate_policy_gradients(learner, experience, config),
            None => Ok(StepOutcome::default()),
        }
    };
    let mut seen = 0;
    let mut whole_steps = |progress: &crate::run::Progress<'_>| {
        seen = progress.entry.step;
        observe(progress) || !seen.is_multiple_of(config.updates)
    };
    let report = run_plan(&mut learner, &plan, &settings, hash, folder, &mut gradients, &mut whole_steps)?;
    Ok((learner, RunReport { examples: prompts.len() - too_long, too_long, ..report }))
}

/// Returns steps of exactly `config.prompts` prompts, each repeated `config.updates` times. The rest of an epoch that
/// does not fill a step is dropped.
fn plan_rollout_steps(phase: Phase, count: usize, config: &GrpoConfig) -> Vec<PlannedPhase> {
    let run = RunConfig { batch_tokens: config.prompts, max_steps: 0, ..config.run.clone() };
    let mut planned = plan_steps(&[phase], &vec![1; count], usize::MAX, &run);
    for phase in &mut planned {
        phase.steps.retain(|step| step.len() == config.prompts);
        if config.run.max_steps > 0 {
            phase.steps.truncate(config.run.max_steps);
        }
        phase.steps =
            phase.steps.iter().flat_map(|step| std::iter::repeat_n(step.clone(), config.updates)).collect();
    }
    planned
}

/// Samples and scores the completions of one step, and computes advantages, token weights and metrics.
fn collect_rollouts(
    rollouts: &RolloutEngines,
    rollout: usize,
    prompts: &[&Prompt],
    rewards: &RewardFunction,
    config: &GrpoConfig,
) -> Result<RolloutBatch, LearnError> {
    let draw = RolloutParams {
        group: config.group,
        temperature: config.temperature,
        top_p: config.top_p,
        max_tokens: config.max_tokens,
    };
    let asked: Vec<&[u32]> = prompts.iter().map(|prompt| prompt.tokens.as_slice()).collect();
    let groups = rollouts.sample(&asked, draw, &format!("{}/{rollout}", config.run.seed))?;
    let pairs: Vec<(&Prompt, &Completion)> = prompts
        .iter()
        .zip(&groups)
        .flat_map(|(prompt, group)| group.iter().map(move |one| (*prompt, one)))
        .collect();
    let scored = rewards.score(&pairs, config)?;
    let mut all_advantages = Vec::with_capacity(pairs.len());
    let (mut same, mut deviation) = (0, 0.0);
    for group in scored.chunks(config.group) {
        let totals: Vec<f64> = group.iter().map(|reward| reward.total).collect();
        let mean = totals.iter().sum::<f64>() / totals.len() as f64;
        deviation += (totals.iter().map(|total| (total - mean).powi(2)).sum::<f64>()
            / (totals.len() - 1) as f64)
            .sqrt();
        all_advantages.extend(advantages(&totals, config.by_deviation).unwrap_or_else(|| {
            same += 1;
            vec![0.0; totals.len()]
        }));
    }
    let learnt = |completion: &Completion| config.learn_truncated || !completion.is_truncated;
    let used: Vec<bool> = pairs.iter().map(|(_, completion)| learnt(completion)).collect();
    let sequences = used.iter().filter(|used| **used).count().max(1) as f64;
    let tokens: usize =
        pairs.iter().zip(&used).filter(|(_, used)| **used).map(|((_, one), _)| one.tokens.len()).sum();
    let weights = pairs.iter().zip(&used).map(|((_, completion), used)| match (used, config.weighting) {
        (false, _) => 0.0,
        (true, LossType::Token) => 1.0 / tokens.max(1) as f64,
        (true, LossType::Sequence) => 1.0 / (sequences * completion.tokens.len() as f64),
        (true, LossType::Limit) => 1.0 / (sequences * config.max_tokens as f64),
    });
    let n = pairs.len() as f64;
    let mean = |value: &dyn Fn(usize) -> f64| (0..pairs.len()).map(value).sum::<f64>() / n;
    let metrics = [
        ("reward", mean(&|i| scored[i].total)),
        ("reward/deviation", deviation / groups.len() as f64),
        ("reward/format", mean(&|i| scored[i].format)),
        ("reward/accuracy", mean(&|i| scored[i].accuracy)),
        ("reward/rv", mean(&|i| scored[i].rv)),
        ("reward/cd", mean(&|i| scored[i].cd)),
        ("groups/same_reward", f64::from(same) / groups.len() as f64),
        ("completions/tokens", mean(&|i| pairs[i].1.tokens.len() as f64)),
        ("completions/truncated", mean(&|i| if pairs[i].1.is_truncated { 1.0 } else { 0.0 })),
    ];
    Ok(RolloutBatch {
        rollout,
        examples: pairs.iter().map(|(prompt, completion)| completion.to_example(&prompt.tokens)).collect(),
        weights: weights.collect(),
        advantages: all_advantages,
        old: None,
        reference: None,
        sample: pairs.first().map(|(prompt, completion)| {
            format!("{}\n\n{}\n\n{:?}", prompt.problem, completion.text, scored[0])
        }),
        metrics: metrics.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
    })
}

/// Returns the log probabilities of the completions' tokens at the sampling temperature, per completion, without
/// gradient. Uses the reference models `beside` if given, else the learner's current weights.
fn token_log_probs(
    learner: &Learner,
    beside: Option<&[CausalLm]>,
    examples: &[Example],
    config: &GrpoConfig,
) -> Result<Vec<Vec<f32>>, LearnError> {
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    let order: Vec<usize> = (0..examples.len()).collect();
    let parts =
        learner.map_micro_batches(&order, &lengths, config.run.micro_batch_tokens, |replica, micro| {
            let lm = beside.map_or(&replica.lm, |beside| &beside[replica.rank]);
            let learnt = LossRows::new(micro.iter().map(|&index| &examples[index]));
            let hidden = (learnt.hidden_states(lm)?.detach() / config.temperature)?;
            let head = lm.lm_head()?.detach();
            let values =
                linear_log_prob(&hidden, &head, &learnt.targets, lm.precision())?.to_vec1::<f32>()?;
            let mut rest = values.as_slice();
            let mut by_example = Vec::with_capacity(micro.len());
            for count in learnt.counts {
                let (own, more) = rest.split_at(count);
                by_example.push(own.to_vec());
                rest = more;
            }
            Ok(by_example)
        })?;
    Ok(parts.concat())
}

/// Accumulates the policy gradient of one step. Completions with zero weight are skipped, and without a KL term also
/// those with zero advantage.
fn accumulate_policy_gradients(
    learner: &Learner,
    experience: &RolloutBatch,
    config: &GrpoConfig,
) -> Result<StepOutcome, LearnError> {
    let mut outcome = StepOutcome {
        metrics: experience.metrics.clone(),
        sample: experience.sample.clone(),
        ..StepOutcome::default()
    };
    let counts = |index: &usize| {
        experience.weights[*index] > 0.0 && (experience.advantages[*index] != 0.0 || config.kl > 0.0)
    };
    let used: Vec<usize> = (0..experience.examples.len()).filter(counts).collect();
    outcome.skip_update = used.is_empty();
    let lengths: Vec<usize> = experience.examples.iter().map(|example| example.tokens.len()).collect();
    let parts =
        learner.map_micro_batches(&used, &lengths, config.run.micro_batch_tokens, |replica, micro| {
            let learnt = LossRows::new(micro.iter().map(|&index| &experience.examples[index]));
            let hidden = (learnt.hidden_states(&replica.lm)? / config.temperature)?;
            let (head, precision) = (replica.lm.lm_head()?, replica.lm.precision());
            let log_probs = linear_log_prob(&hidden, head, &learnt.targets, precision)?;
            let gather = |rows: &Option<Vec<Vec<f32>>>| -> Result<Option<Tensor>, LearnError> {
                let Some(rows) = rows else { return Ok(None) };
                let values: Vec<f32> = micro.iter().flat_map(|&index| rows[index].iter().copied()).collect();
                Ok(Some(Tensor::from_vec(values, log_probs.dim(0)?, log_probs.device())?))
            };
            let spread = |values: &[f64]| -> Result<Tensor, LearnError> {
                let each = micro.iter().zip(&learnt.counts);
                let values: Vec<f32> = each
                    .flat_map(|(&index, &count)| std::iter::repeat_n(values[index] as f32, count))
                    .collect();
                Ok(Tensor::from_vec(values, log_probs.dim(0)?, log_probs.device())?)
            };
            let old = gather(&experience.old)?.unwrap_or_else(|| log_probs.detach());
            let reference = gather(&experience.reference)?;
            let part = policy_loss(
                &log_probs,
                &old,
                reference.as_ref(),
                &spread(&experience.advantages)?,
                &spread(&experience.weights)?,
                config,
            )?;
            let rows = learnt.targets.len() as f64;
            let entropy = rows * mean_entropy(&hidden, head, precision)?;
            replica.lm.backward(&part.loss)?;
            Ok([f64::from(part.loss.to_scalar::<f32>()?), rows, entropy, part.kl_sum, part.clipped_tokens])
        })?;
    let sum = |which: usize| parts.iter().map(|part| part[which]).sum::<f64>();
    outcome.loss = sum(0);
    outcome.tokens = used.iter().map(|&index| lengths[index]).sum();
    for (which, name) in [(2, "policy/entropy"), (3, "policy/kl"), (4, "policy/clipped")] {
        outcome.metrics.insert(name.to_owned(), sum(which) / sum(1).max(1.0));
    }
    Ok(outcome)
}

/// Loss of some tokens, with statistics.
pub struct PolicyLoss {
    /// Weighted sum of the token losses, a scalar with gradient.
    pub loss: Tensor,
    /// Sum of the k3 estimates over the tokens, without weights.
    pub kl_sum: f64,
    /// Number of tokens whose gradient is cut off by the clip.
    pub clipped_tokens: f64,
}

/// Computes the loss of the module's documentation. All tensors have shape `[tokens]`; the result is the sum weighted
/// by `weights`.
pub fn policy_loss(
    log_probs: &Tensor,
    old: &Tensor,
    reference: Option<&Tensor>,
    advantages: &Tensor,
    weights: &Tensor,
    config: &GrpoConfig,
) -> Result<PolicyLoss, LearnError> {
    let ratio = (log_probs - old)?.exp()?;
    let bound = |value: f64| ratio.ones_like()?.affine(value, 0.0);
    let inside = ratio.maximum(&bound(1.0 - config.clip_low)?)?.minimum(&bound(1.0 + config.clip_high)?)?;
    let (free, held) = ((&ratio * advantages)?, (inside * advantages)?);
    let gain = free.minimum(&held)?;
    let cut = held.lt(&free)?.to_dtype(candle_core::DType::F32)?.sum_all()?;
    let mut loss = gain.neg()?;
    let mut kl = 0.0;
    if let Some(reference) = reference {
        let d = (reference - log_probs)?;
        let k3 = ((d.exp()? - &d)? - 1.0)?;
        kl = f64::from(k3.detach().sum_all()?.to_scalar::<f32>()?);
        loss = (loss + (k3 * config.kl)?)?;
    }
    Ok(PolicyLoss {
        loss: (loss * weights)?.sum_all()?,
        kl_sum: kl,
        clipped_tokens: f64::from(cut.to_scalar::<f32>()?),
    })
}
