//! `galerne bench engine`: prefill, decode and batched decode of a packaged model through the real engine.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use galerne_core::grammar::{GrammarSession, GrammarSource};
use galerne_core::ids::{TenantId, TenantSalt, TokenId};
use galerne_core::sampling::SamplingPlan;
use galerne_engine::request::{Event, EventSink, Request, Sampling};
use galerne_kernels::device::Device as _;
use galerne_plugin::PluginHost;
use galerne_store::store::Store;
use serde::Serialize;

use super::{bench_logits, bench_serve};
use crate::config::{DataArgs, DeviceArgs};
use crate::guests;
use crate::load::{self, RunningModel};

/// Subcommands of `galerne bench`.
#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Prefill, decode and batched decode of one model, without the network
    Engine(EngineBenchArgs),
    /// Streaming clients against a running server, ours or another, over plain HTTP
    Serve(bench_serve::ServeBenchArgs),
    /// Write the logits of given tokens, to compare them with another engine's
    Logits(bench_logits::LogitsArgs),
}

/// Options of `galerne bench engine`.
#[derive(Debug, Args)]
pub(super) struct EngineBenchArgs {
    /// Model to measure [default: the data folder's only one]
    #[arg(short, long)]
    model: Option<String>,
    /// Prompt lengths to prefill, in tokens; none if nothing follows
    #[arg(long, value_delimiter = ',', num_args = 0.., default_values_t = [128, 512, 2_048])]
    prefill: Vec<u32>,
    /// Output tokens of the decode runs
    #[arg(long, default_value = "128")]
    decode: u32,
    /// Prompt tokens each sequence of the decode runs has before its output
    #[arg(long, default_value = "16")]
    context: u32,
    /// Numbers of sequences decoded together; none if nothing follows
    #[arg(long, value_delimiter = ',', num_args = 0.., default_values_t = [1, 2, 4, 8, 16, 32])]
    batch: Vec<u32>,
    /// Runs of each measurement; the median is printed with the extremes
    #[arg(long, default_value = "5")]
    runs: u32,
    /// Also decode with this sampling guest, alternating with plain sampling, and print the ratio
    #[arg(long, value_name = "NAME")]
    sampler: Option<String>,
    /// Also decode under this JSON schema, alternating with plain sampling, and print the ratio; without FILE an array of
    /// objects
    #[arg(long, value_name = "FILE")]
    schema: Option<Option<PathBuf>>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Names, numbers and text as services ask for them, and always another one: it does not end before `--decode` tokens.
const SCHEMA: &str = r#"{"type": "array", "minItems": 10000, "items": {"type": "object", "additionalProperties": false,
    "required": ["name", "kind", "price", "tags", "note"], "properties": {"name": {"type": "string", "maxLength": 40},
    "kind": {"enum": ["book", "film", "place"]}, "price": {"type": "number", "minimum": 0},
    "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4}, "note": {"type": ["string", "null"]}}}}"#;

/// One measured figure in tokens per second.
#[derive(Debug, Serialize)]
struct Figure {
    name: String,
    median_tokens_per_s: f64,
    min_tokens_per_s: f64,
    max_tokens_per_s: f64,
}

impl Figure {
    fn of(name: String, mut rates: Vec<f64>) -> Result<Self> {
        rates.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (rates.first(), rates.last()) else {
            bail!("{name}: no runs; give --runs at least 1");
        };
        Ok(Self {
            name,
            median_tokens_per_s: rates[rates.len() / 2],
            min_tokens_per_s: *min,
            max_tokens_per_s: *max,
        })
    }
}

pub(super) fn run(data: &DataArgs, command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Engine(args) => engine(data, &args),
        BenchCommand::Serve(args) => bench_serve::run(&args),
        BenchCommand::Logits(args) => bench_logits::run(data, &args),
    }
}

fn engine(data: &DataArgs, args: &EngineBenchArgs) -> Result<()> {
    ensure!(args.runs > 0, "--runs: expected at least 1");
    ensure!(args.decode > 1, "--decode: expected at least 2 tokens");
    ensure!(args.context > 0, "--context: expected at least 1 token");
    let store = Store::new(&data.folder()?);
    let name = match &args.model {
        Some(name) => name.clone(),
        None => only_model(&store)?,
    };
    let plugins = PluginHost::new(guests::plugin_options(data)?)?;
    let device = load::device(&args.device)?;
    let model = load::start(&store.open(&name)?, &plugins, &device, &args.device)?;
    let info = device.info();
    if !args.json {
        println!(
            "{name} on {} ({}, {} threads), precision {:?}",
            info.name, info.isa, info.threads, args.device.precision
        );
    }
    let bench = Bench {
        model: &model,
        plugins: &plugins,
        args,
    };
    let figures = bench.all()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    }
    model.engine.shutdown();
    Ok(())
}

