//! Finds, reaches and verifies the server. Knows nothing of requests.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use http::Uri;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionError, TransportErrorCode};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::Client;
use crate::error::{ClientError, TlsError};
use crate::limits::{Congestion, TransportLimits};
use crate::quic::adapter::Connection;
use crate::quic::config;
use crate::tls::{provider, read_certificates};

/// A home router forgets a quiet UDP flow within half a minute, and a client that only receives would never notice.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Response headers a server may send.
const HEADER_BYTES: usize = 64 << 10;
/// TLS alert "no application protocol" (RFC 7301).
const ALERT_NO_APPLICATION_PROTOCOL: u64 = 120;
/// Certificate alerts of RFC 8446, 6: bad_certificate (42) to unknown_ca (48), and decrypt_error (51), which is what
/// a certificate of the trusted name but with another key comes to.
const ALERTS_CERTIFICATE: [u64; 7] = [42, 43, 44, 45, 46, 48, 51];

/// Whom to connect to and whom to trust.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// `https://HOST[:PORT]`; a path is ignored and the scheme may be left out. The port defaults to 443.
    pub url: String,
    /// PEM file with the certificates to trust, for example the server's own development certificate.
    pub ca: Option<PathBuf>,
    /// Trust any certificate. Says nothing about who answers.
    pub insecure: bool,
    /// Time for all of name resolution and handshake.
    pub connect_timeout: Duration,
    /// Congestion control of what this side sends.
    pub congestion: Congestion,
}

impl ClientOptions {
    /// Options that trust `ca` and wait five seconds.
    #[must_use]
    pub fn new(url: impl Into<String>, ca: Option<PathBuf>) -> Self {
        let connect_timeout = Duration::from_secs(5);
        Self {
            url: url.into(),
            ca,
            insecure: false,
            connect_timeout,
            congestion: Congestion::default(),
        }
    }
}

/// A server's name as a URL gives it.
pub(super) struct Target {
    pub(super) authority: String,
    host: String,
    port: u16,
}

impl Target {
    fn parse(url: &str) -> Result<Self, ClientError> {
        let refused = |reason: &str| ClientError::Url {
            url: url.to_owned(),
            reason: reason.to_owned(),
        };
        let full = if url.contains("://") {
            url.to_owned()
        } else {
            format!("https://{url}")
        };
        let uri: Uri = full
            .parse()
            .map_err(|error: http::uri::InvalidUri| refused(&error.to_string()))?;
        if uri.scheme_str() != Some("https") {
            return Err(refused("HTTP/3 needs TLS, so the scheme must be https"));
        }
        let authority = uri.authority().ok_or_else(|| refused("no host"))?;
        if authority.as_str().contains('@') {
            return Err(refused("user names have no place here"));
        }
        let host = authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        if host.is_empty() {
            return Err(refused("no host"));
        }
        Ok(Self {
            authority: authority.to_string(),
            host,
            port: authority.port_u16().unwrap_or(443),
        })
    }

    /// Every address to try. `localhost` is both loopbacks, whatever the hosts file says.
    async fn addresses(&self) -> Result<Vec<SocketAddr>, ClientError> {
        if self.host.eq_ignore_ascii_case("localhost") {
            let both: [IpAddr; 2] = [Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()];
            return Ok(both.map(|ip| SocketAddr::new(ip, self.port)).to_vec());
        }
        let failed = |source| ClientError::Resolve {
            host: self.host.clone(),
            source,
        };
        let found: Vec<_> = tokio::net::lookup_host((self.host.as_str(), self.port))
            .await
            .map_err(failed)?
            .collect();
        if found.is_empty() {
            return Err(failed(std::io::Error::other("no address")));
        }
        Ok(found)
    }
}

pub(super) async fn connect(options: ClientOptions) -> Result<Client, ClientError> {
    let target = Target::parse(&options.url)?;
    let config = client_config(&options)?;
    let addresses = target.addresses().await?;
    let mut attempts: FuturesUnordered<_> = addresses
        .into_iter()
        .map(|server| attempt(server, &target.host, config.clone(), options.connect_timeout))
        .collect();
    let mut worst: Option<ClientError> = None;
    while let Some(attempted) = attempts.next().await {
        match attempted {
            Ok((endpoint, quic)) => {
                drop(attempts);
                return start(endpoint, quic, target).await;
            }
            // "Refused" on one loopback says less than "not trusted" on the other.
            Err(error) => {
                worst = Some(match worst.take() {
                    Some(worst) => worst.telling(error),
                    None => error,
                });
            }
        }
    }
    Err(worst.unwrap_or_else(|| ClientError::Resolve {
        host: target.host.clone(),
        source: std::io::Error::other("no address"),
    }))
}

impl ClientError {
    /// The error that tells a user more.
    fn telling(self, other: Self) -> Self {
        let rank = |error: &Self| match error {
            Self::Certificate { .. } | Self::Alpn { .. } => 3,
            Self::Connection { .. } => 2,
            Self::Timeout { .. } => 1,
            _ => 0,
        };
        if rank(&other) > rank(&self) { other } else { self }
    }
}

