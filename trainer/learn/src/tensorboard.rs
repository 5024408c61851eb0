//! TensorBoard event files: each record is its length, a masked CRC-32C of the length, the record, a masked CRC-32C of
//! the record; the record is an `Event` protobuf with one scalar. Written whole from the log history, so a resumed run
//! leaves one clean file.

use std::path::Path;

use potstill_shared::durable::{DurableError, write_file};

/// One scalar at one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Scalar {
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Training step.
    pub step: u64,
    /// Name, such as `train/loss`.
    pub tag: String,
    /// Value.
    pub value: f32,
}

/// Writes the scalars as one event file.
pub fn write_events(path: &Path, scalars: &[Scalar]) -> Result<(), DurableError> {
    let mut bytes = Vec::new();
    let mut version = Vec::new();
    fixed64(&mut version, 1, scalars.first().map_or(0.0, |scalar| scalar.wall_time));
    delimited(&mut version, 3, b"brain.Event:2");
    record(&mut bytes, &version);
    for scalar in scalars {
        let mut value = Vec::new();
        delimited(&mut value, 1, scalar.tag.as_bytes());
        value.push(2 << 3 | 5);
        value.extend_from_slice(&scalar.value.to_le_bytes());
        let mut summary = Vec::new();
        delimited(&mut summary, 1, &value);
        let mut event = Vec::new();
        fixed64(&mut event, 1, scalar.wall_time);
        event.push(2 << 3);
        varint(&mut event, scalar.step);
        delimited(&mut event, 5, &summary);
        record(&mut bytes, &event);
    }
    write_file(path, &bytes)
}

fn record(out: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked_crc(&length).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked_crc(data).to_le_bytes());
}

fn fixed64(out: &mut Vec<u8>, field: u8, value: f64) {
    out.push(field << 3 | 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn delimited(out: &mut Vec<u8>, field: u8, data: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, data.len() as u64);
    out.extend_from_slice(data);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// CRC-32C (Castagnoli), bit by bit: event files are small.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_crc32c() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
