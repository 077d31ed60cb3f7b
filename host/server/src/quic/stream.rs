//! h3's stream traits over quinn. Knows nothing of connections beyond closing one that floods it.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h3::error::Code;
use h3::quic::{self, ConnectionErrorIncoming, StreamErrorIncoming, StreamId, WriteBuf};

use super::adapter::{Shared, stream_lost, var_int};

/// Largest piece taken from quinn at once: small, so that a budget is noticed soon after it is spent.
const CHUNK_BYTES_MAX: usize = 16 << 10;
/// Control, push and QPACK streams carry settings and little else; a peer that sends more in one connection floods.
const CONTROL_BYTES_MAX: usize = 1 << 20;

/// Paces what `h3` takes from a request stream's receiving half.
///
/// `h3` reads one more chunk for every frame that it decodes and buffers a frame other than DATA whole, whatever
/// length it declares. Tiny frames or one huge header would so grow its buffer without bound, past QUIC's flow
/// control. While the gate is shut, reads are pending and `h3` works off its buffer; while it is open, at most
/// `unframed_bytes_max` pass before a frame comes out.
pub(crate) struct ReadGate {
    shut: AtomicBool,
    finished: AtomicBool,
    unframed_bytes: AtomicUsize,
    unframed_bytes_max: usize,
    abandon_code: AtomicU64,
}

impl ReadGate {
    pub(super) fn new(unframed_bytes_max: usize, side: quinn::Side) -> Self {
        let code = match side {
            quinn::Side::Server => Code::H3_INTERNAL_ERROR,
            quinn::Side::Client => Code::H3_REQUEST_CANCELLED,
        };
        Self {
            shut: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            unframed_bytes: AtomicUsize::new(0),
            unframed_bytes_max,
            abandon_code: AtomicU64::new(code.value()),
        }
    }

    /// Reads are pending from now on. The caller must open the gate and poll again before it waits.
    pub(crate) fn shut(&self) {
        self.shut.store(true, Ordering::Relaxed);
    }

    /// Reads go to the network again.
    pub(crate) fn open(&self) {
        self.shut.store(false, Ordering::Relaxed);
    }

    /// A frame came out: the budget begins anew.
    pub(crate) fn framed(&self) {
        self.unframed_bytes.store(0, Ordering::Relaxed);
    }

    /// Whether the peer's FIN has been read.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Relaxed)
    }

    /// Error code with which an unfinished stream is reset when its owner drops it.
    pub(crate) fn abandon_with(&self, code: Code) {
        self.abandon_code.store(code.value(), Ordering::Relaxed);
    }

    fn abandon_code(&self) -> quinn::VarInt {
        var_int(self.abandon_code.load(Ordering::Relaxed))
    }

    fn is_spent(&self) -> bool {
        self.unframed_bytes.load(Ordering::Relaxed) >= self.unframed_bytes_max
    }
}

/// A peer sent more bytes than may be held before a frame is complete.
#[derive(Debug, thiserror::Error)]
#[error("frame exceeds the budget of {limit_bytes} bytes")]
struct FrameTooLarge {
    limit_bytes: usize,
}

/// What a sending half belongs to.
enum SendRole {
    /// Control and QPACK streams: they live as long as the connection.
    Plain,
    /// A request or response: resetting it is the only honest end when it was not finished.
    Request {
        gate: Arc<ReadGate>,
        shared: Arc<Shared>,
    },
}

/// Sending half.
pub(crate) struct SendStream<B: Buf> {
    stream: quinn::SendStream,
    writing: Option<WriteBuf<B>>,
    role: SendRole,
    ended: bool,
}

impl<B: Buf> SendStream<B> {
    pub(super) fn plain(stream: quinn::SendStream) -> Self {
        Self {
            stream,
            writing: None,
            role: SendRole::Plain,
            ended: false,
        }
    }