async fn start(
    endpoint: quinn::Endpoint,
    quic: quinn::Connection,
    target: Target,
) -> Result<Client, ClientError> {
    let server = quic.remote_address();
    let (adapter, shared) = Connection::new(quic.clone(), HEADER_BYTES);
    let built = h3::client::builder()
        .max_field_section_size(HEADER_BYTES as u64)
        .send_grease(false)
        .build(adapter)
        .await;
    let (mut driver, sender) = built.map_err(|error| ClientError::Connection {
        server,
        reason: error.to_string(),
    })?;
    // Ends with the connection, which ends with the last sender.
    tokio::spawn(async move {
        let _ = driver.wait_idle().await;
    });
    Ok(Client {
        sender,
        shared,
        quic,
        target,
        server,
        _endpoint: endpoint,
    })
}

async fn attempt(
    server: SocketAddr,
    host: &str,
    config: quinn::ClientConfig,
    connect_timeout: Duration,
) -> Result<(quinn::Endpoint, quinn::Connection), ClientError> {
    let any: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let endpoint = quinn::Endpoint::client(SocketAddr::new(any, 0)).map_err(ClientError::Socket)?;
    let connecting =
        endpoint
            .connect_with(config, server, host)
            .map_err(|error| ClientError::Connection {
                server,
                reason: error.to_string(),
            })?;
    let connected = tokio::select! {
        connected = timeout(connect_timeout, connecting) => connected,
        () = refused(server) => return Err(ClientError::Refused { server }),
    };
    match connected {
        Ok(Ok(quic)) => Ok((endpoint, quic)),
        Ok(Err(error)) => Err(handshake_error(server, &error, connect_timeout)),
        Err(_) => Err(ClientError::Timeout {
            server,
            timeout: connect_timeout,
        }),
    }
}

/// Returns only if `server` answers UDP with "port unreachable".
///
/// quinn's socket is not connected, so the system never tells it of such answers and it would wait in vain.
async fn refused(server: SocketAddr) {
    let any: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let probe = async {
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
        socket.connect(server).await?;
        // No QUIC packet is this short: a server drops it without an answer.
        socket.send(&[0]).await?;
        socket.recv(&mut [0; 1]).await
    };
    match probe.await {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
        _ => std::future::pending().await,
    }
}

fn handshake_error(server: SocketAddr, error: &ConnectionError, timeout: Duration) -> ClientError {
    // Our own verdict on the peer, or the peer's on us.
    let code = match error {
        ConnectionError::TransportError(error) => Some(u64::from(error.code)),
        ConnectionError::ConnectionClosed(close) => Some(u64::from(close.error_code)),
        ConnectionError::TimedOut => return ClientError::Timeout { server, timeout },
        _ => None,
    };
    // RFC 9001, 4.8: TLS alerts are transport errors from 0x100 on.
    let alert = code.and_then(|code| code.checked_sub(u64::from(TransportErrorCode::crypto(0))));
    match alert {
        Some(ALERT_NO_APPLICATION_PROTOCOL) => ClientError::Alpn { server },
        Some(alert) if ALERTS_CERTIFICATE.contains(&alert) => ClientError::Certificate {
            server,
            reason: error.to_string(),
        },
        _ => ClientError::Connection {
            server,
            reason: error.to_string(),
        },
    }
}

fn client_config(options: &ClientOptions) -> Result<quinn::ClientConfig, ClientError> {
    let provider = provider();
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::from)?;
    let mut tls = if options.insecure {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
            .with_no_client_auth()
    } else {
        builder
            .with_root_certificates(roots(options)?)
            .with_no_client_auth()
    };
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let crypto = QuicClientConfig::try_from(tls).map_err(TlsError::from)?;
    let mut transport = config::transport(&TransportLimits::default(), options.congestion);
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    // Servers open no request streams.
    transport.max_concurrent_bidi_streams(0u32.into());
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// The given file only; without one nothing is trusted and the error says what to pass.
fn roots(options: &ClientOptions) -> Result<RootCertStore, ClientError> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = &options.ca {
        for certificate in read_certificates(path)? {
            roots.add(certificate).map_err(TlsError::from)?;
        }
    }
    Ok(roots)
}

/// Accepts whoever answers, but still checks that the answer is signed with the certificate's key.
struct AnyCertificate(Arc<CryptoProvider>);

impl fmt::Debug for AnyCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyCertificate")
    }
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_takes_urls_and_authorities() {
        for (url, host, port) in [
            ("https://localhost:8443", "localhost", 8443),
            ("https://[::1]:8443/v1", "::1", 8443),
            ("galerne.example", "galerne.example", 443),
            ("127.0.0.1:9", "127.0.0.1", 9),
        ] {
            let target = Target::parse(url).expect(url);
            assert_eq!((target.host.as_str(), target.port), (host, port), "{url}");
        }
        for url in [
            "http://localhost",
            "https://",
            "https://a b",
            "https://user@host",
            "",
        ] {
            assert!(
                matches!(Target::parse(url), Err(ClientError::Url { .. })),
                "{url}"
            );
        }
    }
}
