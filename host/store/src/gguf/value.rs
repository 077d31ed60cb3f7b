//! Metadata values of a GGUF file. Knows their encoding and not their meaning.

use std::io::Read;

use super::GgufError;
use super::cursor::Cursor;

/// Arrays may hold arrays, this deep.
const DEPTH_MAX: u32 = 3;

/// A metadata value. Numbers are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// A float of 32 or 64 bits; may be infinite or not a number.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Values of one type.
    Array(Vec<Value>),
}

impl Value {
    /// The value, or for a long one its kind, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Unsigned(number) => number.to_string(),
            Self::Signed(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::Bool(flag) => flag.to_string(),
            Self::Text(text) => format!("{:?}", text.chars().take(64).collect::<String>()),
            Self::Array(values) => format!("an array of {}", values.len()),
        }
    }
}

/// How a value is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_number(number: u32) -> Option<Self> {
        const KINDS: [Kind; 13] = [
            Kind::U8,
            Kind::I8,
            Kind::U16,
            Kind::I16,
            Kind::U32,
            Kind::I32,
            Kind::F32,
            Kind::Bool,
            Kind::Text,
            Kind::Array,
            Kind::U64,
            Kind::I64,
            Kind::F64,
        ];
        KINDS.get(number as usize).copied()
    }

    /// Fewest bytes of one value.
    const fn least_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::Text | Self::U64 | Self::I64 | Self::F64 => 8,
            Self::Array => 12,
        }
    }
}

/// Reads a value with its type before it.
pub(super) fn read<R: Read>(cursor: &mut Cursor<R>, key: &str) -> Result<Value, GgufError> {
    let kind = read_kind(cursor, key)?;
    read_as(cursor, key, kind, 0)
}

fn read_kind<R: Read>(cursor: &mut Cursor<R>, key: &str) -> Result<Kind, GgufError> {
    let number = cursor.u32(key)?;
    Kind::from_number(number).ok_or_else(|| GgufError::field(key, "a value type from 0 to 12", number))
}

fn read_as<R: Read>(cursor: &mut Cursor<R>, key: &str, kind: Kind, depth: u32) -> Result<Value, GgufError> {
    Ok(match kind {
        Kind::U8 => Value::Unsigned(u8::from_le_bytes(cursor.bytes(key)?).into()),
        Kind::U16 => Value::Unsigned(u16::from_le_bytes(cursor.bytes(key)?).into()),
        Kind::U32 => Value::Unsigned(cursor.u32(key)?.into()),
        Kind::U64 => Value::Unsigned(cursor.u64(key)?),
        Kind::I8 => Value::Signed(i8::from_le_bytes(cursor.bytes(key)?).into()),
        Kind::I16 => Value::Signed(i16::from_le_bytes(cursor.bytes(key)?).into()),
        Kind::I32 => Value::Signed(i32::from_le_bytes(cursor.bytes(key)?).into()),
        Kind::I64 => Value::Signed(i64::from_le_bytes(cursor.bytes(key)?)),
        Kind::F32 => Value::Float(widen(f32::from_le_bytes(cursor.bytes(key)?))),
        Kind::F64 => Value::Float(f64::from_le_bytes(cursor.bytes(key)?)),
        Kind::Bool => match cursor.bytes::<1>(key)? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => return Err(GgufError::field(key, "0 or 1", other)),
        },
        Kind::Text => Value::Text(cursor.text(key)?),
        Kind::Array => {
            if depth == DEPTH_MAX {
                return Err(GgufError::Limit {
                    field: format!("{key}: nested arrays"),
                    got: u64::from(depth) + 1,
                    limit: DEPTH_MAX.into(),
                });
            }
            let kind = read_kind(cursor, key)?;
            let count = cursor.elements(key, kind.least_bytes())?;
            let mut values = Vec::new();
            for _ in 0..count {
                values.push(read_as(cursor, key, kind, depth + 1)?);
            }
            Value::Array(values)
        }
    })
}

/// The shortest decimal that is this f32: `1e-5` stays `1e-5` instead of `9.999999747378752e-6`.
fn widen(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}
