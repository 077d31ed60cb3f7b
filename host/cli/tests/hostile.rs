//! Broken files and hostile architectures: a clear error in bounded time, nothing half-made, and the host goes on.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::{Host, MODEL, data, gguf, root};
use serde_json::{Value, json};

/// Every case must be answered within this, debug build and busy machine included.
const BOUND: Duration = Duration::from_secs(30);

fn galerne(data: &Path, args: &[&str]) -> (Output, String) {
    let begin = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_galerne"))
        .args(args)
        .arg("--data")
        .arg(data)
        .output()
        .expect("start galerne");
    assert!(
        begin.elapsed() < BOUND,
        "galerne {args:?} took {:?}",
        begin.elapsed()
    );
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "galerne {args:?} panicked: {text}");
    (output, text)
}

/// A folder as Hugging Face lays it out, with the demo model's tokenizer, this configuration and these f32 tensors of zeros.
fn hf_folder(parent: &Path, config: &Value, tensors: &[(&str, &[u64])]) -> PathBuf {
    let folder = parent.join("source");
    std::fs::create_dir_all(&folder).expect("make the folder");
    std::fs::write(folder.join("config.json"), config.to_string()).expect("write config.json");
    let tokenizer = data()
        .expect("the demo model")
        .join("models")
        .join(MODEL)
        .join("tokenizer.json");
    std::fs::copy(tokenizer, folder.join("tokenizer.json")).expect("copy the tokenizer");
    let template = json!({"chat_template": "<|im_start|>", "eos_token": "<|im_end|>"});
    std::fs::write(folder.join("tokenizer_config.json"), template.to_string()).expect("write the template");
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<u64>();
        header.insert(
            (*name).to_owned(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}),
        );
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + usize::try_from(end).expect("small"), 0);
    std::fs::write(folder.join("model.safetensors"), file).expect("write the weights");
    folder
}

const TABLE: (&str, &[u64]) = ("model.embed_tokens.weight", &[4, 32]);

fn import(data: &Path, source: &Path, extra: &[&str]) -> (Output, String) {
    let source = source.to_str().expect("a plain path");
    let mut args = vec![
        "model",
        "import",
        source,
        "--name",
        "bad",
        "--license",
        "Apache-2.0",
    ];
    args.extend_from_slice(extra);
    galerne(data, &args)
}

fn nothing_left(data: &Path) {
    let models = data.join("models");
    let left: Vec<_> = std::fs::read_dir(&models)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .collect();
    assert!(left.is_empty(), "left behind in {}: {left:?}", models.display());
}

#[test]
fn truncated_gguf_names_what_is_missing() {
    let Some(gguf) = gguf() else { return };
    let whole = std::fs::read(gguf).expect("read the demo model");
    let folder = tempfile::tempdir().expect("a folder");
    for bytes in [0, 3, 20, 4_000, 1_500_000, whole.len() / 2, whole.len() - 1] {
        let file = folder.path().join("cut.gguf");
        std::fs::write(&file, &whole[..bytes]).expect("write the cut file");
        let (output, text) = import(folder.path(), &file, &[]);
        assert!(!output.status.success(), "a file of {bytes} bytes was imported");
        assert!(
            [
                "tensor",
                "tokenizer.ggml",
                "general.",
                "llama.",
                "magic",
                "header"
            ]
            .iter()
            .any(|word| text.contains(word)),
            "the error for {bytes} bytes names nothing: {text}"
        );
        nothing_left(folder.path());
    }
}

#[test]
fn unknown_model_type_names_the_flags() {
    if data().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let source = hf_folder(
        folder.path(),
        &json!({"model_type": "perceptron", "max_position_embeddings": 64}),
        &[TABLE],
    );
    let (output, text) = import(folder.path(), &source, &[]);
    assert!(!output.status.success());
    assert!(
        text.contains("perceptron") && text.contains("--architecture"),
        "{text}"
    );
    nothing_left(folder.path());
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    if data().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let config = json!({"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 4,
        "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu"});
    let source = hf_folder(folder.path(), &config, &[TABLE]);
    let (output, text) = import(folder.path(), &source, &[]);
    assert!(
        !output.status.success(),
        "a model without its tensors was imported"
    );
    assert!(
        text.contains("model.layers.0.input_layernorm.weight"),
        "the error names the missing tensor: {text}"
    );
    nothing_left(folder.path());

    let norm: (&str, &[u64]) = ("model.layers.0.input_layernorm.weight", &[16]);
    let source = hf_folder(folder.path(), &config, &[TABLE, norm]);
    let (output, text) = import(folder.path(), &source, &[]);
    assert!(!output.status.success(), "a tensor of another shape was imported");
    assert!(
        text.contains("[32]") && text.contains("[16]"),
        "the error names both shapes: {text}"
    );
    nothing_left(folder.path());
}

