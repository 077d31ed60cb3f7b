//! The fuzz targets' corpora as ordinary tests: `ok-` files are accepted, all others are refused with a message.

mod support;

use std::path::Path;

use support::Format;

fn check(folder: &str, format: Format) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(folder);
    let mut accepted = 0;
    let mut refused = 0;
    for entry in std::fs::read_dir(&folder).expect("the corpus") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let judged = format.read(&std::fs::read(&path).expect("a file"));
        assert_eq!(judged.is_ok(), name.starts_with("ok-"), "{name}: {judged:?}");
        if let Err(message) = judged {
            assert!(
                message.len() < 2_000,
                "{name}: a message of {} bytes",
                message.len()
            );
            refused += 1;
        } else {
            accepted += 1;
        }
    }
    assert!(
        accepted > 0 && refused > 0,
        "{accepted} accepted, {refused} refused"
    );
}

#[test]
fn gguf_corpus_is_judged_as_named() {
    check("gguf", Format::Gguf);
}

#[test]
fn safetensors_corpus_is_judged_as_named() {
    check("safetensors", Format::Safetensors);
}
