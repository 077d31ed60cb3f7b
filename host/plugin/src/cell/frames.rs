//! Frames from a socket, put together and taken apart. Knows no message.
//!
//! A frame is its length in 4 bytes, little-endian, and messages in postcard one after the other.

use std::io::{self, Read};

use serde::de::DeserializeOwned;

/// Bytes of the length.
pub(super) const HEADER_BYTES: usize = 4;
/// Read at once; a length that is announced is not believed until the bytes come.
const PART_BYTES: usize = 256 << 10;

/// What one reading gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Came {
    /// A whole frame.
    Frame(Vec<u8>),
    /// Not all of one.
    Part,
    /// The other side is gone.
    End,
}

/// Puts frames together.
pub(crate) struct Frames {
    frame_bytes_max: usize,
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    frame: Vec<u8>,
}

impl Frames {
    /// A longer frame is an error.
    pub(crate) fn new(frame_bytes_max: usize) -> Self {
        Self {
            frame_bytes_max,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            frame: Vec::new(),
        }
    }

    /// Reads once. Whoever waits for a frame gets a chance to look at the clock, even if the bytes come one by one.
    ///
    /// # Errors
    /// The socket's, such as a timeout, after which it may be called again; or a frame that is too long.
    pub(crate) fn read(&mut self, from: &mut impl Read) -> io::Result<Came> {
        if self.header_bytes < HEADER_BYTES {
            let read = from.read(&mut self.header[self.header_bytes..])?;
            self.header_bytes += read;
            return match (read, self.header_bytes) {
                (0, _) => Ok(Came::End),
                (_, HEADER_BYTES) => self.begin(),
                _ => Ok(Came::Part),
            };
        }
        let (filled, length) = (self.frame.len(), self.length());
        self.frame.resize(length.min(filled + PART_BYTES), 0);
        let read = from.read(&mut self.frame[filled..]);
        self.frame
            .truncate(filled + read.as_ref().map_or(0, |read| *read));
        match read? {
            0 => Ok(Came::End),
            _ if self.frame.len() < length => Ok(Came::Part),
            _ => Ok(self.end()),
        }
    }

    /// The header is whole.
    fn begin(&mut self) -> io::Result<Came> {
        let (length, most) = (self.length(), self.frame_bytes_max);
        if length > most {
            let reason = format!("a frame of at most {most} bytes was expected, got {length}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(if length == 0 { self.end() } else { Came::Part })
    }

    fn end(&mut self) -> Came {
        self.header_bytes = 0;
        Came::Frame(std::mem::take(&mut self.frame))
    }

    /// Whether no frame has begun.
    pub(crate) fn is_between(&self) -> bool {
        self.header_bytes == 0
    }

    fn length(&self) -> usize {
        u32::from_le_bytes(self.header) as usize
    }
}

/// The first frame of these bytes, if all of it is there.
pub(crate) fn first_frame(bytes: &[u8]) -> Option<&[u8]> {
    let (header, rest) = bytes.split_first_chunk()?;
    rest.get(..u32::from_le_bytes(*header) as usize)
}

/// The messages of a frame, one after the other.
///
/// # Errors
/// From `each`, or bytes that are no message.
pub(crate) fn messages<T: DeserializeOwned>(
    mut frame: &[u8],
    mut each: impl FnMut(T) -> Result<(), String>,
) -> Result<(), String> {
    while !frame.is_empty() {
        let (message, rest) =
            postcard::take_from_bytes(frame).map_err(|error| format!("no message: {error}"))?;
        frame = rest;
        each(message)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: u32, bytes: &[u8]) -> Vec<u8> {
        [&length.to_le_bytes(), bytes].concat()
    }

    #[test]
    fn a_frame_may_come_in_pieces_and_is_bounded() {
        let bytes = [frame(5, b"hello"), frame(0, b"")].concat();
        let (first, second) = bytes.split_at(6);
        let mut from = first.chain(second);
        let mut frames = Frames::new(5);
        let came: Vec<Came> = (0..5)
            .map(|_| frames.read(&mut from).expect("a reading"))
            .collect();
        let whole = |bytes: &[u8]| Came::Frame(bytes.to_vec());
        assert_eq!(
            came,
            [Came::Part, Came::Part, whole(b"hello"), whole(b""), Came::End]
        );
        let error = Frames::new(5).read(&mut frame(6, b"hello!").as_slice());
        assert!(
            error
                .expect_err("too long")
                .to_string()
                .contains("at most 5 bytes")
        );
        let bytes = frame(2, b"hi!");
        assert_eq!(first_frame(&bytes), Some(b"hi".as_slice()));
        assert_eq!((first_frame(&bytes[..5]), first_frame(&bytes[..3])), (None, None));
        // Four gigabytes announced, none sent.
        let (mut frames, bytes) = (Frames::new(usize::MAX), frame(u32::MAX, b""));
        let mut from = bytes.as_slice();
        assert_eq!(frames.read(&mut from).expect("the header"), Came::Part);
        assert_eq!(frames.read(&mut from).expect("the end"), Came::End);
        assert!(frames.frame.capacity() <= PART_BYTES);
    }
}
