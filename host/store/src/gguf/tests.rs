//! Broken and lying GGUF files: errors that name the field, no panic, bounded memory.

use proptest::prelude::*;

use super::{Gguf, GgufError, GgufLimits, Value};

/// Writes GGUF files, right or wrong.
#[derive(Debug, Clone)]
pub(crate) struct Builder {
    pub(crate) version: u32,
    pub(crate) alignment: u64,
    pub(crate) metadata: Vec<(String, u32, Vec<u8>)>,
    /// Name, dimensions innermost first, type number, data.
    pub(crate) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

pub(crate) fn text(value: &str) -> Vec<u8> {
    let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(value.as_bytes());
    bytes
}

pub(crate) fn array(kind: u32, values: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend((values.len() as u64).to_le_bytes());
    bytes.extend(values.concat());
    bytes
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            version: 3,
            alignment: 32,
            metadata: Vec::new(),
            tensors: Vec::new(),
        }
    }

    pub(crate) fn set(&mut self, key: &str, kind: u32, bytes: Vec<u8>) {
        self.metadata.retain(|(name, ..)| name != key);
        self.metadata.push((key.to_owned(), kind, bytes));
    }

    pub(crate) fn number(&mut self, key: &str, value: u32) {
        self.set(key, 4, value.to_le_bytes().to_vec());
    }

    pub(crate) fn text(&mut self, key: &str, value: &str) {
        self.set(key, 8, text(value));
    }

    pub(crate) fn tensor(&mut self, name: &str, dimensions: &[u64], kind: u32, data: Vec<u8>) {
        self.tensors.retain(|(other, ..)| other != name);
        self.tensors
            .push((name.to_owned(), dimensions.to_vec(), kind, data));
    }

    /// The file, and the length of its header.
    pub(crate) fn build(&self) -> (Vec<u8>, usize) {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            file.extend(text(key));
            file.extend(kind.to_le_bytes());
            file.extend(value);
        }
        let mut offset = 0_u64;
        for (name, dimensions, kind, data) in &self.tensors {
            file.extend(text(name));
            file.extend((dimensions.len() as u32).to_le_bytes());
            file.extend(dimensions.iter().flat_map(|extent| extent.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend(offset.to_le_bytes());
            offset = (offset + data.len() as u64).next_multiple_of(self.alignment);
        }
        let header = file.len();
        for (.., data) in &self.tensors {
            file.resize(file.len().next_multiple_of(self.alignment as usize), 0);
            file.extend(data);
        }
        (file, header)
    }
}

fn read(bytes: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::read(bytes, bytes.len() as u64, &GgufLimits::default())
}

fn check_error(builder: &Builder, expected: &str) {
    let error = read(&builder.build().0).expect_err(expected).to_string();
    assert!(
        error.contains(expected),
        "{error:?} does not contain {expected:?}"
    );
}

fn sample() -> Builder {
    let mut builder = Builder::new();
    builder.text("general.architecture", "llama");
    builder.set("a.u8", 0, vec![200]);
    builder.set("a.i8", 1, vec![200]);
    builder.set("a.u16", 2, 65_000_u16.to_le_bytes().to_vec());
    builder.set("a.i16", 3, (-2_i16).to_le_bytes().to_vec());
    builder.set("a.i32", 5, (-3_i32).to_le_bytes().to_vec());
    builder.set("a.f32", 6, 1e-5_f32.to_le_bytes().to_vec());
    builder.set("a.bool", 7, vec![1]);
    builder.set(
        "a.nested",
        9,
        array(9, &[array(8, &[text("x")]), array(0, &[vec![1], vec![2]])]),
    );
    builder.set("a.u64", 10, u64::MAX.to_le_bytes().to_vec());
    builder.set("a.i64", 11, i64::MIN.to_le_bytes().to_vec());
    builder.set("a.f64", 12, f64::NAN.to_le_bytes().to_vec());
    builder.tensor("plain", &[2, 3], 0, vec![7; 24]);
    builder.tensor("quantized", &[64, 2], 3, vec![9; 80]);
    builder
}

#[test]
fn every_value_type_is_read() {
    for version in [2, 3] {
        let (bytes, _) = Builder { version, ..sample() }.build();
        let gguf = read(&bytes).expect("read");
        let get = |key: &str| gguf.metadata[key].clone();
        assert_eq!(get("a.u8"), Value::Unsigned(200));
        assert_eq!(get("a.i8"), Value::Signed(-56));
        assert_eq!(get("a.u16"), Value::Unsigned(65_000));
        assert_eq!(get("a.i16"), Value::Signed(-2));
        assert_eq!(get("a.i32"), Value::Signed(-3));
        assert_eq!(get("a.f32"), Value::Float(1e-5));
        assert_eq!(get("a.bool"), Value::Bool(true));
        let inner = [
            Value::Array(vec![Value::Text("x".into())]),
            Value::Array([1, 2].map(Value::Unsigned).to_vec()),
        ];
        assert_eq!(get("a.nested"), Value::Array(inner.to_vec()));
        assert_eq!(get("a.u64"), Value::Unsigned(u64::MAX));
        assert_eq!(get("a.i64"), Value::Signed(i64::MIN));
        assert!(
            gguf.float("a.f64").is_err(),
            "not a number is not a finite number"
        );
        let plain = &gguf.tensors["plain"];
        assert_eq!((plain.info.shape.as_slice(), plain.size_bytes), (&[3, 2][..], 24));
        assert_eq!(&bytes[plain.start as usize..][..24], [7; 24]);
        let quantized = &gguf.tensors["quantized"];
        assert_eq!(&bytes[quantized.start as usize..], [9; 80]);
    }
}

