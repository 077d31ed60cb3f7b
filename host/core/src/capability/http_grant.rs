//! One host a deployment's guests may call: read from its spelling, and matched against a URL's parts.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a host is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Encrypted.
    Https,
    /// In the clear: only where a grant says so.
    Http,
}

impl Scheme {
    /// Where servers listen if a URL does not say.
    #[must_use]
    pub fn default_port(self) -> u16 {
        match self {
            Self::Https => 443,
            Self::Http => 80,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Https => "https",
            Self::Http => "http",
        })
    }
}

/// `api.example.com`, `*.example.com` (any name below, not `example.com` itself), with `:PORT` where it is not the
/// scheme's, and `http://` before it for calls in the clear. Names only: an address cannot be granted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HttpGrant {
    scheme: Scheme,
    /// In lower case, without the `*.`.
    name: String,
    below: bool,
    port: u16,
}

/// No grant of a host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("http grant {got:?}: {reason}; expected a host's name like \"api.example.com\" or \"*.example.com\"")]
pub struct HttpGrantError {
    got: String,
    reason: &'static str,
}

impl HttpGrant {
    /// Whether this grants calls of this host, which is in lower case, at this port.
    #[must_use]
    pub fn allows(&self, scheme: Scheme, host: &str, port: u16) -> bool {
        let named = if self.below {
            let below = host.strip_suffix(&self.name);
            below.is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
        } else {
            host == self.name
        };
        named && scheme == self.scheme && port == self.port
    }
}

impl FromStr for HttpGrant {
    type Err = HttpGrantError;

    fn from_str(text: &str) -> Result<Self, HttpGrantError> {
        let wrong = |reason| HttpGrantError {
            got: text.chars().take(300).collect(),
            reason,
        };
        let (scheme, rest) = match text.split_once("://") {
            None => (Scheme::Https, text),
            Some(("https", rest)) => (Scheme::Https, rest),
            Some(("http", rest)) => (Scheme::Http, rest),
            Some(_) => return Err(wrong("the scheme is neither https nor http")),
        };
        let (host, port) = match rest.rsplit_once(':') {
            None => (rest, scheme.default_port()),
            Some((host, port)) => {
                let port = port.parse().ok().filter(|port| *port > 0);
                (
                    host,
                    port.ok_or_else(|| wrong("the port is no number from 1 to 65535"))?,
                )
            }
        };
        let (below, name) = match host.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, host),
        };
        let name = name.to_ascii_lowercase();
        if !is_name(&name) {
            return Err(wrong("this is no host's name"));
        }
        if name.parse::<IpAddr>().is_ok() || name.rsplit('.').next().is_some_and(is_number) {
            return Err(wrong("an address cannot be granted"));
        }
        Ok(Self {
            scheme,
            name,
            below,
            port,
        })
    }
}

/// Labels of letters, digits, `-` and `_` with dots between them.
fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// What resolvers take for a part of an IPv4 address, in decimal or hexadecimal.
fn is_number(label: &str) -> bool {
    let digits = label.strip_prefix("0x");
    digits.map_or_else(
        || label.bytes().all(|byte| byte.is_ascii_digit()),
        |hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()),
    )
}

impl fmt::Display for HttpGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.scheme == Scheme::Http {
            f.write_str("http://")?;
        }
        if self.below {
            f.write_str("*.")?;
        }
        f.write_str(&self.name)?;
        if self.port == self.scheme.default_port() {
            return Ok(());
        }
        write!(f, ":{}", self.port)
    }
}

impl TryFrom<String> for HttpGrant {
    type Error = HttpGrantError;

    fn try_from(text: String) -> Result<Self, HttpGrantError> {
        text.parse()
    }
}

impl From<HttpGrant> for String {
    fn from(grant: HttpGrant) -> Self {
        grant.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(text: &str) -> HttpGrant {
        text.parse().expect("a grant")
    }

    #[test]
    fn a_grant_is_for_one_scheme_name_and_port() {
        let exact = grant("API.example.com");
        assert!(exact.allows(Scheme::Https, "api.example.com", 443));
        for (scheme, host, port) in [
            (Scheme::Http, "api.example.com", 80),
            (Scheme::Http, "api.example.com", 443),
            (Scheme::Https, "api.example.com", 8443),
            (Scheme::Https, "api.example.com.evil.org", 443),
            (Scheme::Https, "evil-api.example.com", 443),
            (Scheme::Https, "example.com", 443),
        ] {
            assert!(!exact.allows(scheme, host, port), "{scheme}://{host}:{port}");
        }
        assert!(grant("http://crm.example.com:8080").allows(Scheme::Http, "crm.example.com", 8080));
    }

    #[test]
    fn a_star_is_for_names_below() {
        let below = grant("*.example.com");
        for host in ["a.example.com", "a.b.example.com"] {
            assert!(below.allows(Scheme::Https, host, 443), "{host}");
        }
        for host in [
            "example.com",
            ".example.com",
            "evilexample.com",
            "example.com.evil.org",
        ] {
            assert!(!below.allows(Scheme::Https, host, 443), "{host}");
        }
    }

    #[test]
    fn a_grant_is_written_as_it_was_read() {
        for text in [
            "a.example",
            "*.a.example",
            "http://a.example",
            "a.example:8443",
            "http://*.a:81",
        ] {
            assert_eq!(grant(text).to_string(), text);
        }
        assert_eq!(grant("https://A.example:443").to_string(), "a.example");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "*",
            "*.",
            "a..b",
            "a.example/path",
            "user@a.example",
            "127.0.0.1",
            "[::1]",
            "1.2.0x7f",
            "2130706433",
            "ftp://a.example",
            "a.example:0",
            "a.example:99999",
            "*.*.example",
            "a b",
            "a.example.",
            "é.example",
        ] {
            assert!(text.parse::<HttpGrant>().is_err(), "{text}");
        }
    }
}
