//! Matrix products with the shapes of a 135M model on one thread: our 8-bit kernels against candle's Q8_0,
//! and our bf16 against f32. The candidates of a row run in turn, and the fastest round of each counts.
//! Ratios are stable where absolute times are not.
//!
//!     cargo bench -p potstill-engine
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints what it found")]

use std::time::Instant;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use potstill_engine::device;
use potstill_engine::ops::Precision;
use potstill_engine::ops::linear::linear;
use potstill_engine::ops::packed::QuantizedMatrix;

/// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 15;

/// Returns the seconds of each candidate's fastest round.
fn fastest<const N: usize>(mut work: [&mut dyn FnMut(); N]) -> [f64; N] {
    let mut best = [f64::INFINITY; N];
    for _ in 0..ROUNDS {
        for (best, work) in best.iter_mut().zip(&mut work) {
            let begin = Instant::now();
            work();
            *best = best.min(begin.elapsed().as_secs_f64());
        }
    }
    best
}

fn main() {
    device::set_threads(1);
    // A pool of one thread limits candle's own products to one thread as well.
    device::run_in_pool(|| {
        let tensor =
            |rows: usize, columns: usize| Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap();
        println!(
            "GFLOP/s at one thread            eight bits   candle Q8_0  ratio |     bf16       f32  ratio"
        );
        for (out, inner) in [(576, 576), (1536, 576), (576, 1536), (49_152, 576)] {
            let weight = tensor(out, inner);
            let packed = QuantizedMatrix::quantize_int8(&weight).unwrap().unwrap();
            let peer = QMatMul::from_qtensor(QTensor::quantize(&weight, GgmlDType::Q8_0).unwrap()).unwrap();
            for rows in [1, 8, 16, 128, 512] {
                if rows * out > 1 << 23 {
                    continue;
                }
                let x = tensor(rows, inner);
                let [eight, candle, bf16, f32] = fastest([
                    &mut || drop(packed.forward(&x).unwrap()),
                    &mut || drop(peer.forward(&x).unwrap()),
                    &mut || drop(linear(&x, &weight, Precision::Bf16).unwrap()),
                    &mut || drop(linear(&x, &weight, Precision::F32).unwrap()),
                ]);
                let speed = |seconds: f64| 2e-9 * (rows * out * inner) as f64 / seconds;
                println!(
                    "{:<32} {:>10.0}  {:>12.0}  {:>5.2} | {:>8.0}  {:>8.0}  {:>5.2}",
                    format!("{rows} x {out} x {inner}"),
                    speed(eight),
                    speed(candle),
                    candle / eight,
                    speed(bf16),
                    speed(f32),
                    f32 / bf16
                );
            }
        }
    });
}
