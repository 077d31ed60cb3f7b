//! The demo model's GGUF file, where it has been fetched: import, tokenizer goldens, weights. Without it these tests
//! say so and pass.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::UNIX_EPOCH;

use galerne_core::dtype::DType;
use galerne_core::ids::TokenId;
use galerne_core::weights::WeightSource;
use galerne_store::gguf::{Gguf, GgufLimits};
use galerne_store::import::{GuestChooser, ImportRequest, NoProgress, import};

/// Gives bytes that are not guests, which is no matter to the store.
struct Chooser;

impl GuestChooser for Chooser {
    fn architecture(&self, model_type: &str) -> Result<Vec<u8>, String> {
        Ok(model_type.as_bytes().to_vec())
    }

    fn chat(&self, template: Option<&str>, _special_tokens: &[String]) -> Result<Vec<u8>, String> {
        Ok(template.unwrap_or_default().as_bytes().to_vec())
    }
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The demo model's file, as the build tool unpacks it.
fn demo_file() -> Option<PathBuf> {
    let folder = workspace().join("target/demo-source");
    let inner = std::fs::read_dir(&folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()));
    let found = [folder.clone()].into_iter().chain(inner).find_map(|folder| {
        let files = std::fs::read_dir(folder).ok()?;
        files
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "gguf"))
    });
    if found.is_none() {
        eprintln!(
            "skipped: no GGUF file in {}; `cargo xtask demo` fetches it",
            folder.display()
        );
    }
    found
}

fn ids(value: &serde_json::Value) -> Vec<TokenId> {
    let number = |id: &serde_json::Value| TokenId(u32::try_from(id.as_u64().expect("id")).expect("id"));
    value.as_array().expect("ids").iter().map(number).collect()
}

#[test]
fn the_demo_model_imports_and_its_tokenizer_matches_the_goldens() {
    let Some(source) = demo_file() else { return };
    let data = tempfile::tempdir().expect("folder");
    let request = ImportRequest {
        source: &source,
        models_dir: data.path(),
        name: "smollm2",
        version: None,
        license: None,
        replace: false,
        now: UNIX_EPOCH,
    };
    let package = import(&request, &Chooser, &NoProgress, &AtomicBool::new(false)).expect("import");
    let tokenizer = package.tokenizer().expect("tokenizer");
    let golden = std::fs::read(workspace().join("tests/golden/smollm2-tokenizer.json")).expect("golden");
    let golden: serde_json::Value = serde_json::from_slice(&golden).expect("golden");
    let cases = golden["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 31);
    for case in cases {
        let text = case["text"].as_str().expect("text");
        let plain = tokenizer.encode(text).expect("encode");
        assert_eq!(plain, ids(&case["ids_plain"]), "plain {text:?}");
        let special = tokenizer.encode_special(text).expect("encode");
        assert_eq!(special, ids(&case["ids_parse_special"]), "special {text:?}");
        assert_eq!(
            tokenizer.decode(&plain),
            case["detok"].as_str().expect("detok"),
            "decode {text:?}"
        );
        let mut stream = tokenizer.stream();
        let pieces: String = plain.iter().map(|&token| stream.push(token)).collect();
        assert_eq!(pieces + &stream.finish(), text, "stream {text:?}");
    }
    let manifest = package.manifest();
    assert_eq!(
        (manifest.model_type.as_str(), manifest.license.as_deref()),
        ("llama", Some("Apache-2.0"))
    );
    assert_eq!(
        (manifest.chat.eos_tokens.as_slice(), manifest.chat.add_bos),
        (&["<|im_end|>".to_owned()][..], false)
    );
    package.verify(|_| ()).expect("digests");
    let weights = package.weights().expect("weights");
    assert_eq!(weights.index().tensors.len(), 272);
    for (name, dtype, shape) in [
        ("model.embed_tokens.weight", DType::Q8_0, &[49_152, 576][..]),
        (
            "model.layers.29.self_attn.k_proj.weight",
            DType::Q4_1,
            &[192, 576],
        ),
        ("model.norm.weight", DType::F32, &[576]),
    ] {
        let weight = weights
            .weight(name)
            .expect("read")
            .unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!((weight.dtype, weight.shape), (dtype, shape), "{name}");
    }
}

#[test]
fn the_demo_model_cut_anywhere_is_an_error_that_names_the_place() {
    let Some(source) = demo_file() else { return };
    let bytes = std::fs::read(source).expect("read");
    let limits = GgufLimits::default();
    let cuts = (0..1_785_664)
        .step_by(59_999)
        .chain((1_785_664..bytes.len()).step_by(9_999_991));
    for cut in cuts.chain([bytes.len() - 1]) {
        let error = Gguf::read(&bytes[..cut], cut as u64, &limits)
            .expect_err("cut")
            .to_string();
        assert!(error.contains("truncated"), "cut at {cut}: {error}");
        let names = ["magic", "version", "count", "tokenizer.ggml.", "tensor "];
        assert!(
            names.iter().any(|name| error.contains(name)),
            "cut at {cut}: {error}"
        );
    }
}
