//! Imports of tiny models made here, whole and broken.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use galerne_core::dtype::DType;
use galerne_core::ids::TokenId;
use galerne_core::weights::WeightSource;
use serde_json::json;

use super::{GuestChooser, ImportError, ImportRequest, NoProgress, Progress, import};
use crate::gguf::tests::{Builder, array, text};
use crate::package::Package;
use crate::store::Store;

/// Knows one model type; its guests are not components, which is no matter to the store.
struct Chooser;

impl GuestChooser for Chooser {
    fn architecture(&self, model_type: &str) -> Result<Vec<u8>, String> {
        match model_type {
            "llama" => Ok(b"architecture".to_vec()),
            other => Err(format!("no guest for model type {other:?}")),
        }
    }

    fn chat(&self, _template: Option<&str>, special_tokens: &[String]) -> Result<Vec<u8>, String> {
        Ok(special_tokens.join(" ").into_bytes())
    }
}

/// GPT-2's table of characters for bytes.
fn byte_characters() -> Vec<String> {
    let mut names = vec![String::new(); 256];
    for (character, byte) in crate::tokenizer::spelling_table_for_tests() {
        names[usize::from(byte)] = character.to_string();
    }
    names
}

fn rows(count: usize, bytes: usize) -> Vec<u8> {
    (0..count).flat_map(|row| vec![row as u8; bytes]).collect()
}

/// A one-layer model of width 32 with two heads of 16, one of them for keys, and byte tokens.
fn tiny() -> Builder {
    let mut b = Builder::new();
    b.text("general.architecture", "llama");
    b.text("general.license", "apache-2.0");
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 128),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", 16),
    ] {
        b.number(&format!("llama.{key}"), value);
    }
    b.set(
        "llama.attention.layer_norm_rms_epsilon",
        6,
        1e-5_f32.to_le_bytes().to_vec(),
    );
    b.set("llama.rope.freq_base", 6, 10_000_f32.to_le_bytes().to_vec());
    b.text("tokenizer.ggml.model", "gpt2");
    b.text("tokenizer.ggml.pre", "smollm");
    let mut tokens = byte_characters();
    tokens.extend(["he", "<|end|>", "<mark>"].map(str::to_owned));
    let types: Vec<Vec<u8>> = (0..259)
        .map(|id| {
            i32::to_le_bytes(match id {
                257 => 3,
                258 => 4,
                _ => 1,
            })
            .to_vec()
        })
        .collect();
    let tokens: Vec<Vec<u8>> = tokens.iter().map(|token| text(token)).collect();
    b.set("tokenizer.ggml.tokens", 9, array(8, &tokens));
    b.set("tokenizer.ggml.token_type", 9, array(5, &types));
    b.set("tokenizer.ggml.merges", 9, array(8, &[text("h e")]));
    b.number("tokenizer.ggml.eos_token_id", 257);
    b.number("tokenizer.ggml.bos_token_id", 257);
    b.text("tokenizer.chat_template", "{{ messages }}");
    b.tensor("token_embd.weight", &[32, 259], 8, rows(259, 34));
    b.tensor("output_norm.weight", &[32], 0, vec![1; 128]);
    b.tensor("blk.0.attn_q.weight", &[32, 32], 3, rows(32, 20));
    b.tensor("blk.0.attn_q.bias", &[32], 0, rows(32, 4));
    b.tensor("blk.0.attn_k.weight", &[32, 16], 6, rows(16, 22));
    b.tensor("blk.0.attn_v.weight", &[32, 16], 2, rows(16, 18));
    b.tensor("blk.0.attn_output.weight", &[32, 32], 30, rows(32, 64));
    for part in ["attn_norm", "ffn_norm"] {
        b.tensor(&format!("blk.0.{part}.weight"), &[32], 0, vec![2; 128]);
    }
    b.tensor("blk.0.ffn_gate.weight", &[32, 64], 3, rows(64, 20));
    b.tensor("blk.0.ffn_up.weight", &[32, 64], 3, rows(64, 20));
    b.tensor("blk.0.ffn_down.weight", &[64, 32], 3, rows(32, 40));
    b
}

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("folder"),
        }
    }

    fn store(&self) -> Store {
        Store::new(self.folder.path())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("folder");
        std::fs::write(&path, bytes).expect("write");
        path
    }

    fn import(&self, source: &Path) -> Result<Package, ImportError> {
        self.import_with(source, "tiny", false, &NoProgress, &AtomicBool::new(false))
    }

    fn import_with(
        &self,
        source: &Path,
        name: &str,
        replace: bool,
        progress: &dyn Progress,
        cancelled: &AtomicBool,
    ) -> Result<Package, ImportError> {
        let models_dir = self.store().models_dir().to_owned();
        let now = UNIX_EPOCH + Duration::from_secs(86_400);
        let request = ImportRequest {
            source,
            models_dir: &models_dir,
            name,
            version: None,
            license: None,
            replace,
            now,
        };
        import(&request, &Chooser, progress, cancelled)
    }

    fn import_gguf(&self, builder: &Builder) -> Result<Package, ImportError> {
        self.import(&self.write("model.gguf", &builder.build().0))
    }

    /// Names in the models folder, hidden ones included.
    fn names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.store().models_dir()) else {
            return Vec::new();
        };
        entries
            .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
            .collect()
    }
}

