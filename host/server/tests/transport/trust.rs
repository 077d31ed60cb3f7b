//! Who may listen where, and what a client says when it cannot connect.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use galerne_server::client::{Client, ClientOptions};
use galerne_server::error::{ClientError, ServeError};
use galerne_server::serve::{ServeOptions, bind};
use galerne_server::tls::{DevCertificate, TlsFiles, spki_sha256};
use http::{HeaderMap, Method};

use crate::support::TestServer;

fn address(text: &str) -> SocketAddr {
    text.parse().expect("address")
}

fn certificate(dir: &tempfile::TempDir) -> TlsFiles {
    DevCertificate::load_or_create(dir.path(), SystemTime::now(), &[])
        .expect("certificate")
        .files
}

async fn connect_error(options: ClientOptions) -> ClientError {
    Client::connect(options).await.err().expect("no connection")
}

#[tokio::test]
async fn other_certificate_is_not_trusted() {
    let server = TestServer::start().await;
    let other = TestServer::start().await;
    assert_ne!(
        spki_sha256(&server.ca).expect("hash"),
        spki_sha256(&other.ca).expect("hash")
    );
    for ca in [Some(other.ca.clone()), None] {
        let error = connect_error(ClientOptions::new(server.url(), ca)).await;
        assert!(matches!(error, ClientError::Certificate { .. }), "{error}");
        assert!(
            error
                .to_string()
                .contains("certificate not trusted: pass --ca FILE or --insecure"),
            "{error}"
        );
    }
    let mut insecure = ClientOptions::new(server.url(), None);
    insecure.insecure = true;
    let client = Client::connect(insecure).await.expect("insecure");
    client
        .request(Method::GET, "/info", HeaderMap::new(), "".into())
        .await
        .expect("answer");
}

#[tokio::test]
async fn localhost_is_tried_on_both_loopbacks() {
    let server = TestServer::start().await;
    let url = format!("https://localhost:{}", server.addr.port());
    let client = Client::connect(ClientOptions::new(url, Some(server.ca.clone())))
        .await
        .expect("connect");
    assert_eq!(client.server(), server.addr);
}

#[tokio::test]
async fn nobody_there_is_said_at_once() {
    let free = std::net::UdpSocket::bind("127.0.0.1:0")
        .expect("socket")
        .local_addr()
        .expect("address");
    let begun = std::time::Instant::now();
    let mut options = ClientOptions::new(format!("https://{free}"), None);
    options.connect_timeout = Duration::from_secs(20);
    let error = connect_error(options).await;
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn silence_is_a_time_out() {
    let deaf = std::net::UdpSocket::bind("127.0.0.1:0").expect("socket");
    let mut options = ClientOptions::new(format!("https://{}", deaf.local_addr().expect("address")), None);
    options.connect_timeout = Duration::from_millis(200);
    let error = connect_error(options).await;
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn server_without_http3_is_told_apart() {
    let dir = tempfile::tempdir().expect("dir");
    let files = certificate(&dir);
    let chain = galerne_server::tls::read_certificates(&files.cert).expect("chain");
    let key = rustls_pki_types::pem::PemObject::from_pem_file(&files.key).expect("key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("key");
    tls.alpn_protocols = vec![b"smtp".to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls).expect("quic");
    let endpoint = quinn::Endpoint::server(
        quinn::ServerConfig::with_crypto(Arc::new(crypto)),
        address("127.0.0.1:0"),
    )
    .expect("endpoint");
    let url = format!("https://{}", endpoint.local_addr().expect("address"));
    let accepting = tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let _ = incoming.await;
        }
    });
    let error = connect_error(ClientOptions::new(url, Some(files.cert))).await;
    assert!(matches!(error, ClientError::Alpn { .. }), "{error}");
    accepting.abort();
}

async fn bind_error(options: ServeOptions) -> ServeError {
    bind(options, Router::new()).await.err().expect("refused")
}

#[tokio::test]
async fn plain_http_is_for_loopback_only() {
    let dir = tempfile::tempdir().expect("dir");
    for open in ["0.0.0.0:0", "[::]:0", "192.0.2.1:8000"] {
        let mut options = ServeOptions::new(address("127.0.0.1:0"), certificate(&dir));
        options.http = Some(address(open));
        let error = bind_error(options).await;
        assert!(
            matches!(error, ServeError::PlainNotLoopback { .. }),
            "{open}: {error}"
        );
        assert!(
            error.to_string().contains("loopback") && error.to_string().contains("127.0.0.1"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn taken_ports_are_named() {
    let dir = tempfile::tempdir().expect("dir");
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").expect("udp");
    let taken = udp.local_addr().expect("address");
    let error = bind_error(ServeOptions::new(taken, certificate(&dir))).await;
    assert!(
        matches!(
            error,
            ServeError::PortInUse {
                transport: "udp",
                flag: "--listen",
                ..
            }
        ),
        "{error}"
    );

    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("tcp");
    let taken = tcp.local_addr().expect("address");
    let error = bind_error(ServeOptions::new(taken, certificate(&dir))).await;
    assert!(
        matches!(
            error,
            ServeError::PortInUse {
                transport: "tcp",
                flag: "--listen",
                ..
            }
        ),
        "{error}"
    );

    let mut options = ServeOptions::new(address("127.0.0.1:0"), certificate(&dir));
    options.http = Some(taken);
    let error = bind_error(options).await;
    assert!(
        matches!(
            error,
            ServeError::PortInUse {
                transport: "tcp",
                flag: "--http",
                ..
            }
        ),
        "{error}"
    );
}
