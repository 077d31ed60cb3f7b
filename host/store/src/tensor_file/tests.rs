//! Safetensors headers, whole and broken.

use std::collections::BTreeMap;

use galerne_core::dtype::DType;
use galerne_core::weights::WeightInfo;
use proptest::prelude::*;
use serde_json::json;

use super::{TensorFile, TensorFileError, read_header, write_header};

fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

fn read(bytes: &[u8]) -> Result<TensorFile, TensorFileError> {
    read_header(bytes, bytes.len() as u64)
}

fn check_error(header: &serde_json::Value, data_bytes: usize, expected: &str) {
    let error = read(&file(&header.to_string(), data_bytes))
        .expect_err(expected)
        .to_string();
    assert!(
        error.contains(expected),
        "{error:?} does not contain {expected:?}"
    );
}

fn sample() -> BTreeMap<String, WeightInfo> {
    [
        ("norm", DType::F32, vec![3]),
        ("half", DType::Bf16, vec![4, 8]),
        ("wide", DType::F16, vec![2, 16]),
        ("q41", DType::Q4_1, vec![2, 64]),
        ("q80", DType::Q8_0, vec![2, 3, 32]),
        ("q6k", DType::Q6K, vec![3, 512]),
        ("scalar", DType::F32, vec![]),
        ("empty", DType::F32, vec![0, 4]),
    ]
    .into_iter()
    .map(|(name, dtype, shape)| (name.to_owned(), WeightInfo { dtype, shape }))
    .collect()
}

fn sample_file() -> (Vec<u8>, Vec<String>) {
    let (mut bytes, order) = write_header(&sample()).expect("header");
    assert!(bytes.len().is_multiple_of(64));
    bytes.resize(bytes.len() + 12 + 64 + 64 + 80 + 204 + 1260 + 4, 0);
    (bytes, order)
}

#[test]
fn what_is_written_is_read_back() {
    let (bytes, order) = sample_file();
    let read = read(&bytes).expect("read");
    let infos: BTreeMap<String, WeightInfo> = read
        .tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.info.clone()))
        .collect();
    assert_eq!(infos, sample());
    assert_eq!(
        order[..3],
        ["empty", "half", "wide"],
        "sizes that are multiples of 64 come first"
    );
    assert!(read.tensors["half"].start.is_multiple_of(64) && read.tensors["wide"].start.is_multiple_of(64));
}

#[test]
fn the_safetensors_crate_reads_what_is_written() {
    let (bytes, _) = sample_file();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
    let quantized = theirs.tensor("q41").expect("q41");
    assert_eq!(
        (quantized.dtype(), quantized.shape()),
        (safetensors::Dtype::U8, &[2, 40][..])
    );
    assert_eq!(
        theirs.tensor("half").expect("half").dtype(),
        safetensors::Dtype::BF16
    );
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let (bytes, _) = sample_file();
    for length in 0..bytes.len() {
        assert!(read(&bytes[..length]).is_err(), "cut at {length}");
    }
}

#[test]
fn lies_are_named() {
    let tensor = |dtype: &str, shape: &[u64], offsets: [u64; 2]| json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
    check_error(
        &json!({"w": tensor("F8_E4M3", &[4], [0, 4])}),
        4,
        "tensor \"w\": has dtype F8_E4M3, not supported",
    );
    check_error(
        &json!({"w": tensor("U8", &[4], [0, 4])}),
        4,
        "tensor \"w\": has dtype U8, which is supported only",
    );
    check_error(
        &json!({"w": tensor("F32", &[4], [0, 4])}),
        4,
        "tensor \"w\": data_offsets 0..4 span the wrong",
    );
    check_error(
        &json!({"w": tensor("F32", &[1], [4, 0])}),
        4,
        "tensor \"w\": data_offsets 4..0 span the wrong",
    );
    check_error(
        &json!({"w": tensor("F32", &[1], [0, 4])}),
        3,
        "tensor \"w\": ends at byte 4 of the data",
    );
    check_error(
        &json!({"w": tensor("F32", &[1 << 62, 8], [0, 4])}),
        4,
        "tensor \"w\": shape",
    );
    check_error(
        &json!({"w": tensor("F32", &[1; 9], [0, 4])}),
        4,
        "tensor \"w\": has 9 dimensions",
    );
    check_error(
        &json!({"": tensor("F32", &[1], [0, 4])}),
        4,
        "its name has 0 bytes",
    );
    check_error(
        &json!({"w": tensor("F32", &[1], [0, 4])}),
        5,
        "tensors cover 4 bytes, the file has 5",
    );
    check_error(
        &json!({"a": tensor("F32", &[1], [0, 4]), "b": tensor("F32", &[1], [0, 4])}),
        4,
        "tensor \"b\": begins at byte 0 of the data, the tensor before it ends at 4",
    );
    check_error(
        &json!({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        4,
        "tensor \"w\": invalid value",
    );
    check_error(&json!({"w": {"dtype": "F32"}}), 4, "tensor \"w\": missing field");
    let described =
        |json: &str| json!({"__metadata__": {"galerne.tensors": json}, "q": tensor("U8", &[1, 20], [0, 20])});
    check_error(&described("{}"), 20, "tensor \"q\": has dtype U8");
    check_error(&described("nonsense"), 20, "metadata \"galerne.tensors\"");
    check_error(
        &described(r#"{"q":{"dtype":"q4_1","shape":[1,33]}}"#),
        20,
        "tensor \"q\": shape [1, 33]",
    );
    check_error(
        &described(r#"{"q":{"dtype":"q4_1","shape":[2,32]}}"#),
        20,
        "tensor \"q\": is stored as [1, 20]",
    );
    let stray = r#"{"q":{"dtype":"q4_1","shape":[1,32]},"r":{"dtype":"q4_1","shape":[1,32]}}"#;
    check_error(&described(stray), 20, "tensor \"r\": is described");
    let twice = r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let error = read(&file(twice, 4)).expect_err("twice").to_string();
    assert!(error.contains("tensor \"w\": listed twice"), "{error}");
}

#[test]
fn a_lying_header_length_is_refused_before_reading() {
    for (length, expected) in [
        (u64::MAX, "the limit is"),
        (100_000_001, "the limit is"),
        (50, "truncated"),
    ] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        let error = read(&bytes).expect_err("lie").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

proptest! {
    #[test]
    fn flipped_bytes_never_panic_nor_reach_out(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let (mut bytes, _) = sample_file();
        for (place, value) in flips {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Ok(file) = read(&bytes) {
            for (name, tensor) in &file.tensors {
                prop_assert!(tensor.start + tensor.size_bytes <= bytes.len() as u64, "{name}");
            }
        }
    }
}
