//! Messages over a socket, many to a frame: an outbox that one thread drains, and a reader. Knows no message.
//!
//! A frame is its length in 4 bytes, little-endian, and messages in postcard one after the other. Whatever was pushed
//! while the last frame was being written goes into the next: a step of the engine is one or two frames, however many
//! sequences it has.

use std::io::{self, Read, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of the length.
const HEADER_BYTES: usize = 4;
/// What may wait before further messages have to.
const WAITING_BYTES_MAX: usize = 1 << 20;
/// Read at once; a length that is announced is not believed until the bytes come.
const PART_BYTES: usize = 256 << 10;

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Too much waits already.
    Full,
    /// Nobody will send it any more.
    Closed,
}

/// Whether a sender may wait for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WhenFull {
    /// It blocks.
    Wait,
    /// It gives [`Refused::Full`].
    Refuse,
    /// It is taken all the same: one of a few.
    Take,
}

struct Waiting {
    /// Room for the header, then messages.
    frame: Vec<u8>,
    closed: bool,
}

impl Waiting {
    fn is_full(&self) -> bool {
        !self.closed && self.frame.len() > WAITING_BYTES_MAX
    }
}

/// Messages that wait to be sent.
pub(crate) struct Outbox {
    // A std Mutex: held to append a message, never while writing to the socket.
    waiting: Mutex<Waiting>,
    pushed: Condvar,
    drained: Condvar,
}

impl Default for Outbox {
    fn default() -> Self {
        let waiting = Waiting {
            frame: vec![0; HEADER_BYTES],
            closed: false,
        };
        Self {
            waiting: Mutex::new(waiting),
            pushed: Condvar::new(),
            drained: Condvar::new(),
        }
    }
}

impl Outbox {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What waits, once it is not too much.
    fn roomy(&self) -> MutexGuard<'_, Waiting> {
        let full = |waiting: &mut Waiting| waiting.is_full();
        let roomy = self.drained.wait_while(self.waiting(), full);
        roomy.unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks until a message would be taken, or nobody sends any more.
    pub(crate) fn wait_for_room(&self) {
        drop(self.roomy());
    }

    /// Puts a message behind the others.
    pub(crate) fn push(&self, message: &impl Serialize, when_full: WhenFull) -> Result<(), Refused> {
        let mut waiting = match when_full {
            WhenFull::Wait => self.roomy(),
            WhenFull::Refuse | WhenFull::Take => self.waiting(),
        };
        if when_full == WhenFull::Refuse && waiting.is_full() {
            return Err(Refused::Full);
        }
        if waiting.closed {
            return Err(Refused::Closed);
        }
        let length = waiting.frame.len();
        let frame = std::mem::take(&mut waiting.frame);
        // Plain data has a length and is always written; were it not, half a message must not be sent.
        waiting.frame = postcard::to_extend(message, frame).map_err(|_| {
            waiting.closed = true;
            Refused::Closed
        })?;
        drop(waiting);
        // The thread that sends sleeps only when there is nothing.
        if length == HEADER_BYTES {
            self.pushed.notify_one();
        }
        Ok(())
    }

    /// Refuses further messages and lets [`send`](Self::send) end.
    pub(crate) fn close(&self) {
        self.waiting().closed = true;
        self.pushed.notify_all();
        self.drained.notify_all();
    }

    /// Sends what comes until the outbox is closed or the other side is gone.
    pub(crate) fn send(&self, mut to: impl Write) {
        let mut frame = vec![0; HEADER_BYTES];
        while self.next(&mut frame) {
            let length = u32::try_from(frame.len() - HEADER_BYTES).unwrap_or(u32::MAX);
            frame[..HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
            if to.write_all(&frame).is_err() {
                break;
            }
            frame.truncate(HEADER_BYTES);
            frame.shrink_to(WAITING_BYTES_MAX);
        }
        self.close();
    }

    /// Takes all that waits in exchange for an empty frame; false when closed.
    fn next(&self, frame: &mut Vec<u8>) -> bool {
        let mut waiting = self.waiting();
        while !waiting.closed && waiting.frame.len() == HEADER_BYTES {
            waiting = self.pushed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut waiting.frame, frame);
        let open = !waiting.closed;
        drop(waiting);
        self.drained.notify_all();
        open
    }
}

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

    fn length(&self) -> usize {
        u32::from_le_bytes(self.header) as usize
    }
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
    fn messages_that_wait_go_in_one_frame() {
        let outbox = Outbox::default();
        for number in 0..3u32 {
            outbox.push(&number, WhenFull::Refuse).expect("room");
        }
        let mut sent = vec![0; HEADER_BYTES];
        assert!(outbox.next(&mut sent));
        let mut got = Vec::new();
        messages(&sent[HEADER_BYTES..], |number: u32| {
            got.push(number);
            Ok(())
        })
        .expect("numbers");
        assert_eq!(got, [0, 1, 2]);
        outbox.close();
        assert_eq!(outbox.push(&3u32, WhenFull::Wait), Err(Refused::Closed));
    }

    #[test]
    fn an_outbox_nobody_drains_refuses() {
        let outbox = Outbox::default();
        let text = "x".repeat(WAITING_BYTES_MAX);
        outbox.push(&text, WhenFull::Refuse).expect("it was empty");
        assert_eq!(outbox.push(&1u8, WhenFull::Refuse), Err(Refused::Full));
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
        // Four gigabytes announced, none sent.
        let (mut frames, bytes) = (Frames::new(usize::MAX), frame(u32::MAX, b""));
        let mut from = bytes.as_slice();
        assert_eq!(frames.read(&mut from).expect("the header"), Came::Part);
        assert_eq!(frames.read(&mut from).expect("the end"), Came::End);
        assert!(frames.frame.capacity() <= PART_BYTES);
    }
}