    pub(super) fn request(stream: quinn::SendStream, gate: Arc<ReadGate>, shared: Arc<Shared>) -> Self {
        Self {
            stream,
            writing: None,
            role: SendRole::Request { gate, shared },
            ended: false,
        }
    }
}

impl<B: Buf> Drop for SendStream<B> {
    fn drop(&mut self) {
        let SendRole::Request { gate, shared } = &self.role else {
            return;
        };
        drop(shared.take_watch(stream_id(self.stream.id())));
        if !self.ended {
            // quinn would finish the stream, and the peer would take half an answer for a whole one.
            let _ = self.stream.reset(gate.abandon_code());
        }
    }
}

impl<B: Buf> quic::SendStream<B> for SendStream<B> {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        if let Some(data) = &mut self.writing {
            while data.has_remaining() {
                let written =
                    ready!(Pin::new(&mut self.stream).poll_write(cx, data.chunk())).map_err(write_failed)?;
                data.advance(written);
            }
        }
        self.writing = None;
        Poll::Ready(Ok(()))
    }

    fn send_data<T: Into<WriteBuf<B>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        if self.writing.is_some() {
            let connection_error =
                ConnectionErrorIncoming::InternalError("write begun before the last one ended".to_owned());
            return Err(StreamErrorIncoming::ConnectionErrorIncoming { connection_error });
        }
        self.writing = Some(data.into());
        Ok(())
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        ready!(quic::SendStream::<B>::poll_ready(self, cx))?;
        self.ended = true;
        Poll::Ready(
            self.stream
                .finish()
                .map_err(|error| StreamErrorIncoming::Unknown(Box::new(error))),
        )
    }

    fn reset(&mut self, reset_code: u64) {
        self.ended = true;
        let _ = self.stream.reset(var_int(reset_code));
    }

    fn send_id(&self) -> StreamId {
        stream_id(self.stream.id())
    }
}

/// What a receiving half belongs to.
enum RecvRole {
    /// A peer's control, push or QPACK stream, with what it has carried so far.
    Control {
        conn: quinn::Connection,
        received_bytes: usize,
    },
    /// A request or response.
    Request { gate: Arc<ReadGate> },
}

/// Receiving half.
pub(crate) struct RecvStream {
    stream: quinn::RecvStream,
    role: RecvRole,
}

impl RecvStream {
    pub(super) fn control(stream: quinn::RecvStream, conn: quinn::Connection) -> Self {
        Self {
            stream,
            role: RecvRole::Control {
                conn,
                received_bytes: 0,
            },
        }
    }

    pub(super) fn request(stream: quinn::RecvStream, gate: Arc<ReadGate>) -> Self {
        Self {
            stream,
            role: RecvRole::Request { gate },
        }
    }

    /// The error that ends a stream whose peer overdoes it.
    fn over_budget(&mut self) -> Option<StreamErrorIncoming> {
        match &self.role {
            RecvRole::Request { gate } if gate.is_spent() => {
                gate.abandon_with(Code::H3_EXCESSIVE_LOAD);
                Some(StreamErrorIncoming::Unknown(Box::new(FrameTooLarge {
                    limit_bytes: gate.unframed_bytes_max,
                })))
            }
            RecvRole::Control { conn, received_bytes } if *received_bytes > CONTROL_BYTES_MAX => {
                conn.close(
                    var_int(Code::H3_EXCESSIVE_LOAD.value()),
                    b"control stream too long",
                );
                Some(stream_lost(quinn::ConnectionError::LocallyClosed))
            }
            _ => None,
        }
    }

