//! Model files: error messages for damaged folders and GGUF files, round trips of writers and readers, and
//! loading for serving.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use potstill_engine::EngineError;
use potstill_engine::batch::Batch;
use potstill_engine::checkpoint_files::{write_model, write_tensors};
use potstill_engine::config::ModelConfig;
use potstill_engine::gguf_files::{GgufFormat, write_gguf};
use potstill_engine::loader::{LoadedModel, load, load_for_serving};
use potstill_engine::model::CausalLm;
use potstill_engine::ops::packed::has_fast_kernel;
use potstill_engine::weights::Weights;
use proptest::prelude::*;

fn teacher() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../recipes/demo-teacher")
}

/// Returns a copy of the demo teacher that a test may damage.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(teacher()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

/// Returns the error message of loading `folder`.
fn error_of(folder: &Path) -> String {
    load(folder, &Device::Cpu, DType::F32).err().unwrap().to_string()
}

fn tensors(folder: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap()
}

/// Changes a JSON file of a folder.
fn edit(folder: &Path, name: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join(name);
    let mut value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut value);
    potstill_shared::durable::write_file(&path, value.to_string().as_bytes()).unwrap();
}

#[test]
fn missing_tensor_error_names_tensor_and_shape() {
    let folder = copy();
    let mut all = tensors(folder.path());
    all.remove("model.layers.1.mlp.up_proj.weight");
    write_tensors(&folder.path().join("model.safetensors"), &all).unwrap();
    let error = error_of(folder.path());
    assert!(error.contains("model.layers.1.mlp.up_proj.weight") && error.contains("[384, 128]"), "{error}");
}

#[test]
fn wrong_shape_error_names_both_shapes() {
    let folder = copy();
    edit(folder.path(), "config.json", |config| config["intermediate_size"] = 400.into());
    let error = error_of(folder.path());
    assert!(
        error.contains("[128, 400]") && error.contains("[128, 384]") && error.contains("down_proj"),
        "{error}"
    );
}

#[test]
fn rejects_unknown_architectures_and_features() {
    for (key, value, word) in [
        ("model_type", serde_json::json!("mamba"), "`mamba` is not supported; supported are `qwen2`"),
        ("use_sliding_window", serde_json::json!(true), "use_sliding_window"),
        ("num_key_value_heads", serde_json::json!(3), "not a multiple"),
        ("head_dim", serde_json::json!(7), "head size 7"),
        ("vocab_size", serde_json::json!(-1), "config.json"),
        ("rope_scaling", serde_json::json!({"rope_type": "yarn"}), "yarn"),
        ("vocab_size", serde_json::json!(5), "the embedding has 5 rows"),
        ("quantization_config", serde_json::json!({"quant_method": "fp8"}), "quantization_config"),
        ("max_position_embeddings", serde_json::json!(1u64 << 40), "beyond anything"),
    ] {
        let folder = copy();
        edit(folder.path(), "config.json", |config| config[key] = value);
        let error = error_of(folder.path());
        assert!(error.contains(word), "{key}: {error}");
    }
}

#[test]
fn errors_name_missing_and_invalid_files() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = copy();
        std::fs::remove_file(folder.path().join(name)).unwrap();
        assert!(error_of(folder.path()).contains(name));
        potstill_shared::durable::write_file(&folder.path().join(name), b"\x00\xffnot this").unwrap();
        assert!(error_of(folder.path()).contains(name));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    potstill_shared::durable::write_file(&path, b"GGUF\x03\x00\x00\x00\xff\xff\xff\xff").unwrap();
    assert!(error_of(&path).contains("x.gguf"));
}

#[test]
fn written_model_loads_unchanged() {
    let model = load(&teacher(), &Device::Cpu, DType::F32).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), &model, DType::F32).unwrap();
    let again = load(folder.path(), &Device::Cpu, DType::F32).unwrap();
    assert_eq!(model.config, again.config);
    for ((name, a), (_, b)) in model.weights.iter().zip(again.weights.iter()) {
        let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() == 0.0, "{name}");
    }
    let ids = model.tokenizer.encode("A Dan has 11 cards.").unwrap();
    assert_eq!(ids, again.tokenizer.encode("A Dan has 11 cards.").unwrap());
}

