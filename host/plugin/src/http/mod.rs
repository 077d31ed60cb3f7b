//! Guests' outbound HTTP calls: granted hosts only, to the address that was checked, bounded in time and bytes.

mod address;
mod lookup;
mod message;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_core::capability::{CapabilityError, HttpGrant, HttpRequest, HttpResponse};
use galerne_core::limits::Allowance;
use ureq::http::{Response, Uri};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Body};

pub use address::{AddressRange, AddressRangeError};
pub use lookup::{Lookup, SystemLookup};
use message::Message;

/// Makes the calls of all guests of a host. Blocks the guest's own thread.
pub struct HttpClient {
    lookup: Arc<dyn Lookup>,
    /// Networks guests may reach though they are not of the public Internet.
    reachable: Vec<AddressRange>,
    tls: TlsConfig,
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpClient")
            .field("reachable", &self.reachable)
            .finish_non_exhaustive()
    }
}

impl HttpClient {
    /// With `lookup` for names. Of what is not the public Internet, guests reach only `reachable`: an operator's own
    /// networks with services for guests, usually none.
    #[must_use]
    pub fn new(lookup: Arc<dyn Lookup>, reachable: Vec<AddressRange>) -> Self {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::WebPki)
            .unversioned_rustls_crypto_provider(provider)
            .build();
        Self {
            lookup,
            reachable,
            tls,
        }
    }

    /// Sends a request, follows redirects, and reads all of the answer within `time_max`.
    ///
    /// # Errors
    /// Not granted, no sense, a limit, or the network; with what to do.
    pub(crate) fn send(
        &self,
        request: HttpRequest,
        grants: &[HttpGrant],
        allowance: &Allowance,
        time_max: Duration,
    ) -> Result<HttpResponse, CapabilityError> {
        let deadline = Instant::now() + time_max;
        let mut message = Message::new(request, allowance)?;
        let redirects_max = allowance.limits.capability.http_redirects_max;
        for _ in 0..=redirects_max {
            let target = message.target()?;
            if !grants
                .iter()
                .any(|grant| grant.allows(target.scheme, &target.host, target.port))
            {
                return Err(denied(&target.origin()));
            }
            let addresses = self.checked_addresses(&target.host, target.port, deadline)?;
            let response = self.exchange(&message, addresses, deadline)?;
            match message::redirect_target(&response) {
                Some(location) => message.redirect(&target, &location)?,
                None => return read(response, allowance),
            }
        }
        Err(CapabilityError::Limit(format!(
            "http: at most {redirects_max} redirects of one call ({})",
            allowance.who("http_redirects_max")
        )))
    }

    /// Where a name leads, if every one of its addresses is where guests may go.
    fn checked_addresses(
        &self,
        host: &str,
        port: u16,
        deadline: Instant,
    ) -> Result<Vec<SocketAddr>, CapabilityError> {
        let addresses = lookup::look_up(&self.lookup, host, port, time_left(deadline)?)?;
        let reachable = |address: &SocketAddr| {
            let ip = address.ip();
            address::is_public(ip) || self.reachable.iter().any(|range| range.contains(ip))
        };
        // One bad address among good ones is an attack or a mistake; either way nobody should choose among them.
        // The address is not named: what a name leads to inside the host's network is none of the guest's business.
        if addresses.is_empty() || !addresses.iter().all(reachable) {
            return Err(CapabilityError::Denied(format!(
                "http: \"{host}\" leads to a network that guests may not reach (private, local or reserved addresses); \
                 the host's operator can open it"
            )));
        }
        Ok(addresses)
    }

    /// One request to one of these addresses, up to the headers of its answer. A connection of its own, so that no
    /// other call's address is used.
    fn exchange(
        &self,
        message: &Message,
        addresses: Vec<SocketAddr>,
        deadline: Instant,
    ) -> Result<Response<Body>, CapabilityError> {
        let config = Agent::config_builder()
            .tls_config(self.tls.clone())
            // Not from the environment, and redirects are followed here, where each is checked.
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .max_idle_connections(0)
            .user_agent("galerne")
            .timeout_global(Some(time_left(deadline)?))
            .build();
        let agent = Agent::with_parts(config, DefaultConnector::new(), Pinned(addresses));
        let sent = match message.request()? {
            message::Request::Empty(request) => agent.run(request),
            message::Request::Full(request) => agent.run(request),
        };
        sent.map_err(|error| failed(&error))
    }
}

/// "Resolves" to what was checked.
#[derive(Debug)]
struct Pinned(Vec<SocketAddr>);

impl Resolver for Pinned {
    fn resolve(
        &self,
        _: &Uri,
        _: &ureq::config::Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut resolved = self.empty();
        for address in self.0.iter().take(lookup::ADDRESSES_MAX) {
            resolved.push(*address);
        }
        Ok(resolved)
    }
}

fn read(mut response: Response<Body>, allowance: &Allowance) -> Result<HttpResponse, CapabilityError> {
    let bytes_max = allowance.limits.capability.http_response_bytes_max;
    let body = response
        .body_mut()
        .with_config()
        .limit(bytes_max as u64)
        .read_to_vec()
        .map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => CapabilityError::Limit(format!(
                "http: expected a body of at most {bytes_max} bytes ({}), the server sends more",
                allowance.who("http_response_bytes_max")
            )),
            other => failed(&other),
        })?;
    let headers = response.headers().iter();
    Ok(HttpResponse {
        status: response.status().as_u16(),
        headers: headers
            .filter_map(|(name, value)| Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned())))
            .collect(),
        body,
    })
}

fn time_left(deadline: Instant) -> Result<Duration, CapabilityError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(timeout()) } else { Ok(left) }
}

fn timeout() -> CapabilityError {
    CapabilityError::Timeout(
        "http: no whole answer in the time a call has (http_time_max, or what the guest's call may still wait)".to_owned(),
    )
}

fn denied(origin: &str) -> CapabilityError {
    CapabilityError::Denied(format!(
        "http: {origin} is not granted; to grant it, write its host into http = [\"HOST\"] in the table [capabilities] of \
         the deployment"
    ))
}

fn failed(error: &ureq::Error) -> CapabilityError {
    match error {
        ureq::Error::Timeout(_) => timeout(),
        // With the timeout of a read that came late the system says this.
        ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut => timeout(),
        other => CapabilityError::Failed(crate::errors::bounded(&format!("http: {other}"))),
    }
}