fn check_error(change: impl Fn(&mut Builder), expected: &str) {
    let mut builder = tiny();
    change(&mut builder);
    let place = Place::new();
    let error = place.import_gguf(&builder).expect_err(expected).to_string();
    assert!(
        error.contains(expected),
        "{error:?} does not contain {expected:?}"
    );
    assert!(place.names().is_empty(), "left behind: {:?}", place.names());
}

#[test]
fn a_gguf_file_becomes_a_package() {
    let place = Place::new();
    let package = place.import_gguf(&tiny()).expect("import");
    let manifest = package.manifest();
    assert_eq!(
        (manifest.name.as_str(), manifest.model_type.as_str()),
        ("tiny", "llama")
    );
    assert_eq!(manifest.license.as_deref(), Some("Apache-2.0"));
    assert_eq!(
        (manifest.created.as_str(), manifest.source.as_str()),
        ("1970-01-02T00:00:00Z", "model.gguf")
    );
    assert_eq!(manifest.context_tokens_max, 128);
    assert_eq!(manifest.chat.template.as_deref(), Some("{{ messages }}"));
    let config: serde_json::Value = serde_json::from_str(package.config_json()).expect("json");
    for (field, value) in [
        ("model_type", json!("llama")),
        ("hidden_size", json!(32)),
        ("num_key_value_heads", json!(1)),
        ("head_dim", json!(16)),
        ("rms_norm_eps", json!(1e-5)),
        ("vocab_size", json!(259)),
        ("tie_word_embeddings", json!(true)),
        ("attention_bias", json!(true)),
        ("rope_scaling", json!(null)),
        ("eos_token_id", json!(257)),
    ] {
        assert_eq!(config[field], value, "{field}");
    }
    assert_eq!(package.architecture().expect("guest"), b"architecture");
    assert_eq!(package.chat().expect("guest"), b"<|end|> <mark>");
    let tokenizer = package.tokenizer().expect("tokenizer");
    assert_eq!(package.eos_tokens(&tokenizer).expect("eos"), [TokenId(257)]);
    assert_eq!(package.prompt_prefix(&tokenizer).expect("prefix"), None);
    assert_eq!(tokenizer.encode("he 12").expect("encode").len(), 4);
    package.verify(|_| ()).expect("digests");
}

