//! Benchmark of a training step without the model, on one thread: our losses and optimizer against the same in candle's
//! stock operations.
//!
//! Both variants run alternately, and the fastest round of each counts, because ratios are stable where times are not.
//! Whole steps are compared with PyTorch in `load-tests/peers/train.py`.
//!
//!     cargo bench -p potstill-learn
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints what it found")]

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use potstill_engine::device;
use potstill_engine::ops::{Precision, linear_loss, log_prob};
use potstill_learn::adamw::{AdamW, AdamWConfig};

/// The same allocator as in the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Rounds per comparison.
const ROUNDS: usize = 5;

/// Runs both variants alternately and prints the milliseconds of each one's fastest round, and their ratio.
fn compare(name: &str, mut ours: impl FnMut(), mut stock: impl FnMut()) {
    let mut best = [f64::INFINITY; 2];
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        ours();
        best[0] = best[0].min(begin.elapsed().as_secs_f64());
        let begin = Instant::now();
        stock();
        best[1] = best[1].min(begin.elapsed().as_secs_f64());
    }
    println!("{name:<58} {:>8.1}  {:>8.1}  {:>5.2}", 1e3 * best[0], 1e3 * best[1], best[1] / best[0]);
}

fn main() {
    device::set_threads(1);
    device::run_in_pool(|| {
        let random = |rows: usize, columns: usize| {
            Var::from_tensor(&Tensor::randn(0f32, 0.05, (rows, columns), &Device::Cpu).unwrap()).unwrap()
        };
        println!("milliseconds at one thread {:>40}  {:>8}  ratio", "ours", "stock");
        let (rows, words, width) = (512, 49_152, 576);
        let (hidden, head) = (random(rows, width), random(words, width));
        let targets: Vec<u32> = (0..rows).map(|row| (row * 7919 % words) as u32).collect();
        let back = |loss: Tensor| drop(loss.backward().unwrap());
        let n = rows as f64;
        compare(
            "loss of 512 tokens over 49,152 words, with gradients",
            || {
                let precision = Precision::F32;
                back(linear_loss::linear_cross_entropy(&hidden, &head, &targets, n, precision).unwrap());
            },
            || back(linear_loss::reference_cross_entropy(&hidden, &head, &targets, n).unwrap()),
        );
        compare(
            "log-probabilities of the same, with gradients",
            || {
                let precision = Precision::F32;
                let all = log_prob::linear_log_prob(&hidden, &head, &targets, precision).unwrap();
                back(all.sum_all().unwrap());
            },
            || back(log_prob::reference_log_prob(&hidden, &head, &targets).unwrap().sum_all().unwrap()),
        );
        let shapes = 16;
        let variables: BTreeMap<String, Var> =
            (0..shapes).map(|at| (at.to_string(), random(1536, width))).collect();
        let gradients: BTreeMap<String, Tensor> =
            (0..shapes).map(|at| (at.to_string(), random(1536, width).as_detached_tensor())).collect();
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            quantize_moments: false,
        };
        let mut ours = AdamW::new(variables.clone(), config).unwrap();
        let mut stock = StockAdamW::new(&variables);
        compare(
            "AdamW with clipping over 14 million weights",
            || {
                let norm = ours.gradient_norm(&gradients).unwrap();
                ours.step(&gradients, norm, 1e-5).unwrap();
            },
            || stock.step(&gradients, config, 1e-5),
        );
        let mut ours =
            AdamW::new(variables.clone(), AdamWConfig { quantize_moments: true, ..config }).unwrap();
        compare(
            "the same with moments of eight bits",
            || {
                let norm = ours.gradient_norm(&gradients).unwrap();
                ours.step(&gradients, norm, 1e-5).unwrap();
            },
            || stock.step(&gradients, config, 1e-5),
        );
    });
}

/// AdamW (Loshchilov and Hutter 2019) in candle's stock operations, as baseline.
struct StockAdamW {
    /// Name, weight, first and second moment of each variable.
    slots: Vec<(String, Var, Tensor, Tensor)>,
    step: i32,
}

impl StockAdamW {
    fn new(variables: &BTreeMap<String, Var>) -> Self {
        let slot = |(name, variable): (&String, &Var)| {
            let zero = variable.zeros_like().unwrap();
            (name.clone(), variable.clone(), zero.clone(), zero)
        };
        Self { slots: variables.iter().map(slot).collect(), step: 0 }
    }

    fn step(&mut self, gradients: &BTreeMap<String, Tensor>, config: AdamWConfig, lr: f64) {
        self.step += 1;
        let squares =
            gradients.values().map(|g| g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
        let clip = (config.max_grad_norm / f64::from(squares.sum::<f32>().sqrt())).min(1.0);
        let correction = |beta: f64| 1.0 - beta.powi(self.step);
        for (name, weight, m, v) in &mut self.slots {
            let gradient = (&gradients[name] * clip).unwrap();
            let moment = |old: &Tensor, beta: f64, new: &Tensor| {
                ((old * beta).unwrap() + (new * (1.0 - beta)).unwrap()).unwrap()
            };
            *m = moment(m, config.beta1, &gradient);
            *v = moment(v, config.beta2, &gradient.sqr().unwrap());
            let root = (&*v / correction(config.beta2)).unwrap().sqrt().unwrap();
            let update = (&*m / (root + config.eps).unwrap()).unwrap();
            let kept = (weight.as_tensor() * (1.0 - lr * config.weight_decay)).unwrap();
            let update = (update * (lr / correction(config.beta1))).unwrap();
            weight.set(&(kept - update).unwrap()).unwrap();
        }
    }
}
