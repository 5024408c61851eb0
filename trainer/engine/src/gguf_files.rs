//! Writes GGUF version 3 files for llama.cpp, with tokenizer and chat template, as F16, Q8_0 or the mixture
//! Q4_K_M.
//!
//! Q4_K_M follows llama.cpp's rules: the output layer and half of the value and down projections get 6
//! bits, other matrices 4. Rows not divisible by 256 get Q8_0 and Q5_0 instead. Norms and biases stay f32.
//! With importance weights from a calibration text, Q4_K and Q6_K lose least where inputs are large.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use potstill_shared::durable::write_file_with;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Family;
use crate::error::EngineError;
use crate::gguf::ROPE_FREQS_TENSOR;
use crate::loader::LoadedModel;
use crate::rope_scaling::RopeScaling;

const ALIGNMENT: usize = 32;

/// Formats of the written files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GgufFormat {
    /// 16-bit floats.
    F16,
    /// 8-bit integers with one scale per 32 weights.
    Q8_0,
    /// Mixture of 4- and 6-bit formats, about 4.8 bits per weight.
    Q4KM,
}

impl GgufFormat {
    /// Returns the name used in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q4KM => "q4_k_m",
        }
    }

    /// Returns llama.cpp's number for `general.file_type`.
    fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Q4KM => 15,
        }
    }
}

/// Importance weights: mean square of every input channel of a matrix, by Hugging Face name.
pub type ImportanceMatrix = HashMap<String, Vec<f32>>;

/// Writes `model` to `path`; `name` becomes `general.name`. `importance` guides the rounding of Q4_K and
/// Q6_K. Fails if GGUF cannot express the model.
pub fn write_gguf(
    path: &Path,
    model: &LoadedModel,
    name: &str,
    format: GgufFormat,
    importance: Option<&ImportanceMatrix>,
) -> Result<(), EngineError> {
    let header = build_metadata(path, model, name, format)?;
    let mut tensors = Vec::new();
    for (hf_name, shape) in model.config.tensor_shapes() {
        let mut tensor = model.weights.get(&hf_name)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        if model.config.family == Family::Llama {
            for (part, heads) in
                [("q_proj.weight", model.config.heads.query), ("k_proj.weight", model.config.heads.kv)]
            {
                if hf_name.ends_with(part) {
                    tensor = permute_qk_rows(&tensor, heads)?;
                }
            }
        }
        let kind =
            tensor_type(&hf_name, &shape, format, model.config.tied_embeddings, model.config.num_layers);
        let weighted = importance.and_then(|all| all.get(&hf_name)).filter(|_| uses_importance(kind));
        let quantised = match weighted {
            Some(importance) => QTensor::quantize_imatrix(&tensor.contiguous()?, importance, kind)?,
            None => QTensor::quantize(&tensor.contiguous()?, kind)?,
        };
        tensors.push((
            gguf_name(&hf_name).ok_or_else(|| missing_gguf_name(path, &hf_name))?,
            shape,
            kind,
            quantised,
        ));
    }
    if let Some(RopeScaling::Llama3 { .. }) = model.config.rope_scaling {
        let divisors = model.config.frequency_divisors();
        let shape = vec![divisors.len()];
        let tensor = QTensor::quantize(&Tensor::new(divisors, &Device::Cpu)?, GgmlDType::F32)?;
        tensors.push((ROPE_FREQS_TENSOR.to_owned(), shape, GgmlDType::F32, tensor));
    }
    let data: Vec<_> =
        tensors.iter().map(|(.., tensor)| tensor.data()).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(write_file_with(path, |file| {
        file.write_all(b"GGUF")?;
        file.write_all(&3u32.to_le_bytes())?;
        file.write_all(&(tensors.len() as u64).to_le_bytes())?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        let mut written = 24;
        for (key, value) in &header {
            let mut bytes = Vec::new();
            write_string(&mut bytes, key);
            bytes.extend_from_slice(&value.type_id().to_le_bytes());
            value.write(&mut bytes);
            written += bytes.len();
            file.write_all(&bytes)?;
        }
        let mut offset = 0;
        for ((name, shape, kind, _), data) in tensors.iter().zip(&data) {
            let mut bytes = Vec::new();
            write_string(&mut bytes, name);
            bytes.extend_from_slice(&(shape.len() as u32).to_le_bytes());
            // GGUF lists the innermost dimension first.
            shape.iter().rev().for_each(|size| bytes.extend_from_slice(&(*size as u64).to_le_bytes()));
            bytes.extend_from_slice(&ggml_type_id(*kind).to_le_bytes());
            bytes.extend_from_slice(&(offset as u64).to_le_bytes());
            offset += data.len().next_multiple_of(ALIGNMENT);
            written += bytes.len();
            file.write_all(&bytes)?;
        }
        write_padding(file, written)?;
        data.iter().try_for_each(|data| {
            file.write_all(data)?;
            write_padding(file, data.len())
        })
    })?)
}

