//! Loads a model from a Hugging Face folder (`config.json`, `tokenizer.json`, `*.safetensors`) or a GGUF
//! file. Tensors are read one by one and moved to their device and data type before the next is read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use serde::Deserialize;
use serde_json::Value;

use crate::config::{Family, ModelConfig, OneOrMany};
use crate::device::compute_type;
use crate::error::EngineError;
use crate::gguf::Gguf;
use crate::ops::packed::is_fast;
use crate::shard::Shard;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::weights::{Gathered, Keep, Weights};

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
    pub template: Arc<ChatTemplate>,
    /// Whether the serving engine may round matrices to 8 bits: the file is quantized already, or 8 bits
    /// were requested.
    pub quantised: bool,
}

impl LoadedModel {
    /// Returns the model with its weights on `device` in `dtype`. Tensors that are there already are
    /// shared.
    pub fn on(&self, device: &Device, dtype: DType) -> Result<Self, EngineError> {
        Ok(Self { weights: self.weights.to(device, dtype)?, ..self.clone() })
    }
}

/// Loads a model from `path`, with the weights on `device` in `dtype`.
pub fn load(path: &Path, device: &Device, dtype: DType) -> Result<LoadedModel, EngineError> {
    from(path, Keep { device: device.clone(), dtype, eight_bits: false }, false)
}

/// Loads a model for serving only. On a single CPU, quantized tensors of a GGUF file are quantized while
/// reading, or with `eight_bits` all matrices: 4-bit data stays 4-bit, all else becomes 8-bit. Without fast
/// kernels only `eight_bits` has this effect. For several devices the weights stay on the CPU in the
/// devices' data type; [`crate::sharded`] then quantizes each shard. Fails for `eight_bits` on a GPU.
pub fn load_to_serve(path: &Path, devices: &[Device], eight_bits: bool) -> Result<LoadedModel, EngineError> {
    if eight_bits && devices.iter().any(|device| !device.is_cpu()) {
        let (expected, found) = ("`cpu`, where matrices are to have eight bits", "a GPU".to_owned());
        return Err(EngineError::Parameter { name: "device", expected, found });
    }
    let (device, packs) = match devices {
        [only] => (only, only.is_cpu() && (eight_bits || is_fast())),
        _ => (&Device::Cpu, false),
    };
    let dtype = devices.first().map_or(DType::F32, compute_type);
    let model = from(path, Keep { device: device.clone(), dtype, eight_bits: packs }, eight_bits)?;
    Ok(LoadedModel { quantised: model.quantised || eight_bits, ..model })
}

/// Loads a folder or a GGUF file. If `keep` permits, quantizes the tensors that are quantized in the file,
/// or `all`.
fn from(path: &Path, keep: Keep, all: bool) -> Result<LoadedModel, EngineError> {
    if path.is_dir() {
        from_folder(path, keep, all)
    } else if path.extension().is_some_and(|extension| extension == "gguf") {
        from_gguf(path, keep, all)
    } else {
        Err(EngineError::malformed(path, "neither a model folder nor a `.gguf` file"))
    }
}

fn read(path: &Path) -> Result<String, EngineError> {
    std::fs::read_to_string(path).map_err(|source| EngineError::Read { path: path.to_owned(), source })
}

