//! vLLM for CPU on the same weights in bf16: large, so only when asked for.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::report::{Better, Compared, Report};
use super::serve::{self, Bursts, CLIENTS};
use super::server::{self, Load, PEER_MODEL, Server};
use super::stats::Sample;
use super::{Context, build, groups};
use crate::workspace_root;

/// Every package it needs, each at one version.
const REQUIREMENTS: &str = "benches/peers/vllm.txt";
/// It compiles at its first start.
const READY_TIMEOUT: Duration = Duration::from_mins(10);
/// Prompt lengths whose time to the first token is compared.
const PREFILL: [u32; 2] = [512, 2_048];
/// Memory for its KV, in GiB.
const KV_GIB: u32 = 2;
/// ChatML: what the servers add to each prompt differs by no more than a few tokens.
const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}\
    <|im_end|>\n{% endfor %}<|im_start|>assistant\n";

pub(super) fn run(context: &Context, report: &mut Report) -> Result<()> {
    let python = install(&context.peers)?;
    let model = model_folder(context)?;
    let (mut ours, mut peer) = (Bursts::default(), Bursts::default());
    let (mut our_prefill, mut peer_prefill) = (
        PREFILL.map(|_| Sample::default()),
        PREFILL.map(|_| Sample::default()),
    );
    for run in 0..context.runs {
        eprintln!("vllm: alternation {} of {}", run + 1, context.runs);
        measure(context, &Server::galerne(context)?, &mut ours, &mut our_prefill)?;
        let server = start(context, &python, &model)?;
        measure(context, &server, &mut peer, &mut peer_prefill)?;
    }
    serve::compare(report, "vLLM", &ours, &peer, 2.2, 2.0);
    for (length, (ours, peer)) in PREFILL.iter().zip(our_prefill.iter().zip(&peer_prefill)) {
        let compared = Compared {
            name: format!("prefill {length}, TTFT of one client"),
            unit: "ms",
            peer_name: "vLLM",
            better: Better::Lower,
            target: 1.5,
        };
        report.add(compared, ours, peer);
    }
    Ok(())
}

fn measure(
    context: &Context,
    server: &Server,
    bursts: &mut Bursts,
    prefill: &mut [Sample; PREFILL.len()],
) -> Result<()> {
    bursts.measure(context, server)?;
    for (prompt_tokens, sample) in PREFILL.into_iter().zip(prefill) {
        let load = Load {
            clients: 1,
            requests: 3,
            prompt_tokens,
            output_tokens: 2,
        };
        sample.push(server.load(context, load)?.ttft_p50_ms);
    }
    Ok(())
}

/// The interpreter of an environment that has vLLM, made on first use.
fn install(peers: &Path) -> Result<PathBuf> {
    let list = workspace_root().join(REQUIREMENTS);
    let wanted = std::fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
    let bin = build::environment(
        &peers.join("vllm"),
        &wanted,
        &[
            "--no-cache-dir".as_ref(),
            "--no-deps".as_ref(),
            "--requirement".as_ref(),
            list.as_os_str(),
        ],
        "vLLM with pip (3 GB, 6 GB on disk)",
    )?;
    Ok(bin.join("python"))
}

/// A folder as vLLM reads them, made of our bf16 package: its tensors have their Hugging Face names.
fn model_folder(context: &Context) -> Result<PathBuf> {
    let (_, name) = groups::in_format(context, "BF16")?;
    let package = context.data.join("models").join(name);
    let folder = context.peers.join("vllm-model");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    std::fs::hard_link(
        package.join("weights.safetensors"),
        folder.join("model.safetensors"),
    )?;
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(package.join(file), folder.join(file))?;
    }
    let tokenizer = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    });
    std::fs::write(folder.join("tokenizer_config.json"), tokenizer.to_string())?;
    Ok(folder)
}

/// On all the threads the comparison has, without its prefix cache, and with the OpenMP library it asks for.
fn start(context: &Context, python: &Path, model: &Path) -> Result<Server> {
    let port = server::free_port()?;
    let log = context.peers.join("vllm.log");
    let output = File::create(&log)?;
    let mut command = Command::new(python);
    // Its own command looks for a package of another name and ends.
    command.args(["-m", "vllm.entrypoints.openai.api_server", "--model"]);
    command.arg(model);
    command.args(["--served-model-name", PEER_MODEL, "--host", "127.0.0.1"]);
    command.args(["--port", &port.to_string(), "--dtype", "bfloat16"]);
    command.args(["--max-model-len", "4096", "--max-num-seqs", &CLIENTS.to_string()]);
    command.arg("--no-enable-prefix-caching");
    command.env("VLLM_CPU_OMP_THREADS_BIND", format!("0-{}", context.threads - 1));
    command.env("VLLM_CPU_KVCACHE_SPACE", KV_GIB.to_string());
    command.env("VLLM_CACHE_ROOT", context.peers.join("vllm-cache"));
    command.env("LD_PRELOAD", context.peers.join("vllm/lib/libiomp5.so"));
    command.envs([("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1")]);
    command.stdout(Stdio::from(output.try_clone()?)).stderr(output);
    Server::peer(&mut command, port, READY_TIMEOUT)
        .with_context(|| format!("vLLM's own words are in {}", log.display()))
}
