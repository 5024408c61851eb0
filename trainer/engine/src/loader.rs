//! Loads a model from a Hugging Face folder (`config.json`, `tokenizer.json`, `*.safetensors`) or a GGUF
//! file. Tensors are read one by one and moved to their device and data type before the next is read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use serde::Deserialize;
use serde_json::Value;

use crate::config::{Family, ModelConfig, OneOrMany};
use crate::device::compute_dtype;
use crate::error::EngineError;
use crate::gguf::GgufFile;
use crate::ops::packed::has_fast_kernel;
use crate::shard::SafetensorsFile;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::weights::{WeightBuilder, WeightLayout, Weights};

/// A model with tokenizer and chat template.
#[derive(Clone)]
pub struct LoadedModel {
    /// Configuration; `eos` holds every token that ends a turn.
    pub config: ModelConfig,
    /// Weights of the model.
    pub weights: Weights,
    /// Tokenizer of the model.
    pub tokenizer: Tokenizer,
    /// Chat template of the model.
    pub chat_template: Arc<ChatTemplate>,
    /// Whether the serving engine may round matrices to 8 bits: the file is quantized already, or 8 bits
    /// were requested.
    pub quantized: bool,
}

impl LoadedModel {
    /// Returns the model with its weights on `device` in `dtype`. Tensors that are there already are
    /// shared.
    pub fn to_device(&self, device: &Device, dtype: DType) -> Result<Self, EngineError> {
        Ok(Self { weights: self.weights.to_device(device, dtype)?, ..self.clone() })
    }
}

/// Loads a model from `path`, with the weights on `device` in `dtype`.
pub fn load(path: &Path, device: &Device, dtype: DType) -> Result<LoadedModel, EngineError> {
    load_path(path, WeightLayout { device: device.clone(), dtype, eight_bits: false }, false)
}

/// Loads a model for serving only. On a single CPU, quantized tensors of a GGUF file are quantized while
/// reading, or with `eight_bits` all matrices: 4-bit data stays 4-bit, all else becomes 8-bit. Without fast
/// kernels only `eight_bits` has this effect. For several devices the weights stay on the CPU in the
/// devices' data type; [`crate::sharded`] then quantizes each shard. Fails for `eight_bits` on a GPU.
pub fn load_for_serving(
    path: &Path,
    devices: &[Device],
    eight_bits: bool,
) -> Result<LoadedModel, EngineError> {
    if eight_bits && devices.iter().any(|device| !device.is_cpu()) {
        let (expected, found) = ("`cpu`, where matrices are to have eight bits", "a GPU".to_owned());
        return Err(EngineError::InvalidParameter { name: "device", expected, found });
    }
    let (device, packs) = match devices {
        [only] => (only, only.is_cpu() && (eight_bits || has_fast_kernel())),
        _ => (&Device::Cpu, false),
    };
    let dtype = devices.first().map_or(DType::F32, compute_dtype);
    let model =
        load_path(path, WeightLayout { device: device.clone(), dtype, eight_bits: packs }, eight_bits)?;
    Ok(LoadedModel { quantized: model.quantized || eight_bits, ..model })
}

/// Loads a folder or a GGUF file. If `keep` permits, quantizes the tensors that are quantized in the file,
/// or `all`.
fn load_path(path: &Path, keep: WeightLayout, all: bool) -> Result<LoadedModel, EngineError> {
    if path.is_dir() {
        load_folder(path, keep, all)
    } else if path.extension().is_some_and(|extension| extension == "gguf") {
        load_gguf(path, keep, all)
    } else {
        Err(EngineError::malformed(path, "neither a model folder nor a `.gguf` file"))
    }
}

fn read_text(path: &Path) -> Result<String, EngineError> {
    std::fs::read_to_string(path).map_err(|source| EngineError::ReadFile { path: path.to_owned(), source })
}

fn read_text_if_exists(path: &Path) -> Result<Option<String>, EngineError> {
    if path.exists() { read_text(path).map(Some) } else { Ok(None) }
}

#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Value>,
    bos_token: Option<Value>,
    eos_token: Option<Value>,
}

/// The fields of `generation_config.json` that the loader uses.
#[derive(Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<OneOrMany>,
}

