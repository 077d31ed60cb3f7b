//! Reads a message body at the pace of its consumer, for both roles. Knows nothing of what the bytes mean.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use h3::error::StreamError;
use h3::quic;
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use http_body::{Body, Frame, SizeHint};

use super::stream::ReadGate;

/// Pieces below this are gathered: every piece kept apart pins the whole datagram that it came in.
const SMALL_BYTES: usize = 512;
/// Frames without content in a row, after which the peer is taken for hostile.
const EMPTY_FRAMES_MAX: u32 = 64;

/// A body that did not arrive as announced.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// The stream broke.
    #[error("{0}")]
    Stream(#[from] StreamError),
    /// The stream ended cleanly, but not where `content-length` said.
    #[error("body length: expected {expected_bytes} bytes, got {got_bytes}")]
    Length { expected_bytes: u64, got_bytes: u64 },
    /// Nothing but empty frames.
    #[error("more than {EMPTY_FRAMES_MAX} empty frames in a row")]
    EmptyFrames,
}

/// The receiving half of a request or response, as `h3` gives it to either role.
pub(crate) trait DataSource {
    /// Next piece; `None` at the end and also, which is a trap, at an empty frame.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>>;
}

fn whole<T: Buf>(piece: Option<T>) -> Option<Bytes> {
    piece.map(|mut piece| piece.copy_to_bytes(piece.remaining()))
}

impl<S: quic::RecvStream> DataSource for h3::server::RequestStream<S, Bytes> {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        self.poll_recv_data(cx).map_ok(whole)
    }
}

impl<S: quic::RecvStream> DataSource for h3::client::RequestStream<S, Bytes> {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        self.poll_recv_data(cx).map_ok(whole)
    }
}

/// A body in pieces. Trailers are read over.
pub(crate) struct BodyReader<S> {
    source: S,
    gate: Arc<ReadGate>,
    expected_bytes: Option<u64>,
    got_bytes: u64,
    ended: bool,
}

impl<S: DataSource> BodyReader<S> {
    /// A reader over `source`, whose header has been read.
    pub(crate) fn new(source: S, gate: Arc<ReadGate>, headers: &HeaderMap) -> Self {
        gate.framed();
        let expected_bytes = headers
            .get(CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| text.parse().ok());
        Self {
            source,
            gate,
            expected_bytes,
            got_bytes: 0,
            ended: false,
        }
    }

    /// The body ends where the header ended: an answer to HEAD.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }

    /// First what `h3` has buffered, then what the network has.
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        if let Poll::Ready(piece) = self.poll_buffered(cx) {
            return Poll::Ready(piece);
        }
        self.gate.open();
        let polled = self.source.poll_piece(cx);
        if polled.is_ready() {
            self.gate.framed();
        }
        polled
    }

    fn poll_buffered(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        self.gate.shut();
        let polled = self.source.poll_piece(cx);
        if polled.is_ready() {
            self.gate.framed();
        }
        polled
    }

    /// Appends buffered pieces to a small one, so that one-byte frames do not become one-byte allocations.
    fn gather(&mut self, first: Bytes, cx: &mut Context<'_>) -> Result<Bytes, StreamError> {
        if first.len() >= SMALL_BYTES {
            return Ok(first);
        }
        let mut gathered = BytesMut::from(&first[..]);
        while gathered.len() < SMALL_BYTES {
            match self.poll_buffered(cx) {
                Poll::Ready(Ok(Some(piece))) => gathered.extend_from_slice(&piece),
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Ready(Ok(None)) | Poll::Pending => break,
            }
        }
        Ok(gathered.freeze())
    }

    /// The next piece, never empty; `None` at the end of a complete body.
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, BodyError>> {
        if self.ended {
            return Poll::Ready(Ok(None));
        }
        for _ in 0..EMPTY_FRAMES_MAX {
            let piece = match self.poll_source(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Ready(Ok(piece)) => piece,
            };
            match piece {
                Some(first) if first.has_remaining() => {
                    let chunk = self.gather(first, cx)?;
                    self.got_bytes += chunk.len() as u64;
                    return Poll::Ready(Ok(Some(chunk)));
                }
                // Only with the peer's FIN read is "nothing more" the end rather than an empty DATA frame.
                None if self.gate.is_finished() => return Poll::Ready(self.finish().map(|()| None)),
                Some(_) | None => {}
            }
        }
        Poll::Ready(Err(BodyError::EmptyFrames))
    }

    fn finish(&mut self) -> Result<(), BodyError> {
        self.ended = true;
        match self.expected_bytes {
            Some(expected_bytes) if expected_bytes != self.got_bytes => Err(BodyError::Length {
                expected_bytes,
                got_bytes: self.got_bytes,
            }),
            _ => Ok(()),
        }
    }
}

impl<S: DataSource + Unpin> Body for BodyReader<S> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.get_mut()
            .poll_chunk(cx)
            .map(|chunk| chunk.transpose().map(|chunk| chunk.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        match self.expected_bytes {
            Some(expected) => SizeHint::with_exact(expected.saturating_sub(self.got_bytes)),
            None => SizeHint::default(),
        }
    }
}
