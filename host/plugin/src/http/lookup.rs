//! From a name to addresses, in bounded time. Judges no address.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use galerne_core::capability::CapabilityError;

/// Addresses of one name that are used.
pub(crate) const ADDRESSES_MAX: usize = 16;

/// Looks names up. A trait, so that tests can answer what an attacker's name server would.
pub trait Lookup: Send + Sync {
    /// The addresses of a name, with this port. Blocks.
    ///
    /// # Errors
    /// There are none, or nobody answers.
    fn look_up(&self, host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>>;
}

/// The operating system's.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemLookup;

impl Lookup for SystemLookup {
    fn look_up(&self, host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
        Ok((host, port).to_socket_addrs()?.take(ADDRESSES_MAX).collect())
    }
}

/// On a thread of its own, because the system's look-up cannot be stopped: one that outlives its call ends when the system
/// gives up.
pub(crate) fn look_up(
    lookup: &Arc<dyn Lookup>,
    host: &str,
    port: u16,
    time_max: Duration,
) -> Result<Vec<SocketAddr>, CapabilityError> {
    let failed = |reason: &dyn std::fmt::Display| {
        CapabilityError::Failed(format!("http: look up \"{host}\": {reason}; is the name right?"))
    };
    let (answer, answered) = mpsc::channel();
    let (lookup, name) = (Arc::clone(lookup), host.to_owned());
    std::thread::Builder::new()
        .name("guest-lookup".to_owned())
        .spawn(move || {
            // Nobody waits for it any more if this fails.
            let _ = answer.send(lookup.look_up(&name, port));
        })
        .map_err(|error| failed(&error))?;
    match answered.recv_timeout(time_max) {
        Ok(Ok(mut addresses)) => {
            addresses.truncate(ADDRESSES_MAX);
            Ok(addresses)
        }
        Ok(Err(error)) => Err(failed(&error)),
        Err(RecvTimeoutError::Timeout) => Err(super::timeout()),
        Err(RecvTimeoutError::Disconnected) => Err(failed(&"the look-up broke off")),
    }
}
