//! A client that goes away is noticed at once: nothing of its request stays.

use std::time::Duration;

use http::{HeaderMap, Method};

use crate::support::{TestServer, WIRES, Wire};

const START: Duration = Duration::from_secs(5);
/// From the client's cancel to the handler's drop.
const PROMPT: Duration = Duration::from_millis(200);

/// HTTP/1.1 has no way to cancel but to close the connection.
fn ends_with_its_request(wire: Wire) -> bool {
    matches!(wire, Wire::H1 | Wire::Plain)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pending_handler_is_dropped() {
    let server = TestServer::start().await;
    for wire in WIRES {
        for (method, body) in [(Method::GET, ""), (Method::POST, "question")] {
            let mut conn = server.open(wire).await;
            let alive = server.alive.clone();
            tokio::select! {
                _ = conn.request(method, "/hang", body) => panic!("the handler never answers"),
                () = alive.reaches(1, START) => {}
            }
            let _kept = (!ends_with_its_request(wire)).then_some(conn);
            server.alive.reaches(0, PROMPT).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streaming_body_is_dropped() {
    let server = TestServer::start().await;
    for wire in WIRES {
        let mut conn = server.open(wire).await;
        let mut answer = conn.get("/drip").await;
        answer.chunk().await.expect("piece").expect("more");
        server.alive.reaches(1, START).await;
        drop(answer);
        let _kept = (!ends_with_its_request(wire)).then_some(conn);
        server.alive.reaches(0, PROMPT).await;
    }
}

/// The body has nothing to write for an hour, so no write can fail: only the stop itself can tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn body_that_waits_is_dropped() {
    let server = TestServer::start().await;
    for wire in WIRES {
        let mut conn = server.open(wire).await;
        let answer = conn.get("/stall").await;
        server.alive.reaches(1, START).await;
        drop(answer);
        let _kept = (!ends_with_its_request(wire)).then_some(conn);
        server.alive.reaches(0, PROMPT).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_connection_drops_all_its_requests() {
    let server = TestServer::start().await;
    let client = server.client().await;
    let mut answers = Vec::new();
    for _ in 0..8 {
        answers.push(
            client
                .request(Method::GET, "/stall", HeaderMap::new(), "".into())
                .await
                .expect("answer"),
        );
    }
    server.alive.reaches(8, START).await;
    drop(answers);
    client.close().await;
    server.alive.reaches(0, PROMPT).await;
}

/// Cancelling one stream leaves its neighbours on the connection alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neighbours_of_a_cancelled_request_go_on() {
    let server = TestServer::start().await;
    let client = server.client().await;
    let cancelled = client
        .request(Method::GET, "/drip", HeaderMap::new(), "".into())
        .await
        .expect("answer");
    let slow = client
        .request(Method::GET, "/slow", HeaderMap::new(), "".into())
        .await
        .expect("answer");
    server.alive.reaches(2, START).await;
    drop(cancelled);
    server.alive.reaches(1, PROMPT).await;
    let body = slow.bytes(1024).await.expect("whole");
    assert_eq!(body.len(), crate::support::SLOW_PIECES * 5);
}
