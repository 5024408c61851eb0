//! Completions that a model under training writes, through the engine that serves it, over the very same weights: what the
//! optimiser changed last is what decodes next, nothing is copied or reloaded.

use potstill_engine::loader::LoadedModel;
use potstill_engine::sampler::Sampling;
use potstill_engine::scheduler::{Engine, FinishReason, Request, SchedulerConfig, Update};
use potstill_shared::id::ContentId;

use crate::error::LearnError;
use crate::examples::Example;

/// One completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Its tokens, the end token included.
    pub tokens: Vec<u32>,
    /// Its text.
    pub text: String,
    /// The limit cut it off.
    pub truncated: bool,
}

impl Completion {
    /// Prompt and completion as a row of which the completion is learnt.
    pub fn example(&self, prompt: &[u32]) -> Example {
        let tokens = [prompt, &self.tokens].concat();
        let learnt = (0..tokens.len()).map(|at| at >= prompt.len()).collect();
        Example { tokens, learnt }
    }
}

/// How completions are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Completions per prompt.
    pub group: usize,
    /// Sampling temperature.
    pub temperature: f64,
    /// Nucleus sampling.
    pub top_p: f64,
    /// Limit on new tokens.
    pub max_tokens: usize,
}

/// Running engines over a model that is being trained, one on each of its devices.
pub struct Rollouts {
    engines: Vec<Engine>,
}

impl Rollouts {
    /// Starts an engine over each copy of the model, with room for `requests` at once.
    pub fn start(models: &[LoadedModel], requests: usize) -> Result<Self, LearnError> {
        let config =
            SchedulerConfig { max_running: 256, max_waiting: requests, ..SchedulerConfig::default() };
        let engines = models.iter().map(|model| Engine::start(model, config.clone()));
        Ok(Self { engines: engines.collect::<Result<_, _>>()? })
    }

    /// `draw.group` completions of every prompt; the prompts go to the engines in turn. Seeds follow from `seed` and the place, and
    /// all requests are handed in at once, so the same weights write the same completions.
    pub fn sample(
        &self,
        prompts: &[&[u32]],
        draw: Draw,
        seed: &str,
    ) -> Result<Vec<Vec<Completion>>, LearnError> {
        let mut requests: Vec<Vec<Request>> = self.engines.iter().map(|_| Vec::new()).collect();
        for (number, prompt) in prompts.iter().enumerate() {
            let requests = &mut requests[number % self.engines.len()];
            for sample in 0..draw.group {
                let seed = ContentId::of(&[seed, &number.to_string(), &sample.to_string()]).seed();
                requests.push(Request {
                    prompt: prompt.to_vec(),
                    max_tokens: draw.max_tokens,
                    sampling: Sampling {
                        temperature: draw.temperature as f32,
                        top_p: draw.top_p as f32,
                        seed,
                        ..Sampling::default()
                    },
                    log_probs: Some(0),
                    ..Request::default()
                });
            }
        }
        let mut running = Vec::with_capacity(self.engines.len());
        for (engine, requests) in self.engines.iter().zip(requests) {
            engine.forget();
            running.push(engine.submit_all(requests)?.into_iter());
        }
        let mut all = Vec::with_capacity(prompts.len() * draw.group);
        let engines = running.len();
        for place in 0..prompts.len() * draw.group {
            let Some(mut updates) = running[place / draw.group % engines].next() else { break };
            let mut completion = Completion { tokens: Vec::new(), text: String::new(), truncated: false };
            loop {
                match updates.blocking_recv() {
                    Some(Update::Sampled(sampled)) => completion.tokens.push(sampled.token),
                    Some(Update::Text(text)) => completion.text.push_str(&text),
                    Some(Update::Finished { reason, .. }) => {
                        completion.truncated = reason == FinishReason::Length;
                        break;
                    }
                    Some(Update::Prompt(_) | Update::Embedding(_)) => {}
                    Some(Update::Failed(problem)) => return Err(LearnError::Rollout(problem)),
                    None => return Err(LearnError::Rollout("the engine has stopped".to_owned())),
                }
            }
            all.push(completion);
        }
        Ok(all.chunks(draw.group).map(<[Completion]>::to_vec).collect())
    }
}