#[test]
fn weights_keep_their_bytes_and_rope_pairs_become_halves() {
    let place = Place::new();
    let weights = place
        .import_gguf(&tiny())
        .expect("import")
        .weights()
        .expect("weights");
    let get = |name: &str| {
        weights
            .weight(name)
            .expect("read")
            .unwrap_or_else(|| panic!("{name} is missing"))
    };
    let embedding = get("model.embed_tokens.weight");
    assert_eq!((embedding.dtype, embedding.shape), (DType::Q8_0, &[259, 32][..]));
    assert_eq!(*embedding.bytes, rows(259, 34));
    let halves = |start: usize| (0..16).map(move |row| (start + row % 8 * 2 + row / 8) as u8);
    let query = get("model.layers.0.self_attn.q_proj.weight");
    let order: Vec<u8> = query.bytes.chunks(20).map(|row| row[0]).collect();
    assert_eq!(order, halves(0).chain(halves(16)).collect::<Vec<u8>>());
    assert!(
        query
            .bytes
            .chunks(20)
            .all(|row| row.iter().all(|byte| *byte == row[0])),
        "rows stay whole"
    );
    let bias = get("model.layers.0.self_attn.q_proj.bias");
    assert_eq!(
        bias.bytes
            .chunks(4)
            .map(|element| element[0])
            .collect::<Vec<u8>>(),
        order
    );
    let key = get("model.layers.0.self_attn.k_proj.weight");
    assert_eq!(
        key.bytes.chunks(22).map(|row| row[0]).collect::<Vec<u8>>(),
        halves(0).collect::<Vec<u8>>()
    );
    assert_eq!(*get("model.layers.0.self_attn.v_proj.weight").bytes, rows(16, 18));
    assert_eq!(get("model.layers.0.self_attn.o_proj.weight").dtype, DType::Bf16);
    assert_eq!(weights.index().tensors.len(), 12);
    assert!(weights.weight("lm_head.weight").expect("read").is_none());
}

#[test]
fn a_truncated_gguf_names_what_is_cut_and_leaves_nothing() {
    let (bytes, header) = tiny().build();
    let place = Place::new();
    let cuts = (0..header)
        .step_by(97)
        .chain((header..bytes.len()).step_by(1_001))
        .chain([bytes.len() - 1]);
    for cut in cuts {
        let error = place
            .import(&place.write("cut.gguf", &bytes[..cut]))
            .expect_err("cut")
            .to_string();
        assert!(error.contains("truncated"), "cut at {cut}: {error}");
        assert!(
            cut <= header || error.contains("tensor "),
            "cut at {cut}: {error}"
        );
    }
    assert!(place.names().is_empty());
}

#[test]
fn lying_metadata_is_named() {
    check_error(
        |b| b.text("general.architecture", "mamba"),
        "architecture \"mamba\" cannot be imported",
    );
    check_error(
        |b| b.text("tokenizer.ggml.pre", "tekken"),
        "tokenizer.ggml.pre \"tekken\" cannot be imported",
    );
    check_error(
        |b| b.text("tokenizer.ggml.model", "bert"),
        "tokenizer.ggml.model \"bert\"",
    );
    check_error(
        |b| b.number("llama.expert_count", 8),
        "llama.expert_count: expected a model without experts, got 8",
    );
    check_error(
        |b| b.number("llama.attention.head_count", 0),
        "llama.attention.head_count: expected 1 to",
    );
    check_error(
        |b| b.number("llama.attention.head_count_kv", 3),
        "llama.attention.head_count_kv: expected a divisor of 2",
    );
    check_error(
        |b| b.number("llama.rope.dimension_count", 8),
        "llama.rope.dimension_count: expected the head width 16",
    );
    check_error(
        |b| b.text("llama.block_count", "one"),
        "llama.block_count: expected an unsigned number",
    );
    check_error(
        |b| b.number("llama.block_count", u32::MAX),
        "llama.block_count: expected 1 to 1048576",
    );
    check_error(
        |b| b.number("llama.block_count", 2),
        "tensor blk.1.attn_norm.weight is missing",
    );
    check_error(
        |b| b.text("llama.rope.scaling.type", "yarn"),
        "llama.rope.scaling.type: expected none or linear",
    );
    check_error(
        |b| b.number("tokenizer.ggml.eos_token_id", 999),
        "tokenizer.ggml.eos_token_id: expected an id below 259",
    );
    check_error(
        |b| b.set("tokenizer.ggml.merges", 9, array(8, &[text("h e"), text("q zz")])),
        "tokenizer.ggml.merges[1]: expected tokens of the vocabulary, got \"zz\"",
    );
    check_error(
        |b| b.set("tokenizer.ggml.tokens", 9, array(8, &[text("a"), text("a")])),
        "tokenizer.ggml.tokens[1]: expected a token other than token 0",
    );
    check_error(
        |b| b.set("tokenizer.ggml.token_type", 9, array(5, &[])),
        "tokenizer.ggml.token_type: expected 259 entries",
    );
    check_error(
        |b| b.metadata.retain(|(key, ..)| key != "llama.feed_forward_length"),
        "llama.feed_forward_length",
    );
}

