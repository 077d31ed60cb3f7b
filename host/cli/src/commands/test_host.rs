//! The host that `galerne plugin test` starts for itself: a process of this program, spoken to in plain HTTP. Knows no case.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::admin_token;

/// Runs a command of this program's on a data folder.
pub(super) fn galerne(command: &[&str], data: &str) -> Result<()> {
    let run = Command::new(std::env::current_exe()?)
        .args(command)
        .args(["--data", data])
        .stdin(Stdio::null())
        .output()
        .context("run galerne")?;
    ensure!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr).trim()
    );
    Ok(())
}

/// A running host, ended when dropped.
pub(super) struct Host {
    child: Child,
    /// Of plain HTTP.
    address: String,
}

impl Drop for Host {
    fn drop(&mut self) {
        // Nothing of it is kept.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Host {
    /// Guests run in its own process, where their time, memory and fuel are counted.
    pub(super) fn start(data: &str) -> Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .args([
                "serve",
                "--isolation",
                "in-process",
                "--count-fuel",
                "--listen",
                "127.0.0.1:0",
                "--http",
                "127.0.0.1:0",
            ])
            .args(["--kv-memory", "64", "--data", data])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start galerne serve")?;
        let mut host = Self {
            child,
            address: String::new(),
        };
        let stdout = host.child.stdout.take().context("the host's output")?;
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("http"), Some(url)) => url.trim_start_matches("http://").clone_into(&mut host.address),
                (Some("ready"), _) => return Ok(host),
                _ => {}
            }
        }
        bail!("the test's host ended before it was ready")
    }

    /// Posts to an admin route.
    pub(super) fn admin(&self, data: &Path, path: &str, body: &[u8]) -> Result<()> {
        let token = admin_token::load_or_create(data)?;
        let (status, text) = self.ask("POST", path, Some(&token), body)?;
        if (200..300).contains(&status) {
            return Ok(());
        }
        let said: Value = serde_json::from_str(&text).unwrap_or_default();
        bail!("{}", said["error"]["message"].as_str().unwrap_or(&text));
    }

    /// What it says of itself.
    pub(super) fn metrics(&self) -> Result<Metrics> {
        let (_, text) = self.ask("GET", "/metrics", None, b"")?;
        Ok(Metrics(text))
    }

    /// An exchange: status and body.
    pub(super) fn ask(
        &self,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: &[u8],
    ) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect(&self.address).context("connect to the test's host")?;
        let token = token.map(|token| format!("authorization: Bearer {token}\r\n"));
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-length: {}\r\n{}\r\n",
            self.address,
            body.len(),
            token.unwrap_or_default()
        )?;
        stream.write_all(body)?;
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .context("read from the test's host")?;
        let (head, text) = answer
            .split_once("\r\n\r\n")
            .context("an answer without a head")?;
        let status = head
            .split_whitespace()
            .nth(1)
            .and_then(|status| status.parse().ok());
        Ok((status.context("an answer without a status")?, text.to_owned()))
    }
}

/// A host's `/metrics`.
pub(super) struct Metrics(String);

impl Metrics {
    fn value(&self, name: &str) -> Option<&str> {
        let value = |line: &'_ str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' '));
        let line = self.0.lines().find(|line| value(line))?;
        line.rsplit(' ').next()
    }

    /// A counter; 0 if it is not there.
    pub(super) fn whole(&self, name: &str) -> u64 {
        self.value(name).and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    /// Any figure; 0 if it is not there.
    pub(super) fn real(&self, name: &str) -> f64 {
        self.value(name)
            .and_then(|value| value.parse().ok())
            .unwrap_or(0.0)
    }
}
