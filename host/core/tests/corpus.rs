//! The fuzz corpus as an ordinary test: every file is read and judged, and each name says how.

mod support;

use std::path::{Path, PathBuf};

use support::{Case, llama, mixture, run_case};

fn corpus() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/graph");
    let entries = std::fs::read_dir(&folder).expect("the corpus is part of the repository");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("readable").path()).collect();
    files.sort();
    files
}

/// `ok-` passes the gate, `refused-` does not, `noise-` is no graph at all; `infinite-` has a number that a JSON reader refuses
/// or rounds to infinity, depending on the features other crates give it. What a fuzzer adds may be anything.
#[test]
fn every_file_is_judged_as_its_name_says() {
    let files = corpus();
    assert!(files.len() >= 10, "the corpus has only {} files", files.len());
    for file in files {
        let bytes = std::fs::read(&file).expect("readable");
        let name = file.file_name().expect("a file").to_string_lossy().into_owned();
        let result = run_case(&bytes);
        let kind = name.split('-').next().unwrap_or_default();
        match (kind, &result) {
            ("ok", Some(Ok(_)))
            | ("refused", Some(Err(_)))
            | ("noise", None)
            | ("infinite", None | Some(Err(_))) => {}
            ("ok" | "refused" | "noise" | "infinite", _) => panic!("{name}: judged {result:?}"),
            _ => {}
        }
    }
}

/// Every truncation of a valid case is refused by the parser or the gate, never by a panic.
#[test]
fn truncated_and_flipped_bytes_never_panic() {
    let bytes = serde_json::to_vec(&Case::from(&mixture())).expect("plain data");
    assert!(matches!(run_case(&bytes), Some(Ok(_))));
    for end in 0..bytes.len() {
        assert!(run_case(&bytes[..end]).is_none(), "cut at {end}");
    }
    for position in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[position] ^= 1;
        let _judged_without_panic = run_case(&flipped);
    }
}

#[test]
fn a_graph_survives_json() {
    let model = llama();
    let json = serde_json::to_vec(&Case::from(&model)).expect("plain data");
    let valid = run_case(&json).expect("a case").expect("a valid graph");
    assert_eq!(valid.graph(), &model.graph);
}