/// Writes zeros up to the next multiple of [`ALIGNMENT`] after `written` bytes.
fn write_padding(file: &mut impl Write, written: usize) -> io::Result<()> {
    file.write_all(&[0; ALIGNMENT][..written.next_multiple_of(ALIGNMENT) - written])
}

fn missing_gguf_name(path: &Path, name: &str) -> EngineError {
    EngineError::malformed(path, format!("tensor `{name}` has no name in GGUF"))
}

/// Returns whether quantization to `kind` uses importance weights.
fn uses_importance(kind: GgmlDType) -> bool {
    matches!(kind, GgmlDType::Q4K | GgmlDType::Q6K)
}

/// Returns ggml's number of a tensor type.
fn ggml_type_id(kind: GgmlDType) -> u32 {
    match kind {
        GgmlDType::F16 => 1,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q4K => 12,
        GgmlDType::Q6K => 14,
        _ => 0,
    }
}

/// Returns the type of a tensor in a file of `format`, by llama.cpp's rules.
fn tensor_type(name: &str, shape: &[usize], format: GgufFormat, tied: bool, layers: usize) -> GgmlDType {
    let [_, inner] = shape else { return GgmlDType::F32 };
    let fit = |wanted: GgmlDType, instead: GgmlDType, last: GgmlDType| {
        if inner.is_multiple_of(wanted.block_size()) {
            wanted
        } else if inner.is_multiple_of(instead.block_size()) {
            instead
        } else {
            last
        }
    };
    match format {
        GgufFormat::F16 => GgmlDType::F16,
        GgufFormat::Q8_0 => fit(GgmlDType::Q8_0, GgmlDType::Q8_0, GgmlDType::F16),
        GgufFormat::Q4KM => {
            let layer = name.split('.').nth(2).and_then(|layer| layer.parse::<usize>().ok()).unwrap_or(0);
            let (first, last) = (layers / 8, 7 * layers / 8);
            let finer = layer < first || layer >= last || (layer - first) % 3 == 2;
            let six = match name {
                "lm_head.weight" => true,
                "model.embed_tokens.weight" => tied,
                _ => finer && (name.contains("v_proj") || name.contains("down_proj")),
            };
            if six {
                fit(GgmlDType::Q6K, GgmlDType::Q8_0, GgmlDType::F16)
            } else {
                fit(GgmlDType::Q4K, GgmlDType::Q5_0, GgmlDType::F16)
            }
        }
    }
}

/// Returns the GGUF name of a tensor, or `None` if GGUF has none.
fn gguf_name(name: &str) -> Option<String> {
    Some(match name {
        "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
        "model.norm.weight" => "output_norm.weight".to_owned(),
        "lm_head.weight" => "output.weight".to_owned(),
        _ => {
            let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let (part, kind) = rest.rsplit_once('.')?;
            let part = match part {
                "input_layernorm" => "attn_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.q_norm" => "attn_q_norm",
                "self_attn.k_norm" => "attn_k_norm",
                "self_attn.o_proj" => "attn_output",
                "post_attention_layernorm" => "ffn_norm",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                _ => return None,
            };
            format!("blk.{layer}.{part}.{kind}")
        }
    })
}

/// Reorders rows from `[head][half][pair]` to `[head][pair][half]`, the order of llama.cpp's rotary kernel.
fn permute_qk_rows(tensor: &Tensor, heads: usize) -> Result<Tensor, EngineError> {
    let (rows, columns) = tensor.dims2()?;
    let half = rows / heads / 2;
    Ok(tensor.reshape((heads, 2, half, columns))?.transpose(1, 2)?.contiguous()?.reshape((rows, columns))?)
}

/// A metadata value.
enum MetadataValue {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Integers(Vec<i32>),
    Texts(Vec<String>),
}

/// Appends a GGUF string: its length as `u64`, then the bytes.
fn write_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

impl MetadataValue {
    /// Returns GGUF's number of the value type.
    fn type_id(&self) -> u32 {
        match self {
            Self::U32(_) => 4,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::Text(_) => 8,
            Self::Integers(_) | Self::Texts(_) => 9,
        }
    }

