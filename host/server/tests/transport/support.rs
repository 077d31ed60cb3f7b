//! A server with a small router, and one client interface over every protocol.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Extension, Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use galerne_server::client::{self, Client, ClientOptions};
use galerne_server::error::ClientError;
use galerne_server::limits::TransportInfo;
use galerne_server::serve::{ServeOptions, bind};
use galerne_server::tls::{DevCertificate, read_certificates};
use http::{HeaderMap, Method, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

/// Largest body that `/count` takes.
pub(crate) const COUNT_BYTES_MAX: usize = 1 << 20;
/// Pieces that `/slow` sends, one every [`SLOW_PAUSE`].
pub(crate) const SLOW_PIECES: usize = 6;
pub(crate) const SLOW_PAUSE: Duration = Duration::from_millis(80);

/// Pause of `/sip` after each piece of its body.
pub(crate) const SIP_PAUSE: Duration = Duration::from_millis(10);

/// Handlers and bodies that have begun and not been dropped.
#[derive(Clone, Default)]
pub(crate) struct Alive(Arc<AtomicUsize>);

pub(crate) struct Guard(Alive);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Alive {
    fn guard(&self) -> Guard {
        self.0.fetch_add(1, Ordering::SeqCst);
        Guard(self.clone())
    }

    /// Waits until exactly `count` are alive.
    pub(crate) async fn reaches(&self, count: usize, within: Duration) {
        let begun = Instant::now();
        loop {
            let now = self.0.load(Ordering::SeqCst);
            if now == count {
                return;
            }
            assert!(
                begun.elapsed() < within,
                "expected {count} alive within {within:?}, still {now}"
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn pieces(guard: Guard, pause: Duration, count: usize) -> Body {
    Body::from_stream(stream::unfold((guard, 0), move |(guard, sent)| async move {
        if sent == count {
            return None;
        }
        tokio::time::sleep(pause).await;
        Some((
            Ok::<_, std::convert::Infallible>(Bytes::from_static(b"piece")),
            (guard, sent + 1),
        ))
    }))
}

fn events(text: &'static str) -> Response {
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(Body::from(text))
        .expect("response")
}

/// Every route that the tests need.
pub(crate) fn router(alive: Alive) -> Router {
    Router::new()
        .route(
            "/echo",
            post(async |request: Request| Response::new(request.into_body())),
        )
        .route(
            "/info",
            get(async |Extension(info): Extension<TransportInfo>| {
                format!("{} {} {}", info.protocol.name(), info.remote.ip(), info.encrypted)
            }),
        )
        .route("/count", post(async |body: Bytes| body.len().to_string()))
        .route("/empty", get(async || StatusCode::NO_CONTENT))
        .route(
            "/hop",
            get(async || ([("connection", "close"), ("keep-alive", "1")], "hop")),
        )
        .route(
            "/hang",
            get(async |State(alive): State<Alive>| {
                let _guard = alive.guard();
                std::future::pending::<()>().await;
            })
            .post(async |State(alive): State<Alive>, body: Bytes| {
                let _guard = alive.guard();
                assert!(!body.is_empty());
                std::future::pending::<()>().await;
            }),
        )
        .route(
            "/drip",
            get(async |State(alive): State<Alive>| {
                Response::new(pieces(alive.guard(), Duration::from_millis(5), usize::MAX))
            }),
        )
        .route(
            "/stall",
            get(async |State(alive): State<Alive>| {
                Response::new(pieces(alive.guard(), Duration::from_secs(3600), 1))
            }),
        )
        .route(
            "/slow",
            get(async |State(alive): State<Alive>| {
                Response::new(pieces(alive.guard(), SLOW_PAUSE, SLOW_PIECES))
            }),
        )
        .route(
            "/ignore",
            post(async |State(alive): State<Alive>, request: Request| {
                let guard = alive.guard();
                std::future::pending::<()>().await;
                drop((guard, request));
            }),
        )
        .route(
            "/sip",
            post(async |request: Request| {
                let mut body = request.into_body();
                while body.frame().await.is_some() {
                    tokio::time::sleep(SIP_PAUSE).await;
                }
            }),
        )
        .route(
            "/break",
            get(async || {
                // A reset throws away what was not delivered yet, the header too: give it time to arrive.
                let broken =
                    stream::once(async { Ok(Bytes::from_static(b"half")) }).chain(stream::once(async {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        Err(std::io::Error::other("broken"))
                    }));
                Response::new(Body::from_stream(broken))
            }),
        )
        .route(
            "/sse",
            post(async || events("id: 1\ndata: {\"a\":1}\n\n: ping\n\nid: 2\ndata: b\n\ndata: [DONE]\n\n")),
        )
        .route("/sse-cut", post(async || events("id: 1\ndata: a\n\n")))
        .layer(DefaultBodyLimit::max(COUNT_BYTES_MAX))
        .with_state(alive)
}

/// A server on free ports, with its own certificate.
pub(crate) struct TestServer {
    pub(crate) addr: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) ca: PathBuf,
    pub(crate) alive: Alive,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl TestServer {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut ServeOptions)) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let cert = DevCertificate::load_or_create(dir.path(), SystemTime::now(), &[]).expect("certificate");
        let any: SocketAddr = "127.0.0.1:0".parse().expect("address");
        let mut options = ServeOptions::new(any, cert.files.clone());
        options.http = Some(any);
        change(&mut options);
        let alive = Alive::default();
        let bound = bind(options, router(alive.clone())).await.expect("bind");
        let (addr, http) = (bound.local_addr(), bound.http_addr().expect("plain"));
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(bound.serve(async move {
            let _ = stopped.await;
        }));
        Self {
            addr,
            http,
            ca: cert.files.cert,
            alive,
            stop: Some(stop),
            task,
            _dir: dir,
        }
    }

    pub(crate) fn begin_stop(&mut self) {
        let _ = self.stop.take().expect("once").send(());
    }

    /// Waits for the server's end and says how long it took.
    pub(crate) async fn ended(self) -> Duration {
        let begun = Instant::now();
        self.task.await.expect("server");
        begun.elapsed()
    }

    pub(crate) fn url(&self) -> String {
        format!("https://{}", self.addr)
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(ClientOptions::new(self.url(), Some(self.ca.clone())))
            .await
            .expect("connect")
    }

    pub(crate) async fn open(&self, wire: Wire) -> Conn {
        match wire {
            Wire::H3 => Conn::H3(Box::new(self.client().await)),
            Wire::H2 => {
                let io = TokioIo::new(self.tls(b"h2").await);
                let (sender, conn) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
                    .await
                    .expect("h2");
                Conn::H2(sender, Driver::start(async move { drop(conn.await) }))
            }
            Wire::H1 => {
                let io = TokioIo::new(self.tls(b"http/1.1").await);
                let (sender, conn) = hyper::client::conn::http1::handshake(io).await.expect("h1");
                Conn::H1(sender, Driver::start(async move { drop(conn.await) }))
            }
            Wire::Plain => {
                let io = TokioIo::new(TcpStream::connect(self.http).await.expect("tcp"));
                let (sender, conn) = hyper::client::conn::http1::handshake(io).await.expect("h1");
                Conn::H1(sender, Driver::start(async move { drop(conn.await) }))
            }
        }
    }

    pub(crate) async fn tls(&self, alpn: &[u8]) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut config = self.rustls();
        config.alpn_protocols = vec![alpn.to_vec()];
        let tcp = TcpStream::connect(self.addr).await.expect("tcp");
        let name = ServerName::try_from("localhost").expect("name");
        TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await
            .expect("tls")
    }

    /// TLS client settings that trust this server.
    pub(crate) fn rustls(&self) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in read_certificates(&self.ca).expect("ca") {
            roots.add(certificate).expect("root");
        }
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth()
    }
}

