//! Messages to the other end of a socket, many to a frame. Knows no message and starts no thread.
//!
//! Whoever [flushes](Outbox::flush) writes what waits, unless somebody is writing: then that one goes on with it. So a step of
//! the engine is one frame, however many sequences it has, and no thread has to wake up to send it.

use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::frames::HEADER_BYTES;

/// What may wait before further messages have to.
const WAITING_BYTES_MAX: usize = 1 << 20;

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

/// How long a flush may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Until all is sent.
    Patient,
    /// One timeout of the socket. Then [`Outbox::send`] goes on, and does so from then on: whoever does not read once is not
    /// waited for again.
    Hasty,
}

#[derive(Default)]
struct Waiting {
    /// Room for the header, then messages.
    frame: Vec<u8>,
    /// What is left of a frame that was begun.
    rest: Vec<u8>,
    /// Of an earlier frame, to be used again.
    spare: Vec<u8>,
    /// Somebody writes.
    sending: bool,
    /// The thread of [`Outbox::send`] writes, and nobody else.
    slow: bool,
    /// More is about to come.
    corked: bool,
    closed: bool,
}

impl Waiting {
    fn is_full(&self) -> bool {
        !self.closed && self.frame.len() > WAITING_BYTES_MAX
    }

    /// A cork holds back no more than may wait: whoever works under it must find room too.
    fn is_corked(&self) -> bool {
        self.corked && !self.is_full()
    }

    fn is_empty(&self) -> bool {
        self.rest.is_empty() && self.frame.len() <= HEADER_BYTES
    }

    /// The bytes to send next.
    fn take(&mut self) -> Vec<u8> {
        if !self.rest.is_empty() {
            return std::mem::take(&mut self.rest);
        }
        let mut spare = std::mem::take(&mut self.spare);
        spare.clear();
        spare.resize(HEADER_BYTES, 0);
        let mut frame = std::mem::replace(&mut self.frame, spare);
        let length = u32::try_from(frame.len() - HEADER_BYTES).unwrap_or(u32::MAX);
        frame[..HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
        frame
    }

    /// So many of the bytes are sent.
    fn sent(&mut self, mut bytes: Vec<u8>, sent: usize) {
        if sent < bytes.len() {
            self.rest = bytes.split_off(sent);
        } else {
            bytes.clear();
            bytes.shrink_to(WAITING_BYTES_MAX);
            self.spare = bytes;
        }
    }
}

/// Messages that wait to be sent.
pub(crate) struct Outbox {
    socket: UnixStream,
    // A std Mutex: held to append a message, never while writing to the socket.
    waiting: Mutex<Waiting>,
    stalled: Condvar,
    drained: Condvar,
}

impl Outbox {
    /// To this socket, whose timeout for writing, if it has one, says how hasty a hasty flush is.
    pub(crate) fn new(socket: UnixStream) -> Self {
        let waiting = Waiting {
            frame: vec![0; HEADER_BYTES],
            ..Waiting::default()
        };
        Self {
            socket,
            waiting: Mutex::new(waiting),
            stalled: Condvar::new(),
            drained: Condvar::new(),
        }
    }

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

    /// Puts a message behind the others. It goes out with the next flush.
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
        let frame = std::mem::take(&mut waiting.frame);
        // Plain data has a length and is always written; were it not, half a message must not be sent.
        waiting.frame = postcard::to_extend(message, frame).map_err(|_| {
            waiting.closed = true;
            Refused::Closed
        })?;
        Ok(())
    }

    /// Puts a message behind the others and sends them.
    pub(crate) fn push_now(&self, message: &impl Serialize, when_full: WhenFull) -> Result<(), Refused> {
        self.push(message, when_full)?;
        self.flush(Patience::Patient);
        Ok(())
    }

    /// Sends what waits, or leaves it to whoever is sending.
    pub(crate) fn flush(&self, patience: Patience) {
        let mut waiting = self.waiting();
        while !(waiting.slow
            || waiting.is_corked()
            || waiting.sending
            || waiting.closed
            || waiting.is_empty())
        {
            waiting = self.send_some(waiting, patience);
        }
        if waiting.slow {
            self.stalled.notify_one();
        }
    }

    /// Runs `work`, and sends what came meanwhile, from whomever, in one go at its end.
    pub(crate) fn corked(&self, work: impl FnOnce()) {
        self.waiting().corked = true;
        work();
        self.waiting().corked = false;
        self.flush(Patience::Patient);
    }