pub(super) fn only_model(store: &Store) -> Result<String> {
    let mut models = store.list()?;
    match (models.pop(), models.is_empty()) {
        (Some(model), true) => Ok(model.name),
        (None, _) => bail!("no models; import one with `galerne model import SOURCE --name NAME`"),
        (Some(_), false) => bail!("several models; choose one with -m NAME"),
    }
}

/// Pairs of short decodes that each of `--runs` stands for where two ways of sampling are compared: a few percent
/// cannot be told from one pair.
const PAIRS_PER_RUN: u32 = 8;

struct Bench<'a> {
    model: &'a RunningModel,
    plugins: &'a PluginHost,
    args: &'a EngineBenchArgs,
}

/// What decides the tokens of a run, beside a plan at temperature 1.
#[derive(Clone, Copy)]
enum Way<'a> {
    Plain,
    Guest(&'a str),
    Grammar(&'a GrammarSource),
}

/// When each token of a sequence came.
struct Times {
    begin: Instant,
    tokens: Vec<Instant>,
}

impl Bench<'_> {
    fn all(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        // The first run pays for page faults and frequency changes; it does not count.
        self.decode(1, 16, Way::Plain)?;
        for &tokens in &self.args.prefill {
            self.prefill(tokens)?;
            let rates = self.repeat(|| self.prefill(tokens))?;
            self.push(&mut figures, format!("prefill {tokens}"), rates)?;
        }
        for &sequences in &self.args.batch {
            let rates = self.repeat(|| self.decode(sequences, self.args.decode, Way::Plain))?;
            self.push(
                &mut figures,
                format!("decode {} x {sequences}", self.args.decode),
                rates,
            )?;
        }
        if let Some(name) = &self.args.sampler {
            self.compare(&format!("guest {name}"), Way::Guest(name), &mut figures)?;
        }
        if let Some(file) = &self.args.schema {
            let source = GrammarSource::JsonSchema(schema(file.as_deref())?);
            self.compare("schema", Way::Grammar(&source), &mut figures)?;
        }
        Ok(figures)
    }

    fn repeat(&self, mut run: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
        (0..self.args.runs).map(|_| run()).collect()
    }

    fn push(&self, figures: &mut Vec<Figure>, name: String, rates: Vec<f64>) -> Result<()> {
        let figure = Figure::of(name, rates)?;
        if !self.args.json {
            println!(
                "{:<28} {:>8.1} tokens/s  ({:.1} to {:.1})",
                figure.name, figure.median_tokens_per_s, figure.min_tokens_per_s, figure.max_tokens_per_s
            );
        }
        figures.push(figure);
        Ok(())
    }

    /// Alternates plain sampling and another way at batch 1, each first in turn, so that a drifting machine moves both.
    fn compare(&self, name: &str, way: Way<'_>, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut plain, mut other, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for pair in 0..self.args.runs * PAIRS_PER_RUN {
            let mut both = [(Way::Plain, 0.0), (way, 0.0)];
            both.rotate_left(pair as usize % 2);
            for (way, rate) in &mut both {
                *rate = self.decode(1, self.args.decode, *way)?;
            }
            both.rotate_left(pair as usize % 2);
            let [(_, without), (_, with)] = both;
            plain.push(without);
            other.push(with);
            ratios.push(with / without);
        }
        self.push(figures, "decode, plain sampling".to_owned(), plain)?;
        self.push(figures, format!("decode, {name}"), other)?;
        ratios.sort_by(f64::total_cmp);
        if !self.args.json {
            println!(
                "{:<28} {:>8.3}            (quarters at {:.3} and {:.3})",
                format!("ratio {name} / plain"),
                ratios[ratios.len() / 2],
                ratios[ratios.len() / 4],
                ratios[ratios.len() * 3 / 4]
            );
        }
        Ok(())
    }

    /// Prompt tokens over the time to the first output token.
    fn prefill(&self, tokens: u32) -> Result<f64> {
        let (sender, receiver) = channel();
        let begin = self.submit(0, tokens, 1, (Sampling::Plan(greedy()), None), sender)?;
        let times = collect(1, &receiver, &[begin])?;
        let first = times[0].tokens.first().context("no token came")?;
        Ok(f64::from(tokens) / (*first - times[0].begin).as_secs_f64())
    }

    /// Output tokens of all sequences over the time between the last first token and the first last token:
    /// only while all of them decode.
    fn decode(&self, sequences: u32, tokens: u32, way: Way<'_>) -> Result<f64> {
        let (sender, receiver) = channel();
        let mut begins = Vec::new();
        for index in 0..sequences {
            let plan = Sampling::Plan(SamplingPlan::default());
            let decided = match way {
                Way::Plain => (plan, None),
                Way::Guest(name) => (self.guest(name)?, None),
                Way::Grammar(source) => {
                    let waker = self.model.engine.waker();
                    (plan, Some(self.model.grammars.session(source, waker)?))
                }
            };
            begins.push(self.submit(index, self.args.context, tokens, decided, sender.clone())?);
        }
        let times = collect(sequences as usize, &receiver, &begins)?;
        let from = times
            .iter()
            .filter_map(|times| times.tokens.first())
            .max()
            .context("no token came")?;
        let to = times
            .iter()
            .filter_map(|times| times.tokens.last())
            .min()
            .context("no token came")?;
        let counted: usize = times
            .iter()
            .map(|times| times.tokens.iter().filter(|at| *at > from && *at <= to).count())
            .sum();
        ensure!(
            counted > 0,
            "the sequences never decoded together; give a larger --decode"
        );
        Ok(counted as f64 / (*to - *from).as_secs_f64())
    }

    fn guest(&self, name: &str) -> Result<Sampling> {
        let samplers = guests::samplers(self.plugins, &[])?;
        let factory = samplers
            .get(name)
            .with_context(|| format!("no sampling guest \"{name}\" in this build"))?;
        let session = factory.session("{}", self.model.engine.vocabulary(), 1, self.model.engine.waker())?;
        Ok(Sampling::Guest(session))
    }

    fn submit(
        &self,
        index: u32,
        prompt_tokens: u32,
        tokens_max: u32,
        (sampling, grammar): (Sampling, Option<Box<dyn GrammarSession>>),
        sender: Sender<(usize, Arrival)>,
    ) -> Result<Instant> {
        let vocabulary = self.model.engine.vocabulary();
        // Any tokens do: speed does not depend on what they mean. Differing prompts keep the prefix cache out.
        let prompt = (0..prompt_tokens)
            .map(|at| TokenId((at.wrapping_mul(7_919) ^ index.wrapping_mul(104_729)) % vocabulary))
            .collect();
        let request = Request {
            tenant: TenantId(0),
            salt: TenantSalt([0; 16]),
            prompt,
            tokens_max,
            stop_tokens: Vec::new(),
            ignore_eos: true,
            sampling,
            grammar,
            seed: u64::from(index),
            logprobs: None,
            use_prefix_cache: false,
        };
        let begin = Instant::now();
        self.model.engine.submit(
            request,
            Box::new(Sink {
                index: index as usize,
                sender,
            }),
        )?;
        Ok(begin)
    }
}

