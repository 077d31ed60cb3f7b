//! The header of a safetensors file: read with every claim checked, and written. Must not know what tensors mean.
//!
//! Layout: 8 bytes little-endian header length, a JSON object (tensor name → dtype, shape, `data_offsets`, and
//! `__metadata__`: string → string), then the data. Quantized tensors are Galerne's own: dtype `U8` with shape
//! `[rows, row bytes]`, and in `__metadata__` under `galerne.tensors` a JSON object that maps the name to
//! `{"dtype": "q4_1", "shape": [rows, columns]}`. Any safetensors reader can open such a file.

use std::collections::BTreeMap;
use std::io::Read;

use galerne_core::dtype::DType;
use galerne_core::weights::WeightInfo;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// The metadata key that describes quantized tensors.
pub const QUANTIZED_KEY: &str = "galerne.tensors";
/// Longest header accepted, as in the safetensors format.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Most dimensions of a tensor.
pub const RANK_MAX: usize = 8;
/// Longest name of a tensor.
pub const NAME_BYTES_MAX: usize = 256;
/// Data starts at a multiple of this, and so does every tensor whose size is one.
pub const ALIGN_BYTES: u64 = 64;

/// What is wrong with a tensor file.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// Reading failed.
    #[error("read header: {0}")]
    Read(#[from] std::io::Error),
    /// The file ends inside its header.
    #[error("header: expected {expected} bytes, the file has {got}; is it truncated?")]
    Truncated {
        /// Bytes the header claims.
        expected: u64,
        /// Bytes in the file.
        got: u64,
    },
    /// The header is longer than allowed.
    #[error("header: {bytes} bytes, the limit is {HEADER_BYTES_MAX}")]
    HeaderTooLong {
        /// Its length.
        bytes: u64,
    },
    /// The header is not the JSON it should be.
    #[error("header: {0}")]
    Json(#[from] serde_json::Error),
    /// `galerne.tensors` is not the JSON it should be.
    #[error("header: metadata {QUANTIZED_KEY:?}: {0}")]
    Quantized(serde_json::Error),
    /// A tensor's description does not hold.
    #[error("tensor {tensor:?}: {problem}")]
    Tensor {
        /// The tensor's name, cut if long.
        tensor: String,
        /// What does not hold.
        problem: TensorProblem,
    },
    /// Bytes no tensor covers.
    #[error("data: tensors cover {covered} bytes, the file has {got}")]
    Uncovered {
        /// Bytes the tensors cover.
        covered: u64,
        /// Bytes of data in the file.
        got: u64,
    },
}

/// What does not hold of one tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorProblem {
    /// The name is empty or too long.
    #[error("its name has {0} bytes, expected 1 to {NAME_BYTES_MAX}")]
    Name(usize),
    /// The element type is not supported.
    #[error("has dtype {0}, not supported; supported: F32, F16, BF16")]
    DType(String),
    /// A `U8` tensor without a description.
    #[error("has dtype U8, which is supported only for tensors described in metadata {QUANTIZED_KEY:?}")]
    Undescribed,
    /// A description without a tensor.
    #[error("is described in metadata {QUANTIZED_KEY:?}, but the file has no U8 tensor of this name")]
    NotStored,
    /// Too many dimensions.
    #[error("has {0} dimensions, the limit is {RANK_MAX}")]
    Rank(usize),
    /// The shape's size overflows, or its rows are not whole blocks.
    #[error("shape {shape:?} cannot be stored as {dtype}")]
    Shape {
        /// The element type.
        dtype: &'static str,
        /// The shape.
        shape: Vec<u64>,
    },
    /// The stored shape is not what the description needs.
    #[error("is stored as {got:?} bytes, its description needs {expected:?}")]
    StoredShape {
        /// Rows and bytes of a row.
        expected: [u64; 2],
        /// The stored shape.
        got: Vec<u64>,
    },
    /// The offsets do not span the shape's bytes.
    #[error("data_offsets {begin}..{end} span the wrong number of bytes, its shape needs {expected}")]
    Span {
        /// First byte.
        begin: u64,
        /// Byte after the last.
        end: u64,
        /// Bytes the shape needs.
        expected: u64,
    },
    /// The offsets lie behind the end of the file.
    #[error("ends at byte {end} of the data, the file has {got}; is it truncated?")]
    PastEnd {
        /// Byte after the last.
        end: u64,
        /// Bytes of data in the file.
        got: u64,
    },
    /// It does not begin where the tensor before it ends.
    #[error("begins at byte {begin} of the data, the tensor before it ends at {expected}")]
    Gap {
        /// First byte.
        begin: u64,
        /// Where it should begin.
        expected: u64,
    },
}

