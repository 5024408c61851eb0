//! Reads 4-bit blocks of GGUF files (ggml's `block_q4_0`, `block_q4_1` and `block_q4_K`) without rounding
//! to 8 bits. Only the products of Q4_K's scales, 17 bits long, are rounded to f16 afterwards.

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::ops::packed::{BLOCK_WEIGHTS, Int4Block};

/// Decodes the bytes of whole rows into blocks of 32 weights in column order. Returns `None` for formats
/// other than Q4_0, Q4_1 and Q4_K.
pub(crate) fn decode_int4_blocks(
    kind: GgmlDType,
    bytes: &[u8],
) -> Option<Box<dyn Iterator<Item = Int4Block> + '_>> {
    let blocks = bytes.chunks_exact(kind.type_size());
    Some(match kind {
        GgmlDType::Q4_0 => Box::new(blocks.map(|block| {
            let scale = read_f16(block, 0);
            Int4Block { scale, least: -8.0 * scale, values: unpack_nibbles(&block[2..]) }
        })),
        GgmlDType::Q4_1 => Box::new(blocks.map(|block| Int4Block {
            scale: read_f16(block, 0),
            least: read_f16(block, 2),
            values: unpack_nibbles(&block[4..]),
        })),
        GgmlDType::Q4K => Box::new(blocks.flat_map(decode_q4_k)),
        _ => return None,
    })
}

fn read_f16(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Unpacks 16 bytes: the low nibbles are the first 16 weights, the high nibbles the others.
fn unpack_nibbles(bytes: &[u8]) -> [u8; BLOCK_WEIGHTS] {
    std::array::from_fn(|at| bytes[at % 16] >> (4 * (at / 16)) & 15)
}

/// Decodes a Q4_K super-block of 256 weights. Two f16 factors come first, one for the scales and one for
/// the minimums. Then 12 bytes hold a 6-bit scale and a 6-bit minimum for each of eight blocks. Each
/// pair of blocks shares 32 bytes of weights: the low nibbles and the high nibbles.
fn decode_q4_k(bytes: &[u8]) -> impl Iterator<Item = Int4Block> + '_ {
    let (scale, least) = (read_f16(bytes, 0), read_f16(bytes, 2));
    let (numbers, weights) = bytes[4..].split_at(12);
    (0..8).map(move |at| {
        // The first four blocks have contiguous six bits. The others take four bits from their own byte and
        // two from the top of earlier bytes.
        let [of_scale, of_least] = if at < 4 {
            [numbers[at] & 63, numbers[at + 4] & 63]
        } else {
            let (low, high) = (numbers[at + 4], [numbers[at - 4], numbers[at]]);
            [low & 15 | high[0] >> 6 << 4, low >> 4 | high[1] >> 6 << 4]
        };
        let bytes = &weights[at / 2 * BLOCK_WEIGHTS..][..BLOCK_WEIGHTS];
        Int4Block {
            scale: scale * f32::from(of_scale),
            least: -least * f32::from(of_least),
            values: std::array::from_fn(|column| bytes[column] >> (4 * (at % 2)) & 15),
        }
    })
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::ops::packed::QuantizedMatrix;

    /// Each block equals candle's dequantization of the same bytes.
    #[test]
    fn four_bit_blocks_match_candle_dequantization() {
        let values: Vec<f32> = (0..6 * 512).map(|at| ((at * 7919) % 1009) as f32 / 504.0 - 0.8).collect();
        let tensor = Tensor::from_vec(values, (6, 512), &Device::Cpu).unwrap();
        for kind in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q4K] {
            let quantised = QTensor::quantize(&tensor, kind).unwrap();
            let expected =
                quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let bytes = quantised.data().unwrap();
            let found: Vec<f32> = decode_int4_blocks(kind, &bytes)
                .unwrap()
                .flat_map(|block| block.values.map(|value| f32::from(value) * block.scale + block.least))
                .collect();
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-5, "{kind:?}: {found} {expected}");
            }
            let row = |row: usize| {
                decode_int4_blocks(kind, &bytes[row * bytes.len() / 6..][..bytes.len() / 6]).unwrap()
            };
            let packed = QuantizedMatrix::from_int4_blocks(6, 512, row).unwrap().unwrap();
            let kept = packed
                .lookup_rows(&[0, 1, 2, 3, 4, 5])
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            // The values reach from -0.8 to 1.2, so neither part of a value exceeds 2.
            let bound = if kind == GgmlDType::Q4K { 2.0 * 2f32.powi(-11) } else { 1e-6 };
            for (kept, expected) in kept.iter().zip(&expected) {
                assert!((kept - expected).abs() < bound, "{kind:?}: {kept} {expected}");
            }
        }
        assert!(decode_int4_blocks(GgmlDType::Q8_0, &[]).is_none());
    }
}