fn schema(file: Option<&Path>) -> Result<serde_json::Value> {
    let Some(file) = file else {
        return Ok(serde_json::from_str(SCHEMA)?);
    };
    let text = std::fs::read_to_string(file).with_context(|| format!("read schema {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("schema {}", file.display()))
}

fn greedy() -> SamplingPlan {
    SamplingPlan {
        temperature: 0.0,
        ..SamplingPlan::default()
    }
}

enum Arrival {
    Token(Instant),
    Done(Result<(), String>),
}

struct Sink {
    index: usize,
    sender: Sender<(usize, Arrival)>,
}

impl EventSink for Sink {
    fn send(&self, event: Event) {
        let arrival = match event {
            Event::Token { .. } => Arrival::Token(Instant::now()),
            Event::Finished { .. } => Arrival::Done(Ok(())),
            Event::Failed(error) => Arrival::Done(Err(error.to_string())),
        };
        // The receiver goes only when the bench has failed already.
        let _ = self.sender.send((self.index, arrival));
    }
}

fn collect(
    sequences: usize,
    receiver: &Receiver<(usize, Arrival)>,
    begins: &[Instant],
) -> Result<Vec<Times>> {
    let mut times: Vec<Times> = begins
        .iter()
        .map(|begin| Times {
            begin: *begin,
            tokens: Vec::new(),
        })
        .collect();
    let mut done = 0;
    while done < sequences {
        match receiver.recv().context("the engine ended")? {
            (index, Arrival::Token(at)) => times[index].tokens.push(at),
            (_, Arrival::Done(Ok(()))) => done += 1,
            (_, Arrival::Done(Err(error))) => bail!("a sequence failed: {error}"),
        }
    }
    Ok(times)
}