/// Returns the text of a special token, given as a string or as an object with `content`.
fn special_token_text(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn parse_json<T: for<'de> Deserialize<'de>>(text: &str, path: &Path) -> Result<T, EngineError> {
    serde_json::from_str(text).map_err(|error| EngineError::malformed(path, error.to_string()))
}

fn load_folder(folder: &Path, mut keep: WeightLayout, all: bool) -> Result<LoadedModel, EngineError> {
    let config_path = folder.join("config.json");
    let mut config = ModelConfig::from_json(&read_text(&config_path)?, &config_path)?;
    if let (Family::Candle(family), true) = (config.family, all) {
        let problem =
            "its matrices cannot be packed to eight bits: its decoder is not defined here".to_owned();
        return Err(EngineError::CandleFamily { family: family.name(), problem });
    }
    let tokenizer_path = folder.join("tokenizer.json");
    let tokenizer = Tokenizer::from_json(&read_text(&tokenizer_path)?, &tokenizer_path)?;
    if tokenizer.len() > config.vocab_size {
        return Err(EngineError::malformed(
            tokenizer_path,
            format!("{} tokens, but the embedding has {} rows", tokenizer.len(), config.vocab_size),
        ));
    }
    let path = folder.join("tokenizer_config.json");
    let names: TokenizerConfig = match read_text_if_exists(&path)? {
        Some(text) => parse_json(&text, &path)?,
        None => TokenizerConfig::default(),
    };
    let path = folder.join("generation_config.json");
    let generation: GenerationConfig = match read_text_if_exists(&path)? {
        Some(text) => parse_json(&text, &path)?,
        None => GenerationConfig::default(),
    };
    let eos_text = special_token_text(names.eos_token.as_ref());
    add_eos_tokens(&mut config, generation.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default());
    add_eos_tokens(
        &mut config,
        eos_text.as_deref().and_then(|text| tokenizer.token_id(text)).into_iter().collect(),
    );
    let source =
        read_text_if_exists(&folder.join("chat_template.jinja"))?.or_else(|| match names.chat_template {
            Some(Value::String(text)) => Some(text),
            // A list of named templates: take the one called `default`.
            Some(Value::Array(list)) => list
                .iter()
                .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
                .and_then(|entry| entry.get("template")?.as_str().map(str::to_owned)),
            _ => None,
        });
    let bos_text = special_token_text(names.bos_token.as_ref());
    let template = build_chat_template(source.as_deref(), bos_text, eos_text, &tokenizer, &config)?;
    keep.eight_bits &= all;
    if let Some(foreign) = &config.candle {
        keep.dtype = foreign.compute_dtype(keep.dtype);
    }
    let mut gathered = WeightBuilder::new(&config, keep);
    for path in shard_paths(folder)? {
        let mut shard = SafetensorsFile::open(&path)?;
        for name in shard.tensor_names() {
            if gathered.uses(&name) {
                gathered.add(name.clone(), shard.read_tensor(&name)?)?;
            }
        }
    }
    let weights = gathered.build()?;
    Ok(LoadedModel { config, weights, tokenizer, chat_template: template, quantized: false })
}

fn load_gguf(path: &Path, mut keep: WeightLayout, all: bool) -> Result<LoadedModel, EngineError> {
    let mut gguf = GgufFile::open(path)?;
    let mut config = gguf.config()?;
    let tokenizer = gguf.build_tokenizer()?;
    // Chat models end a turn with these tokens, whether or not the file names them as end tokens.
    let turn_ends = ["<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>"];
    add_eos_tokens(&mut config, turn_ends.iter().filter_map(|token| tokenizer.token_id(token)).collect());
    let source = gguf.chat_template().map(str::to_owned);
    let text_of = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id));
    let (bos, eos) = (text_of(config.bos_token_id), text_of(config.eos_token_ids.first().copied()));
    let template = build_chat_template(source.as_deref(), bos, eos, &tokenizer, &config)?;
    let quantised = gguf.is_quantized();
    keep.eight_bits &= quantised || all;
    let mut gathered = WeightBuilder::new(&config, keep);
    gguf.load_tensors(&config, &mut gathered)?;
    let weights = gathered.build()?;
    Ok(LoadedModel { config, weights, tokenizer, chat_template: template, quantized: quantised })
}

fn add_eos_tokens(config: &mut ModelConfig, ids: Vec<u32>) {
    for id in ids {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
}

fn build_chat_template(
    source: Option<&str>,
    bos: Option<String>,
    eos: Option<String>,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
) -> Result<Arc<ChatTemplate>, EngineError> {
    let text_of = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
    let bos = bos.unwrap_or_else(|| text_of(config.bos_token_id));
    let eos = eos.unwrap_or_else(|| text_of(config.eos_token_ids.first().copied()));
    Ok(Arc::new(match source {
        Some(source) => ChatTemplate::new(source, &bos, &eos)?,
        None => ChatTemplate::chatml()?,
    }))
}

#[derive(Deserialize)]
struct SafetensorsIndex {
    weight_map: BTreeMap<String, String>,
}

/// Returns the safetensors files of a folder: `model.safetensors`, or the shards listed in the index.
fn shard_paths(folder: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let index_path = folder.join("model.safetensors.index.json");
    let Some(text) = read_text_if_exists(&index_path)? else {
        return Ok(vec![folder.join("model.safetensors")]);
    };
    let index: SafetensorsIndex = parse_json(&text, &index_path)?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    if let Some(name) = names.iter().find(|name| name.contains(['/', '\\'])) {
        return Err(EngineError::malformed(index_path, format!("shard `{name}` lies outside the folder")));
    }
    Ok(names.iter().map(|name| folder.join(name)).collect())
}
