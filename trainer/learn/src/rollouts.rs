//! Rollouts: completions sampled during training by the inference engine.
//!
//! The engine shares the memory of the trained weights. An optimizer step takes effect on the next rollout without a
//! copy or reload. Scoring the completions is left to the caller.

use potstill_engine::loader::LoadedModel;
use potstill_engine::sampler::SamplingParams;
use potstill_engine::scheduler::{Engine, EngineConfig, FinishReason, Request, RequestUpdate};
use potstill_shared::id::ContentId;

use crate::error::LearnError;
use crate::examples::Example;

/// One sampled completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Generated token ids, including the end token.
    pub tokens: Vec<u32>,
    /// Decoded text.
    pub text: String,
    /// Whether the completion ended at the token limit.
    pub is_truncated: bool,
}

impl Completion {
    /// Returns prompt and completion as one training example. Only the completion's tokens count in the loss.
    pub fn to_example(&self, prompt: &[u32]) -> Example {
        let tokens = [prompt, &self.tokens].concat();
        let learnt = (0..tokens.len()).map(|at| at >= prompt.len()).collect();
        Example { tokens, loss_mask: learnt }
    }
}

/// Sampling parameters of rollouts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RolloutParams {
    /// Completions per prompt (TRL: `num_generations`).
    pub group: usize,
    /// Sampling temperature.
    pub temperature: f64,
    /// Nucleus sampling: probability mass of the tokens to sample from, 0 to 1.
    pub top_p: f64,
    /// Maximum number of new tokens per completion.
    pub max_tokens: usize,
}

/// Inference engines over a model under training, one per device.
pub struct RolloutEngines {
    engines: Vec<Engine>,
}

impl RolloutEngines {
    /// Starts one engine per model replica. Each engine accepts up to `requests` queued requests.
    pub fn start(models: &[LoadedModel], requests: usize) -> Result<Self, LearnError> {
        let config = EngineConfig { max_running: 256, max_waiting: requests, ..EngineConfig::default() };
        let engines = models.iter().map(|model| Engine::start(model, config.clone()));
        Ok(Self { engines: engines.collect::<Result<_, _>>()? })
    }

    /// Samples `draw.group` completions of every prompt and returns them in the order of `prompts`.
    ///
    /// Prompts are distributed over the engines round robin. `seed`, the prompt's index and the completion's index
    /// determine the seed of each request. All requests of an engine are submitted at once, so equal weights produce
    /// equal completions.
    pub fn sample(
        &self,
        prompts: &[&[u32]],
        draw: RolloutParams,
        seed: &str,
    ) -> Result<Vec<Vec<Completion>>, LearnError> {
        let mut requests: Vec<Vec<Request>> = self.engines.iter().map(|_| Vec::new()).collect();
        for (number, prompt) in prompts.iter().enumerate() {
            let requests = &mut requests[number % self.engines.len()];
            for sample in 0..draw.group {
                let seed = ContentId::from_parts(&[seed, &number.to_string(), &sample.to_string()]).seed();
                requests.push(Request {
                    prompt: prompt.to_vec(),
                    max_tokens: draw.max_tokens,
                    sampling: SamplingParams {
                        temperature: draw.temperature as f32,
                        top_p: draw.top_p as f32,
                        seed,
                        ..SamplingParams::default()
                    },
                    logprobs: Some(0),
                    ..Request::default()
                });
            }
        }
        let mut running = Vec::with_capacity(self.engines.len());
        for (engine, requests) in self.engines.iter().zip(requests) {
            engine.invalidate_prefix_cache();
            running.push(engine.submit_all(requests)?.into_iter());
        }
        let mut all = Vec::with_capacity(prompts.len() * draw.group);
        let engines = running.len();
        for place in 0..prompts.len() * draw.group {
            let Some(mut updates) = running[place / draw.group % engines].next() else { break };
            let mut completion = Completion { tokens: Vec::new(), text: String::new(), is_truncated: false };
            loop {
                match updates.blocking_recv() {
                    Some(RequestUpdate::Sampled(sampled)) => completion.tokens.push(sampled.token),
                    Some(RequestUpdate::Text(text)) => completion.text.push_str(&text),
                    Some(RequestUpdate::Finished { reason, .. }) => {
                        completion.is_truncated = reason == FinishReason::Length;
                        break;
                    }
                    Some(RequestUpdate::Prompt(_) | RequestUpdate::Embedding(_)) => {}
                    Some(RequestUpdate::Failed(problem)) => return Err(LearnError::Rollout(problem)),
                    None => return Err(LearnError::Rollout("the engine has stopped".to_owned())),
                }
            }
            all.push(completion);
        }
        Ok(all.chunks(draw.group).map(<[Completion]>::to_vec).collect())
    }
}