/// Numbers and sizes as `ggml.h` and `ggml-common.h` have them.
#[test]
fn every_block_format_is_read_in_stored_form() {
    let formats = [
        (2, "q4_0", 32, 18),
        (3, "q4_1", 32, 20),
        (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34),
        (12, "q4_k", 256, 144),
        (13, "q5_k", 256, 176),
        (14, "q6_k", 256, 210),
        (20, "iq4_nl", 32, 18),
    ];
    for (kind, name, elements, block_bytes) in formats {
        let mut builder = sample();
        let stored: Vec<u8> = (0..6 * block_bytes).map(|i| (i % 251) as u8).collect();
        builder.tensor("blocks", &[2 * elements, 3], kind, stored.clone());
        let (bytes, _) = builder.build();
        let gguf = read(&bytes).expect("read");
        let tensor = &gguf.tensors["blocks"];
        assert_eq!(tensor.info.dtype.name(), name);
        assert_eq!(tensor.info.shape, [3, 2 * elements]);
        assert_eq!(tensor.size_bytes, stored.len() as u64, "{name}");
        assert_eq!(&bytes[tensor.start as usize..][..stored.len()], stored, "{name}");
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let (bytes, header) = sample().build();
    for length in 0..bytes.len() {
        let error = read(&bytes[..length]).expect_err("cut").to_string();
        assert!(
            error.contains("truncated"),
            "cut at {length} of {}: {error}",
            bytes.len()
        );
        if length > header {
            assert!(
                error.contains("tensor plain") || error.contains("tensor quantized"),
                "{error}"
            );
        }
    }
}

#[test]
fn lies_are_named() {
    let change = |f: &dyn Fn(&mut Builder)| {
        let mut builder = sample();
        f(&mut builder);
        builder
    };
    check_error(&change(&|b| b.version = 1), "version: expected 2 or 3, got 1");
    check_error(&change(&|b| b.version = 3_u32.swap_bytes()), "big-endian");
    check_error(
        &change(&|b| b.number("general.alignment", 12)),
        "general.alignment: expected a power of two",
    );
    check_error(
        &change(&|b| b.set("odd", 13, vec![])),
        "odd: expected a value type from 0 to 12, got 13",
    );
    check_error(
        &change(&|b| b.set("flag", 7, vec![2])),
        "flag: expected 0 or 1, got 2",
    );
    check_error(
        &change(&|b| b.metadata.push(("a.u8".into(), 0, vec![1]))),
        "a.u8: expected one entry",
    );
    check_error(
        &change(&|b| b.tensors.push(b.tensors[0].clone())),
        "tensor plain: expected one tensor",
    );
    let count = array(0, &[])
        .into_iter()
        .take(4)
        .chain(u64::MAX.to_le_bytes())
        .collect::<Vec<_>>();
    check_error(
        &change(&|b| b.set("long", 9, count.clone())),
        "long: 18446744073709551615, the limit is",
    );
    check_error(
        &change(&|b| b.set("long", 8, (1_u64 << 40).to_le_bytes().to_vec())),
        "the limit is 16777216",
    );
    let deep = (0..4).fold(array(0, &[]), |inner, _| array(9, &[inner]));
    check_error(
        &change(&|b| b.set("deep", 9, deep.clone())),
        "deep: nested arrays: 4, the limit is 3",
    );
    check_error(
        &change(&|b| b.tensor("blk.0.attn_q.weight", &[256, 1], 10, vec![0; 84])),
        "tensor blk.0.attn_q.weight has type Q2_K, not supported yet; supported: F32, F16",
    );
    check_error(
        &change(&|b| b.tensor("t", &[1], 77, vec![])),
        "tensor t has type number 77",
    );
    check_error(
        &change(&|b| b.tensor("t", &[33, 1], 3, vec![])),
        "tensor t: expected a shape",
    );
    check_error(
        &change(&|b| b.tensor("t", &[32, u64::MAX], 3, vec![])),
        "tensor t: expected a shape",
    );
    check_error(
        &change(&|b| b.tensor("t", &[1 << 40], 0, vec![])),
        "tensor t ends at byte",
    );
    check_error(
        &change(&|b| b.tensor("t", &[1; 5], 0, vec![])),
        "tensor t: dimension count: 5, the limit is 4",
    );
    check_error(
        &change(&|b| b.tensors[0].1 = vec![2, 6]),
        "tensor quantized begins at byte",
    );
}

#[test]
fn a_count_never_allocates() {
    // A header that claims the most it may, with nothing behind it.
    for (tensors, entries) in [(65_536_u64, 0_u64), (0, 4_096), (u64::MAX, 0), (0, u64::MAX)] {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        let error = read(&bytes).expect_err("nothing there").to_string();
        assert!(error.contains("count"), "{error}");
    }
}

proptest! {
    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        let (mut bytes, header) = sample().build();
        for (place, value) in flips {
            bytes[place.index(header)] = value;
        }
        if let Ok(gguf) = read(&bytes) {
            for (name, tensor) in &gguf.tensors {
                prop_assert!(tensor.start + tensor.size_bytes <= bytes.len() as u64, "{name}");
            }
        }
    }

    #[test]
    fn any_bytes_behind_the_magic_never_panic(tail in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tail);
        let _ = read(&bytes);
    }
}