#[test]
fn lying_tensors_are_named() {
    let drop = |name: &'static str| move |b: &mut Builder| b.tensors.retain(|(other, ..)| other != name);
    check_error(
        drop("blk.0.ffn_up.weight"),
        "tensor blk.0.ffn_up.weight is missing",
    );
    check_error(drop("token_embd.weight"), "tensor token_embd.weight is missing");
    check_error(
        |b| b.tensor("blk.0.surprise.weight", &[1], 0, vec![0; 4]),
        "tensor blk.0.surprise.weight: expected a tensor of",
    );
    check_error(
        |b| b.tensor("blk.0.attn_q.weight", &[32, 16], 3, rows(16, 20)),
        "tensor blk.0.attn_q.weight: expected 32 rows",
    );
    check_error(
        |b| b.tensor("rope_freqs.weight", &[8], 0, vec![9; 32]),
        "tensor rope_freqs.weight: expected the factors",
    );
}

#[test]
fn unknown_model_types_carry_the_choosers_words() {
    check_error(
        |b| {
            let qwen = |text: &str| text.replace("llama.", "qwen2.");
            b.metadata.iter_mut().for_each(|(key, ..)| *key = qwen(key));
            b.text("general.architecture", "qwen2");
        },
        "no guest for model type \"qwen2\"",
    );
}

#[test]
fn names_are_checked_and_models_replaced_only_when_asked() {
    let place = Place::new();
    let source = place.write("model.gguf", &tiny().build().0);
    let run =
        |name: &str, replace| place.import_with(&source, name, replace, &NoProgress, &AtomicBool::new(false));
    assert!(matches!(run("../x", false), Err(ImportError::Name(_))));
    let first = run("tiny", false).expect("import").weights().expect("weights");
    assert!(matches!(run("tiny", false), Err(ImportError::Exists(name)) if name == "tiny"));
    run("tiny", true).expect("replace");
    assert_eq!(place.names(), ["tiny"]);
    let old = first
        .weight("model.norm.weight")
        .expect("the replaced file stays readable")
        .expect("there");
    assert_eq!(*old.bytes, [1; 128]);
    assert!(matches!(
        place.import(&place.folder.path().join("none")),
        Err(ImportError::Exists(_))
    ));
    let nothing = place.import_with(
        Path::new("/nowhere"),
        "other",
        false,
        &NoProgress,
        &AtomicBool::new(false),
    );
    assert!(matches!(nothing, Err(ImportError::Source(_))));
}

#[test]
fn a_cancelled_import_leaves_nothing() {
    struct CancelAfter<'a> {
        bytes: AtomicU64,
        cancelled: &'a AtomicBool,
    }
    impl Progress for CancelAfter<'_> {
        fn stage(&self, _name: &str, _total_bytes: u64) {}
        fn advance(&self, bytes: u64) {
            if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > 1_000 {
                self.cancelled.store(true, Ordering::Relaxed);
            }
        }
    }
    let place = Place::new();
    let source = place.write("model.gguf", &tiny().build().0);
    let cancelled = AtomicBool::new(false);
    let progress = CancelAfter {
        bytes: AtomicU64::new(0),
        cancelled: &cancelled,
    };
    let result = place.import_with(&source, "tiny", false, &progress, &cancelled);
    assert!(matches!(result, Err(ImportError::Cancelled)));
    assert!(progress.bytes.load(Ordering::Relaxed) > 1_000, "it had begun");
    assert!(place.names().is_empty());
}