    fn account(&mut self, chunk: Option<&Bytes>) {
        match (&mut self.role, chunk) {
            (RecvRole::Request { gate }, Some(bytes)) => {
                gate.unframed_bytes.fetch_add(bytes.len(), Ordering::Relaxed);
            }
            (RecvRole::Request { gate }, None) => gate.finished.store(true, Ordering::Relaxed),
            (RecvRole::Control { received_bytes, .. }, Some(bytes)) => *received_bytes += bytes.len(),
            (RecvRole::Control { .. }, None) => {}
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        let RecvRole::Request { gate } = &self.role else {
            return;
        };
        if gate.is_finished() {
            return;
        }
        // An answered request whose rest nobody wants is no error of the peer's (RFC 9114, 4.1).
        let code = match gate.abandon_code() {
            code if code == var_int(Code::H3_INTERNAL_ERROR.value()) => var_int(Code::H3_NO_ERROR.value()),
            code => code,
        };
        let _ = self.stream.stop(code);
    }
}

impl quic::RecvStream for RecvStream {
    type Buf = Bytes;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        if let RecvRole::Request { gate } = &self.role
            && gate.shut.load(Ordering::Relaxed)
        {
            return Poll::Pending;
        }
        if let Some(error) = self.over_budget() {
            return Poll::Ready(Err(error));
        }
        // The read is cancel-safe, so no future has to be kept and the stream stays usable for `stop_sending`.
        let read = pin!(self.stream.read_chunk(CHUNK_BYTES_MAX, true)).poll(cx);
        let chunk = ready!(read).map_err(read_failed)?.map(|chunk| chunk.bytes);
        self.account(chunk.as_ref());
        Poll::Ready(Ok(chunk))
    }

    fn stop_sending(&mut self, error_code: u64) {
        let _ = self.stream.stop(var_int(error_code));
    }

    fn recv_id(&self) -> StreamId {
        stream_id(self.stream.id())
    }
}

/// Both halves of a request stream.
pub(crate) struct BidiStream<B: Buf> {
    send: SendStream<B>,
    recv: RecvStream,
}

impl<B: Buf> BidiStream<B> {
    pub(super) fn new(send: SendStream<B>, recv: RecvStream) -> Self {
        Self { send, recv }
    }
}

impl<B: Buf> quic::BidiStream<B> for BidiStream<B> {
    type SendStream = SendStream<B>;
    type RecvStream = RecvStream;

    fn split(self) -> (SendStream<B>, RecvStream) {
        (self.send, self.recv)
    }
}

impl<B: Buf> quic::SendStream<B> for BidiStream<B> {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_ready(cx)
    }

    fn send_data<T: Into<WriteBuf<B>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        self.send.send_data(data)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_finish(cx)
    }

    fn reset(&mut self, reset_code: u64) {
        self.send.reset(reset_code);
    }

    fn send_id(&self) -> StreamId {
        self.send.send_id()
    }
}

impl<B: Buf> quic::RecvStream for BidiStream<B> {
    type Buf = Bytes;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        self.recv.poll_data(cx)
    }

    fn stop_sending(&mut self, error_code: u64) {
        self.recv.stop_sending(error_code);
    }

    fn recv_id(&self) -> StreamId {
        self.recv.recv_id()
    }
}

/// Both crates number streams as RFC 9000 does.
pub(super) fn stream_id(id: quinn::StreamId) -> StreamId {
    let number = u64::from(id);
    StreamId::try_from(number).expect("quinn's stream ids are below 2^62")
}

fn write_failed(error: quinn::WriteError) -> StreamErrorIncoming {
    match error {
        quinn::WriteError::Stopped(code) => StreamErrorIncoming::StreamTerminated {
            error_code: code.into_inner(),
        },
        quinn::WriteError::ConnectionLost(error) => stream_lost(error),
        other => StreamErrorIncoming::Unknown(Box::new(other)),
    }
}

fn read_failed(error: quinn::ReadError) -> StreamErrorIncoming {
    match error {
        quinn::ReadError::Reset(code) => StreamErrorIncoming::StreamTerminated {
            error_code: code.into_inner(),
        },
        quinn::ReadError::ConnectionLost(error) => stream_lost(error),
        other => StreamErrorIncoming::Unknown(Box::new(other)),
    }
}