fn read_if_there(path: &Path) -> Result<Option<String>, EngineError> {
    if path.exists() { read(path).map(Some) } else { Ok(None) }
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
fn token_text(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn parse<T: for<'de> Deserialize<'de>>(text: &str, path: &Path) -> Result<T, EngineError> {
    serde_json::from_str(text).map_err(|error| EngineError::malformed(path, error.to_string()))
}

fn from_folder(folder: &Path, mut keep: Keep, all: bool) -> Result<LoadedModel, EngineError> {
    let config_path = folder.join("config.json");
    let mut config = ModelConfig::from_json(&read(&config_path)?, &config_path)?;
    if let (Family::Foreign(family), true) = (config.family, all) {
        let problem =
            "its matrices cannot be packed to eight bits: its decoder is not defined here".to_owned();
        return Err(EngineError::Foreign { family: family.name(), problem });
    }
    let tokenizer_path = folder.join("tokenizer.json");
    let tokenizer = Tokenizer::from_json(&read(&tokenizer_path)?, &tokenizer_path)?;
    if tokenizer.len() > config.vocab_size {
        return Err(EngineError::malformed(
            tokenizer_path,
            format!("{} tokens, but the embedding has {} rows", tokenizer.len(), config.vocab_size),
        ));
    }
    let path = folder.join("tokenizer_config.json");
    let names: TokenizerConfig = match read_if_there(&path)? {
        Some(text) => parse(&text, &path)?,
        None => TokenizerConfig::default(),
    };
    let path = folder.join("generation_config.json");
    let generation: GenerationConfig = match read_if_there(&path)? {
        Some(text) => parse(&text, &path)?,
        None => GenerationConfig::default(),
    };
    let eos_text = token_text(names.eos_token.as_ref());
    add_eos(&mut config, generation.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default());
    add_eos(&mut config, eos_text.as_deref().and_then(|text| tokenizer.id(text)).into_iter().collect());
    let source = read_if_there(&folder.join("chat_template.jinja"))?.or_else(|| match names.chat_template {
        Some(Value::String(text)) => Some(text),
        // A list of named templates: take the one called `default`.
        Some(Value::Array(list)) => list
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str().map(str::to_owned)),
        _ => None,
    });
    let bos_text = token_text(names.bos_token.as_ref());
    let template = template(source.as_deref(), bos_text, eos_text, &tokenizer, &config)?;
    keep.eight_bits &= all;
    if let Some(foreign) = &config.foreign {
        keep.dtype = foreign.dtype(keep.dtype);
    }
    let mut gathered = Gathered::new(&config, keep);
    for path in shards(folder)? {
        let mut shard = Shard::open(&path)?;
        for name in shard.names() {
            if gathered.wants(&name) {
                gathered.add(name.clone(), shard.tensor(&name)?)?;
            }
        }
    }
    let weights = gathered.finish()?;
    Ok(LoadedModel { config, weights, tokenizer, template, quantised: false })
}

fn from_gguf(path: &Path, mut keep: Keep, all: bool) -> Result<LoadedModel, EngineError> {
    let mut gguf = Gguf::open(path)?;
    let mut config = gguf.config()?;
    let tokenizer = gguf.tokenizer()?;
    // Chat models end a turn with these tokens, whether or not the file names them as end tokens.
    let turn_ends = ["<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>"];
    add_eos(&mut config, turn_ends.iter().filter_map(|token| tokenizer.id(token)).collect());
    let source = gguf.chat_template().map(str::to_owned);
    let text_of = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
    let (bos, eos) = (text_of(config.bos), text_of(config.eos.first().copied()));
    let template = template(source.as_deref(), bos, eos, &tokenizer, &config)?;
    let quantised = gguf.is_quantised();
    keep.eight_bits &= quantised || all;
    let mut gathered = Gathered::new(&config, keep);
    gguf.tensors(&config, &mut gathered)?;
    let weights = gathered.finish()?;
    Ok(LoadedModel { config, weights, tokenizer, template, quantised })
}

fn add_eos(config: &mut ModelConfig, ids: Vec<u32>) {
    for id in ids {
        if !config.eos.contains(&id) {
            config.eos.push(id);
        }
    }
}

fn template(
    source: Option<&str>,
    bos: Option<String>,
    eos: Option<String>,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
) -> Result<Arc<ChatTemplate>, EngineError> {
    let text_of = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
    let bos = bos.unwrap_or_else(|| text_of(config.bos));
    let eos = eos.unwrap_or_else(|| text_of(config.eos.first().copied()));
    Ok(Arc::new(match source {
        Some(source) => ChatTemplate::new(source, &bos, &eos)?,
        None => ChatTemplate::chatml()?,
    }))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Returns the safetensors files of a folder: `model.safetensors`, or the shards listed in the index.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let index_path = folder.join("model.safetensors.index.json");
    let Some(text) = read_if_there(&index_path)? else { return Ok(vec![folder.join("model.safetensors")]) };
    let index: Index = parse(&text, &index_path)?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    if let Some(name) = names.iter().find(|name| name.contains(['/', '\\'])) {
        return Err(EngineError::malformed(index_path, format!("shard `{name}` lies outside the folder")));
    }
    Ok(names.iter().map(|name| folder.join(name)).collect())
}
