//! Writes TensorBoard event files.
//!
//! A record consists of its length, the masked CRC-32C of the length, the data, and the masked CRC-32C of the data. The
//! data is an `Event` protobuf with one scalar.
//!
//! The file is written as a whole from the log history. A resumed run therefore leaves one file without duplicates.
//! Only scalars are supported.

use std::path::Path;

use potstill_shared::durable::{DurableError, write_file};

/// One scalar at one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Scalar {
    /// Unix time in seconds.
    pub wall_time: f64,
    /// Training step.
    pub step: u64,
    /// TensorBoard tag, such as `train/loss`.
    pub tag: String,
    /// Value of the scalar.
    pub value: f32,
}

/// Writes `scalars` to `path` as one event file.
pub fn write_events(path: &Path, scalars: &[Scalar]) -> Result<(), DurableError> {
    let mut bytes = Vec::new();
    let mut version = Vec::new();
    append_fixed64(&mut version, 1, scalars.first().map_or(0.0, |scalar| scalar.wall_time));
    append_bytes(&mut version, 3, b"brain.Event:2");
    append_record(&mut bytes, &version);
    for scalar in scalars {
        let mut value = Vec::new();
        append_bytes(&mut value, 1, scalar.tag.as_bytes());
        value.push(2 << 3 | 5);
        value.extend_from_slice(&scalar.value.to_le_bytes());
        let mut summary = Vec::new();
        append_bytes(&mut summary, 1, &value);
        let mut event = Vec::new();
        append_fixed64(&mut event, 1, scalar.wall_time);
        event.push(2 << 3);
        append_varint(&mut event, scalar.step);
        append_bytes(&mut event, 5, &summary);
        append_record(&mut bytes, &event);
    }
    write_file(path, &bytes)
}

/// Appends one record with its length and checksums.
fn append_record(out: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked_crc(&length).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked_crc(data).to_le_bytes());
}

/// Appends a protobuf field of wire type 1 (64-bit): a double.
fn append_fixed64(out: &mut Vec<u8>, field: u8, value: f64) {
    out.push(field << 3 | 1);
    out.extend_from_slice(&value.to_le_bytes());
}

/// Appends a protobuf field of wire type 2 (length-delimited): bytes.
fn append_bytes(out: &mut Vec<u8>, field: u8, data: &[u8]) {
    out.push(field << 3 | 2);
    append_varint(out, data.len() as u64);
    out.extend_from_slice(data);
}

/// Appends `value` as a protobuf varint.
fn append_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Computes CRC-32C (Castagnoli) bit by bit. A lookup table is not worth its code, because event files are small.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

/// Returns the CRC-32C of `data`, masked as TFRecord files require.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_returns_the_standard_check_value() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
