//! A guest's HTTP request as it is checked, sent, and changed by a redirect. Opens no connection.

use galerne_core::capability::{CapabilityError, HttpRequest, Scheme};
use galerne_core::limits::Allowance;
use ureq::Body;
use ureq::http::{self, HeaderMap, HeaderName, HeaderValue, Method, Response, Uri, header};

const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// Headers that say how the message travels: the host's own.
const TRAVEL: [&str; 13] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "http2-settings",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
];

/// What a redirect to another host takes along.
const HARMLESS: [HeaderName; 4] = [
    header::ACCEPT,
    header::ACCEPT_LANGUAGE,
    header::CONTENT_TYPE,
    header::USER_AGENT,
];

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) scheme: Scheme,
    /// In lower case.
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl Target {
    pub(crate) fn origin(&self) -> String {
        format!("{}://{}:{}", self.scheme, self.host, self.port)
    }
}

/// A request on its way.
#[derive(Debug)]
pub(crate) struct Message {
    method: Method,
    url: Uri,
    headers: HeaderMap,
    body: Vec<u8>,
}

/// As the client takes it: with a body or without.
pub(crate) enum Request {
    Empty(http::Request<()>),
    Full(http::Request<Vec<u8>>),
}

fn invalid(text: impl Into<String>) -> CapabilityError {
    CapabilityError::Invalid(crate::errors::bounded(&text.into()))
}

impl Message {
    /// Checks all but where it goes.
    pub(crate) fn new(request: HttpRequest, allowance: &Allowance) -> Result<Self, CapabilityError> {
        let header_bytes = |(name, value): &(String, String)| name.len() + value.len() + 4;
        let bytes =
            request.headers.iter().map(header_bytes).sum::<usize>() + request.url.len() + request.body.len();
        let bytes_max = allowance.limits.capability.http_request_bytes_max;
        if bytes > bytes_max {
            return Err(CapabilityError::Limit(format!(
                "http: expected a request of at most {bytes_max} bytes ({}), got {bytes}",
                allowance.who("http_request_bytes_max")
            )));
        }
        let method = request.method.to_ascii_uppercase();
        if !METHODS.contains(&method.as_str()) {
            let expected = METHODS.join(", ");
            return Err(invalid(format!(
                "http method: expected {expected}, got {method:?}"
            )));
        }
        if ["GET", "HEAD", "OPTIONS"].contains(&method.as_str()) && !request.body.is_empty() {
            return Err(invalid(format!("http: expected no body with {method}, got one")));
        }
        Ok(Self {
            method: method.parse().map_err(|_| invalid("http method"))?,
            url: parse_url(&request.url)?,
            headers: headers(&request.headers)?,
            body: request.body,
        })
    }

    /// Where it goes.
    pub(crate) fn target(&self) -> Result<Target, CapabilityError> {
        let url = &self.url;
        let wrong = |reason: &str| {
            invalid(format!(
                "http url: {reason}; expected https://HOST/PATH, got {:?}",
                url.to_string()
            ))
        };
        let scheme = match url.scheme_str() {
            Some("https") => Scheme::Https,
            Some("http") => Scheme::Http,
            _ => return Err(wrong("no scheme https or http")),
        };
        let authority = url.authority().ok_or_else(|| wrong("no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("a user's name in it"));
        }
        let host = authority.host().to_ascii_lowercase();
        if host.is_empty() {
            return Err(wrong("no host"));
        }
        let port = match authority.as_str().len() == authority.host().len() {
            true => scheme.default_port(),
            false => authority
                .port_u16()
                .ok_or_else(|| wrong("no port behind the colon"))?,
        };
        Ok(Target { scheme, host, port })
    }

    /// The request to be sent.
    pub(crate) fn request(&self) -> Result<Request, CapabilityError> {
        let mut request = http::Request::new(());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.url.clone();
        *request.headers_mut() = self.headers.clone();
        let has_body = [Method::POST, Method::PUT, Method::PATCH].contains(&self.method);
        if has_body {
            return Ok(Request::Full(request.map(|()| self.body.clone())));
        }
        if !self.body.is_empty() {
            return Err(invalid(format!(
                "http: expected no body with {}, got one",
                self.method
            )));
        }
        Ok(Request::Empty(request))
    }

    /// Becomes the request a redirect asks for.
    pub(crate) fn redirect(&mut self, from: &Target, redirect: &Redirect) -> Result<(), CapabilityError> {
        self.url = join(&self.url, &redirect.location)?;
        if redirect.drops_body && self.method != Method::HEAD {
            self.method = Method::GET;
            self.body.clear();
            self.headers.remove(header::CONTENT_TYPE);
        }
        if self.target()? != *from {
            let kept = HARMLESS
                .iter()
                .filter_map(|name| Some((name.clone(), self.headers.get(name)?.clone())))
                .collect();
            self.headers = kept;
        }
        Ok(())
    }
}

fn parse_url(text: &str) -> Result<Uri, CapabilityError> {
    text.parse().map_err(|error| {
        invalid(format!(
            "http url: {error}; expected https://HOST/PATH, got {text:?}"
        ))
    })
}

fn headers(pairs: &[(String, String)]) -> Result<HeaderMap, CapabilityError> {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        let wrong = |reason: &str| invalid(format!("http header {name:?}: {reason}"));
        let name: HeaderName = name.parse().map_err(|_| wrong("this is no header's name"))?;
        if TRAVEL.contains(&name.as_str()) {
            return Err(wrong("the host writes this one itself; leave it out"));
        }
        let value = HeaderValue::from_str(value).map_err(|_| wrong("its value has control characters"))?;
        headers
            .try_append(name, value)
            .map_err(|_| wrong("there are too many headers"))?;
    }
    Ok(headers)
}

