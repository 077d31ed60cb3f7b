//! Reader of GGUF files (versions 2 and 3, little-endian). Must not know what the metadata means.
//!
//! Source of the format: the GGUF specification of the ggml project. Every length and offset in the file is a claim:
//! it is compared with the file's size and with [`GgufLimits`] before anything is allocated or read for it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use galerne_core::dtype::DType;
use galerne_core::weights::WeightInfo;

use crate::tensor_file::rows_and_bytes;

mod cursor;
mod value;

use cursor::Cursor;
pub use value::{Kind, Value};

/// Bounds on a GGUF header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufLimits {
    /// Metadata entries.
    pub entries_max: u64,
    /// Tensors.
    pub tensors_max: u64,
    /// Bytes of a key or a tensor's name.
    pub name_bytes_max: u64,
    /// Bytes of one string.
    pub string_bytes_max: u64,
    /// Elements of all arrays together.
    pub elements_max: u64,
    /// Bytes of the whole header.
    pub header_bytes_max: u64,
}

impl Default for GgufLimits {
    fn default() -> Self {
        Self {
            entries_max: 4_096,
            tensors_max: 65_536,
            name_bytes_max: 256,
            string_bytes_max: 16 << 20,
            elements_max: 4 << 20,
            header_bytes_max: 256 << 20,
        }
    }
}

/// What is wrong with a GGUF file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// Reading failed.
    #[error("gguf: read {field}: {source}")]
    Read {
        /// What was being read.
        field: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file ends too early for what it claims.
    #[error("gguf: {field} needs {needed} bytes, {left} are left of the file; is it truncated?")]
    Truncated {
        /// What was being read.
        field: String,
        /// Bytes it needs.
        needed: u64,
        /// Bytes left.
        left: u64,
    },
    /// More of something than allowed.
    #[error("gguf: {field}: {got}, the limit is {limit}")]
    Limit {
        /// What is too large.
        field: String,
        /// How large it is.
        got: u64,
        /// The limit.
        limit: u64,
    },
    /// A field does not hold.
    #[error("gguf: {field}: expected {expected}, got {got}")]
    Field {
        /// The field, or `tensor NAME`.
        field: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A tensor has an element type the host cannot compute with.
    #[error(
        "gguf: tensor {tensor} has type {got}, not supported yet; supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL"
    )]
    TensorType {
        /// The tensor's name.
        tensor: String,
        /// The type's name, or its number if the number is unknown.
        got: String,
    },
    /// A tensor's data lies behind the end of the file.
    #[error("gguf: tensor {tensor} ends at byte {end}, the file has {file_bytes}; is it truncated?")]
    PastEnd {
        /// The tensor's name.
        tensor: String,
        /// Byte after its last.
        end: u64,
        /// Bytes in the file.
        file_bytes: u64,
    },
    /// Two tensors share bytes.
    #[error("gguf: tensor {tensor} begins at byte {start}, inside tensor {other}")]
    Overlap {
        /// The second tensor's name.
        tensor: String,
        /// Its first byte.
        start: u64,
        /// The first tensor's name.
        other: String,
    },
}

impl GgufError {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers give a value they are done with"
    )]
    pub(crate) fn field(field: impl Into<String>, expected: impl Into<String>, got: impl ToString) -> Self {
        Self::Field {
            field: field.into(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }
}

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Element type and shape, outermost dimension first (the file lists them the other way round).
    pub info: WeightInfo,
    /// First byte, from the start of the file.
    pub start: u64,
    /// Its size.
    pub size_bytes: u64,
}

/// A checked GGUF header.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gguf {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, GgufTensor>,
}

impl Gguf {
    /// Reads the header of a file of `file_bytes` bytes.
    ///
    /// # Errors
    /// Names the field or tensor that does not hold.
    pub fn read(reader: impl Read, file_bytes: u64, limits: &GgufLimits) -> Result<Self, GgufError> {
        let mut cursor = Cursor::new(reader, file_bytes, *limits);
        read_version(&mut cursor)?;
        let tensors = cursor.count("tensor count", limits.tensors_max, 24)?;
        let entries = cursor.count("metadata count", limits.entries_max, 13)?;
        let mut metadata = BTreeMap::new();
        for number in 0..entries {
            let key = cursor.name(|| format!("key of metadata entry {number}"))?;
            let value = value::read(&mut cursor, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(GgufError::field(key, "one entry", "a second one"));
            }
        }
        let alignment = alignment(&metadata)?;
        let mut raw = Vec::new();
        for number in 0..tensors {
            raw.push(read_tensor(&mut cursor, number)?);
        }
        let data_start = cursor.position().next_multiple_of(alignment);
        let tensors = place(raw, data_start, alignment, file_bytes)?;
        Ok(Self { metadata, tensors })
    }

    /// A text of the metadata.
    ///
    /// # Errors
    /// If it is there and not a string.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.get(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A number of the metadata that is not negative.
    ///
    /// # Errors
    /// If it is there and not such a number.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.get(key, "an unsigned number", |value| match value {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    /// A finite number of the metadata.
    ///
    /// # Errors
    /// If it is there and not such a number.
    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.get(key, "a finite number", |value| match value {
            Value::Float(number) if number.is_finite() => Some(*number),
            _ => None,
        })
    }

    /// A truth value of the metadata.
    ///
    /// # Errors
    /// If it is there and not one.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.get(key, "a boolean", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// An array of the metadata.
    ///
    /// # Errors
    /// If it is there and not an array.
    pub fn array(&self, key: &str) -> Result<Option<&[Value]>, GgufError> {
        self.get(key, "an array", |value| match value {
            Value::Array(values) => Some(values.as_slice()),
            _ => None,
        })
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        take: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        take(value)
            .map(Some)
            .ok_or_else(|| GgufError::field(key, expected, value.describe()))
    }
}

