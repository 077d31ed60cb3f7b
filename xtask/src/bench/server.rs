//! A server of either side, started and stopped, and the load of `galerne bench serve` upon it.

use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{Context, process};
use crate::demo::MODEL;

/// The name under which peers serve the model.
pub(super) const PEER_MODEL: &str = "demo";
/// How long a server may take to end by itself.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// What the clients ask.
#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) clients: u32,
    /// Of all clients together.
    pub(super) requests: u32,
    pub(super) prompt_tokens: u32,
    pub(super) output_tokens: u32,
}

/// What they saw: medians, and output tokens of all together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Served {
    pub(super) tokens_per_s: f64,
    pub(super) ttft_p50_ms: f64,
    pub(super) itl_p50_ms: f64,
}

/// A running server, ended when dropped.
pub(super) struct Server {
    child: Child,
    pub(super) url: String,
    /// Ours only.
    pub(super) https: String,
    /// The model's name there.
    model: &'static str,
}

impl Drop for Server {
    /// Asks it to end, so that it can end its own children, before it is killed.
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let deadline = Instant::now() + END_TIMEOUT;
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Ours, with the demo model.
    pub(super) fn galerne(context: &Context) -> Result<Self> {
        Self::ours(&context.galerne, &context.data, context.threads)
    }

    /// Ours, with the demo model of this data folder.
    pub(super) fn ours(galerne: &Path, data: &Path, threads: usize) -> Result<Self> {
        let mut child = Command::new(galerne)
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--http",
                "127.0.0.1:0",
                "-m",
                MODEL,
                "--data",
            ])
            .arg(data)
            .args(["--threads", &threads.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start galerne serve")?;
        let stdout = child.stdout.take().context("the server's output")?;
        let mut server = Self {
            child,
            url: String::new(),
            https: String::new(),
            model: MODEL,
        };
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            let mut words = line.split_whitespace();
            let (what, url) = (words.next(), words.next().unwrap_or_default());
            if what == Some("http") {
                url.clone_into(&mut server.url);
            } else if what == Some("https") {
                url.clone_into(&mut server.https);
            } else if line.starts_with("ready") {
                ensure!(
                    !server.url.is_empty(),
                    "galerne serve did not say where plain HTTP is"
                );
                return Ok(server);
            }
        }
        bail!("galerne serve ended before it was ready")
    }

    /// A peer that is to listen on `port`, once its `/health` answers.
    ///
    /// # Errors
    /// It ended, or `timeout` passed.
    pub(super) fn peer(command: &mut Command, port: u16, timeout: Duration) -> Result<Self> {
        let name = process::name(command);
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let mut server = Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
            https: String::new(),
            model: PEER_MODEL,
        };
        let deadline = Instant::now() + timeout;
        while !healthy(port) {
            if let Some(status) = server.child.try_wait()? {
                bail!("{name} ended with {status} before it was ready");
            }
            ensure!(
                Instant::now() < deadline,
                "{name} was not ready within {timeout:?}"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(server)
    }

    /// Lets clients stream until all their requests are answered.
    pub(super) fn load(&self, context: &Context, load: Load) -> Result<Served> {
        parse(&process::finish(&mut self.bench(&context.galerne, self.model, load))?.stdout)
    }

    /// The same, of this model or deployment: the times between tokens, in ms.
    pub(super) fn gaps(&self, galerne: &Path, model: &str, load: Load) -> Result<Vec<f64>> {
        let mut command = self.bench(galerne, model, load);
        parse_gaps(&process::finish(command.arg("--gaps"))?.stdout)
    }

    fn bench(&self, galerne: &Path, model: &str, load: Load) -> Command {
        let mut command = Command::new(galerne);
        command.args(["bench", "serve", "--json", "--url", &self.url, "--model", model]);
        for (name, value) in [
            ("clients", load.clients),
            ("requests", load.requests),
            ("prompt-tokens", load.prompt_tokens),
            ("max-tokens", load.output_tokens),
        ] {
            command.arg(format!("--{name}={value}"));
        }
        command
    }

    /// The most memory it ever held, in bytes; that of its children is not counted.
    pub(super) fn peak_bytes(&self) -> Result<f64> {
        process::peak_bytes(&self.child).context("the server ended during the load")
    }
}

/// A port nobody listens on.
pub(super) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Whether `/health` answers 200: it answers 503 while the model loads.
fn healthy(port: u16) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        std::io::Write::write_all(&mut stream, b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    };
    ask().is_ok_and(|line| line.split_whitespace().nth(1) == Some("200"))
}

/// What `galerne bench serve --json` printed.
fn figures(json: &str) -> Result<Value> {
    let figures: Value =
        serde_json::from_str(json).context("read what galerne bench serve --json printed")?;
    let errors = figures["errors"].as_u64().unwrap_or(0);
    ensure!(errors == 0, "{errors} requests of the burst failed");
    Ok(figures)
}

fn parse_gaps(json: &str) -> Result<Vec<f64>> {
    let gaps = figures(json)?["gaps_ms"].take();
    serde_json::from_value(gaps).context("read the times between tokens")
}

fn parse(json: &str) -> Result<Served> {
    let figures = figures(json)?;
    let number = |value: &Value| value.as_f64().context("galerne bench serve left out a figure");
    Ok(Served {
        tokens_per_s: number(&figures["output_tokens_per_s"])?,
        ttft_p50_ms: number(&figures["ttft_ms"]["p50"])?,
        itl_p50_ms: number(&figures["itl_ms"]["p50"])?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_with_errors_is_no_figure() {
        let json = r#"{"clients":32,"output_tokens_per_s":1290.5,"ttft_ms":{"p50":260.0,"p99":400.0},
            "itl_ms":{"p50":20.0,"p99":60.0},"errors":0}"#;
        let served = Served {
            tokens_per_s: 1_290.5,
            ttft_p50_ms: 260.0,
            itl_p50_ms: 20.0,
        };
        assert_eq!(parse(json).expect("parse"), served);
        assert!(parse(&json.replace("\"errors\":0", "\"errors\":1")).is_err());
    }
}