    fn write(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::U32(value) => bytes.extend_from_slice(&value.to_le_bytes()),
            Self::F32(value) => bytes.extend_from_slice(&value.to_le_bytes()),
            Self::Bool(value) => bytes.push(u8::from(*value)),
            Self::Text(value) => write_string(bytes, value),
            Self::Integers(list) => {
                bytes.extend_from_slice(&5u32.to_le_bytes());
                bytes.extend_from_slice(&(list.len() as u64).to_le_bytes());
                list.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
            }
            Self::Texts(list) => {
                bytes.extend_from_slice(&8u32.to_le_bytes());
                bytes.extend_from_slice(&(list.len() as u64).to_le_bytes());
                list.iter().for_each(|value| write_string(bytes, value));
            }
        }
    }
}

/// Returns all metadata of the file in order. Fails if GGUF cannot express tokenizer or rotary scaling.
fn build_metadata(
    path: &Path,
    model: &LoadedModel,
    name: &str,
    format: GgufFormat,
) -> Result<Vec<(String, MetadataValue)>, EngineError> {
    let config = &model.config;
    let family = config.family.name();
    let mut all: Vec<(String, MetadataValue)> = Vec::new();
    let mut put = |key: &str, value: MetadataValue| all.push((key.replace("{arch}", family), value));
    put("general.architecture", MetadataValue::Text(family.to_owned()));
    put("general.name", MetadataValue::Text(name.to_owned()));
    put("general.file_type", MetadataValue::U32(format.file_type()));
    put("general.quantization_version", MetadataValue::U32(2));
    put("{arch}.block_count", MetadataValue::U32(config.num_layers as u32));
    put("{arch}.context_length", MetadataValue::U32(config.max_positions as u32));
    put("{arch}.embedding_length", MetadataValue::U32(config.hidden_size as u32));
    put("{arch}.feed_forward_length", MetadataValue::U32(config.intermediate_size as u32));
    put("{arch}.attention.head_count", MetadataValue::U32(config.heads.query as u32));
    put("{arch}.attention.head_count_kv", MetadataValue::U32(config.heads.kv as u32));
    put("{arch}.attention.key_length", MetadataValue::U32(config.heads.dim as u32));
    put("{arch}.attention.value_length", MetadataValue::U32(config.heads.dim as u32));
    put("{arch}.rope.dimension_count", MetadataValue::U32(config.heads.dim as u32));
    put("{arch}.rope.freq_base", MetadataValue::F32(config.rope_theta));
    put("{arch}.attention.layer_norm_rms_epsilon", MetadataValue::F32(config.rms_norm_eps as f32));
    match &config.rope_scaling {
        None => {}
        Some(RopeScaling::Linear { factor }) => {
            put("{arch}.rope.scaling.type", MetadataValue::Text("linear".to_owned()));
            put("{arch}.rope.scaling.factor", MetadataValue::F32(*factor));
        }
        Some(scaling @ RopeScaling::Yarn { factor, original_max_position_embeddings: original, .. }) => {
            if !scaling.has_yarn_defaults() {
                let problem = "this rope scaling has no form in GGUF: `yarn` with the numbers of the paper; export a safetensors \
                               folder instead";
                return Err(EngineError::malformed(path, problem));
            }
            put("{arch}.rope.scaling.type", MetadataValue::Text("yarn".to_owned()));
            put("{arch}.rope.scaling.factor", MetadataValue::F32(*factor));
            put("{arch}.rope.scaling.original_context_length", MetadataValue::U32(*original as u32));
        }
        Some(scaling @ RopeScaling::Llama3 { factor, original_max_position_embeddings: original, .. }) => {
            // Readers derive the factor from the slowest frequency.
            let most = config.frequency_divisors().into_iter().fold(0.0, f32::max);
            let plain = *scaling == RopeScaling::llama3_defaults(*factor, *original)
                && (most - factor).abs() <= 1e-3 * factor;
            if config.family != Family::Llama || !plain {
                let problem = "this rope scaling has no form in GGUF: `llama3` of a Llama, with bounds of 1 and 4, where the slowest \
                               frequency is divided by the whole factor; export a safetensors folder instead";
                return Err(EngineError::malformed(path, problem));
            }
            put("{arch}.rope.scaling.original_context_length", MetadataValue::U32(*original as u32));
        }
    }
    put("{arch}.vocab_size", MetadataValue::U32(config.vocab_size as u32));
    let words = GgufVocabulary::from_tokenizer(path, model)?;
    put("tokenizer.ggml.model", MetadataValue::Text("gpt2".to_owned()));
    put("tokenizer.ggml.pre", MetadataValue::Text(words.pre.to_owned()));
    put("tokenizer.ggml.tokens", MetadataValue::Texts(words.tokens));
    put("tokenizer.ggml.token_type", MetadataValue::Integers(words.kinds));
    put("tokenizer.ggml.merges", MetadataValue::Texts(words.merges));
    put("tokenizer.ggml.add_bos_token", MetadataValue::Bool(false));
    // The end token of the chat template ends a turn.
    if let Some(eos) =
        model.tokenizer.token_id(model.chat_template.eos_token()).or(config.eos_token_ids.first().copied())
    {
        put("tokenizer.ggml.eos_token_id", MetadataValue::U32(eos));
        put("tokenizer.ggml.padding_token_id", MetadataValue::U32(eos));
    }
    if let Some(bos) = config.bos_token_id {
        put("tokenizer.ggml.bos_token_id", MetadataValue::U32(bos));
    }
    put("tokenizer.chat_template", MetadataValue::Text(model.chat_template.source().to_owned()));
    Ok(all)
}

