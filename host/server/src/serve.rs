//! Binds the listeners and runs them to an orderly end. Knows no routes: it is handed a router.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use axum::Router;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tracing::info;

use crate::error::ServeError;
use crate::limits::{Congestion, TransportLimits};
use crate::quic::config;
use crate::quic::listener::QuicListener;
use crate::tcp::{HttpListener, Wrap, alt_svc};
use crate::tls::{ServerTls, TlsFiles};

/// Connections that the system may hold before they are accepted.
const BACKLOG: u32 = 1024;
/// Tries to find one port that is free on UDP and TCP.
const PORT_ATTEMPTS: u32 = 16;

/// What to listen on and how.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Address of HTTP/3 (UDP) and of HTTP/1.1 and 2 with TLS (TCP). Port 0 takes one that is free on both.
    pub listen: SocketAddr,
    /// Plain HTTP/1.1, on a loopback address only.
    pub http: Option<SocketAddr>,
    /// Certificate and key.
    pub tls: TlsFiles,
    /// Congestion control of QUIC.
    pub congestion: Congestion,
    /// Bounds.
    pub limits: TransportLimits,
}

impl ServeOptions {
    /// Options with default limits and congestion control, without plain HTTP.
    #[must_use]
    pub fn new(listen: SocketAddr, tls: TlsFiles) -> Self {
        let (congestion, limits) = (Congestion::default(), TransportLimits::default());
        Self {
            listen,
            http: None,
            tls,
            congestion,
            limits,
        }
    }
}

/// Tells every listener and connection that the end has begun.
#[derive(Clone)]
pub(crate) struct Drain(watch::Receiver<bool>);

impl Drain {
    /// Returns once the drain has begun, at once if it has already.
    pub(crate) async fn begun(&mut self) {
        // A dropped sender means that nobody runs the listeners any more: also an end.
        let _ = self.0.wait_for(|begun| *begun).await;
    }
}

/// Listeners that hold their ports but accept nothing yet.
pub struct Bound {
    quic: QuicListener,
    tls: HttpListener,
    plain: Option<HttpListener>,
    local_addr: SocketAddr,
    http_addr: Option<SocketAddr>,
    files: TlsFiles,
    router: Router,
}

/// Takes the ports and reads the certificate. Must run inside a tokio runtime.
///
/// # Errors
/// When a port is taken, a plain address is not loopback, or certificate and key do not fit.
pub async fn bind(options: ServeOptions, router: Router) -> Result<Bound, ServeError> {
    let plain = options.http.map(bind_plain).transpose()?;
    let tls = ServerTls::load(&options.tls)?;
    let (udp, tcp) = bind_pair(options.listen)?;
    let socket_error = |transport| {
        move |source| ServeError::Socket {
            transport,
            addr: options.listen,
            source,
        }
    };
    let local_addr = udp.local_addr().map_err(socket_error("udp"))?;
    let quic_config = config::server(tls.quic, &options.limits, options.congestion)?;
    let endpoint = quinn::Endpoint::new(
        quinn::EndpointConfig::default(),
        Some(quic_config),
        udp,
        Arc::new(quinn::TokioRuntime),
    )
    .map_err(socket_error("udp"))?;
    let acceptor = TlsAcceptor::from(Arc::new(tls.tcp));
    let wrap = Wrap::Tls {
        acceptor,
        alt_svc: alt_svc(local_addr.port()),
    };
    let limits = options.limits;
    let http_addr = plain
        .as_ref()
        .map(TcpListener::local_addr)
        .transpose()
        .map_err(socket_error("tcp"))?;
    Ok(Bound {
        quic: QuicListener {
            endpoint,
            limits: limits.clone(),
        },
        tls: HttpListener {
            listener: tcp,
            wrap,
            limits: limits.clone(),
        },
        plain: plain.map(|listener| HttpListener {
            listener,
            wrap: Wrap::Plain,
            limits,
        }),
        local_addr,
        http_addr,
        files: options.tls,
        router,
    })
}

impl Bound {
    /// Address of HTTP/3 and of HTTP with TLS.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Address of plain HTTP, if there is one.
    #[must_use]
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http_addr
    }

    /// Certificate and key in use.
    #[must_use]
    pub fn tls_files(&self) -> &TlsFiles {
        &self.files
    }

    /// Serves until `shutdown` completes. Then accepts nothing new, says GOAWAY, lets requests in flight finish for
    /// at most [`TransportLimits::drain_timeout`], and closes what is left.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) {
        let (begin, begun) = watch::channel(false);
        let drain = Drain(begun);
        let plain = async {
            if let Some(plain) = self.plain {
                plain.serve(self.router.clone(), drain.clone()).await;
            }
        };
        let listeners = async {
            tokio::join!(
                self.quic.serve(self.router.clone(), drain.clone()),
                self.tls.serve(self.router.clone(), drain.clone()),
                plain,
            )
        };
        tokio::pin!(listeners);
        tokio::select! {
            _ = &mut listeners => return,
            () = shutdown => {}
        }
        info!("draining: no new requests, waiting for those in flight");
        let _ = begin.send(true);
        listeners.await;
    }
}

fn bind_plain(addr: SocketAddr) -> Result<TcpListener, ServeError> {
    let ip = addr.ip().to_canonical();
    if !ip.is_loopback() {
        return Err(ServeError::PlainNotLoopback { addr });
    }
    bind_tcp(addr).map_err(|source| bind_error("tcp", addr, "--http", source))
}

fn bind_tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // A restart must not wait for the last process's connections to leave TIME_WAIT.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

fn bind_error(
    transport: &'static str,
    addr: SocketAddr,
    flag: &'static str,
    source: io::Error,
) -> ServeError {
    if source.kind() == io::ErrorKind::AddrInUse {
        ServeError::PortInUse {
            transport,
            addr,
            flag,
        }
    } else {
        ServeError::Socket {
            transport,
            addr,
            source,
        }
    }
}

/// UDP and TCP on the same port. With port 0 the system picks the UDP port and TCP has to follow.
fn bind_pair(addr: SocketAddr) -> Result<(UdpSocket, TcpListener), ServeError> {
    let ip: IpAddr = addr.ip();
    for _ in 0..PORT_ATTEMPTS {
        let udp = UdpSocket::bind(addr).map_err(|source| bind_error("udp", addr, "--listen", source))?;
        let udp_addr = udp
            .local_addr()
            .map_err(|source| bind_error("udp", addr, "--listen", source))?;
        match bind_tcp(udp_addr) {
            Ok(tcp) => return Ok((udp, tcp)),
            Err(error) if addr.port() == 0 && error.kind() == io::ErrorKind::AddrInUse => {}
            Err(source) => return Err(bind_error("tcp", udp_addr, "--listen", source)),
        }
    }
    Err(ServeError::NoSharedPort {
        ip,
        attempts: PORT_ATTEMPTS,
    })
}
