//! Compares every fused operation with its plain form: values and gradients on random shapes.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use potstill_engine::ops::Precision;
use potstill_engine::ops::attention::{
    AttentionHeads, Segment, attention, reference_attention as plain_attention,
};
use potstill_engine::ops::linear::{FrozenWeight, linear, lora_linear, reference_lora_linear};
use potstill_engine::ops::linear_loss::{
    linear_cross_entropy, reference_cross_entropy as plain_cross_entropy,
};
use potstill_engine::ops::log_prob::{linear_log_prob, mean_entropy, reference_log_prob as plain_log_prob};
use potstill_engine::ops::rms_norm::{reference_rms_norm as plain_rms_norm, rms_norm};
use potstill_engine::ops::rope::RotaryTables;
use potstill_engine::ops::swiglu::{reference_swiglu as plain_swiglu, swiglu};
use proptest::prelude::*;

fn random(shape: &[usize], seed: u64) -> Var {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Compares the values, and the gradients of a randomly weighted sum of the outputs.
fn same(inputs: &[&Var], fused: &Tensor, plain: &Tensor) {
    same_at(1.0, inputs, fused, plain);
}

/// Like [`same`], for gradients that are differences of terms as large as `terms`. The rounding errors of
/// the terms remain after they cancel.
fn same_at(terms: f32, inputs: &[&Var], fused: &Tensor, plain: &Tensor) {
    close("value", 1.0, fused, plain);
    let weighting = random(fused.dims(), 99);
    let gradients =
        |out: &Tensor| (out * weighting.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let (ours, reference) = (gradients(fused), gradients(plain));
    for (i, input) in inputs.iter().enumerate() {
        close(&format!("gradient {i}"), terms, ours.get(input).unwrap(), reference.get(input).unwrap());
    }
}

fn close(what: &str, terms: f32, a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let (difference, size) = (largest(&(a - b).unwrap()), largest(b).max(terms).max(1.0));
    assert!(difference <= 2e-5 * size, "{what} differs by {difference} at size {size}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn rms_norm_matches_plain_form(rows in 1usize..300, d in 1usize..70, seed: u64) {
        let (x, w) = (random(&[rows, d], seed), random(&[d], seed ^ 1));
        let (normed, plain) = (rms_norm(&x, &w, 1e-6).unwrap(), plain_rms_norm(&x, &w, 1e-6).unwrap());
        // The gradient of x / rms is a difference of terms of size 1 / rms, with weights of at most 2 x 2.
        let rms = x.sqr().unwrap().mean(1).unwrap().sqrt().unwrap();
        same_at(4.0 * largest(&rms.recip().unwrap().minimum(1e3).unwrap()), &[&x, &w], &normed, &plain);
    }

    #[test]
    fn swiglu_matches_plain_form(rows in 1usize..300, d in 1usize..70, seed: u64) {
        let (gate, up) = (random(&[rows, d], seed), random(&[rows, d], seed ^ 1));
        same(&[&gate, &up], &swiglu(&gate, &up).unwrap(), &plain_swiglu(&gate, &up).unwrap());
    }

    #[test]
    fn linear_matches_plain_form(rows in 1usize..80, inner in 1usize..40, out in 1usize..40, seed: u64) {
        let (x, w) = (random(&[rows, inner], seed), random(&[out, inner], seed ^ 1));
        same(&[&x, &w], &linear(&x, &w, Precision::F32).unwrap(), &x.matmul(&w.t().unwrap()).unwrap());
    }

    #[test]
    fn adapted_linear_matches_plain_form(rows in 1usize..60, blocks in 1usize..3, out in 1usize..40, rank in 1usize..6, quantised: bool, seed: u64) {
        let inner = 32 * blocks;
        let (x, a, b) = (random(&[rows, inner], seed), random(&[rank, inner], seed ^ 1), random(&[out, rank], seed ^ 2));
        let w = random(&[out, inner], seed ^ 3).as_detached_tensor();
        let w = if quantised {
            FrozenWeight::Quantised(Arc::new(QTensor::quantize(&w, GgmlDType::Q8_0).unwrap()))
        } else {
            FrozenWeight::Dense(w)
        };
        let (fused, plain) = (lora_linear(&x, &w, &a, &b, 0.5, Precision::F32).unwrap(), reference_lora_linear(&x, &w, &a, &b, 0.5).unwrap());
        same(&[&x, &a, &b], &fused, &plain);
    }

    #[test]
    fn log_probs_match_plain_form(rows in 1usize..100, d in 1usize..40, vocabulary in 2usize..90, seed: u64) {
        let (h, w) = (random(&[rows, d], seed), random(&[vocabulary, d], seed ^ 1));
        let targets: Vec<u32> = (0..rows as u32).map(|i| (i * 13 + 5) % vocabulary as u32).collect();
        same(&[&h, &w], &linear_log_prob(&h, &w, &targets, Precision::F32).unwrap(), &plain_log_prob(&h, &w, &targets).unwrap());
    }

    #[test]
    fn rope_matches_plain_form(rows in 1usize..200, heads in 1usize..5, half in 1usize..20, magnitude in 0.5f32..2.0, seed: u64) {
        let x = random(&[rows, heads * half * 2], seed);
        let positions: Vec<u32> = (0..rows as u32).map(|i| i * 7 % 101).collect();
        let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / (1.0 + i as f32)).collect();
        let rotary = RotaryTables::new(&positions, &frequencies, magnitude);
        same(&[&x], &rotary.apply(&x).unwrap(), &rotary.apply_reference(&x).unwrap());
    }

    #[test]
    fn attention_matches_plain_form(lengths in prop::collection::vec(1usize..150, 1..4), kv in 1usize..4, group in 1usize..4, half in 1usize..12, seed: u64) {
        let heads = AttentionHeads { query: kv * group, kv, dim: half * 2 };
        let rows: usize = lengths.iter().sum();
        let mut start = 0;
        let segments: Vec<Segment> = lengths.iter().map(|&len| {
            let segment = Segment { start, len, past: 0 };
            start += len;
            segment
        }).collect();
        let q = random(&[rows, heads.query * heads.dim], seed);
        let (k, v) = (random(&[rows, kv * heads.dim], seed ^ 1), random(&[rows, kv * heads.dim], seed ^ 2));
        let fused = attention(&q, &k, &v, heads, &Arc::new(segments.clone()), Precision::F32).unwrap();
        let parts: Vec<Tensor> = segments.iter().map(|s| {
            let rows = |t: &Var| t.as_tensor().narrow(0, s.start, s.len).unwrap();
            plain_attention(&rows(&q), &rows(&k), &rows(&v), heads, 0).unwrap()
        }).collect();
        same(&[&q, &k, &v], &fused, &Tensor::cat(&parts, 0).unwrap());
    }

    #[test]
    fn cross_entropy_matches_plain_form(rows in 1usize..100, d in 1usize..40, vocabulary in 2usize..90, seed: u64) {
        let (h, w) = (random(&[rows, d], seed), random(&[vocabulary, d], seed ^ 1));
        let targets: Vec<u32> = (0..rows).map(|i| ((seed as usize).wrapping_add(i * 31) % vocabulary) as u32).collect();
        same(
            &[&h, &w],
            &linear_cross_entropy(&h, &w, &targets, rows as f64, Precision::F32).unwrap(),
            &plain_cross_entropy(&h, &w, &targets, rows as f64).unwrap(),
        );
    }
}

/// Rounding both factors of each product to bf16 changes values and gradients by no more than 8 significant
/// bits explain.
#[test]
fn bf16_precision_is_close_to_f32() {
    let heads = AttentionHeads { query: 4, kv: 2, dim: 16 };
    let segments =
        Arc::new(vec![Segment { start: 0, len: 90, past: 0 }, Segment { start: 90, len: 40, past: 0 }]);
    let (x, w) = (random(&[130, 64], 1), random(&[64, 64], 2));
    let (kv, head) = (random(&[130, 32], 3), random(&[500, 64], 4));
    let targets: Vec<u32> = (0..130).map(|row| row * 37 % 500).collect();
    let run = |precision| {
        let q = linear(&x, &w, precision).unwrap();
        let attended = attention(&(q * 0.02).unwrap(), &kv, &kv, heads, &segments, precision).unwrap();
        let loss = linear_cross_entropy(&attended, &head, &targets, 130.0, precision).unwrap();
        let gradients = loss.backward().unwrap();
        let of = |variable: &Var| gradients.get(variable).unwrap().clone();
        (loss, [of(&x), of(&w), of(&kv), of(&head)])
    };
    let (exact, rounded) = (run(Precision::F32), run(Precision::Bf16));
    let size = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    assert!(size(&(&exact.0 - &rounded.0).unwrap()) < 0.01 * size(&exact.0));
    for (exact, rounded) in exact.1.iter().zip(&rounded.1) {
        let off = size(&(exact - rounded).unwrap()) / size(exact);
        assert!(off < 0.03, "{off}");
        assert!(
            Precision::Bf16.supported() == Precision::F32 || off > 0.0,
            "bf16 was asked for and not computed"
        );
    }
}

#[test]
fn cross_entropy_is_independent_of_chunking() {
    // A chunk holds 8 Mi logits; 60,000 x 300 needs several chunks.
    let (h, w) = (random(&[300, 8], 1), random(&[60_000, 8], 2));
    let targets: Vec<u32> = (0..300).map(|i| i * 197 % 60_000).collect();
    let fused = linear_cross_entropy(&h, &w, &targets, 300.0, Precision::F32).unwrap();
    close("value", 1.0, &fused, &plain_cross_entropy(&h, &w, &targets, 300.0).unwrap());
}

/// The form for other devices, tested through f64: candle operations on one chunk of logits at a time.
#[test]
fn chunked_log_probs_match_all_logits_at_once() {
    for (rows, vocabulary) in [(7, 30), (300, 60_000)] {
        let wide = |seed, shape: [usize; 2]| {
            Var::from_tensor(&random(&shape, seed).to_dtype(DType::F64).unwrap()).unwrap()
        };
        let (h, w) = (wide(1, [rows, 8]), wide(2, [vocabulary, 8]));
        let targets: Vec<u32> = (0..rows).map(|i| (i * 197 % vocabulary) as u32).collect();
        let weighting = random(&[rows], 3);
        let of = |log_probs: Tensor| {
            let log_probs = log_probs.to_dtype(DType::F32).unwrap();
            let loss = (&log_probs * weighting.as_tensor()).unwrap().sum_all().unwrap();
            let store = loss.backward().unwrap();
            let gradient = |x: &Var| store.get(x).unwrap().to_dtype(DType::F32).unwrap();
            [log_probs, gradient(&h), gradient(&w)]
        };
        let ours = of(linear_log_prob(&h, &w, &targets, Precision::F32).unwrap());
        let plain = of(plain_log_prob(&h, &w, &targets).unwrap());
        for (what, (ours, plain)) in
            ["value", "gradient of h", "gradient of w"].iter().zip(ours.iter().zip(&plain))
        {
            close(what, 1.0, ours, plain);
        }
        let narrow = |x: &Var| x.to_dtype(DType::F32).unwrap();
        let entropy = mean_entropy(&h, &w, Precision::F32).unwrap();
        let fused = mean_entropy(&narrow(&h), &narrow(&w), Precision::F32).unwrap();
        assert!((entropy - fused).abs() < 1e-4 * fused, "entropy {entropy} against {fused}");
        let cross_entropy = |h: &Tensor, w: &Tensor| {
            let loss = linear_cross_entropy(h, w, &targets, rows as f64, Precision::F32).unwrap();
            loss.to_dtype(DType::F32).unwrap()
        };
        close("cross-entropy", 1.0, &cross_entropy(&h, &w), &cross_entropy(&narrow(&h), &narrow(&w)));
    }
}

/// The form for other devices of linear layers, with and without adapter. Frozen weights get no gradient.
#[test]
fn unfused_linear_layers_match_plain_form() {
    let wide = |seed, rows, columns| {
        Var::from_tensor(&random(&[rows, columns], seed).to_dtype(DType::F64).unwrap()).unwrap()
    };
    let (x, w, a, b) = (wide(1, 9, 12), wide(2, 7, 12), wide(3, 3, 12), wide(4, 7, 3));
    let weighting = wide(5, 9, 7);
    let frozen = FrozenWeight::Dense(w.as_detached_tensor());
    let backward = |y: &Tensor| (y * weighting.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let agree = |ours: &Tensor, plain: &Tensor, learn: &[&Var], rest: &[&Var]| {
        let near = |a: &Tensor, b: &Tensor| {
            let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(gap < 1e-9, "{gap}");
        };
        near(ours, plain);
        let (ours, plain) = (backward(ours), backward(plain));
        learn.iter().for_each(|x| near(ours.get(x).unwrap(), plain.get(x).unwrap()));
        assert!(rest.iter().all(|x| ours.get(x).is_none()), "a gradient that nobody asked for");
    };
    let product = |x: &Tensor, w: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
    let of = |x: &Tensor, w: &Tensor| linear(x, w, Precision::F32).unwrap();
    agree(&of(&x, &w), &product(&x, &w), &[&x, &w], &[]);
    agree(&of(&x, &w.as_detached_tensor()), &product(&x, &w), &[&x], &[&w]);
    agree(&of(&x.as_detached_tensor(), &w), &product(&x, &w), &[&w], &[&x]);
    let adapted = lora_linear(&x, &frozen, &a, &b, 0.5, Precision::F32).unwrap();
    agree(&adapted, &reference_lora_linear(&x, &frozen, &a, &b, 0.5).unwrap(), &[&x, &a, &b], &[&w]);
}

#[test]
fn rejects_targets_outside_the_vocabulary() {
    let (h, w) = (random(&[2, 4], 1), random(&[3, 4], 2));
    assert!(
        linear_cross_entropy(&h, &w, &[0, 3], 2.0, Precision::F32)
            .unwrap_err()
            .to_string()
            .contains("target 3")
    );
}
