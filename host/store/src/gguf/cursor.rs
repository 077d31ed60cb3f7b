//! A bounded reader: knows how much of the file is left and refuses what cannot be there.

use std::io::Read;

use super::{GgufError, GgufLimits};

pub(super) struct Cursor<R> {
    reader: R,
    position: u64,
    /// Bytes the header may still take: what is left of the file, or of the limit.
    left: u64,
    file_bytes: u64,
    limits: GgufLimits,
    elements: u64,
}

impl<R: Read> Cursor<R> {
    pub(super) fn new(reader: R, file_bytes: u64, limits: GgufLimits) -> Self {
        let left = file_bytes.min(limits.header_bytes_max);
        Self {
            reader,
            position: 0,
            left,
            file_bytes,
            limits,
            elements: 0,
        }
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    fn reserve(&mut self, field: &str, needed: u64) -> Result<(), GgufError> {
        if needed <= self.left {
            self.left -= needed;
            self.position += needed;
            return Ok(());
        }
        let left_of_file = self.file_bytes - self.position;
        if needed > left_of_file {
            return Err(GgufError::Truncated {
                field: field.to_owned(),
                needed,
                left: left_of_file,
            });
        }
        let got = self.position.saturating_add(needed);
        Err(GgufError::Limit {
            field: format!("header up to {field}"),
            got,
            limit: self.limits.header_bytes_max,
        })
    }

    pub(super) fn bytes<const N: usize>(&mut self, field: &str) -> Result<[u8; N], GgufError> {
        self.reserve(field, N as u64)?;
        let mut bytes = [0; N];
        self.reader
            .read_exact(&mut bytes)
            .map_err(|source| GgufError::Read {
                field: field.to_owned(),
                source,
            })?;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, field: &str) -> Result<u32, GgufError> {
        self.bytes(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &str) -> Result<u64, GgufError> {
        self.bytes(field).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `least_bytes` each.
    pub(super) fn count(&mut self, field: &str, limit: u64, least_bytes: u64) -> Result<u64, GgufError> {
        let got = self.u64(field)?;
        if got > limit {
            return Err(GgufError::Limit {
                field: field.to_owned(),
                got,
                limit,
            });
        }
        let needed = got * least_bytes;
        let left = self.file_bytes - self.position;
        if needed > left {
            return Err(GgufError::Truncated {
                field: field.to_owned(),
                needed,
                left,
            });
        }
        Ok(got)
    }

    /// A count of array elements, against the limit on all arrays together.
    pub(super) fn elements(&mut self, field: &str, least_bytes: u64) -> Result<u64, GgufError> {
        let limit = self.limits.elements_max - self.elements;
        let count = self.count(field, limit, least_bytes)?;
        self.elements += count;
        Ok(count)
    }

    pub(super) fn text(&mut self, field: &str) -> Result<String, GgufError> {
        self.bounded_text(field, self.limits.string_bytes_max)
    }

    pub(super) fn name(&mut self, field: impl Fn() -> String) -> Result<String, GgufError> {
        self.bounded_text(&field(), self.limits.name_bytes_max)
    }

    fn bounded_text(&mut self, field: &str, limit: u64) -> Result<String, GgufError> {
        let length = self.count(field, limit, 1)?;
        self.reserve(field, length)?;
        // Not `vec![0; length]`: memory grows with the bytes that are really there.
        let mut bytes = Vec::new();
        let read = (&mut self.reader).take(length).read_to_end(&mut bytes);
        let count = read.map_err(|source| GgufError::Read {
            field: field.to_owned(),
            source,
        })? as u64;
        if count != length {
            return Err(GgufError::Truncated {
                field: field.to_owned(),
                needed: length,
                left: count,
            });
        }
        String::from_utf8(bytes).map_err(|_| GgufError::field(field, "UTF-8", "other bytes"))
    }
}