    /// Writes once without the lock.
    fn send_some<'a>(
        &'a self,
        mut waiting: MutexGuard<'a, Waiting>,
        patience: Patience,
    ) -> MutexGuard<'a, Waiting> {
        waiting.sending = true;
        let bytes = waiting.take();
        drop(waiting);
        let written = self.write(&bytes, patience);
        let mut waiting = self.waiting();
        waiting.sending = false;
        match written {
            Ok(written) => {
                waiting.slow |= written < bytes.len();
                waiting.sent(bytes, written);
            }
            Err(_) => waiting.closed = true,
        }
        self.drained.notify_all();
        waiting
    }

    /// How many bytes went out; all of them if there is patience.
    fn write(&self, bytes: &[u8], patience: Patience) -> io::Result<usize> {
        let mut written = 0;
        while written < bytes.len() {
            match (&self.socket).write(&bytes[written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(more) => written += more,
                Err(error) => match (error.kind(), patience) {
                    (io::ErrorKind::Interrupted, _) => {}
                    (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Patience::Patient) => {}
                    (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Patience::Hasty) => break,
                    _ => return Err(error),
                },
            }
        }
        Ok(written)
    }

    /// Refuses further messages and lets [`send`](Self::send) end.
    pub(crate) fn close(&self) {
        self.waiting().closed = true;
        self.stalled.notify_all();
        self.drained.notify_all();
    }

    /// Sends what a hasty flush could not, and all that follows, until the outbox is closed or the other side is gone.
    pub(crate) fn send(&self) {
        let mut waiting = self.waiting();
        loop {
            let idle = |waiting: &mut Waiting| {
                !waiting.closed && (waiting.sending || !waiting.slow || waiting.is_empty())
            };
            let woken = self.stalled.wait_while(waiting, idle);
            waiting = woken.unwrap_or_else(PoisonError::into_inner);
            if waiting.closed {
                drop(waiting);
                return self.close();
            }
            waiting = self.send_some(waiting, Patience::Patient);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::time::Duration;

    use super::super::frames::{Came, Frames, messages};
    use super::*;

    fn pair() -> (Outbox, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_write_timeout(Some(Duration::from_millis(1)))
            .expect("a timeout");
        (Outbox::new(ours), theirs)
    }

    fn numbers(from: &mut UnixStream) -> Vec<u32> {
        let mut frames = Frames::new(1 << 20);
        loop {
            if let Came::Frame(frame) = frames.read(from).expect("a reading") {
                let mut got = Vec::new();
                let take = |number: u32| {
                    got.push(number);
                    Ok(())
                };
                messages(&frame, take).expect("numbers");
                return got;
            }
        }
    }

    #[test]
    fn messages_that_wait_go_in_one_frame() {
        let (outbox, mut theirs) = pair();
        for number in 0..3u32 {
            outbox.push(&number, WhenFull::Refuse).expect("room");
        }
        outbox.flush(Patience::Hasty);
        assert_eq!(numbers(&mut theirs), [0, 1, 2]);
        outbox.push_now(&3u32, WhenFull::Wait).expect("room");
        assert_eq!(numbers(&mut theirs), [3]);
        outbox.close();
        assert_eq!(outbox.push(&4u32, WhenFull::Wait), Err(Refused::Closed));
    }

    #[test]
    fn what_comes_while_corked_goes_in_one_frame() {
        let (outbox, mut theirs) = pair();
        outbox.corked(|| {
            for number in 0..3u32 {
                outbox.push_now(&number, WhenFull::Wait).expect("room");
            }
        });
        assert_eq!(numbers(&mut theirs), [0, 1, 2]);
    }

    #[test]
    fn a_cork_does_not_hold_more_than_may_wait() {
        let (outbox, mut theirs) = pair();
        let text = "x".repeat(WAITING_BYTES_MAX);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                outbox.corked(|| {
                    for _ in 0..3 {
                        outbox.push_now(&text, WhenFull::Wait).expect("room");
                    }
                });
                outbox.socket.shutdown(std::net::Shutdown::Write).expect("open");
            });
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).expect("all of it");
            assert_eq!(got.iter().filter(|byte| **byte == b'x').count(), 3 * text.len());
        });
    }

    #[test]
    fn an_outbox_nobody_drains_refuses() {
        let (outbox, _theirs) = pair();
        let text = "x".repeat(WAITING_BYTES_MAX);
        outbox.push(&text, WhenFull::Refuse).expect("it was empty");
        assert_eq!(outbox.push(&1u8, WhenFull::Refuse), Err(Refused::Full));
    }

    #[test]
    fn whoever_does_not_read_is_not_waited_for_and_misses_nothing() {
        let (outbox, mut theirs) = pair();
        let text = "x".repeat(WAITING_BYTES_MAX - 16);
        outbox.push(&text, WhenFull::Refuse).expect("it was empty");
        let begin = std::time::Instant::now();
        outbox.flush(Patience::Hasty);
        assert!(
            begin.elapsed() < Duration::from_millis(500),
            "{:?}",
            begin.elapsed()
        );
        std::thread::scope(|scope| {
            scope.spawn(|| outbox.send());
            outbox.push(&7u32, WhenFull::Refuse).expect("room");
            outbox.flush(Patience::Hasty);
            // The text has its length in 3 bytes before it; both frames have 4.
            let mut got = vec![0; 4 + 3 + text.len() + 4 + 1];
            theirs.read_exact(&mut got).expect("all of it");
            assert!(got[7..7 + text.len()].iter().all(|byte| *byte == b'x'));
            assert_eq!(got[got.len() - 1], 7);
            outbox.close();
        });
    }

    #[test]
    fn an_outbox_whose_other_end_is_gone_closes() {
        let (outbox, theirs) = pair();
        drop(theirs);
        outbox.push_now(&1u8, WhenFull::Wait).expect("nobody knows yet");
        assert_eq!(outbox.push(&1u8, WhenFull::Wait), Err(Refused::Closed));
    }
}
