//! Both sides as servers: 32 clients that stream at once over plain HTTP.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Result;

use super::Context;
use super::report::{Better, Compared, Report};
use super::server::{self, Load, PEER_MODEL, Served, Server};
use super::stats::Sample;

pub(super) const CLIENTS: u32 = 32;
const BURST: Load = Load {
    clients: CLIENTS,
    requests: CLIENTS,
    prompt_tokens: 100,
    output_tokens: 64,
};
/// Tokens of context of each of llama-server's slots: prompt, template and output, with room.
const SLOT_TOKENS: u32 = 512;
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// One side's bursts, one per alternation.
#[derive(Default)]
pub(super) struct Bursts {
    tokens_per_s: Sample,
    ttft_ms: Sample,
    itl_ms: Sample,
    peak_mb: Sample,
}

impl Bursts {
    /// A small burst to warm the server, then the one that counts.
    pub(super) fn measure(&mut self, context: &Context, server: &Server) -> Result<()> {
        server.load(
            context,
            Load {
                clients: 2,
                requests: 2,
                ..BURST
            },
        )?;
        let Served {
            tokens_per_s,
            ttft_p50_ms,
            itl_p50_ms,
        } = server.load(context, BURST)?;
        self.tokens_per_s.push(tokens_per_s);
        self.ttft_ms.push(ttft_p50_ms);
        self.itl_ms.push(itl_p50_ms);
        self.peak_mb.push(server.peak_bytes()? / 1e6);
        Ok(())
    }
}

pub(super) fn run(context: &Context, report: &mut Report) -> Result<()> {
    let (mut ours, mut peer) = (Bursts::default(), Bursts::default());
    for run in 0..context.runs {
        eprintln!("serve: alternation {} of {}", run + 1, context.runs);
        ours.measure(context, &Server::galerne(context)?)?;
        peer.measure(context, &llama_server(context)?)?;
    }
    compare(report, "llama-server", &ours, &peer, 5.0, 1.0);
    let mut add = |name, unit, ours, peer| {
        report.add(
            compared(name, unit, "llama-server", Better::Lower, 1.0),
            ours,
            peer,
        );
    };
    add("ITL p50", "ms", &ours.itl_ms, &peer.itl_ms);
    add("peak memory", "MB", &ours.peak_mb, &peer.peak_mb);
    Ok(())
}

/// Adds the lines of output and time to the first token, with their targets.
pub(super) fn compare(
    report: &mut Report,
    peer_name: &str,
    ours: &Bursts,
    peer: &Bursts,
    output: f64,
    ttft: f64,
) {
    report.add(
        compared("output", "tokens/s", peer_name, Better::Higher, output),
        &ours.tokens_per_s,
        &peer.tokens_per_s,
    );
    report.add(
        compared("TTFT p50", "ms", peer_name, Better::Lower, ttft),
        &ours.ttft_ms,
        &peer.ttft_ms,
    );
}

fn compared<'a>(
    name: &str,
    unit: &'static str,
    peer_name: &'a str,
    better: Better,
    target: f64,
) -> Compared<'a> {
    Compared {
        name: format!("serve, {CLIENTS} clients, {name}"),
        unit,
        peer_name,
        better,
        target,
    }
}

/// With the settings found to be its best: a slot per client and an int8 KV cache.
fn llama_server(context: &Context) -> Result<Server> {
    let port = server::free_port()?;
    let mut command = Command::new(context.llama.tool("llama-server"));
    command.arg("-m").arg(&context.gguf);
    command.args(["--alias", PEER_MODEL, "--host", "127.0.0.1"]);
    command.args(["--port", &port.to_string()]);
    command.args(["-t", &context.threads.to_string(), "-np", &CLIENTS.to_string()]);
    command.args(["-c", &(CLIENTS * SLOT_TOKENS).to_string()]);
    command.args(["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]);
    command.args(["--no-cache-prompt", "--cache-ram", "0", "--log-disable"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Server::peer(&mut command, port, READY_TIMEOUT)
}
