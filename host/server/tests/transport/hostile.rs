//! Peers that break the rules cost themselves, not the server.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use crate::support::{SIP_PAUSE, TestServer, Wire};

const EXCESSIVE_LOAD: u32 = 0x107;
const NO_ERROR: u32 = 0x100;
const REQUEST_REJECTED: u32 = 0x10b;

/// A QUIC connection with an empty SETTINGS frame sent and nothing else.
async fn raw(server: &TestServer) -> (quinn::Endpoint, quinn::Connection) {
    let mut tls = server.rustls();
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).expect("quic");
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().expect("address")).expect("endpoint");
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let conn = endpoint
        .connect_with(config, server.addr, "localhost")
        .expect("config")
        .await
        .expect("connect");
    let mut control = conn.open_uni().await.expect("control");
    // Stream type control, then SETTINGS of length 0.
    control.write_all(&[0x00, 0x04, 0x00]).await.expect("settings");
    // Finishing a control stream is an error, so it must outlive the test.
    std::mem::forget(control);
    (endpoint, conn)
}

/// HEADERS of `POST path` in QPACK without dynamic table or Huffman coding.
fn post_headers(path: &str) -> Vec<u8> {
    // Prefix; static entries :method POST (20) and :scheme https (23).
    let mut block = vec![0x00, 0x00, 0xc0 | 20, 0xc0 | 23];
    // Literals with static names :path (1) and :authority (0).
    block.extend([0x50 | 1, path.len() as u8]);
    block.extend(path.as_bytes());
    block.extend([0x50, 9]);
    block.extend(b"localhost");
    let mut frame = vec![0x01, block.len() as u8];
    frame.extend(block);
    frame
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handmade_request_is_understood() {
    let server = TestServer::start().await;
    let (_endpoint, conn) = raw(&server).await;
    let (mut send, mut recv) = conn.open_bi().await.expect("stream");
    send.write_all(&post_headers("/count")).await.expect("headers");
    // An empty DATA frame must not end the body; the one after it must count.
    send.write_all(&[0x00, 0x00, 0x00, 0x03, 1, 2, 3])
        .await
        .expect("data");
    tokio::time::sleep(Duration::from_millis(50)).await;
    send.write_all(&[0x00, 0x00, 0x00, 0x02, 4, 5])
        .await
        .expect("data");
    send.finish().expect("finish");
    let response = recv.read_to_end(4096).await.expect("response");
    assert_eq!(response.last(), Some(&b'5'), "{response:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_header_is_cut_off() {
    let server = TestServer::start().await;
    let (_endpoint, conn) = raw(&server).await;
    let (mut send, _recv) = conn.open_bi().await.expect("stream");
    // HEADERS that declares 2^40 bytes.
    send.write_all(&[0x01, 0xc0, 0, 1, 0, 0, 0, 0, 0])
        .await
        .expect("frame header");
    let mut sent = 0;
    let stopped = loop {
        match send.write(&[0; 4096]).await {
            Ok(written) => sent += written,
            Err(quinn::WriteError::Stopped(code)) => break code,
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 1 << 20, "the server took {sent} bytes of one header");
    };
    assert_eq!(stopped, EXCESSIVE_LOAD.into());
    assert!(
        conn.close_reason().is_none(),
        "other requests on the connection go on"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_header_is_cut_off() {
    let limit = Duration::from_millis(200);
    let server = TestServer::start_with(|options| options.limits.header_timeout = limit).await;
    let (_endpoint, conn) = raw(&server).await;
    let (mut send, _recv) = conn.open_bi().await.expect("stream");
    send.write_all(&[0x01]).await.expect("one byte");
    timeout(limit * 10, send.stopped())
        .await
        .expect("cut off")
        .expect("stopped");

    let mut plain = TcpStream::connect(server.http).await.expect("tcp");
    plain.write_all(b"GET / HT").await.expect("half a header");
    let mut rest = Vec::new();
    timeout(limit * 10, plain.read_to_end(&mut rest))
        .await
        .expect("cut off")
        .expect("closed");
}

/// Frames of one byte must not grow the server's buffer past QUIC's flow control, whether the handler reads or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_frames_feel_back_pressure() {
    let server = TestServer::start().await;
    for path in ["/ignore", "/sip"] {
        let (_endpoint, conn) = raw(&server).await;
        let (mut send, _recv) = conn.open_bi().await.expect("stream");
        send.write_all(&post_headers(path)).await.expect("headers");
        let frames = [0x00, 0x01, b'x'].repeat(1024);
        let mut sent = 0;
        // Some 50 sips of about 1.5 kB each, beside a window of 256 KiB.
        let end = Instant::now() + SIP_PAUSE * 50;
        while let Ok(written) = timeout_at(end, send.write(&frames)).await {
            sent += written.expect("write");
            assert!(
                sent < 1 << 20,
                "{path}: the server took {sent} bytes that its handler never read"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_frames_arrive_whole() {
    let server = TestServer::start().await;
    let (_endpoint, conn) = raw(&server).await;
    let (mut send, mut recv) = conn.open_bi().await.expect("stream");
    send.write_all(&post_headers("/count")).await.expect("headers");
    send.write_all(&[0x00, 0x01, b'x'].repeat(100_000))
        .await
        .expect("frames");
    send.finish().expect("finish");
    let response = recv.read_to_end(4096).await.expect("response");
    assert!(response.ends_with(b"100000"), "{response:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_headers_are_refused_with_431() {
    let server = TestServer::start().await;
    let client = server.client().await;
    let mut headers = HeaderMap::new();
    for index in 0..45 {
        let name: http::HeaderName = format!("x-filler-{index}").parse().expect("name");
        // Seven bits a byte in Huffman coding or fewer: small on the wire, large decoded.
        headers.insert(name, HeaderValue::from_str(&"a".repeat(1000)).expect("value"));
    }
    let response = client
        .request(Method::GET, "/info", headers, "".into())
        .await
        .expect("response");
    assert_eq!(response.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rapid_cancels_close_the_connection() {
    let server = TestServer::start_with(|options| options.limits.early_cancels_max = 20).await;
    let client = server.client().await;
    let mut cancelled = 0;
    let error = loop {
        let request = client.request(Method::POST, "/hang", HeaderMap::new(), "x".into());
        match timeout(Duration::from_millis(20), request).await {
            Err(_) => cancelled += 1,
            Ok(Ok(_)) => panic!("the handler never answers"),
            Ok(Err(error)) => break error,
        }
        assert!(cancelled < 100, "still open after {cancelled} cancels");
    };
    assert!(cancelled >= 20, "closed after {cancelled}: {error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_bounded() {
    let server = TestServer::start_with(|options| options.limits.connections_max = 2).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut conn = server.open(Wire::Plain).await;
        assert_eq!(conn.get("/info").await.status, StatusCode::OK);
        held.push(conn);
    }
    let mut refused = TcpStream::connect(server.http).await.expect("tcp");
    let mut said = String::new();
    refused.read_to_string(&mut said).await.expect("answer");
    assert!(
        said.starts_with("HTTP/1.1 503 ") && said.contains("retry-after: 1"),
        "{said}"
    );
    drop(held);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(
        server.open(Wire::Plain).await.get("/info").await.status,
        StatusCode::OK
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crowded_server_asks_for_proof_of_address() {
    let server = TestServer::start_with(|options| options.limits.handshakes_before_retry = 0).await;
    let client = server.client().await;
    let response = client
        .request(Method::GET, "/info", HeaderMap::new(), "".into())
        .await
        .expect("after a Retry");
    assert_eq!(response.status, StatusCode::OK);
}

/// A client that has not read GOAWAY yet must learn that its request was not looked at, so that it may repeat it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_after_goaway_are_rejected_as_repeatable() {
    let mut server = TestServer::start_with(|o| o.limits.drain_timeout = Duration::from_secs(1)).await;
    let (_endpoint, conn) = raw(&server).await;
    let (mut send, _recv) = conn.open_bi().await.expect("stream");
    send.write_all(&post_headers("/ignore")).await.expect("headers");
    server.alive.reaches(1, Duration::from_secs(5)).await;
    server.begin_stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (mut late, mut answer) = conn.open_bi().await.expect("stream");
    late.write_all(&post_headers("/count")).await.expect("headers");
    late.finish().expect("finish");
    let error = answer.read_to_end(64).await.expect_err("rejected");
    let rejected = quinn::ReadToEndError::Read(quinn::ReadError::Reset(REQUEST_REJECTED.into()));
    assert_eq!(error, rejected);
    server.ended().await;
}

/// A client that sends no pings of its own may still wait in the queue for longer than the idle time-out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_request_outlives_the_idle_time_out() {
    let idle = Duration::from_millis(400);
    let server = TestServer::start_with(|options| options.limits.idle_timeout = idle).await;
    let (_endpoint, conn) = raw(&server).await;
    let (mut send, _recv) = conn.open_bi().await.expect("stream");
    send.write_all(&post_headers("/ignore")).await.expect("headers");
    server.alive.reaches(1, Duration::from_secs(5)).await;
    tokio::time::sleep(idle * 4).await;
    assert!(conn.close_reason().is_none(), "{:?}", conn.close_reason());
    server.alive.reaches(1, Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unused_connection_is_closed_without_error() {
    let unused = Duration::from_millis(200);
    let server = TestServer::start_with(|options| options.limits.unused_timeout = unused).await;
    let (_endpoint, conn) = raw(&server).await;
    match timeout(unused * 10, conn.closed()).await.expect("closed") {
        quinn::ConnectionError::ApplicationClosed(close) => assert_eq!(close.error_code, NO_ERROR.into()),
        other => panic!("{other}"),
    }
}