/// GGUF stores the divisor of each frequency, but not the parameters of Llama 3's scaling.
#[test]
fn gguf_round_trip_keeps_rope_scaling_or_rejects_it() {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama");
    let text = std::fs::read_to_string(fixture.join("config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let stretched = |low: f64| {
        serde_json::json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": low, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})
    };
    json["rope_parameters"] = stretched(1.0);
    json["rope_theta"] = 500_000.0.into();
    let read = |json: &serde_json::Value| ModelConfig::from_json(&json.to_string(), &fixture).unwrap();
    let model = |config: ModelConfig| LoadedModel {
        weights: Weights::new(tensors(&fixture).into_iter().collect(), &config).unwrap(),
        config,
        ..teacher_of_bytes()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let written = model(read(&json));
    write_gguf(&path, &written, "x", GgufFormat::F16, None).unwrap();
    let again = load(&path, &Device::Cpu, DType::F32).unwrap();
    assert_eq!(again.config.rope_scaling, written.config.rope_scaling);
    assert_eq!(again.config.inverse_frequencies(), written.config.inverse_frequencies());
    let unstretched = ModelConfig { rope_scaling: None, ..written.config.clone() };
    assert_ne!(again.config.inverse_frequencies(), unstretched.inverse_frequencies());
    // The file stores the rows of q and k in another order; the reader restores the order.
    for (name, tensor) in written.weights.iter() {
        let off = (tensor - again.weights.get(name).unwrap()).unwrap().abs().unwrap().flatten_all().unwrap();
        let off = off.max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(off < 1e-3, "{name} is off by {off}");
    }

    // Other divisors than Llama 3's are rejected, because the model would be served with wrong positions.
    let mut bytes = std::fs::read(&path).unwrap();
    let divisors = bytes.len() - 32;
    bytes[divisors..][..4].copy_from_slice(&7f32.to_le_bytes());
    potstill_shared::durable::write_file(&path, &bytes).unwrap();
    assert!(error_of(&path).contains("rope_freqs.weight"), "{}", error_of(&path));
    let refused = |json: &serde_json::Value| {
        write_gguf(&path, &model(read(json)), "x", GgufFormat::F16, None).err().unwrap().to_string()
    };
    let mut short = json.clone();
    short["rope_theta"] = 10_000.0.into();
    assert!(refused(&short).contains("no form in GGUF"), "no frequency is divided by the whole factor");
    json["rope_parameters"] = stretched(2.0);
    assert!(refused(&json).contains("no form in GGUF"));

    // GGUF stores YaRN's parameters.
    json["rope_parameters"] =
        serde_json::json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096});
    let written = model(read(&json));
    write_gguf(&path, &written, "x", GgufFormat::F16, None).unwrap();
    let again = load(&path, &Device::Cpu, DType::F32).unwrap();
    assert_eq!(again.config.rope_scaling, written.config.rope_scaling);
    assert_eq!(again.config.max_positions, 16_384);
    // This model has a separate output layer, permuted heads and rows that do not divide into blocks.
    let served = load_for_serving(&path, &[Device::Cpu], true).unwrap();
    if has_fast_kernel() {
        let batch = Batch::new([([5u32, 9, 14, 3].as_slice(), 0)]);
        let logits = |weights: &Weights| {
            let model = CausalLm::new(&again.config, weights).unwrap();
            model.logits(&model.hidden_states(&batch).unwrap()).unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(logits(&served.weights), logits(&again.weights.quantized_to_int8().unwrap()));
    }
    // A tensor of the wrong shape is rejected before its data are read.
    let mut bytes = std::fs::read(&path).unwrap();
    let name = b"blk.0.ffn_up.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4;
    bytes[at..at + 8].copy_from_slice(&(1u64 << 62).to_le_bytes());
    bytes[at + 8..at + 16].copy_from_slice(&0u64.to_le_bytes());
    potstill_shared::durable::write_file(&path, &bytes).unwrap();
    let wrong = load_for_serving(&path, &[Device::Cpu], true).err().unwrap().to_string();
    assert!(wrong.contains("up_proj.weight` has shape"), "{wrong}");
    json["rope_parameters"]["attention_factor"] = 1.13863.into();
    write_gguf(&path, &model(read(&json)), "x", GgufFormat::F16, None).unwrap();
    json["rope_parameters"]["beta_fast"] = 16.0.into();
    assert!(refused(&json).contains("`yarn` with the numbers of the paper"));
}

/// Quantization while reading equals quantization afterwards, and no unquantized copy remains.
#[test]
fn loading_for_serving_matches_later_quantization() {
    let folder = tempfile::tempdir().unwrap();
    for (name, format) in [("q8_0", GgufFormat::Q8_0), ("q4_k_m", GgufFormat::Q4KM), ("f16", GgufFormat::F16)]
    {
        let path = folder.path().join(format!("{name}.gguf"));
        write_gguf(&path, &teacher_of_bytes(), name, format, None).unwrap();
        let dense = load(&path, &Device::Cpu, DType::F32).unwrap();
        let served = load_for_serving(&path, &[Device::Cpu], false).unwrap();
        let packed =
            if dense.quantized { dense.weights.quantized_to_int8().unwrap() } else { dense.weights.clone() };
        let tokens: Vec<u32> = (0..23).map(|at| at * 5 % 28).collect();
        let batch = Batch::new([(tokens.as_slice(), 0)]);
        let logits = |weights: &Weights| {
            let model = CausalLm::new(&dense.config, weights).unwrap();
            model.logits(&model.hidden_states(&batch).unwrap()).unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(logits(&served.weights), logits(&packed), "{name}");
        let exact = logits(&dense.weights);
        let off = logits(&served.weights).concat().into_iter().zip(exact.concat());
        let off = off.map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let most = exact.concat().into_iter().map(f32::abs).fold(0f32, f32::max);
        assert!(off < 0.05 * most, "{name}: logits of up to {most} are off by {off}");
        if dense.quantized && has_fast_kernel() {
            assert!(matrices(&dense.weights) > 0 && matrices(&served.weights) == 0, "{name}");
        }
        // On request all matrices are quantized, in any file.
        let asked = load_for_serving(&path, &[Device::Cpu], true).unwrap();
        assert_eq!(matrices(&asked.weights), 0, "{name}");
        assert!(asked.weights.trainable().unwrap_err().to_string().contains("packed to be served"));
        if has_fast_kernel() {
            assert_eq!(logits(&asked.weights), logits(&dense.weights.quantized_to_int8().unwrap()), "{name}");
        }
    }
    let folder = load_for_serving(&teacher(), &[Device::Cpu], true).unwrap();
    assert!(folder.quantized && matrices(&folder.weights) == 0);
    let foreign = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/foreign/mistral");
    let refused = load_for_serving(&foreign, &[Device::Cpu], true).err().unwrap().to_string();
    assert!(refused.contains("eight bits"), "{refused}");
}

/// 4-bit rows are not rounded again: only the activations differ from the file's exact product.
#[test]
fn loading_for_serving_keeps_four_bit_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("four.gguf");
    let model = model_of_four_bits();
    write_gguf(&path, &model, "four", GgufFormat::Q4KM, None).unwrap();
    let dense = load(&path, &Device::Cpu, DType::F32).unwrap();
    let served = load_for_serving(&path, &[Device::Cpu], true).unwrap();
    assert_eq!(matrices(&served.weights), 0);
    let eight = dense.weights.quantized_to_int8().unwrap();
    let (four, eight_bytes) = (served.weights.quantized_bytes(), eight.quantized_bytes());
    assert!(!has_fast_kernel() || four < eight_bytes * 3 / 4, "{four} bytes, {eight_bytes} with eight bits");
    let tokens: Vec<u32> = (0..150).map(|at| at * 5 % 28).collect();
    // Few rows use integer kernels; many rows use bf16 where the CPU has tiles.
    for tokens in [&tokens[..7], &tokens] {
        let batch = Batch::new([(tokens, 0)]);
        let logits = |weights: &Weights| {
            let model = CausalLm::new(&dense.config, weights).unwrap();
            model.logits(&model.hidden_states(&batch).unwrap()).unwrap().to_vec2::<f32>().unwrap().concat()
        };
        let exact = logits(&dense.weights);
        let most = exact.iter().fold(0f32, |most, logit| most.max(logit.abs()));
        let [off, off_in_eight] = [&served.weights, &eight].map(|weights| {
            let squares = logits(weights).into_iter().zip(&exact).map(|(a, b)| (a - b).powi(2));
            (squares.sum::<f32>() / exact.len() as f32).sqrt()
        });
        assert!(off < 0.01 * most, "logits of up to {most} are off by {off}");
        assert!(!has_fast_kernel() || off < 1.1 * off_in_eight, "{off}, and {off_in_eight} in eight bits");
    }
}

/// Returns the number of unquantized matrices.
fn matrices(weights: &Weights) -> usize {
    weights.iter().filter(|(_, tensor)| tensor.rank() == 2).count()
}

proptest! {
    /// Random changes of a safetensors header give an error or a model, never a panic.
    #[test]
    fn damaged_safetensors_header_never_panics(at in 0usize..4000, byte: u8, length in 0usize..200_000) {
        let folder = copy();
        let path = folder.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] = byte;
        bytes.truncate(bytes.len() - length.min(bytes.len()));
        potstill_shared::durable::write_file(&path, &bytes).unwrap();
        match load(folder.path(), &Device::Cpu, DType::F32) {
            Ok(_) | Err(EngineError::Malformed { .. } | EngineError::MissingTensor { .. } | EngineError::ShapeMismatch { .. }) => {}
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    /// Random changes of a GGUF file give an error or a model, never a panic.
    #[test]
    fn damaged_gguf_never_panics(at in 0usize..12_000, value: u64, wide: bool, four: bool, length in 0usize..400_000) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        let mut bytes = if four { gguf_of_four_bits() } else { gguf() }.clone();
        let value = value.to_le_bytes();
        bytes[at..at + if wide { 8 } else { 1 }].copy_from_slice(&value[..if wide { 8 } else { 1 }]);
        bytes.truncate(bytes.len() - length.saturating_sub(200_000));
        potstill_shared::durable::write_file(&path, &bytes).unwrap();
        let _either = load(&path, &Device::Cpu, DType::F32);
        let _either = load_for_serving(&path, &[Device::Cpu], true);
    }

    /// Random changes of the JSON files give an error or a model, never a panic.
    #[test]
    fn damaged_json_never_panics(name in 0usize..4, at in 0usize..1_000_000, with in JUNK, cut: bool) {
        let folder = copy();
        let name = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"][name];
        let path = folder.path().join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        let at = (0..=at % text.len()).rev().find(|at| text.is_char_boundary(*at)).unwrap();
        let rest = if cut { text[at..].find(',').map_or("", |comma| &text[at + comma..]) } else { &text[at..] };
        potstill_shared::durable::write_file(&path, format!("{}{with}{rest}", &text[..at]).as_bytes()).unwrap();
        if let Ok(model) = load(folder.path(), &Device::Cpu, DType::F32) {
            let _either = model.tokenizer.encode("A Dan has 11 cards.").and_then(|ids| model.tokenizer.decode(&ids));
        }
    }
}

/// Text that replaces parts of a JSON file.
const JUNK: &str = r#"[0-9\[\]{}",:.eE\\-]{0,6}|null|true|18446744073709551615|-1|1e999"#;

/// Returns the demo teacher with a byte-level tokenizer. Its own tokenizer has whole words, which GGUF
/// cannot express.
fn teacher_of_bytes() -> LoadedModel {
    let folder = copy();
    let vocabulary: serde_json::Map<_, _> = ('a'..='z')
        .chain(['Ġ', 'Ċ'])
        .zip(0..)
        .map(|(c, id)| (c.to_string(), serde_json::json!(id)))
        .collect();
    let bytes = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": bytes, "decoder": bytes,
        "post_processor": null, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}
    });
    edit(folder.path(), "tokenizer.json", |file| *file = tokenizer);
    load(folder.path(), &Device::Cpu, DType::F32).unwrap()
}

