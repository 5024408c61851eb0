//! Keys and values of one sequence, layer by layer.

use candle_core::Tensor;

use crate::error::EngineError;
use crate::ops::attention::{Heads, cached, plain};

/// Grows by the rows of each forward pass. On the CPU a plain vector per layer, elsewhere a tensor.
#[derive(Debug, Default)]
pub struct KvCache {
    layers: Vec<Layer>,
    len: usize,
}

#[derive(Debug)]
enum Layer {
    Host { k: Vec<f32>, v: Vec<f32> },
    Device { k: Tensor, v: Tensor },
}

impl KvCache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was computed yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Called once per forward pass, after all layers.
    pub(crate) fn advance(&mut self, rows: usize) {
        self.len += rows;
    }

    /// Appends the rows' keys and values to `layer` and writes the rows' attention to `out` (host only).
    pub(crate) fn attend_host(
        &mut self,
        layer: usize,
        [q, k, v]: [&[f32]; 3],
        heads: Heads,
        out: &mut [f32],
    ) -> Result<(), EngineError> {
        if self.layers.len() == layer {
            self.layers.push(Layer::Host { k: Vec::new(), v: Vec::new() });
        }
        let Some(Layer::Host { k: keys, v: values }) = self.layers.get_mut(layer) else {
            return Err(EngineError::Stopped("a cache moved between devices".to_owned()));
        };
        keys.extend_from_slice(k);
        values.extend_from_slice(v);
        cached(q, keys, values, heads, self.len, out);
        Ok(())
    }

    /// The same for tensors on any device.
    pub(crate) fn attend_device(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: Heads,
    ) -> Result<Tensor, EngineError> {
        let (k, v) = match self.layers.get(layer) {
            Some(Layer::Device { k: keys, v: values }) => {
                (Tensor::cat(&[keys, k], 0)?, Tensor::cat(&[values, v], 0)?)
            }
            _ => (k.clone(), v.clone()),
        };
        let out = plain(q, &k, &v, heads, self.len)?;
        let entry = Layer::Device { k, v };
        if layer < self.layers.len() {
            self.layers[layer] = entry;
        } else {
            self.layers.push(entry);
        }
        Ok(out)
    }
}