#[test]
fn a_changed_file_is_noticed() {
    let place = Place::new();
    let package = place.import_gguf(&tiny()).expect("import");
    place.write("models/tiny/chat.wasm", b"other");
    assert!(
        package
            .chat()
            .expect_err("changed")
            .to_string()
            .contains("chat.wasm: expected digest sha256:")
    );
    let weights = package.dir().join("weights.safetensors");
    let mut bytes = std::fs::read(&weights).expect("read");
    *bytes.last_mut().expect("bytes") ^= 1;
    place.write("models/tiny/weights.safetensors", &bytes);
    assert!(package.verify(|_| ()).is_err());
    place.write("models/broken/galerne.toml", b"name = 3");
    let listed = place.store().list().expect("list");
    let states: Vec<(&str, bool)> = listed
        .iter()
        .map(|entry| (entry.name.as_str(), entry.manifest.is_ok()))
        .collect();
    assert_eq!(states, [("broken", false), ("tiny", true)]);
    place.store().remove("tiny").expect("remove");
    let error = place.store().open("tiny").expect_err("removed").to_string();
    assert!(error.contains("it has broken"), "{error}");
}

/// A Hugging Face folder made of the tiny model's tokenizer and two shards.
fn hugging_face(place: &Place) -> PathBuf {
    let package = place.import_gguf(&tiny()).expect("import");
    let tokenizer = std::fs::read(package.dir().join("tokenizer.json")).expect("tokenizer");
    place.store().remove("tiny").expect("remove");
    place.write("hf/tokenizer.json", &tokenizer);
    let config = json!({"model_type": "llama", "max_position_embeddings": 64, "eos_token_id": [257, 256]});
    place.write("hf/config.json", config.to_string().as_bytes());
    let tokenizer_config = json!({"bos_token": {"content": "<|end|>"}, "add_bos_token": true, "eos_token": "<mark>",
        "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]});
    place.write(
        "hf/tokenizer_config.json",
        tokenizer_config.to_string().as_bytes(),
    );
    place.write("hf/README.md", b"---\nlicense: mit\n---\n");
    let index =
        json!({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}});
    place.write("hf/model.safetensors.index.json", index.to_string().as_bytes());
    shard(place, "model-1.safetensors", "a", safetensors::Dtype::BF16);
    shard(place, "model-2.safetensors", "b", safetensors::Dtype::F32);
    place.folder.path().join("hf")
}

fn shard(place: &Place, file: &str, tensor: &str, dtype: safetensors::Dtype) {
    let data = vec![5; dtype.bitsize() / 8 * 6];
    let view = safetensors::tensor::TensorView::new(dtype, vec![2, 3], &data).expect("view");
    let bytes = safetensors::serialize([(tensor, view)], None).expect("serialize");
    place.write(&format!("hf/{file}"), &bytes);
}

#[test]
fn a_hugging_face_folder_becomes_a_package() {
    let place = Place::new();
    let package = place.import(&hugging_face(&place)).expect("import");
    let manifest = package.manifest();
    assert_eq!(
        (manifest.source.as_str(), manifest.license.as_deref()),
        ("hf", Some("MIT"))
    );
    assert_eq!(manifest.chat.eos_tokens, ["<|end|>", "he", "<mark>"]);
    assert_eq!(manifest.chat.template.as_deref(), Some("yes"));
    let tokenizer = package.tokenizer().expect("tokenizer");
    assert_eq!(
        package.prompt_prefix(&tokenizer).expect("prefix"),
        Some(TokenId(257))
    );
    let weights = package.weights().expect("weights");
    let get = |name: &str| weights.weight(name).expect("read").expect("there");
    let a = get("a");
    assert_eq!(
        (a.dtype, a.shape, &*a.bytes),
        (DType::Bf16, &[2, 3][..], &[5; 12][..])
    );
    assert_eq!(*get("b").bytes, [5; 24]);
}

#[test]
fn a_broken_hugging_face_folder_is_named() {
    let check = |change: &dyn Fn(&Place), expected: &str| {
        let place = Place::new();
        let folder = hugging_face(&place);
        change(&place);
        let error = place.import(&folder).expect_err(expected).to_string();
        assert!(
            error.contains(expected),
            "{error:?} does not contain {expected:?}"
        );
        assert!(place.names().is_empty());
    };
    let remove =
        |name: &'static str| move |p: &Place| std::fs::remove_file(p.folder.path().join(name)).expect("file");
    check(&remove("hf/model-2.safetensors"), "model-2.safetensors");
    check(&remove("hf/tokenizer.json"), "tokenizer.json");
    check(
        &|p| shard(p, "model-2.safetensors", "c", safetensors::Dtype::F32),
        "tensor b is missing from model-2",
    );
    check(
        &|p| shard(p, "model-2.safetensors", "a", safetensors::Dtype::F32),
        "tensor a: expected one shard",
    );
    check(
        &|p| shard(p, "model-2.safetensors", "b", safetensors::Dtype::I64),
        "tensor \"b\": has dtype I64",
    );
    check(
        &|p| drop(p.write("hf/config.json", b"{\"model_type\": 3}")),
        "config.json: model_type: expected a string, got 3",
    );
    check(&|p| drop(p.write("hf/config.json", b"{")), "config.json: content");
    check(
        &|p| drop(p.write("hf/generation_config.json", b"{\"eos_token_id\": 999}")),
        "generation_config.json: eos_token_id",
    );
    let escape = br#"{"weight_map": {"a": "../x.safetensors"}}"#;
    check(
        &|p| drop(p.write("hf/model.safetensors.index.json", escape)),
        "expected plain file names",
    );
    check(
        &|p| {
            let path = p.folder.path().join("hf/model-1.safetensors");
            let bytes = std::fs::read(&path).expect("read");
            std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("write");
        },
        "tensor \"a\": ends at byte 12 of the data, the file has 11",
    );
}

#[test]
fn a_sentencepiece_vocabulary_becomes_merges() {
    let mut builder = tiny();
    let pieces: Vec<(String, i32, f32)> = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)]
        .into_iter()
        .map(|(name, kind, score)| (name.to_owned(), kind, score))
        .chain((0..=255_u8).map(|byte| (format!("<0x{byte:02X}>"), 6, 0.0)))
        .chain(
            [("▁", -3.0), ("h", -4.0), ("e", -5.0), ("he", -1.0), ("▁he", -2.0)]
                .map(|(name, score)| (name.to_owned(), 1, score)),
        )
        .collect();
    type Encode<'a> = &'a dyn Fn(&(String, i32, f32)) -> Vec<u8>;
    let list = |f: Encode<'_>| pieces.iter().map(f).collect::<Vec<_>>();
    builder.text("tokenizer.ggml.model", "llama");
    builder.set(
        "tokenizer.ggml.tokens",
        9,
        array(8, &list(&|piece| text(&piece.0))),
    );
    builder.set(
        "tokenizer.ggml.token_type",
        9,
        array(5, &list(&|piece| piece.1.to_le_bytes().to_vec())),
    );
    builder.set(
        "tokenizer.ggml.scores",
        9,
        array(6, &list(&|piece| piece.2.to_le_bytes().to_vec())),
    );
    builder.number("tokenizer.ggml.bos_token_id", 1);
    builder.number("tokenizer.ggml.eos_token_id", 2);
    let place = Place::new();
    let package = place.import_gguf(&builder).expect("import");
    let tokenizer = package.tokenizer().expect("tokenizer");
    let ids = tokenizer.encode("he hé").expect("encode");
    let expected: Vec<TokenId> = [263, 259, 260, 3 + 0xc3, 3 + 0xa9].map(TokenId).to_vec();
    assert_eq!(ids, expected);
    assert_eq!(tokenizer.decode(&ids), "he hé");
    assert_eq!(tokenizer.token_bytes(TokenId(3 + 0xc3)), [0xc3]);
    assert_eq!(
        package.prompt_prefix(&tokenizer).expect("prefix"),
        Some(TokenId(1))
    );
    assert!(!tokenizer.encode("<s>").expect("encode").contains(&TokenId(1)));
}