/// A server's wish that the request go elsewhere.
pub(crate) struct Redirect {
    location: String,
    drops_body: bool,
}

/// Whether this answer is one.
pub(crate) fn redirect_target(response: &Response<Body>) -> Option<Redirect> {
    let drops_body = match response.status().as_u16() {
        301..=303 => true,
        307 | 308 => false,
        _ => return None,
    };
    let location = response.headers().get(header::LOCATION)?.to_str().ok()?;
    Some(Redirect {
        location: location.to_owned(),
        drops_body,
    })
}

/// A location seen from a URL: a whole URL, or a part of one.
fn join(base: &Uri, location: &str) -> Result<Uri, CapabilityError> {
    let location = location.split('#').next().unwrap_or_default();
    if location.contains("://") && !location.starts_with('/') && !location.starts_with('?') {
        return parse_url(location);
    }
    let scheme = base.scheme_str().unwrap_or("https");
    if location.starts_with("//") {
        return parse_url(&format!("{scheme}:{location}"));
    }
    let authority = base.authority().map_or("", |authority| authority.as_str());
    let path = match location {
        absolute if absolute.starts_with('/') => absolute.to_owned(),
        query if query.starts_with('?') => format!("{}{query}", base.path()),
        relative => {
            let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{folder}/{relative}")
        }
    };
    parse_url(&format!("{scheme}://{authority}{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(
        method: &str,
        url: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Message, CapabilityError> {
        let request = HttpRequest {
            method: method.to_owned(),
            url: url.to_owned(),
            headers: headers
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            body: body.to_vec(),
        };
        Message::new(request, &Allowance::default())
    }

    fn target(url: &str) -> Result<String, CapabilityError> {
        message("GET", url, &[], b"")?
            .target()
            .map(|target| target.origin())
    }

    #[test]
    fn a_target_is_what_is_connected_to() {
        for (url, expected) in [
            ("https://A.example", "https://a.example:443"),
            ("http://a.example/x?y", "http://a.example:80"),
            ("https://a.example:8443/", "https://a.example:8443"),
            ("https://a.example/@b.example", "https://a.example:443"),
            ("https://[::1]:80/", "https://[::1]:80"),
        ] {
            assert_eq!(target(url).as_deref(), Ok(expected), "{url}");
        }
        for url in [
            "",
            "a.example",
            "/path",
            "ftp://a.example/",
            "https://user@a.example/",
            "https://granted.example:x@evil.example",
            "https://a.example:99999/",
            "https://a.example:/",
            "https://",
            "file:///etc/passwd",
            "https://a\\b.example/",
        ] {
            assert!(target(url).is_err(), "{url}: {:?}", target(url));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let url = "https://a.example/";
        for (method, headers, body) in [
            ("CONNECT", &[][..], &b""[..]),
            ("GE T", &[], b""),
            ("GET", &[], b"body"),
            ("DELETE", &[], b"body"),
            ("GET", &[("Host", "b.example")], b""),
            ("POST", &[("Transfer-Encoding", "chunked")], b"x"),
            ("GET", &[("x", "a\r\ny: b")], b""),
            ("GET", &[("x y", "a")], b""),
        ] {
            let sent = message(method, url, headers, body).and_then(|message| message.request());
            assert!(
                matches!(sent, Err(CapabilityError::Invalid(_))),
                "{method} {headers:?}"
            );
        }
        assert!(message("post", url, &[("x-a", "a\u{7f}")], b"x").is_err());
        assert!(message("post", url, &[("X-A", "b")], b"x").is_ok());
        let large = message("POST", url, &[], &vec![0; 2 << 20]);
        assert!(matches!(large, Err(CapabilityError::Limit(_))));
    }

    #[test]
    fn a_redirect_elsewhere_takes_no_token_along() {
        let headers = [
            ("authorization", "secret"),
            ("x-api-key", "secret"),
            ("accept", "text/plain"),
        ];
        let mut message = message("POST", "https://a.example/x/y", &headers, b"body").expect("a request");
        let from = message.target().expect("a target");
        let to = |location: &str, drops_body| Redirect {
            location: location.to_owned(),
            drops_body,
        };
        message.redirect(&from, &to("z?q", false)).expect("the same host");
        assert_eq!(message.url.to_string(), "https://a.example/x/z?q");
        assert_eq!((message.headers.len(), message.body.len()), (3, 4));
        message
            .redirect(&from, &to("//b.example/", true))
            .expect("another host");
        assert_eq!(message.url.to_string(), "https://b.example/");
        assert_eq!(message.method, Method::GET);
        assert_eq!((message.headers.len(), message.body.len()), (1, 0));
        assert!(message.headers.contains_key("accept"));
    }

    #[test]
    fn locations_are_seen_from_where_they_came() {
        let base: Uri = "http://a.example:81/x/y?q".parse().expect("a URL");
        for (location, expected) in [
            ("/z", "http://a.example:81/z"),
            ("z", "http://a.example:81/x/z"),
            ("?r", "http://a.example:81/x/y?r"),
            ("//b.example/z#f", "http://b.example/z"),
            ("https://b.example/z", "https://b.example/z"),
            (
                "/to?url=https://c.example",
                "http://a.example:81/to?url=https://c.example",
            ),
        ] {
            assert_eq!(join(&base, location).expect(location).to_string(), expected);
        }
    }
}
