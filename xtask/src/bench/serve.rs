//! Both sides as servers: 32 clients that stream at once over plain HTTP, measured by `galerne bench serve`.

use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::report::{Better, Compared, Report};
use super::stats::Sample;
use super::{Context, MODEL, process};

const CLIENTS: u32 = 32;
const PROMPT_TOKENS: u32 = 100;
const OUTPUT_TOKENS: u32 = 64;
/// Tokens of context of each of llama-server's slots: prompt, template and output, with room.
const SLOT_TOKENS: u32 = 512;
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// One burst against one server.
#[derive(Clone, Copy)]
struct Burst {
    tokens_per_s: f64,
    ttft_p50_ms: f64,
    itl_p50_ms: f64,
    peak_bytes: f64,
}

pub(super) fn run(context: &Context, report: &mut Report) -> Result<()> {
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for run in 0..context.runs {
        eprintln!("serve: alternation {} of {}", run + 1, context.runs);
        let mut server = galerne(context)?;
        ours.push(server.burst(context, MODEL)?);
        drop(server);
        let mut server = llama_server(context)?;
        peer.push(server.burst(context, "demo")?);
    }
    let compared = |name: &str, unit, better, target| Compared {
        name: format!("serve, {CLIENTS} clients, {name}"),
        unit,
        peer_name: "llama-server",
        better,
        target,
    };
    let sample = |bursts: &[Burst], of: fn(&Burst) -> f64| Sample(bursts.iter().map(of).collect());
    let mut add =
        |compared, of: fn(&Burst) -> f64| report.add(compared, &sample(&ours, of), &sample(&peer, of));
    add(compared("output", "tokens/s", Better::Higher, 5.0), |burst| {
        burst.tokens_per_s
    });
    add(compared("TTFT p50", "ms", Better::Lower, 1.0), |burst| {
        burst.ttft_p50_ms
    });
    add(compared("ITL p50", "ms", Better::Lower, 1.0), |burst| {
        burst.itl_p50_ms
    });
    add(compared("peak memory", "MB", Better::Lower, 1.0), |burst| {
        burst.peak_bytes / 1e6
    });
    Ok(())
}

/// A running server, killed when dropped.
struct Server {
    child: Child,
    url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// A small burst to warm it, then the one that counts.
    fn burst(&mut self, context: &Context, model: &str) -> Result<Burst> {
        self.load(context, model, 2)?;
        let (tokens_per_s, ttft_p50_ms, itl_p50_ms) = self.load(context, model, CLIENTS)?;
        Ok(Burst {
            tokens_per_s,
            ttft_p50_ms,
            itl_p50_ms,
            peak_bytes: process::peak_bytes(&self.child).context("the server ended during the burst")?,
        })
    }

    fn load(&self, context: &Context, model: &str, clients: u32) -> Result<(f64, f64, f64)> {
        let mut command = Command::new(&context.galerne);
        command.args(["bench", "serve", "--json", "--url", &self.url, "--model", model]);
        for (name, value) in [
            ("clients", clients),
            ("requests", clients),
            ("prompt-tokens", PROMPT_TOKENS),
            ("max-tokens", OUTPUT_TOKENS),
        ] {
            command.arg(format!("--{name}={value}"));
        }
        parse(&process::finish(&mut command)?.stdout)
    }
}

fn galerne(context: &Context) -> Result<Server> {
    let mut child = Command::new(&context.galerne)
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
        .arg(&context.data)
        .args(["--threads", &context.threads.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start galerne serve")?;
    let stdout = child.stdout.take().context("the server's output")?;
    let mut server = Server {
        child,
        url: String::new(),
    };
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        if let Some(url) = line.strip_prefix("http ") {
            url.split_whitespace()
                .next()
                .unwrap_or_default()
                .clone_into(&mut server.url);
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

/// With the settings found to be its best: a slot per client and an int8 KV cache.
fn llama_server(context: &Context) -> Result<Server> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let child = Command::new(context.llama.tool("llama-server"))
        .arg("-m")
        .arg(&context.gguf)
        .args([
            "--alias",
            "demo",
            "--host",
            "127.0.0.1",
            "--port",
            &port.to_string(),
        ])
        .args(["-t", &context.threads.to_string(), "-np", &CLIENTS.to_string()])
        .args([
            "-c",
            &(CLIENTS * SLOT_TOKENS).to_string(),
            "-fa",
            "on",
            "-ctk",
            "q8_0",
            "-ctv",
            "q8_0",
        ])
        .args(["--no-cache-prompt", "--cache-ram", "0", "--log-disable"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start llama-server")?;
    let mut server = Server {
        child,
        url: format!("http://127.0.0.1:{port}"),
    };
    let deadline = Instant::now() + READY_TIMEOUT;
    while !healthy(port) {
        if let Some(status) = server.child.try_wait()? {
            bail!("llama-server ended with {status} before it was ready");
        }
        ensure!(
            Instant::now() < deadline,
            "llama-server was not ready within {READY_TIMEOUT:?}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(server)
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

/// Output tokens per second, and the medians of the time to the first token and between tokens, in milliseconds.
fn parse(json: &str) -> Result<(f64, f64, f64)> {
    let figures: Value =
        serde_json::from_str(json).context("read what galerne bench serve --json printed")?;
    let errors = figures["errors"].as_u64().unwrap_or(0);
    ensure!(errors == 0, "{errors} requests of the burst failed");
    let number = |value: &Value| value.as_f64().context("galerne bench serve left out a figure");
    Ok((
        number(&figures["output_tokens_per_s"])?,
        number(&figures["ttft_ms"]["p50"])?,
        number(&figures["itl_ms"]["p50"])?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_with_errors_is_no_figure() {
        let json = r#"{"clients":32,"output_tokens_per_s":1290.5,"ttft_ms":{"p50":260.0,"p99":400.0},
            "itl_ms":{"p50":20.0,"p99":60.0},"errors":0}"#;
        assert_eq!(parse(json).expect("parse"), (1_290.5, 260.0, 20.0));
        assert!(parse(&json.replace("\"errors\":0", "\"errors\":1")).is_err());
    }
}
