//! Reads GGUF files (llama.cpp): configuration, tensors, chat template and tokenizer.
//!
//! llama.cpp's conversion permutes the rows of q and k for `llama`, because llama.cpp rotates adjacent
//! elements. The reader restores Hugging Face's half-split order. Tensors are dequantized to f32; for
//! serving, matrices become quantized matrices ([`crate::ops::packed`]) while reading.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use candle_core::{Device, Tensor};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::config::{Family, ModelConfig};
use crate::error::EngineError;
use crate::gguf_blocks::decode_int4_blocks;
use crate::ops::attention::AttentionHeads;
use crate::ops::packed::QuantizedMatrix;
use crate::rope_scaling::RopeScaling;
use crate::tokenizer::Tokenizer;
use crate::weights::WeightBuilder;

/// Name of the tensor with Llama 3's divisors of the rotary frequencies.
pub(crate) const ROPE_FREQS_TENSOR: &str = "rope_freqs.weight";

/// An open GGUF file.
pub struct GgufFile {
    path: std::path::PathBuf,
    reader: BufReader<File>,
    content: Content,
    /// Size of the file in bytes.
    length: u64,
}

impl GgufFile {
    /// Opens the file and reads header and metadata.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let file =
            File::open(path).map_err(|source| EngineError::ReadFile { path: path.to_owned(), source })?;
        let length =
            file.metadata().map_err(|source| EngineError::ReadFile { path: path.to_owned(), source })?.len();
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let unreadable =
            |error: String| EngineError::malformed(path, format!("not a readable GGUF file: {error}"));
        // candle 0.11 divides by the alignment in the header, so a damaged file can cause a panic.
        let content = catch_unwind(AssertUnwindSafe(|| Content::read(&mut reader)))
            .map_err(|_| unreadable("its header makes no sense".to_owned()))?
            .map_err(|error| unreadable(error.to_string()))?;
        Ok(Self { path: path.to_owned(), reader, content, length })
    }

    fn malformed(&self, problem: impl Into<String>) -> EngineError {
        EngineError::malformed(&self.path, problem)
    }

    /// Integer of the metadata, of any integer type.
    fn metadata_u64(&self, key: &str) -> Option<u64> {
        let value = self.content.metadata.get(key)?;
        match value {
            Value::I32(v) => u64::try_from(*v).ok(),
            Value::I64(v) => u64::try_from(*v).ok(),
            other => other.to_u64().ok().or_else(|| other.to_u32().ok().map(u64::from)),
        }
    }

    fn metadata_f32(&self, key: &str) -> Option<f32> {
        self.content.metadata.get(key)?.to_f32().ok()
    }

    fn metadata_str(&self, key: &str) -> Option<&str> {
        self.content.metadata.get(key)?.to_string().ok().map(String::as_str)
    }

    fn metadata_bool(&self, key: &str) -> Option<bool> {
        self.content.metadata.get(key)?.to_bool().ok()
    }

    fn metadata_strings(&self, key: &str) -> Result<Vec<String>, EngineError> {
        let missing = || self.malformed(format!("metadata `{key}` is missing or no list of strings"));
        let list = self.content.metadata.get(key).and_then(|v| v.to_vec().ok()).ok_or_else(missing)?;
        list.iter().map(|v| v.to_string().cloned().map_err(|_| missing())).collect()
    }

    /// Returns the configuration of the model.
    pub fn config(&mut self) -> Result<ModelConfig, EngineError> {
        let mut config = self.read_config()?;
        if self.content.tensor_infos.contains_key(ROPE_FREQS_TENSOR) {
            self.read_llama3_scaling(&mut config)?;
        }
        Ok(config)
    }

    /// Sets Llama 3's rotary scaling. The file holds the divisor of each frequency, but not the parameters.
    fn read_llama3_scaling(&mut self, config: &mut ModelConfig) -> Result<(), EngineError> {
        if config.rope_scaling.is_some() {
            let problem =
                format!("frequencies are stretched twice, by `{ROPE_FREQS_TENSOR}` and by a factor");
            return Err(self.malformed(problem));
        }
        let divisors = self.read_f32_tensor(ROPE_FREQS_TENSOR)?.flatten_all()?.to_vec1::<f32>()?;
        let key = format!("{}.rope.scaling.original_context_length", config.family.name());
        // Llama 3.1 to 3.3 were pretrained on contexts of 8192 tokens; older files omit the length.
        let original =
            self.metadata_f32(&key).or(self.metadata_u64(&key).map(|tokens| tokens as f32)).unwrap_or(8192.0);
        config.rope_scaling =
            Some(RopeScaling::llama3_defaults(divisors.iter().copied().fold(1.0, f32::max), original));
        let known = config.frequency_divisors();
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-3 * b.abs();
        if known.len() != divisors.len() || !divisors.iter().zip(&known).all(near) {
            let problem = format!(
                "`{ROPE_FREQS_TENSOR}` stretches frequencies in another way than Llama 3; take the safetensors folder"
            );
            return Err(self.malformed(problem));
        }
        Ok(())
    }

    /// Returns YaRN with the parameters of the paper; rejects other parameters.
    fn read_yarn_scaling(&self, name: &str) -> Result<RopeScaling, EngineError> {
        let number = |key: &str| self.metadata_f32(&format!("{name}.rope.scaling.{key}"));
        for (key, usual) in [
            ("attn_factor", 1.0),
            ("yarn_ext_factor", 1.0),
            ("yarn_attn_factor", 1.0),
            ("yarn_beta_fast", 32.0),
            ("yarn_beta_slow", 1.0),
            ("yarn_log_multiplier", 0.0),
        ] {
            let value = self.content.metadata.get(&format!("{name}.rope.scaling.{key}"));
            if value.is_some_and(|value| value.to_f32().ok() != Some(usual)) {
                let problem =
                    format!("rope scaling `yarn` with another `{key}` than {usual} is not supported");
                return Err(self.malformed(problem));
            }
        }
        let original = self.metadata_u64(&format!("{name}.rope.scaling.original_context_length"));
        match (number("factor"), original) {
            (Some(factor), Some(original)) => Ok(RopeScaling::yarn_defaults(factor, original as f32)),
            _ => Err(self.malformed("rope scaling `yarn` without `factor` and `original_context_length`")),
        }
    }

    /// Returns the configuration without Llama 3's rotary scaling.
    fn read_config(&self) -> Result<ModelConfig, EngineError> {
        let name = self.metadata_str("general.architecture").unwrap_or_default();
        let family = Family::parse_native(name, &self.path)?;
        let need = |key: &str| -> Result<usize, EngineError> {
            self.metadata_u64(&format!("{name}.{key}"))
                .map(|value| value as usize)
                .ok_or_else(|| self.malformed(format!("metadata `{name}.{key}` is missing")))
        };
        let hidden_size = need("embedding_length")?;
        let query = need("attention.head_count")?;
        let kv = need("attention.head_count_kv").unwrap_or(query);
        let dim = need("attention.key_length").unwrap_or(hidden_size / query.max(1));
        let positions = need("context_length")?;
        let rope_scaling = match self.metadata_str(&format!("{name}.rope.scaling.type")) {
            None | Some("none") => None,
            Some("linear") => Some(RopeScaling::Linear {
                factor: self.metadata_f32(&format!("{name}.rope.scaling.factor")).unwrap_or(1.0),
            }),
            Some("yarn") => Some(self.read_yarn_scaling(name)?),
            Some(other) => return Err(self.malformed(format!("rope scaling `{other}` is not supported"))),
        };
        let checked = rope_scaling.map(RopeScaling::validated).transpose();
        let rope_scaling = checked.map_err(|problem| self.malformed(format!("rope scaling: {problem}")))?;
        let vocab_size = match self.content.tensor_infos.get("token_embd.weight") {
            Some(info) => info.shape.dims().first().copied().unwrap_or_default(),
            None => {
                return Err(EngineError::MissingTensor {
                    name: "token_embd.weight".to_owned(),
                    expected: vec![0, hidden_size],
                });
            }
        };
        let config = ModelConfig {
            family,
            vocab_size,
            hidden_size,
            intermediate_size: need("feed_forward_length")?,
            num_layers: need("block_count")?,
            heads: AttentionHeads { query, kv, dim },
            max_positions: rope_scaling
                .as_ref()
                .map_or(positions, |scaling| scaling.max_context_tokens(positions)),
            rms_norm_eps: f64::from(
                self.metadata_f32(&format!("{name}.attention.layer_norm_rms_epsilon")).unwrap_or(1e-6),
            ),
            rope_theta: self.metadata_f32(&format!("{name}.rope.freq_base")).unwrap_or(10_000.0),
            rope_scaling,
            tied_embeddings: !self.content.tensor_infos.contains_key("output.weight"),
            qkv_bias: family == Family::Qwen2,
            eos_token_ids: self
                .metadata_u64("tokenizer.ggml.eos_token_id")
                .map(|id| id as u32)
                .into_iter()
                .collect(),
            bos_token_id: self.metadata_u64("tokenizer.ggml.bos_token_id").map(|id| id as u32),
            num_labels: 0,
            candle: None,
        };
        config.validate(&self.path)?;
        Ok(config)
    }

    /// Returns whether most matrices have fewer than 16 bits per weight.
    pub fn is_quantized(&self) -> bool {
        let matrices = || self.content.tensor_infos.values().filter(|info| info.shape.dims().len() == 2);
        let small = |kind: GgmlDType| !matches!(kind, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        2 * matrices().filter(|info| small(info.ggml_dtype)).count() > matrices().count()
    }

    /// Reads a tensor by its name in the file.
    fn read_tensor(&mut self, name: &str) -> Result<GgufTensor, EngineError> {
        let missing = || EngineError::MissingTensor { name: name.to_owned(), expected: Vec::new() };
        let info = self.content.tensor_infos.get(name).ok_or_else(missing)?;
        let (kind, dims) = (info.ggml_dtype, info.shape.dims().to_vec());
        let values = dims.iter().try_fold(1u64, |all, size| all.checked_mul(*size as u64));
        let blocks = values.map(|values| values / kind.block_size() as u64);
        let bytes = blocks.and_then(|blocks| blocks.checked_mul(kind.type_size() as u64));
        let start = self.content.tensor_data_offset.checked_add(info.offset);
        let end = start.zip(bytes).and_then(|(start, bytes)| start.checked_add(bytes));
        let (Some(start), Some(size)) = (start, bytes.filter(|_| end.is_some_and(|end| end <= self.length)))
        else {
            return Err(self.malformed(format!("tensor `{name}` is larger than what the file has of it")));
        };
        let mut bytes = vec![0; size as usize];
        let read = self.reader.seek(SeekFrom::Start(start)).and_then(|_| self.reader.read_exact(&mut bytes));
        read.map_err(|source| EngineError::ReadFile { path: self.path.clone(), source })?;
        Ok(GgufTensor { kind, dims, bytes })
    }

    /// Reads a tensor as f32.
    fn read_f32_tensor(&mut self, name: &str) -> Result<Tensor, EngineError> {
        let whole = self.read_tensor(name)?.dequantize();
        whole.map_err(|error| self.malformed(format!("tensor `{name}`: {error}")))
    }

    /// Adds the tensors that the model uses to `gathered`, under Hugging Face names and in file order.
    /// Matrices are quantized while reading if `gathered` asks for this.
    pub fn load_tensors(
        &mut self,
        config: &ModelConfig,
        gathered: &mut WeightBuilder,
    ) -> Result<(), EngineError> {
        let infos = self.content.tensor_infos.iter();
        let placed =
            |(name, info): (&String, &TensorInfo)| (info.offset, name.clone(), info.shape.dims().to_vec());
        let mut names: Vec<(u64, String, Vec<usize>)> = infos.map(placed).collect();
        names.sort();
        for (_, name, dims) in names {
            let Some(hf_name) = hugging_face_name(&name).filter(|name| gathered.uses(name)) else {
                continue;
            };
            gathered.check_shape(&hf_name, &dims)?;
            let raw = self.read_tensor(&name)?;
            let heads = match hf_name.rsplit('.').nth(1) {
                Some("q_proj") if config.family == Family::Llama => Some(config.heads.query),
                Some("k_proj") if config.family == Family::Llama => Some(config.heads.kv),
                _ => None,
            };
            let raw = match heads {
                Some(heads) => raw.restore_qk_order(heads).ok_or_else(|| {
                    self.malformed(format!(
                        "tensor `{name}`: its rows are not whole blocks, or not {heads} heads of two halves"
                    ))
                })?,
                None => raw,
            };
            let unreadable = |error| self.malformed(format!("tensor `{name}`: {error}"));
            if gathered.quantizes()
                && let Some(packed) = raw.quantize_for_serving().map_err(unreadable)?
            {
                gathered.add_quantized(&hf_name, packed)?;
                continue;
            }
            let tensor = raw.dequantize().map_err(unreadable)?;
            gathered.add(hf_name, tensor)?;
        }
        Ok(())
    }

    /// Returns the chat template of the metadata.
    pub fn chat_template(&self) -> Option<&str> {
        self.metadata_str("tokenizer.chat_template")
    }

    /// Builds the tokenizer from the metadata: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).
    pub fn build_tokenizer(&self) -> Result<Tokenizer, EngineError> {
        let tokens = self.metadata_strings("tokenizer.ggml.tokens")?;
        let vocabulary: tokenizers::models::bpe::Vocab =
            tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();
        let kind = self.metadata_str("tokenizer.ggml.model").unwrap_or_default();
        let failed = |error: tokenizers::Error| self.malformed(format!("tokenizer: {error}"));
        let mut inner = match kind {
            "gpt2" => {
                let merges = self
                    .metadata_strings("tokenizer.ggml.merges")?
                    .into_iter()
                    .map(|merge| match merge.split_once(' ') {
                        Some((a, b)) => Ok((a.to_owned(), b.to_owned())),
                        None => Err(self.malformed(format!("merge `{merge}` is not two tokens"))),
                    })
                    .collect::<Result<Vec<_>, _>>()?;
                let pre = self.metadata_str("tokenizer.ggml.pre").unwrap_or("default");
                let ignore_merges = pre == "llama-bpe";
                let model = BPE::builder()
                    .vocab_and_merges(vocabulary, merges)
                    .ignore_merges(ignore_merges)
                    .build()
                    .map_err(failed)?;
                let mut inner = tokenizers::Tokenizer::new(model);
                if pre == "qwen2" {
                    inner.with_normalizer(Some(NFC)).map_err(failed)?;
                }
                inner.with_pre_tokenizer(Some(self.pre_tokenizer(pre)?));
                inner.with_decoder(Some(ByteLevel::new(false, true, true)));
                inner
            }
            "llama" => {
                let merges = sentencepiece_merges(&tokens, &self.token_scores(tokens.len())?);
                let model = BPE::builder()
                    .vocab_and_merges(vocabulary, merges)
                    .unk_token("<unk>".to_owned())
                    .fuse_unk(true)
                    .byte_fallback(true)
                    .build()
                    .map_err(failed)?;
                let mut inner = tokenizers::Tokenizer::new(model);
                let space = Replace::new(" ", "▁").map_err(failed)?;
                let mut normalizers: Vec<tokenizers::NormalizerWrapper> = vec![space.into()];
                if self.metadata_bool("tokenizer.ggml.add_space_prefix") != Some(false) {
                    normalizers.insert(0, Prepend::new("▁".to_owned()).into());
                }
                inner.with_normalizer(Some(NormalizerSequence::new(normalizers))).map_err(failed)?;
                inner.with_decoder(Some(tokenizers::decoders::sequence::Sequence::new(vec![
                    Replace::new("▁", " ").map_err(failed)?.into(),
                    tokenizers::decoders::byte_fallback::ByteFallback::new().into(),
                    tokenizers::decoders::fuse::Fuse::new().into(),
                ])));
                inner
            }
            other => {
                return Err(self.malformed(format!(
                    "tokenizer model `{other}` is not supported; supported are `gpt2` and `llama`"
                )));
            }
        };
        // llama.cpp's token types: 3 is a control token, 4 a user-defined token.
        if let Some(types) =
            self.content.metadata.get("tokenizer.ggml.token_type").and_then(|v| v.to_vec().ok())
        {
            let added: Vec<AddedToken> = tokens
                .iter()
                .zip(types)
                .filter_map(|(token, kind)| match kind {
                    Value::I32(3) | Value::U32(3) => Some(AddedToken::from(token.clone(), true)),
                    Value::I32(4) | Value::U32(4) => {
                        Some(AddedToken::from(token.clone(), false).normalized(false))
                    }
                    _ => None,
                })
                .collect();
            inner.add_tokens(added).map_err(failed)?;
        }
        Tokenizer::new(inner)
    }

    /// Returns the pre-tokenizer that splits text before BPE, by llama.cpp's name.
    fn pre_tokenizer(&self, pre: &str) -> Result<PreTokenizerWrapper, EngineError> {
        const WORD_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
        const REMAINDER_PATTERN: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let split = |digits: &str| -> Result<PreTokenizerWrapper, EngineError> {
            Split::new(
                SplitPattern::Regex(format!("{WORD_PATTERN}{digits}{REMAINDER_PATTERN}")),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .map(Into::into)
            .map_err(|error| self.malformed(format!("tokenizer: {error}")))
        };
        let bytes_only: PreTokenizerWrapper = ByteLevel::new(false, false, false).into();
        let gpt2: PreTokenizerWrapper = ByteLevel::new(false, true, true).into();
        Ok(match pre {
            "qwen2" | "deepseek-r1-qwen" => Sequence::new(vec![split(r"\p{N}")?, bytes_only]).into(),
            "llama-bpe" | "llama3" | "smaug-bpe" => {
                Sequence::new(vec![split(r"\p{N}{1,3}")?, bytes_only]).into()
            }
            "smollm" => Sequence::new(vec![Digits::new(true).into(), gpt2]).into(),
            "default" | "gpt-2" => gpt2,
            other => {
                return Err(self.malformed(format!(
                    "pre-tokenizer `{other}` is not supported; supported are `qwen2`, `deepseek-r1-qwen`, `llama-bpe`, `smollm`, `gpt-2`"
                )));
            }
        })
    }

    /// Scores of the SentencePiece tokens; fails unless there are `count`.
    fn token_scores(&self, count: usize) -> Result<Vec<f32>, EngineError> {
        let list = self.content.metadata.get("tokenizer.ggml.scores").and_then(|v| v.to_vec().ok());
        let scores: Vec<f32> =
            list.into_iter().flatten().map(|score| score.to_f32().unwrap_or_default()).collect();
        if scores.len() == count {
            Ok(scores)
        } else {
            Err(self.malformed(format!("{} scores for {count} tokens", scores.len())))
        }
    }
}

/// A tensor in the encoding of the file.
struct GgufTensor {
    kind: GgmlDType,
    dims: Vec<usize>,
    bytes: Vec<u8>,
}

impl GgufTensor {
    /// Returns all values as f32.
    fn dequantize(&self) -> candle_core::Result<Tensor> {
        self.dequantize_bytes(&self.bytes, self.dims.clone())
    }

    /// Converts a matrix for serving: 4-bit formats stay 4-bit, all others become 8-bit. Returns `None` if
    /// rows do not divide into blocks.
    fn quantize_for_serving(&self) -> candle_core::Result<Option<QuantizedMatrix>> {
        let Some((rows, columns, row)) = self.row_layout() else { return Ok(None) };
        if decode_int4_blocks(self.kind, &[]).is_some() {
            let blocks = |at: usize| {
                decode_int4_blocks(self.kind, &self.bytes[at * row..(at + 1) * row]).into_iter().flatten()
            };
            if let Some(packed) = QuantizedMatrix::from_int4_blocks(rows, columns, blocks)? {
                return Ok(Some(packed));
            }
        }
        QuantizedMatrix::quantize_int8_rows(rows, columns, |some| {
            self.dequantize_bytes(&self.bytes[some.start * row..some.end * row], vec![some.len(), columns])
        })
    }

    /// Returns rows, columns and bytes per row of a matrix; `None` if a row does not consist of whole
    /// blocks.
    fn row_layout(&self) -> Option<(usize, usize, usize)> {
        let (&[rows, columns], block) = (self.dims.as_slice(), self.kind.block_size()) else {
            return None;
        };
        columns.is_multiple_of(block).then(|| (rows, columns, columns / block * self.kind.type_size()))
    }

    /// Reorders rows from `[head][pair][half]` to `[head][half][pair]`.
    fn restore_qk_order(self, heads: usize) -> Option<Self> {
        let (rows, _, row) = self.row_layout()?;
        if !rows.is_multiple_of(2 * heads) {
            return None;
        }
        let half = rows / heads / 2;
        let places = (0..heads).flat_map(|head| (0..2).map(move |side| (head, side)));
        let places =
            places.flat_map(|(head, side)| (0..half).map(move |pair| (head * half + pair) * 2 + side));
        let bytes = places.flat_map(|at| &self.bytes[at * row..(at + 1) * row]).copied().collect();
        Some(Self { bytes, ..self })
    }

    /// Dequantizes `bytes` to a tensor of shape `dims`.
    fn dequantize_bytes(&self, bytes: &[u8], dims: Vec<usize>) -> candle_core::Result<Tensor> {
        qtensor_from_ggml(self.kind, bytes, dims, &Device::Cpu)?.dequantize(&Device::Cpu)
    }
}

/// Returns BPE merges ranked like SentencePiece: the pair whose result has the best score is merged first.
fn sentencepiece_merges(tokens: &[String], scores: &[f32]) -> Vec<(String, String)> {
    let known: std::collections::HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut ranked = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (known.get(left), known.get(right)) {
                ranked.push((scores[id], l, r));
            }
        }
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    ranked.into_iter().map(|(_, l, r)| (tokens[l].clone(), tokens[r].clone())).collect()
}

/// Returns the Hugging Face name of a GGUF tensor, or `None` if unknown.
fn hugging_face_name(name: &str) -> Option<String> {
    Some(match name {
        "token_embd.weight" => "model.embed_tokens.weight".to_owned(),
        "output_norm.weight" => "model.norm.weight".to_owned(),
        "output.weight" => "lm_head.weight".to_owned(),
        _ => {
            let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
            let (part, kind) = rest.rsplit_once('.')?;
            let part = match part {
                "attn_norm" => "input_layernorm",
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_q_norm" => "self_attn.q_norm",
                "attn_k_norm" => "self_attn.k_norm",
                "attn_output" => "self_attn.o_proj",
                "ffn_norm" => "post_attention_layernorm",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                _ => return None,
            };
            format!("model.layers.{layer}.{part}.{kind}")
        }
    })
}
