//! h3's connection traits over quinn, for both roles. Knows nothing of requests, routes or TLS.
//!
//! It exists because a server must see a client's cancel while nothing is being written, must survive any order of
//! reads and stops, and must refuse requests that come after it has said goodbye.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Buf;
use h3::error::Code;
use h3::quic::{self, ConnectionErrorIncoming, StreamErrorIncoming, StreamId};
use quinn::VarInt;

use super::stream::{BidiStream, ReadGate, RecvStream, SendStream, stream_id};

/// Sync as well as Send: `h3` keeps these inside values that a client shares between tasks.
type Waiting<T> = Pin<Box<dyn Future<Output = Result<T, quinn::ConnectionError>> + Send + Sync>>;
type Pair = (quinn::SendStream, quinn::RecvStream);

/// Resolves when the peer has stopped the stream, has received all of it, or is lost.
pub(crate) type Stopped =
    Pin<Box<dyn Future<Output = Result<Option<VarInt>, quinn::StoppedError>> + Send + Sync>>;

/// What `h3` hides about one request stream and its owner needs.
pub(crate) struct StreamWatch {
    /// The peer's view of our sending half.
    pub(crate) stopped: Stopped,
    /// Pace of our receiving half.
    pub(crate) gate: Arc<ReadGate>,
}

/// State that a connection's adapter shares with its streams and its owner.
pub(crate) struct Shared {
    refuse_requests: AtomicBool,
    unframed_bytes_max: usize,
    watches: Mutex<HashMap<StreamId, StreamWatch>>,
}

impl Shared {
    fn watches(&self) -> MutexGuard<'_, HashMap<StreamId, StreamWatch>> {
        // A std mutex: held for one map operation, never across an await. The map is valid after any panic.
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out the watch of a stream that has just been accepted or opened; `None` the second time.
    pub(crate) fn take_watch(&self, id: StreamId) -> Option<StreamWatch> {
        self.watches().remove(&id)
    }

    /// From now on new requests are rejected, to be called just before GOAWAY is sent.
    pub(crate) fn refuse_requests(&self) {
        self.refuse_requests.store(true, Ordering::Release);
    }
}

/// Opens streams on a connection.
pub(crate) struct OpenStreams {
    conn: quinn::Connection,
    shared: Arc<Shared>,
    opening_bidi: Option<Waiting<Pair>>,
    opening_uni: Option<Waiting<quinn::SendStream>>,
}

impl Clone for OpenStreams {
    fn clone(&self) -> Self {
        Self::new(self.conn.clone(), self.shared.clone())
    }
}

impl OpenStreams {
    fn new(conn: quinn::Connection, shared: Arc<Shared>) -> Self {
        Self {
            conn,
            shared,
            opening_bidi: None,
            opening_uni: None,
        }
    }

    /// Pairs the halves of a request stream and files its watch.
    fn request_stream<B: Buf>(&self, (send, recv): Pair) -> BidiStream<B> {
        let gate = Arc::new(ReadGate::new(self.shared.unframed_bytes_max, self.conn.side()));
        let id = stream_id(send.id());
        let stopped: Stopped = Box::pin(send.stopped());
        self.shared.watches().insert(
            id,
            StreamWatch {
                stopped,
                gate: gate.clone(),
            },
        );
        BidiStream::new(
            SendStream::request(send, gate.clone(), self.shared.clone()),
            RecvStream::request(recv, gate),
        )
    }
}

impl<B: Buf> quic::OpenStreams<B> for OpenStreams {
    type BidiStream = BidiStream<B>;
    type SendStream = SendStream<B>;

