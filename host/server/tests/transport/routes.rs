//! Requests and responses come through whole and alike on every protocol.

use galerne_server::error::ClientError;
use http::{Method, StatusCode};

use crate::support::{COUNT_BYTES_MAX, TestServer, WIRES, Wire};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn info_tells_protocol_and_peer() {
    let server = TestServer::start().await;
    for wire in WIRES {
        let answer = server.open(wire).await.get("/info").await;
        assert_eq!(answer.status, StatusCode::OK);
        let alt_svc = answer.header("alt-svc").map(str::to_owned);
        let expected = match wire {
            Wire::H3 => "h3 127.0.0.1 true",
            Wire::H2 => "h2 127.0.0.1 true",
            Wire::H1 => "http/1.1 127.0.0.1 true",
            Wire::Plain => "http/1.1 127.0.0.1 false",
        };
        assert_eq!(
            answer.header("content-length"),
            Some(expected.len().to_string().as_str()),
            "{wire:?}"
        );
        assert_eq!(answer.text().await, expected);
        let over_tls_tcp = matches!(wire, Wire::H2 | Wire::H1);
        let advertised = format!("h3=\":{}\"; ma=86400", server.addr.port());
        assert_eq!(alt_svc, over_tls_tcp.then_some(advertised), "{wire:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_stream_both_ways() {
    let server = TestServer::start().await;
    // Well past every window, and no multiple of any frame size.
    let body: Vec<u8> = (0..9_000_001u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for wire in WIRES {
        let answer = server
            .open(wire)
            .await
            .request(Method::POST, "/echo", body.clone())
            .await;
        assert_eq!(answer.status, StatusCode::OK);
        let echoed = answer.bytes().await;
        assert_eq!(echoed.len(), body.len(), "{wire:?}");
        assert_eq!(
            echoed.iter().zip(&body).position(|(a, b)| a != b),
            None,
            "{wire:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn head_and_empty_bodies_are_right() {
    let server = TestServer::start().await;
    for wire in WIRES {
        let mut conn = server.open(wire).await;
        let head = conn.request(Method::HEAD, "/info", "").await;
        assert!(
            head.header("content-length").is_some_and(|length| length != "0"),
            "{wire:?}"
        );
        assert!(head.bytes().await.is_empty());
        let empty = conn.get("/empty").await;
        assert_eq!(empty.status, StatusCode::NO_CONTENT, "{wire:?}");
        assert!(empty.bytes().await.is_empty());
        assert_eq!(conn.request(Method::POST, "/echo", "").await.bytes().await, b"");
        assert_eq!(conn.get("/nowhere").await.status, StatusCode::NOT_FOUND);
    }
}

#[tokio::test]
async fn connection_headers_do_not_reach_http3() {
    let server = TestServer::start().await;
    let answer = server.open(Wire::H3).await.get("/hop").await;
    assert_eq!(
        (answer.header("connection"), answer.header("keep-alive")),
        (None, None)
    );
    assert_eq!(answer.text().await, "hop");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_beyond_the_routers_limit_are_refused() {
    let server = TestServer::start().await;
    for wire in WIRES {
        let fits = server
            .open(wire)
            .await
            .request(Method::POST, "/count", vec![0; COUNT_BYTES_MAX])
            .await;
        assert_eq!(fits.text().await, COUNT_BYTES_MAX.to_string(), "{wire:?}");
        let over = server
            .open(wire)
            .await
            .request(Method::POST, "/count", vec![0; COUNT_BYTES_MAX + 1])
            .await;
        assert_eq!(over.status, StatusCode::PAYLOAD_TOO_LARGE, "{wire:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundred_streams_share_one_connection() {
    let server = TestServer::start().await;
    let client = server.client().await;
    let requests = (0..100usize).map(async |index| {
        let body = vec![index as u8; 10_000 + index];
        let headers = http::HeaderMap::new();
        let response = client
            .request(Method::POST, "/echo", headers, body.clone().into())
            .await
            .expect("response");
        assert_eq!(response.bytes(1 << 20).await.expect("body"), body);
    });
    futures_util::future::join_all(requests).await;
}

#[tokio::test]
async fn body_that_breaks_is_never_a_clean_end() {
    let server = TestServer::start().await;
    for wire in WIRES {
        let mut answer = server.open(wire).await.get("/break").await;
        let error = loop {
            match answer.chunk().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("{wire:?}: clean end of a broken body"),
                Err(error) => break error,
            }
        };
        assert!(!error.is_empty());
    }
}

#[tokio::test]
async fn event_stream_needs_its_done() {
    let server = TestServer::start().await;
    let client = server.client().await;
    let mut whole = client.sse("/sse", &serde_json::json!({})).await.expect("stream");
    let first = whole.next().await.expect("event").expect("first");
    assert_eq!(
        (first.id.as_deref(), first.data.as_str()),
        (Some("1"), "{\"a\":1}")
    );
    assert_eq!(whole.next().await.expect("event").expect("second").data, "b");
    assert_eq!(whole.next().await.expect("end"), None);
    assert_eq!(whole.next().await.expect("end stays"), None);

    let mut cut = client
        .sse("/sse-cut", &serde_json::json!({}))
        .await
        .expect("stream");
    assert_eq!(cut.next().await.expect("event").expect("first").data, "a");
    assert!(matches!(cut.next().await, Err(ClientError::Truncated)));

    let refused = client
        .sse("/nowhere", &serde_json::json!({}))
        .await
        .err()
        .expect("refused");
    assert!(
        matches!(
            refused,
            ClientError::Status {
                status: StatusCode::NOT_FOUND,
                ..
            }
        ),
        "{refused}"
    );
}