/// A byte-level BPE vocabulary in GGUF's form.
struct GgufVocabulary {
    tokens: Vec<String>,
    /// Token types: 1 normal, 3 control, 4 user-defined, 5 unused.
    kinds: Vec<i32>,
    merges: Vec<String>,
    pre: &'static str,
}

impl GgufVocabulary {
    fn from_tokenizer(path: &Path, model: &LoadedModel) -> Result<Self, EngineError> {
        let json: Value = serde_json::from_str(&model.tokenizer.to_json()?)
            .map_err(|error| EngineError::Tokenizer(error.to_string()))?;
        let kind = json["model"]["type"].as_str().unwrap_or_default();
        if kind != "BPE" || json["model"]["byte_fallback"] == Value::Bool(true) {
            let problem = format!(
                "only byte-level BPE tokenizers can be written to GGUF, this one is {kind}; export a safetensors folder instead"
            );
            return Err(EngineError::malformed(path, problem));
        }
        let size = model.config.vocab_size;
        let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
        let mut kinds = vec![5; size];
        for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
            if let Some(at) = id.as_u64().map(|id| id as usize).filter(|at| *at < size) {
                tokens[at].clone_from(token);
                kinds[at] = 1;
            }
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let at = added["id"].as_u64().map(|id| id as usize).filter(|at| *at < size);
            if let (Some(at), Some(content)) = (at, added["content"].as_str()) {
                content.clone_into(&mut tokens[at]);
                kinds[at] = if added["special"] == Value::Bool(true) { 3 } else { 4 };
            }
        }
        let merges = json["model"]["merges"].as_array().into_iter().flatten();
        let merges = merges.map(|merge| match merge {
            Value::Array(pair) => {
                pair.iter().map(|part| part.as_str().unwrap_or_default()).collect::<Vec<_>>().join(" ")
            }
            other => other.as_str().unwrap_or_default().to_owned(),
        });
        // llama.cpp's name of the pre-tokenizer, recognized by its regular expression.
        let split = json["pre_tokenizer"].to_string();
        let pre = if split.contains(r"\\p{N}{1,3}") {
            "llama-bpe"
        } else if split.contains("\"Digits\"") {
            "smollm"
        } else if split.contains(r"\\p{N}") {
            "qwen2"
        } else {
            "gpt-2"
        };
        Ok(Self { tokens, kinds, merges: merges.collect(), pre })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q4_k_m_chooses_tensor_types_like_llama_cpp() {
        let kind = |name: &str, inner: usize| tensor_type(name, &[512, inner], GgufFormat::Q4KM, true, 24);
        assert_eq!(kind("model.layers.0.self_attn.q_proj.weight", 1024), GgmlDType::Q4K);
        assert_eq!(kind("model.layers.0.self_attn.v_proj.weight", 1024), GgmlDType::Q6K);
        assert_eq!(kind("model.layers.3.mlp.down_proj.weight", 1024), GgmlDType::Q4K);
        assert_eq!(kind("model.layers.5.mlp.down_proj.weight", 1024), GgmlDType::Q6K);
        assert_eq!(kind("model.layers.23.mlp.down_proj.weight", 896), GgmlDType::Q8_0);
        assert_eq!(kind("model.layers.4.mlp.up_proj.weight", 896), GgmlDType::Q5_0);
        assert_eq!(kind("model.embed_tokens.weight", 1024), GgmlDType::Q6K);
        assert_eq!(tensor_type("model.norm.weight", &[512], GgufFormat::Q8_0, true, 24), GgmlDType::F32);
    }
}
