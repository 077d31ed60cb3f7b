//! A host that grants, a local server, and a name server that lies. Knows no test.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use galerne_core::capability::{CapabilityError, Grants, SecretName, SecretSource};
use galerne_core::guest::ToolSession;
use galerne_core::limits::{Allowance, CapabilityLimits, GuestLimits, HostLimits};
use galerne_core::tool::ToolError;
use galerne_plugin::{
    CapabilityParts, GuestLog, HostCapabilities, HttpClient, Lookup, MemoryKv, PluginHost, PluginOptions,
};

use super::filter::info;
use super::{built, host_with};

/// The value of the secret `CRM_TOKEN`, which no message may have.
pub(crate) const SECRET: &str = "hunter2";

struct Secrets;

impl SecretSource for Secrets {
    fn secret(&self, name: &SecretName) -> Result<String, CapabilityError> {
        match name.as_str() {
            "CRM_TOKEN" => Ok(SECRET.to_owned()),
            other => Err(CapabilityError::Failed(format!("secret {other}: there is none"))),
        }
    }
}

/// Answers the first look-up of a name with its first addresses, the next with the next, and then with the last again.
#[derive(Default)]
pub(crate) struct Names {
    pub(crate) answers: BTreeMap<String, Vec<Vec<IpAddr>>>,
    pub(crate) asked: AtomicUsize,
    pub(crate) delay: Duration,
    pub(crate) seen: Mutex<BTreeMap<String, usize>>,
}

impl Names {
    pub(crate) fn with(mut self, name: &str, answers: &[&[&str]]) -> Self {
        let addresses = |answer: &&[&str]| answer.iter().map(|ip| ip.parse().expect("an address")).collect();
        self.answers
            .insert(name.to_owned(), answers.iter().map(addresses).collect());
        self
    }

    /// `local.test` and `other.test` are this machine.
    pub(crate) fn local() -> Self {
        Self::default()
            .with("local.test", &[&["127.0.0.1"]])
            .with("other.test", &[&["127.0.0.1"]])
    }
}

impl Lookup for Names {
    fn look_up(&self, host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
        std::thread::sleep(self.delay);
        self.asked.fetch_add(1, Ordering::SeqCst);
        let answers = self
            .answers
            .get(host)
            .ok_or_else(|| std::io::Error::other("no such name"))?;
        let mut seen = self.seen.lock().expect("no panic");
        let times = seen.entry(host.to_owned()).or_default();
        let answer = &answers[(*times).min(answers.len() - 1)];
        *times += 1;
        Ok(answer.iter().map(|ip| SocketAddr::new(*ip, port)).collect())
    }
}

/// What a test changes in a deployment.
pub(crate) struct Deployment {
    /// As in `[capabilities]`.
    pub(crate) grants: String,
    pub(crate) limits: CapabilityLimits,
    /// What one call may wait.
    pub(crate) lower: &'static [(&'static str, u64)],
    pub(crate) wait_max: Duration,
    pub(crate) names: Arc<Names>,
    /// Whether guests may reach this machine.
    pub(crate) local: bool,
}

impl Default for Deployment {
    fn default() -> Self {
        Self {
            grants: "{}".to_owned(),
            limits: CapabilityLimits {
                http_time_max: Duration::from_millis(400),
                ..CapabilityLimits::default()
            },
            lower: &[],
            wait_max: Duration::from_secs(3),
            names: Arc::new(Names::local()),
            local: true,
        }
    }
}

impl Deployment {
    /// That grants what the guest `overreach` imports, and of servers these.
    pub(crate) fn of_overreach(hosts: &[String]) -> Self {
        let hosts = serde_json::to_string(hosts).expect("JSON");
        Self {
            grants: format!(
                r#"{{"log": true, "kv": true, "secrets": ["CRM_TOKEN", "LOST"], "http": {hosts}}}"#
            ),
            ..Self::default()
        }
    }

    /// A host for its guests, with little time for them, and their log.
    pub(crate) fn host(&self) -> (PluginHost, Arc<GuestLog>) {
        let grants: Grants = serde_json::from_str(&self.grants).expect("grants");
        let log = Arc::new(GuestLog::new(&self.limits));
        let reachable = if self.local {
            vec!["127.0.0.0/8".parse().expect("a range")]
        } else {
            vec![]
        };
        let lookup: Arc<dyn Lookup> = Arc::clone(&self.names) as Arc<dyn Lookup>;
        let host = HostLimits {
            capability: self.limits,
            ..HostLimits::default()
        };
        let own = self
            .lower
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value));
        let allowance = Allowance::lowered(host, "support", &own.collect());
        let parts = CapabilityParts {
            tenant: "acme".to_owned(),
            deployment: "support".to_owned(),
            grants,
            allowance,
            log: Arc::clone(&log),
            http: Arc::new(HttpClient::new(lookup, reachable)),
            kv: Arc::new(MemoryKv::default()),
            secrets: Arc::new(Secrets),
        };
        let host = host_with(&PluginOptions {
            limits: GuestLimits {
                tool_deadline: Duration::from_millis(200),
                wait_max: self.wait_max,
                ..GuestLimits::default()
            },
            ..PluginOptions::default()
        });
        (
            host.with_capabilities(Arc::new(HostCapabilities::new(parts))),
            log,
        )
    }

    /// A request's calls of the guest `overreach`, if it is built.
    pub(crate) fn overreach(&self) -> Option<Overreach> {
        let (host, log) = self.host();
        Overreach::of(host, log)
    }
}

/// The guest `overreach` in one request.
pub(crate) struct Overreach {
    session: Box<dyn ToolSession>,
    pub(crate) log: Arc<GuestLog>,
    pub(crate) host: PluginHost,
}

impl Overreach {
    /// Loads it once more, for a request of its own, if it is built.
    pub(crate) fn of(host: PluginHost, log: Arc<GuestLog>) -> Option<Self> {
        let guest = host.load_tool("evil", &built("overreach")?).expect("it fits");
        let session = guest.session("{}", &info()).expect("a session");
        Some(Self { session, log, host })
    }

    pub(crate) fn ask(&mut self, word: &str, text: &str, times: u64) -> Result<String, ToolError> {
        let text = serde_json::to_string(text).expect("JSON");
        let arguments = format!(r#"{{"do": "{word}", "text": {text}, "times": {times}}}"#);
        self.session.call("ask", &arguments)
    }

    /// What it is told when the host does not do it.
    pub(crate) fn refused(&mut self, word: &str, text: &str, times: u64) -> String {
        match self.ask(word, text, times) {
            Err(ToolError::Failed(reason)) => reason,
            other => panic!("{word} {text}: expected a refusal, got {other:?}"),
        }
    }
}

/// Serves connections of this machine, each on a thread, for as long as the test runs. `answer` is given the head of the
/// request.
pub(crate) fn serve(answer: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer) = (stream.expect("a connection"), Arc::clone(&answer));
            std::thread::spawn(move || {
                let mut head = String::new();
                let mut reader = BufReader::new(stream.try_clone().expect("a clone"));
                while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).is_ok_and(|read| read > 0) {}
                // What is left unread when a connection is closed would reset it, and the answer would be lost.
                let length = head
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
                let mut body = vec![0; length.unwrap_or(0)];
                if reader.read_exact(&mut body).is_ok() {
                    answer(&head, &mut stream);
                }
            });
        }
    });
    port
}

/// A whole answer. That the client went away is its own business.
pub(crate) fn reply(stream: &mut TcpStream, status: u16, headers: &str, body: &str) {
    let length = body.len();
    let _ = write!(
        stream,
        "HTTP/1.1 {status} Status\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
}
