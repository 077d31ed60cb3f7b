//! A model of a few kilobytes, always the same: random weights from a seed, a token for each byte, ChatML. It says nothing
//! of sense, and what it is kept to by a grammar it says.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

const WIDTH: usize = 32;
const HEADS: usize = 2;
const FFN: usize = 64;
const CONTEXT: usize = 8_192;
/// Token ids beyond those of bytes.
const SPECIAL: [&str; 2] = ["<|im_start|>", "<|im_end|>"];
const VOCABULARY: usize = 256 + SPECIAL.len();
const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n\
    {% endfor %}<|im_start|>assistant\n";

/// Writes it as a Hugging Face folder, to be imported.
///
/// # Errors
/// The folder or a file in it cannot be written.
pub fn write(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))
    };
    let config = json!({
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": 1, "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_act": "silu",
        "tie_word_embeddings": true, "eos_token_id": 257, "bos_token_id": Value::Null,
    });
    file("config.json", config.to_string().as_bytes())?;
    file("tokenizer.json", tokenizer().to_string().as_bytes())?;
    let tokenizer_config = json!({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"});
    file("tokenizer_config.json", tokenizer_config.to_string().as_bytes())?;
    file("model.safetensors", &weights())
}

/// A token for each byte, spelled as byte-level tokenizers spell them, and no merges.
fn tokenizer() -> Value {
    let plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0x100..;
    let mut vocabulary = Map::new();
    for byte in 0..=255_u8 {
        let code = if plain(byte) {
            u32::from(byte)
        } else {
            others.next().unwrap_or_default()
        };
        let spelled = char::from_u32(code).unwrap_or_default().to_string();
        vocabulary.insert(spelled, json!(byte));
    }
    let added = |(place, name): (usize, &&str)| {
        json!({"id": 256 + place, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let added: Vec<Value> = SPECIAL.iter().enumerate().map(added).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": []},
    })
}

/// A safetensors file: the length of the header, the header, the numbers in f32.
fn weights() -> Vec<u8> {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let head = WIDTH / HEADS;
    let tensors = [
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, WIDTH]),
        (layer("input_layernorm"), vec![WIDTH]),
        (layer("self_attn.q_proj"), vec![WIDTH, WIDTH]),
        (layer("self_attn.k_proj"), vec![head, WIDTH]),
        (layer("self_attn.v_proj"), vec![head, WIDTH]),
        (layer("self_attn.o_proj"), vec![WIDTH, WIDTH]),
        (layer("post_attention_layernorm"), vec![WIDTH]),
        (layer("mlp.gate_proj"), vec![FFN, WIDTH]),
        (layer("mlp.up_proj"), vec![FFN, WIDTH]),
        (layer("mlp.down_proj"), vec![WIDTH, FFN]),
        ("model.norm.weight".to_owned(), vec![WIDTH]),
    ];
    let (mut header, mut data, mut seed) = (Map::new(), Vec::new(), 1_u64);
    for (name, shape) in tensors {
        let begin = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            // Norms are near one, the rest between -0.2 and 0.2.
            let number = if shape.len() == 1 {
                1.0
            } else {
                0.4 * uniform(&mut seed) - 0.2
            };
            data.extend_from_slice(&number.to_le_bytes());
        }
        header.insert(
            name,
            json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]}),
        );
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_slice(), &data].concat()
}

/// In [0, 1), by `SplitMix64` (Steele, Lea and Flood 2014).
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1_u32 << 24) as f32
}