/// How a test reaches the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    H3,
    H2,
    H1,
    Plain,
}

pub(crate) const WIRES: [Wire; 4] = [Wire::H3, Wire::H2, Wire::H1, Wire::Plain];

/// Ends a connection's driver, and so the connection, when the last user drops it.
pub(crate) struct Driver(JoinHandle<()>);

impl Driver {
    fn start(connection: impl Future<Output = ()> + Send + 'static) -> Arc<Self> {
        Arc::new(Self(tokio::spawn(connection)))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub(crate) enum Conn {
    H3(Box<Client>),
    H2(hyper::client::conn::http2::SendRequest<Full<Bytes>>, Arc<Driver>),
    H1(hyper::client::conn::http1::SendRequest<Full<Bytes>>, Arc<Driver>),
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: AnswerBody,
    /// An answer outlives the connection that it was asked on.
    _driver: Option<Arc<Driver>>,
}

enum AnswerBody {
    H3(Box<client::Response>),
    Hyper(Incoming),
}

impl Conn {
    pub(crate) async fn request(&mut self, method: Method, path: &str, body: impl Into<Bytes>) -> Answer {
        let body = body.into();
        let request = |uri: String| {
            http::Request::builder()
                .method(method.clone())
                .uri(uri)
                .header("host", "localhost")
                .body(Full::new(body.clone()))
                .expect("request")
        };
        let (response, driver) = match self {
            Self::H3(client) => {
                let response = client
                    .request(method, path, HeaderMap::new(), body)
                    .await
                    .unwrap_or_else(|e| panic!("{e}"));
                let (status, headers) = (response.status, response.headers.clone());
                return Answer {
                    status,
                    headers,
                    body: AnswerBody::H3(Box::new(response)),
                    _driver: None,
                };
            }
            Self::H2(sender, driver) => {
                let mut request = request(format!("https://localhost{path}"));
                request.headers_mut().remove("host");
                sender.ready().await.expect("open");
                (sender.send_request(request).await, driver.clone())
            }
            Self::H1(sender, driver) => {
                sender.ready().await.expect("open");
                (
                    sender.send_request(request(path.to_owned())).await,
                    driver.clone(),
                )
            }
        };
        let (parts, body) = response.expect("response").into_parts();
        let body = AnswerBody::Hyper(body);
        Answer {
            status: parts.status,
            headers: parts.headers,
            body,
            _driver: Some(driver),
        }
    }

    pub(crate) async fn get(&mut self, path: &str) -> Answer {
        self.request(Method::GET, path, Bytes::new()).await
    }
}

impl Answer {
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, String> {
        match &mut self.body {
            AnswerBody::H3(response) => response.chunk().await.map_err(|e: ClientError| e.to_string()),
            AnswerBody::Hyper(body) => match body.frame().await {
                None => Ok(None),
                Some(Ok(frame)) => Ok(Some(frame.into_data().unwrap_or_default())),
                Some(Err(error)) => Err(error.to_string()),
            },
        }
    }

    pub(crate) async fn bytes(mut self) -> Vec<u8> {
        let mut whole = Vec::new();
        while let Some(chunk) = self.chunk().await.expect("body") {
            whole.extend_from_slice(&chunk);
        }
        whole
    }

    pub(crate) async fn text(self) -> String {
        String::from_utf8(self.bytes().await).expect("text")
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("text"))
    }
}