/// What the hostile guest does for each word, and what the error must say.
const MISBEHAVIOURS: [(&str, &[&str]); 8] = [
    ("loop", &["limit of", "ms in build"]),
    ("trap", &["trapped in build"]),
    ("alloc", &["exceeded its limit in build", "memory"]),
    ("recurse", &["trapped in build"]),
    ("cycle", &["node", "before"]),
    ("shape", &["expected", "got"]),
    ("huge", &["exceeded its limit in build"]),
    ("refuse", &["refused in build"]),
];

fn hostile_guest() -> Option<PathBuf> {
    let guest = root().join("target/guests/hostile.wasm");
    if guest.exists() {
        return Some(guest);
    }
    eprintln!(
        "SKIPPED: no hostile guest at {}; `cargo xtask guests` builds it",
        guest.display()
    );
    None
}

#[test]
fn hostile_architectures_are_refused_in_bounded_time() {
    let (Some(_), Some(guest)) = (data(), hostile_guest()) else {
        return;
    };
    let guest = guest.to_str().expect("a plain path");
    for (misbehave, says) in MISBEHAVIOURS {
        let folder = tempfile::tempdir().expect("a folder");
        let config = json!({"model_type": "hostile", "misbehave": misbehave, "max_position_embeddings": 64});
        let source = hf_folder(folder.path(), &config, &[TABLE]);
        let (output, text) = import(folder.path(), &source, &["--architecture", guest]);
        assert!(!output.status.success(), "{misbehave}: the package was imported");
        for word in says {
            assert!(
                text.contains(word),
                "{misbehave}: the error does not say \"{word}\": {text}"
            );
        }
        nothing_left(folder.path());
    }
}

/// A package that went bad after its import (a swapped guest) is refused, and the other models are served.
#[test]
fn a_host_serves_its_other_models_beside_a_hostile_one() {
    let (Some(data), Some(guest)) = (data(), hostile_guest()) else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let models = folder.path().join("models");
    std::fs::create_dir_all(&models).expect("make the folder");
    copy_package(&data.join("models").join(MODEL), &models.join(MODEL));
    copy_package(&data.join("models").join(MODEL), &models.join("evil"));
    std::fs::copy(&guest, models.join("evil/architecture.wasm")).expect("swap the guest");
    let config = models.join("evil/config.json");
    std::fs::write(
        config,
        json!({"model_type": "hostile", "misbehave": "loop"}).to_string(),
    )
    .expect("write");
    let host = Host::start(folder.path(), &[]);
    let address = host.http.strip_prefix("http://").expect("plain HTTP").to_owned();
    let mut stream = std::net::TcpStream::connect(address).expect("connect");
    use std::io::{Read as _, Write as _};
    stream
        .write_all(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    assert!(answer.contains(MODEL) && !answer.contains("evil"), "{answer}");

    let (output, text) = galerne(
        folder.path(),
        &[
            "serve",
            "--model",
            "evil",
            "--listen",
            "127.0.0.1:0",
            "--http",
            "off",
        ],
    );
    assert!(
        !output.status.success(),
        "asked for by name, a bad package is an error"
    );
    assert!(text.contains("evil"), "{text}");
}

fn copy_package(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("make the folder");
    for entry in std::fs::read_dir(from).expect("read the package") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_name().to_string_lossy().ends_with(".safetensors") {
            std::fs::hard_link(entry.path(), target).expect("link the weights");
        } else {
            std::fs::copy(entry.path(), target).expect("copy a file");
        }
    }
    // Its name is the folder's.
    let manifest = to.join("galerne.toml");
    let name = to.file_name().expect("a name").to_string_lossy().into_owned();
    let text = std::fs::read_to_string(&manifest).expect("read the manifest");
    std::fs::write(
        manifest,
        text.replacen(&format!("name = \"{MODEL}\""), &format!("name = \"{name}\""), 1),
    )
    .expect("write the manifest");
}