/// Where a tensor lies, and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Element type and logical shape.
    pub info: WeightInfo,
    /// First byte, from the start of the file.
    pub start: u64,
    /// Its size.
    pub size_bytes: u64,
}

/// A checked header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TensorFile {
    /// All tensors by name.
    pub tensors: BTreeMap<String, StoredTensor>,
}

/// Reads and checks the header of a file of `file_bytes` bytes: shapes, types, that the data lies inside the file,
/// and that no two tensors share a byte.
///
/// # Errors
/// Names the tensor and what does not hold of it.
pub fn read_header(mut reader: impl Read, file_bytes: u64) -> Result<TensorFile, TensorFileError> {
    let truncated = |expected| TensorFileError::Truncated {
        expected,
        got: file_bytes,
    };
    let body_bytes = file_bytes.checked_sub(8).ok_or_else(|| truncated(8))?;
    let mut length = [0; 8];
    reader.read_exact(&mut length)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(TensorFileError::HeaderTooLong { bytes: header_bytes });
    }
    let data_bytes = body_bytes
        .checked_sub(header_bytes)
        .ok_or_else(|| truncated(header_bytes + 8))?;
    // `take` and `read_to_end`: memory grows with the bytes that are really there.
    let mut header = Vec::new();
    reader.take(header_bytes).read_to_end(&mut header)?;
    let raw: RawHeader = serde_json::from_slice(&header)?;
    let described = raw.described()?;
    check_tensors(raw.tensors, &described, 8 + header_bytes, data_bytes)
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

#[derive(Deserialize, Serialize)]
struct Described {
    dtype: DType,
    shape: Vec<u64>,
}

/// The header as it is written, with repeated names refused: two readers could see two different tensors.
#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, RawTensor>,
}

impl RawHeader {
    fn described(&self) -> Result<BTreeMap<String, Described>, TensorFileError> {
        match self.metadata.get(QUANTIZED_KEY) {
            Some(json) => serde_json::from_str(json).map_err(TensorFileError::Quantized),
            None => Ok(BTreeMap::new()),
        }
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                        continue;
                    }
                    let tensor = map
                        .next_value()
                        .map_err(|error| A::Error::custom(format!("tensor {:?}: {error}", shorten(&name))))?;
                    if header.tensors.insert(name.clone(), tensor).is_some() {
                        return Err(A::Error::custom(format!(
                            "tensor {:?}: listed twice",
                            shorten(&name)
                        )));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Foreign names go into messages cut, so that a message stays a message.
fn shorten(name: &str) -> String {
    name.chars().take(NAME_BYTES_MAX).collect()
}

fn check_tensors(
    raw: BTreeMap<String, RawTensor>,
    described: &BTreeMap<String, Described>,
    data_start: u64,
    data_bytes: u64,
) -> Result<TensorFile, TensorFileError> {
    let fault = |name: &str, problem| TensorFileError::Tensor {
        tensor: shorten(name),
        problem,
    };
    if let Some(name) = described
        .keys()
        .find(|&name| raw.get(name).is_none_or(|tensor| tensor.dtype != "U8"))
    {
        return Err(fault(name, TensorProblem::NotStored));
    }
    let mut tensors = BTreeMap::new();
    let mut spans = Vec::with_capacity(raw.len());
    for (name, tensor) in raw {
        let info = check_tensor(&name, &tensor, described.get(&name), data_bytes)
            .map_err(|problem| fault(&name, problem))?;
        let [begin, end] = tensor.data_offsets;
        spans.push((begin, end, name.clone()));
        tensors.insert(
            name,
            StoredTensor {
                info,
                start: data_start + begin,
                size_bytes: end - begin,
            },
        );
    }
    spans.sort_unstable();
    let mut covered = 0;
    for (begin, end, name) in spans {
        if begin != covered {
            return Err(fault(
                &name,
                TensorProblem::Gap {
                    begin,
                    expected: covered,
                },
            ));
        }
        covered = end;
    }
    if covered != data_bytes {
        return Err(TensorFileError::Uncovered {
            covered,
            got: data_bytes,
        });
    }
    Ok(TensorFile { tensors })
}

fn check_tensor(
    name: &str,
    tensor: &RawTensor,
    described: Option<&Described>,
    data_bytes: u64,
) -> Result<WeightInfo, TensorProblem> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(TensorProblem::Name(name.len()));
    }
    let info = match (tensor.dtype.as_str(), described) {
        ("F32", _) => WeightInfo {
            dtype: DType::F32,
            shape: tensor.shape.clone(),
        },
        ("F16", _) => WeightInfo {
            dtype: DType::F16,
            shape: tensor.shape.clone(),
        },
        ("BF16", _) => WeightInfo {
            dtype: DType::Bf16,
            shape: tensor.shape.clone(),
        },
        ("U8", Some(described)) => WeightInfo {
            dtype: described.dtype,
            shape: described.shape.clone(),
        },
        ("U8", None) => return Err(TensorProblem::Undescribed),
        (other, _) => return Err(TensorProblem::DType(shorten(other))),
    };
    let [rows, row_bytes] = rows_and_bytes(&info)?;
    if tensor.dtype == "U8" && tensor.shape != [rows, row_bytes] {
        return Err(TensorProblem::StoredShape {
            expected: [rows, row_bytes],
            got: tensor.shape.clone(),
        });
    }
    // `rows_and_bytes` has checked the product.
    let expected = rows * row_bytes;
    let [begin, end] = tensor.data_offsets;
    if end.checked_sub(begin) != Some(expected) {
        return Err(TensorProblem::Span { begin, end, expected });
    }
    if end > data_bytes {
        return Err(TensorProblem::PastEnd { end, got: data_bytes });
    }
    Ok(info)
}