fn read_version<R: Read>(cursor: &mut Cursor<R>) -> Result<(), GgufError> {
    let magic: [u8; 4] = cursor.bytes("magic")?;
    if &magic != b"GGUF" {
        return Err(GgufError::field(
            "magic",
            "\"GGUF\"",
            format!("{:?}", magic.escape_ascii().to_string()),
        ));
    }
    match cursor.u32("version")? {
        2 | 3 => Ok(()),
        other if matches!(other.swap_bytes(), 1..=3) => Err(GgufError::field(
            "version",
            "a little-endian file",
            "a big-endian one",
        )),
        other => Err(GgufError::field("version", "2 or 3", other)),
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::Unsigned(bytes)) if bytes.is_power_of_two() && *bytes <= 65_536 => Ok(*bytes),
        Some(other) => Err(GgufError::field(
            "general.alignment",
            "a power of two up to 65536",
            other.describe(),
        )),
    }
}

struct RawTensor {
    name: String,
    info: WeightInfo,
    offset: u64,
}

fn read_tensor<R: Read>(cursor: &mut Cursor<R>, number: u64) -> Result<RawTensor, GgufError> {
    const DIMENSIONS_MAX: u32 = 4;
    let name = cursor.name(|| format!("name of tensor {number}"))?;
    let field = |what: &str| format!("tensor {name}: {what}");
    let rank = cursor.u32(&field("dimension count"))?;
    if rank > DIMENSIONS_MAX {
        return Err(GgufError::Limit {
            field: field("dimension count"),
            got: rank.into(),
            limit: DIMENSIONS_MAX.into(),
        });
    }
    let mut shape = Vec::new();
    for _ in 0..rank {
        shape.push(cursor.u64(&field("shape"))?);
    }
    shape.reverse();
    let kind = cursor.u32(&field("type"))?;
    let offset = cursor.u64(&field("offset"))?;
    let Some(dtype) = dtype_of(kind) else {
        let got = type_name(kind).map_or_else(|| format!("number {kind}"), str::to_owned);
        return Err(GgufError::TensorType { tensor: name, got });
    };
    Ok(RawTensor {
        name,
        info: WeightInfo { dtype, shape },
        offset,
    })
}

/// Checks that each tensor lies inside the file, aligned, alone, and under its own name.
fn place(
    raw: Vec<RawTensor>,
    data_start: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<BTreeMap<String, GgufTensor>, GgufError> {
    let mut tensors = BTreeMap::new();
    let mut spans = BTreeSet::new();
    for RawTensor { name, info, offset } in raw {
        let field = format!("tensor {name}");
        let [rows, row_bytes] = rows_and_bytes(&info)
            .map_err(|problem| GgufError::field(&field, "a shape its type can hold", problem))?;
        let size_bytes = rows * row_bytes;
        if !offset.is_multiple_of(alignment) {
            return Err(GgufError::field(
                &field,
                format!("an offset that is a multiple of {alignment}"),
                offset,
            ));
        }
        let start = data_start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(size_bytes));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(GgufError::field(&field, "an offset inside the file", offset));
        };
        if end > file_bytes {
            return Err(GgufError::PastEnd {
                tensor: name,
                end,
                file_bytes,
            });
        }
        if size_bytes > 0 {
            spans.insert((start, end, name.clone()));
        }
        if tensors
            .insert(
                name,
                GgufTensor {
                    info,
                    start,
                    size_bytes,
                },
            )
            .is_some()
        {
            return Err(GgufError::field(field, "one tensor of this name", "a second one"));
        }
    }
    let mut before: Option<&(u64, u64, String)> = None;
    for span in &spans {
        if let Some((_, end, other)) = before
            && span.0 < *end
        {
            return Err(GgufError::Overlap {
                tensor: span.2.clone(),
                start: span.0,
                other: other.clone(),
            });
        }
        before = Some(span);
    }
    Ok(tensors)
}

fn dtype_of(kind: u32) -> Option<DType> {
    match kind {
        0 => Some(DType::F32),
        1 => Some(DType::F16),
        2 => Some(DType::Q4_0),
        3 => Some(DType::Q4_1),
        6 => Some(DType::Q5_0),
        7 => Some(DType::Q5_1),
        8 => Some(DType::Q8_0),
        12 => Some(DType::Q4K),
        13 => Some(DType::Q5K),
        14 => Some(DType::Q6K),
        20 => Some(DType::Iq4Nl),
        30 => Some(DType::Bf16),
        _ => None,
    }
}

/// The name of an element type the host does not compute with.
fn type_name(kind: u32) -> Option<&'static str> {
    const NAMES: [(u32, &str); 23] = [
        (9, "Q8_1"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (31, "Q4_0_4_4"),
        (32, "Q4_0_4_8"),
        (33, "Q4_0_8_8"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    NAMES
        .iter()
        .find(|(number, _)| *number == kind)
        .map(|(_, name)| *name)
}

#[cfg(test)]
pub(crate) mod tests;