/// Returns the model of [`teacher_of_bytes`] as a Q8_0 GGUF file.
fn gguf() -> &'static Vec<u8> {
    static FILE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    FILE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let model = teacher_of_bytes();
        let path = folder.path().join("teacher.gguf");
        write_gguf(&path, &model, "teacher", GgufFormat::Q8_0, None).unwrap();
        assert_eq!(
            load(&path, &Device::Cpu, DType::F32).unwrap().weights.iter().count(),
            model.weights.iter().count()
        );
        std::fs::read(path).unwrap()
    })
}

/// Returns a random Llama with the same tokenizer and rows divisible by 256.
fn model_of_four_bits() -> LoadedModel {
    let text = r#"{"model_type": "llama", "vocab_size": 124, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": true}"#;
    let config = ModelConfig::from_json(text, Path::new("config.json")).unwrap();
    LoadedModel {
        weights: potstill_engine::init::random_weights(&config, 5).unwrap(),
        config,
        ..teacher_of_bytes()
    }
}

/// Returns the model of [`model_of_four_bits`] as a Q4_K_M GGUF file.
fn gguf_of_four_bits() -> &'static Vec<u8> {
    static FILE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    FILE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("four.gguf");
        write_gguf(&path, &model_of_four_bits(), "four", GgufFormat::Q4KM, None).unwrap();
        std::fs::read(path).unwrap()
    })
}
