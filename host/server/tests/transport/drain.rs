//! Shutdown lets requests in flight finish, takes no new ones, and ends at its deadline.

use std::time::Duration;

use galerne_server::client::{Client, ClientOptions};
use http::{HeaderMap, Method};

use crate::support::{SLOW_PAUSE, SLOW_PIECES, TestServer, WIRES};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_in_flight_finish() {
    let mut server = TestServer::start().await;
    let mut conns = Vec::new();
    for wire in WIRES {
        conns.push((wire, server.open(wire).await));
    }
    let mut reading = Vec::new();
    for (wire, mut conn) in conns {
        let answer = conn.get("/slow").await;
        reading.push(tokio::spawn(async move {
            let body = answer.bytes().await;
            drop(conn);
            (wire, body)
        }));
    }
    server.begin_stop();
    for task in reading {
        let (wire, body) = task.await.expect("reader");
        assert_eq!(body.len(), SLOW_PIECES * 5, "{wire:?}");
    }
    let took = server.ended().await;
    assert!(
        took < SLOW_PAUSE * 20,
        "idle connections must not hold the drain: {took:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_requests_are_rejected_while_old_ones_finish() {
    let mut server = TestServer::start().await;
    let client = server.client().await;
    let slow = client
        .request(Method::GET, "/slow", HeaderMap::new(), "".into())
        .await
        .expect("answer");
    server.begin_stop();
    tokio::time::sleep(SLOW_PAUSE).await;
    let late = client
        .request(Method::GET, "/info", HeaderMap::new(), "".into())
        .await;
    assert!(late.is_err(), "a request after GOAWAY must not be answered");
    let mut options = ClientOptions::new(server.url(), Some(server.ca.clone()));
    options.connect_timeout = Duration::from_millis(300);
    assert!(
        Client::connect(options).await.is_err(),
        "no new connections while draining"
    );
    assert_eq!(slow.bytes(1024).await.expect("whole").len(), SLOW_PIECES * 5);
    server.ended().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_ends_at_its_deadline() {
    let deadline = Duration::from_millis(200);
    let mut server = TestServer::start_with(|options| options.limits.drain_timeout = deadline).await;
    let alive = server.alive.clone();
    let mut waiting = Vec::new();
    for wire in WIRES {
        let mut conn = server.open(wire).await;
        let mut answer = conn.get("/drip").await;
        answer.chunk().await.expect("piece").expect("more");
        waiting.push((conn, answer));
    }
    alive.reaches(WIRES.len(), Duration::from_secs(5)).await;
    server.begin_stop();
    let took = server.ended().await;
    assert!(took >= deadline && took < deadline * 10, "{took:?}");
    alive.reaches(0, Duration::from_secs(1)).await;
    for (_, answer) in &mut waiting {
        let ended = loop {
            match answer.chunk().await {
                Ok(Some(_)) => {}
                other => break other,
            }
        };
        assert!(ended.is_err(), "a body cut by the deadline must not look whole");
    }
}

#[tokio::test]
async fn idle_server_stops_at_once() {
    let mut server = TestServer::start().await;
    let client = server.client().await;
    client
        .request(Method::GET, "/info", HeaderMap::new(), "".into())
        .await
        .expect("answer");
    server.begin_stop();
    let took = server.ended().await;
    assert!(took < Duration::from_secs(3), "{took:?}");
}
