//! The figures of a running host: a neighbour beside evil guests, a switch of versions, an upload.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::plugins::{Bench, Figure};
use super::server::{Load, Server};
use super::stats::{Sample, Turns};
use super::{machine, process};
use crate::demo::MODEL;
use crate::guests;

/// The stream that is looked at, once per turn: some seconds of one client.
const STREAM: Load = Load {
    clients: 1,
    requests: 4,
    prompt_tokens: 20,
    output_tokens: 128,
};
/// Turns that each of `--runs` stands for, where a percentile is looked at.
const TURNS_PER_RUN: u32 = 4;
/// Between two switches of a deployment.
const SWITCH_EVERY: Duration = Duration::from_millis(250);

/// What runs beside the neighbour: a name, and the guest with its parameters in a deployment.
const EVIL: [(&str, &str); 5] = [
    (
        "a pipeline that loops",
        "[pipeline]\nplugin = \"evil-pipeline\"\nparams = { misbehave = \"loop\" }\n",
    ),
    (
        "a pipeline that forks",
        "[pipeline]\nplugin = \"evil-pipeline\"\nparams = { misbehave = \"fork\" }\n",
    ),
    (
        "a pipeline that hoards",
        "[pipeline]\nplugin = \"evil-pipeline\"\nparams = { misbehave = \"alloc\" }\n",
    ),
    (
        "a filter that loops",
        "[[filters]]\nplugin = \"evil\"\nparams = { misbehave = \"loop\", in = \"on-request\" }\n",
    ),
    (
        "a filter that traps",
        "[[filters]]\nplugin = \"evil\"\nparams = { misbehave = \"trap\", in = \"on-request\" }\n",
    ),
];

/// A running host and an author at its command line.
struct Author<'a> {
    bench: &'a Bench<'a>,
    server: Server,
    /// Where its files are written.
    folder: PathBuf,
}

impl<'a> Author<'a> {
    fn new(bench: &'a Bench<'a>) -> Result<Self> {
        let folder = bench.data.join("author");
        std::fs::create_dir_all(&folder)?;
        Ok(Self {
            server: Server::ours(&bench.galerne, &bench.data, machine::cores())?,
            bench,
            folder,
        })
    }

