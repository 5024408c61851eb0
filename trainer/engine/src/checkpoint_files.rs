//! Writes model folders that Hugging Face transformers, vLLM and this engine can load.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use potstill_shared::durable::{DurableError, write_file};
use serde_json::json;

use crate::error::EngineError;
use crate::loader::LoadedModel;

/// Writes `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`,
/// `chat_template.jinja` and `model.safetensors` (in `dtype`). The folder must exist;
/// `durable::publish_folder` then publishes the folder.
pub fn write_model(folder: &Path, model: &LoadedModel, dtype: DType) -> Result<(), EngineError> {
    let json = |name: &str, value: serde_json::Value| -> Result<(), DurableError> {
        write_file(&folder.join(name), format!("{value:#}\n").as_bytes())
    };
    let mut config = model.config.to_json();
    config["torch_dtype"] = json!(match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    });
    if model.config.num_labels > 0 {
        // transformers reads a classifier's output at the last token that is not padding, so the padding
        // token must never end a row. Without a padding token, transformers reads the last token and
        // accepts only single rows.
        let padding = ["<|endoftext|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"];
        let padding = padding.into_iter().filter(|token| *token != model.chat_template.eos_token());
        config["pad_token_id"] = json!(padding.filter_map(|token| model.tokenizer.token_id(token)).next());
    }
    json("config.json", config)?;
    json(
        "generation_config.json",
        json!({ "eos_token_id": model.config.eos_token_ids, "bos_token_id": model.config.bos_token_id }),
    )?;
    write_file(&folder.join("tokenizer.json"), model.tokenizer.to_json()?.as_bytes())?;
    let bos = Some(model.chat_template.bos_token()).filter(|text| !text.is_empty());
    json(
        "tokenizer_config.json",
        json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": model.chat_template.eos_token(),
            "model_max_length": model.config.max_positions,
            "chat_template": model.chat_template.source(),
        }),
    )?;
    write_file(&folder.join("chat_template.jinja"), model.chat_template.source().as_bytes())?;
    let tensors: HashMap<String, Tensor> = model
        .weights
        .iter()
        .map(|(name, tensor)| {
            Ok((name.clone(), tensor.to_dtype(dtype)?.to_device(&candle_core::Device::Cpu)?))
        })
        .collect::<Result<_, EngineError>>()?;
    write_tensors(&folder.join("model.safetensors"), &tensors)
}

/// Writes one safetensors file with the metadata `format: pt`, which transformers requires.
pub fn write_tensors(path: &Path, tensors: &HashMap<String, Tensor>) -> Result<(), EngineError> {
    let mark = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(tensors, Some(mark))
        .map_err(|error| EngineError::malformed(path, error.to_string()))?;
    Ok(write_file(path, &bytes)?)
}