    fn poll_open_bidi(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::BidiStream, StreamErrorIncoming>> {
        let conn = &self.conn;
        let opening = self.opening_bidi.get_or_insert_with(|| {
            let conn = conn.clone();
            Box::pin(async move { conn.open_bi().await })
        });
        let opened = ready!(opening.as_mut().poll(cx));
        self.opening_bidi = None;
        Poll::Ready(opened.map(|pair| self.request_stream(pair)).map_err(stream_lost))
    }

    fn poll_open_send(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::SendStream, StreamErrorIncoming>> {
        let conn = &self.conn;
        let opening = self.opening_uni.get_or_insert_with(|| {
            let conn = conn.clone();
            Box::pin(async move { conn.open_uni().await })
        });
        let opened = ready!(opening.as_mut().poll(cx));
        self.opening_uni = None;
        Poll::Ready(opened.map(SendStream::plain).map_err(stream_lost))
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        self.conn.close(var_int(code.value()), reason);
    }
}

/// A quinn connection as `h3` wants it.
pub(crate) struct Connection {
    opener: OpenStreams,
    incoming_bidi: Waiting<Pair>,
    incoming_uni: Waiting<quinn::RecvStream>,
}

impl Connection {
    /// Wraps `conn`. On a request stream at most `unframed_bytes_max` are read ahead of a complete frame.
    pub(crate) fn new(conn: quinn::Connection, unframed_bytes_max: usize) -> (Self, Arc<Shared>) {
        let shared = Arc::new(Shared {
            refuse_requests: AtomicBool::new(false),
            unframed_bytes_max,
            watches: Mutex::new(HashMap::new()),
        });
        let this = Self {
            incoming_bidi: accept_bidi(&conn),
            incoming_uni: accept_uni(&conn),
            opener: OpenStreams::new(conn, shared.clone()),
        };
        (this, shared)
    }
}

fn accept_bidi(conn: &quinn::Connection) -> Waiting<Pair> {
    let conn = conn.clone();
    Box::pin(async move { conn.accept_bi().await })
}

fn accept_uni(conn: &quinn::Connection) -> Waiting<quinn::RecvStream> {
    let conn = conn.clone();
    Box::pin(async move { conn.accept_uni().await })
}

impl<B: Buf> quic::OpenStreams<B> for Connection {
    type BidiStream = BidiStream<B>;
    type SendStream = SendStream<B>;

    fn poll_open_bidi(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::BidiStream, StreamErrorIncoming>> {
        quic::OpenStreams::<B>::poll_open_bidi(&mut self.opener, cx)
    }

    fn poll_open_send(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::SendStream, StreamErrorIncoming>> {
        quic::OpenStreams::<B>::poll_open_send(&mut self.opener, cx)
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        quic::OpenStreams::<B>::close(&mut self.opener, code, reason);
    }
}

impl<B: Buf> quic::Connection<B> for Connection {
    type RecvStream = RecvStream;
    type OpenStreams = OpenStreams;

    fn poll_accept_recv(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<RecvStream, ConnectionErrorIncoming>> {
        let accepted = ready!(self.incoming_uni.as_mut().poll(cx));
        // Replaced before any return: a finished future must not be polled again.
        self.incoming_uni = accept_uni(&self.opener.conn);
        let conn = &self.opener.conn;
        Poll::Ready(
            accepted
                .map(|recv| RecvStream::control(recv, conn.clone()))
                .map_err(connection_lost),
        )
    }

    fn poll_accept_bidi(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<BidiStream<B>, ConnectionErrorIncoming>> {
        loop {
            let accepted = ready!(self.incoming_bidi.as_mut().poll(cx));
            self.incoming_bidi = accept_bidi(&self.opener.conn);
            let (mut send, mut recv) = match accepted {
                Ok(pair) => pair,
                Err(error) => return Poll::Ready(Err(connection_lost(error))),
            };
            if !self.opener.shared.refuse_requests.load(Ordering::Acquire) {
                return Poll::Ready(Ok(self.opener.request_stream((send, recv))));
            }
            // The peer may repeat a rejected request elsewhere: no part of it was looked at.
            let code = var_int(Code::H3_REQUEST_REJECTED.value());
            let _ = send.reset(code);
            let _ = recv.stop(code);
        }
    }

    fn opener(&self) -> OpenStreams {
        self.opener.clone()
    }
}

/// HTTP/3 codes all fit; a peer's value that does not is clipped rather than trusted.
pub(crate) fn var_int(code: u64) -> VarInt {
    VarInt::from_u64(code).unwrap_or(VarInt::MAX)
}

/// Says to `h3` how a connection ended.
pub(crate) fn connection_lost(error: quinn::ConnectionError) -> ConnectionErrorIncoming {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => ConnectionErrorIncoming::ApplicationClose {
            error_code: close.error_code.into_inner(),
        },
        quinn::ConnectionError::TimedOut => ConnectionErrorIncoming::Timeout,
        other => ConnectionErrorIncoming::Undefined(Arc::new(other)),
    }
}

pub(super) fn stream_lost(error: quinn::ConnectionError) -> StreamErrorIncoming {
    StreamErrorIncoming::ConnectionErrorIncoming {
        connection_error: connection_lost(error),
    }
}