/// Rows (all dimensions but the innermost) and bytes of one row; their product does not overflow.
///
/// # Errors
/// If there are too many dimensions, rows are not whole blocks, or the size overflows.
pub fn rows_and_bytes(info: &WeightInfo) -> Result<[u64; 2], TensorProblem> {
    if info.shape.len() > RANK_MAX {
        return Err(TensorProblem::Rank(info.shape.len()));
    }
    let sizes = || {
        let (&columns, outer) = info.shape.split_last().unwrap_or((&1, &[]));
        let rows = outer
            .iter()
            .try_fold(1_u64, |product, &extent| product.checked_mul(extent))?;
        let row_bytes = info.dtype.row_bytes(usize::try_from(columns).ok()?)? as u64;
        rows.checked_mul(row_bytes)?;
        Some([rows, row_bytes])
    };
    sizes().ok_or_else(|| TensorProblem::Shape {
        dtype: info.dtype.name(),
        shape: info.shape.clone(),
    })
}

/// The header of a file with these tensors, and the order in which their data follows it. Tensors whose size is a
/// multiple of [`ALIGN_BYTES`] come first, so that they are aligned in the file although the format allows no gaps.
///
/// # Errors
/// Names the first tensor whose size overflows or whose rows are not whole blocks.
pub fn write_header(
    tensors: &BTreeMap<String, WeightInfo>,
) -> Result<(Vec<u8>, Vec<String>), TensorFileError> {
    let mut sized = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        let fault = |problem| TensorFileError::Tensor {
            tensor: shorten(name),
            problem,
        };
        let [rows, row_bytes] = rows_and_bytes(info).map_err(fault)?;
        let unaligned = !(rows * row_bytes).is_multiple_of(ALIGN_BYTES);
        sized.push((unaligned, name, info, [rows, row_bytes]));
    }
    sized.sort_by_key(|(unaligned, name, ..)| (*unaligned, *name));
    let mut header = serde_json::Map::new();
    let described: BTreeMap<&String, Described> = sized
        .iter()
        .filter(|(_, _, info, _)| info.dtype.block_elements() > 1)
        .map(|(_, name, info, _)| {
            (
                *name,
                Described {
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                },
            )
        })
        .collect();
    let described = serde_json::to_string(&described)?;
    header.insert(
        "__metadata__".to_owned(),
        serde_json::json!({ "format": "pt", QUANTIZED_KEY: described }),
    );
    let mut end = 0_u64;
    for (_, name, info, [rows, row_bytes]) in &sized {
        let begin = end;
        end = begin
            .checked_add(rows * row_bytes)
            .ok_or_else(|| TensorFileError::Tensor {
                tensor: shorten(name),
                problem: TensorProblem::Shape {
                    dtype: info.dtype.name(),
                    shape: info.shape.clone(),
                },
            })?;
        let (dtype, shape) = match info.dtype {
            DType::F32 => ("F32", info.shape.clone()),
            DType::F16 => ("F16", info.shape.clone()),
            DType::Bf16 => ("BF16", info.shape.clone()),
            _ => ("U8", vec![*rows, *row_bytes]),
        };
        let raw = RawTensor {
            dtype: dtype.to_owned(),
            shape,
            data_offsets: [begin, end],
        };
        header.insert((*name).clone(), serde_json::to_value(raw)?);
    }
    let mut json = serde_json::to_vec(&header)?;
    let aligned = (json.len() + 8).next_multiple_of(ALIGN_BYTES as usize) - 8;
    json.resize(aligned, b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&json);
    Ok((
        bytes,
        sized.into_iter().map(|(_, name, ..)| name.clone()).collect(),
    ))
}

#[cfg(test)]
mod tests;