    fn galerne(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.bench.galerne);
        command
            .args(arguments)
            .args(["--server", &self.server.https, "--data"])
            .arg(&self.bench.data);
        process::finish(&mut command).map(drop)
    }

    /// Pushed under a version that was never there: what exists does not change.
    fn push(&self, file: &Path, name: &str) -> Result<()> {
        let since = std::time::UNIX_EPOCH.elapsed()?.as_millis();
        let version = format!("1.0.{since}");
        self.galerne(&[
            "plugin",
            "push",
            &file.display().to_string(),
            "--name",
            name,
            "--plugin-version",
            &version,
        ])
    }

    fn deploy(&self, name: &str, more: &str) -> Result<()> {
        let file = self.folder.join(format!("{name}.toml"));
        std::fs::write(&file, format!("name = \"{name}\"\nmodel = \"{MODEL}\"\n{more}"))?;
        self.galerne(&["deploy", &file.display().to_string()])
    }

    /// The times between a stream's tokens, in ms.
    fn stream(&self, model: &str) -> Result<Vec<f64>> {
        self.server.gaps(&self.bench.galerne, model, STREAM)
    }

    /// Streams alone and while `again` is done again and again, each first in turn.
    fn turns(&self, model: &str, again: impl Fn() + Sync) -> Result<Turns> {
        let mut turns = Turns::default();
        for turn in 0..self.bench.runs() * TURNS_PER_RUN {
            let beside = || meanwhile(&again, || self.stream(model));
            if turn % 2 == 0 {
                let alone = self.stream(model)?;
                turns.push(alone, beside()?);
            } else {
                let beside = beside()?;
                turns.push(self.stream(model)?, beside);
            }
        }
        Ok(turns)
    }

    /// One chat request, to its end: its status.
    fn ask(&self, model: &str) -> Result<u16> {
        let body = json!({"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]})
            .to_string();
        let address = self.server.url.trim_start_matches("http://");
        let mut stream = TcpStream::connect(address).context("connect to the host")?;
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let status = answer
            .split_whitespace()
            .nth(1)
            .and_then(|status| status.parse().ok());
        status.with_context(|| format!("read a status from {answer:?}"))
    }
}

/// How much an ITL p99 rises while each evil guest is called again and again, one call after the other.
pub(super) fn neighbour(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let author = Author::new(bench)?;
    author.push(&guests::path("hostile-pipeline"), "evil-pipeline")?;
    author.push(&guests::path("hostile"), "evil")?;
    author.stream(MODEL)?;
    let mut figures = Vec::new();
    for (name, guest) in EVIL {
        author.deploy("evil", guest)?;
        let calls = AtomicU32::new(0);
        let turns = author.turns(MODEL, || {
            // Its own requests fail; that they do so quickly or slowly is the guest's business.
            let _ = author.ask("evil");
            calls.fetch_add(1, Ordering::Relaxed);
        })?;
        let percent = |[alone, beside]: [f64; 2]| 100.0 * (beside / alone - 1.0);
        let note = format!("{} calls of the guest", calls.load(Ordering::Relaxed));
        figures.push(figure(
            &format!("a neighbour's ITL p99 beside {name}"),
            "% more",
            10.0,
            &turns,
            percent,
            &note,
        ));
    }
    Ok(figures)
}

/// How much an ITL p99 rises while the stream's deployment gets a new version four times a second.
pub(super) fn switch(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let author = Author::new(bench)?;
    let version = AtomicU32::new(0);
    let deploy = || {
        let number = version.fetch_add(1, Ordering::Relaxed) + 1;
        author.deploy(
            "switched",
            &format!("[[filters]]\nplugin = \"pii-redact\"\n[defaults]\nmax_tokens = {number}\n"),
        )
    };
    deploy()?;
    author.stream("switched")?;
    let turns = author.turns("switched", || {
        // A failed switch shows in the number of versions.
        let _ = deploy();
        std::thread::sleep(SWITCH_EVERY);
    })?;
    let note = format!(
        "{} versions, each a process of its own",
        version.load(Ordering::Relaxed)
    );
    Ok(vec![figure(
        "ITL p99 of a stream whose deployment is switched",
        "ms more",
        1.0,
        &turns,
        |[alone, beside]| beside - alone,
        &note,
    )])
}

/// What p99s of all turns say, and how far that hangs on one of them.
fn figure(
    name: &str,
    unit: &'static str,
    target: f64,
    turns: &Turns,
    rise: impl Fn([f64; 2]) -> f64,
    note: &str,
) -> Figure {
    let p99 = turns.p99();
    let without_one = Sample(turns.p99_without_one().into_iter().map(&rise).collect()).summary();
    Figure {
        name: name.to_owned(),
        unit,
        measured: rise(p99),
        target,
        note: format!(
            "{:.1} to {:.1} without one turn; alone {:.1} ms; {note}",
            without_one.min, without_one.max, p99[0]
        ),
    }
}

/// From the first byte of a component never seen before to the last of its first answer: push, deploy, ask.
pub(super) fn upload(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let author = Author::new(bench)?;
    let component = std::fs::read(guests::path("pii-redact"))?;
    let mut times = Sample::default();
    for run in 0..bench.runs() {
        let file = author.folder.join("fresh.wasm");
        std::fs::write(
            &file,
            with_note(&component, &format!("{run} {:?}", std::time::SystemTime::now())),
        )?;
        let begin = Instant::now();
        author.push(&file, "fresh")?;
        author.deploy("fresh", "[[filters]]\nplugin = \"fresh\"\n")?;
        let status = author.ask("fresh")?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        ensure!(
            status == 200,
            "the first request was answered with status {status}"
        );
    }
    let times = times.summary();
    Ok(vec![Figure {
        name: "from upload to the first answer".to_owned(),
        unit: "ms",
        measured: times.median,
        target: 1_000.0,
        note: format!("{:.0} to {:.0}; compiled anew each time", times.min, times.max),
    }])
}

/// Does `again` again and again while `once` runs.
fn meanwhile<T>(again: impl Fn() + Sync, once: impl FnOnce() -> Result<T>) -> Result<T> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                again();
            }
        });
        let result = once();
        over.store(true, Ordering::Relaxed);
        result
    })
}

/// The same component with a custom section that nobody reads: another digest.
fn with_note(component: &[u8], note: &str) -> Vec<u8> {
    let name = b"note";
    // Both lengths are below 128, one byte each.
    let length = (1 + name.len() + note.len().min(100)) as u8;
    let note = &note.as_bytes()[..note.len().min(100)];
    [component, &[0, length, name.len() as u8], name, note].concat()
}
