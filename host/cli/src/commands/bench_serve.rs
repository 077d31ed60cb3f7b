//! `galerne bench serve`: bursts of streaming chats against any OpenAI-compatible server over plain HTTP.
//! One thread, so that a server on the same machine keeps its cores.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use galerne_server::client::plain::PlainClient;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::task::JoinSet;

const PATH: &str = "/v1/chat/completions";
/// Words of the two probes that tell how many tokens a word takes here.
const PROBE_WORDS: [u32; 2] = [16, 80];
/// Words of the system message: enough that no two requests begin alike.
const SYSTEM_WORDS: u32 = 4;
/// Common words, one token each in most vocabularies.
const WORDS: [&str; 32] = [
    "time", "water", "house", "light", "road", "music", "garden", "morning", "river", "stone", "paper",
    "summer", "letter", "window", "winter", "story", "market", "island", "bread", "forest", "school",
    "bridge", "horse", "cloud", "table", "silver", "doctor", "ocean", "street", "village", "glass",
    "mountain",
];

/// Options of `galerne bench serve`.
#[derive(Debug, Args)]
pub(super) struct ServeBenchArgs {
    /// Server to measure
    #[arg(long, value_name = "http://HOST:PORT")]
    url: String,
    /// Model to ask for
    #[arg(short, long)]
    model: String,
    /// Clients that stream at the same time
    #[arg(long, default_value = "32")]
    clients: NonZeroU32,
    /// Requests of all clients together [default: one each]
    #[arg(long)]
    requests: Option<NonZeroU32>,
    /// Tokens of each prompt, about; no two prompts begin alike
    #[arg(long, default_value = "100")]
    prompt_tokens: NonZeroU32,
    /// Tokens of each answer, exactly where the server knows `ignore_eos`
    #[arg(long, default_value = "64")]
    max_tokens: NonZeroU32,
    /// Key to send, where the server wants one
    #[arg(long)]
    key: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// In the JSON, also every time between two pieces of text
    #[arg(long, requires = "json")]
    gaps: bool,
}

pub(super) fn run(args: &ServeBenchArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(measure(args))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

async fn measure(args: &ServeBenchArgs) -> Result<Report> {
    let mut load = Load {
        client: PlainClient::new(&args.url, args.key.as_deref())?,
        model: args.model.clone(),
        seed: seed(),
        words: 0,
        tokens_max: args.max_tokens.get(),
        requests: args.requests.unwrap_or(args.clients).get(),
        next: AtomicU32::new(0),
    };
    load.words = load.words_for(args.prompt_tokens.get()).await?;
    let load = Arc::new(load);
    let begin = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..args.clients.get() {
        let load = Arc::clone(&load);
        clients.spawn(async move { load.client_loop().await });
    }
    let outcomes = clients.join_all().await.into_iter().flatten();
    let wall = begin.elapsed();
    Report::of(args, outcomes, wall)
}

/// Differs from run to run, so that no server answers from the cache of the last one.
fn seed() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

/// What all clients share.
struct Load {
    client: PlainClient,
    model: String,
    seed: u64,
    /// Words of each prompt.
    words: u32,
    tokens_max: u32,
    requests: u32,
    next: AtomicU32,
}

/// One answer as a client saw it.
struct Answer {
    /// Or to the end, where all tokens were without text.
    first_text: Duration,
    /// Between one piece of text and the next.
    gaps: Vec<Duration>,
    output_tokens: u64,
    prompt_tokens: Option<u64>,
}

impl Load {
    /// Sends one request after the other while some are left.
    async fn client_loop(&self) -> Vec<Result<Answer>> {
        let mut answers = Vec::new();
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.requests {
                return answers;
            }
            let body = self.body(index, self.words, self.tokens_max);
            answers.push(self.ask(body).await);
        }
    }

    /// How many words make a prompt of this many tokens, template included: two small requests tell. They also find
    /// out whether the server answers at all, and warm it up.
    async fn words_for(&self, tokens: u32) -> Result<u32> {
        let mut seen = [0.0; 2];
        for (at, words) in PROBE_WORDS.into_iter().enumerate() {
            let answer = self.ask(self.body(u32::MAX - at as u32, words, 1)).await?;
            let Some(tokens) = answer.prompt_tokens else {
                // Without usage one token a word is the best guess.
                return Ok(tokens);
            };
            seen[at] = tokens as f64;
        }
        let [few, many] = PROBE_WORDS.map(f64::from);
        let tokens_per_word = ((seen[1] - seen[0]) / (many - few)).max(0.1);
        let words = few + (f64::from(tokens) - seen[0]) / tokens_per_word;
        Ok(words.round().max(1.0) as u32)
    }

    fn body(&self, index: u32, words: u32, tokens_max: u32) -> String {
        let mut state = self.seed ^ u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        json!({
            "model": self.model,
            // The system message comes first in every template: where it differs, no cached prefix helps.
            "messages": [
                {"role": "system", "content": text(&mut state, SYSTEM_WORDS)},
                {"role": "user", "content": text(&mut state, words)},
            ],
            "stream": true,
            "stream_options": {"include_usage": true},
            "temperature": 0,
            "max_tokens": tokens_max,
            "ignore_eos": true,
        })
        .to_string()
    }

    async fn ask(&self, body: String) -> Result<Answer> {
        let begin = Instant::now();
        let mut stream = self.client.sse(PATH, body).await?;
        let (mut first, mut last, mut gaps, mut usage) = (None, begin, Vec::new(), None);
        while let Some(event) = stream.next().await? {
            let now = Instant::now();
            let chunk: Chunk = serde_json::from_str(&event.data)
                .with_context(|| format!("expected a chunk of a chat answer, got {}", event.data))?;
            if let Some(error) = chunk.error {
                bail!("the server ended the answer: {error}");
            }
            if chunk.choices.iter().any(|choice| choice.delta.has_text()) {
                match first {
                    None => first = Some(now - begin),
                    Some(_) => gaps.push(now - last),
                }
                last = now;
            }
            usage = chunk.usage.or(usage);
        }
        let pieces = gaps.len() as u64 + u64::from(first.is_some());
        let output_tokens = usage.as_ref().map_or(pieces, |usage| usage.completion_tokens);
        ensure!(output_tokens > 0, "the answer had no tokens");
        Ok(Answer {
            first_text: first.unwrap_or_else(|| begin.elapsed()),
            gaps,
            output_tokens,
            prompt_tokens: usage.map(|usage| usage.prompt_tokens),
        })
    }
}

/// So many words drawn with `state`, a xorshift generator's.
fn text(state: &mut u64, words: u32) -> String {
    let mut text = String::new();
    for _ in 0..words {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(WORDS[(*state >> 33) as usize % WORDS.len()]);
    }
    text
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    delta: Delta,
}

/// Servers name the text of a model that thinks in two ways.
#[derive(Deserialize, Default)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

impl Delta {
    fn has_text(&self) -> bool {
        [&self.content, &self.reasoning_content, &self.reasoning]
            .into_iter()
            .flatten()
            .any(|text| !text.is_empty())
    }
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// The middle and the slow end of a list of times.
#[derive(Debug, Serialize, PartialEq)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

impl Quantiles {
    /// By the nearest rank; `None` without times.
    fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let at = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100).max(1);
            times.get(rank - 1).map(|time| time.as_secs_f64() * 1e3)
        };
        Some(Self {
            p50: at(50)?,
            p99: at(99)?,
        })
    }
}

#[derive(Debug, Serialize)]
struct Report {
    clients: u32,
    requests: usize,
    /// Mean, as the server counted them; absent where it does not tell.
    prompt_tokens: Option<f64>,
    output_tokens: u64,
    wall_s: f64,
    output_tokens_per_s: f64,
    ttft_ms: Quantiles,
    /// Absent where every answer came in one piece.
    itl_ms: Option<Quantiles>,
    /// All that `itl_ms` is of, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    gaps_ms: Option<Vec<f64>>,
    errors: usize,
    first_error: Option<String>,
}

impl Report {
    fn of(
        args: &ServeBenchArgs,
        outcomes: impl Iterator<Item = Result<Answer>>,
        wall: Duration,
    ) -> Result<Self> {
        let (mut answers, mut failures) = (Vec::new(), Vec::new());
        for outcome in outcomes {
            match outcome {
                Ok(answer) => answers.push(answer),
                Err(error) => failures.push(error),
            }
        }
        let errors = failures.len();
        let failure = failures.into_iter().next();
        let Some(ttft_ms) = Quantiles::of(answers.iter().map(|answer| answer.first_text).collect()) else {
            return Err(failure
                .context("no requests were sent")?
                .context("every request failed"));
        };
        let prompts: Vec<u64> = answers.iter().filter_map(|answer| answer.prompt_tokens).collect();
        let (requests, output_tokens) = (
            answers.len() + errors,
            answers.iter().map(|answer| answer.output_tokens).sum(),
        );
        let gaps: Vec<Duration> = answers.into_iter().flat_map(|answer| answer.gaps).collect();
        Ok(Self {
            clients: args.clients.get(),
            requests,
            prompt_tokens: (!prompts.is_empty())
                .then(|| prompts.iter().sum::<u64>() as f64 / prompts.len() as f64),
            output_tokens,
            wall_s: wall.as_secs_f64(),
            output_tokens_per_s: output_tokens as f64 / wall.as_secs_f64(),
            ttft_ms,
            gaps_ms: args
                .gaps
                .then(|| gaps.iter().map(|gap| gap.as_secs_f64() * 1e3).collect()),
            itl_ms: Quantiles::of(gaps),
            errors,
            first_error: failure.map(|error| crate::report(&error)),
        })
    }

    fn print(&self) {
        let prompt = self
            .prompt_tokens
            .map_or_else(|| "unknown".to_owned(), |tokens| format!("{tokens:.1}"));
        println!("clients    {}, requests {}", self.clients, self.requests);
        println!("prompt     {prompt} tokens each");
        println!(
            "output     {} tokens in {:.2} s: {:.1} tokens/s",
            self.output_tokens, self.wall_s, self.output_tokens_per_s
        );
        println!(
            "TTFT       p50 {:.1} ms, p99 {:.1} ms",
            self.ttft_ms.p50, self.ttft_ms.p99
        );
        if let Some(itl) = &self.itl_ms {
            println!("ITL        p50 {:.1} ms, p99 {:.1} ms", itl.p50, itl.p99);
        }
        if let Some(error) = &self.first_error {
            println!("errors     {}, the first: {error}", self.errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let times = |n: u64| (1..=n).rev().map(Duration::from_millis).collect();
        assert_eq!(Quantiles::of(Vec::new()), None);
        assert_eq!(Quantiles::of(times(1)), Some(Quantiles { p50: 1.0, p99: 1.0 }));
        assert_eq!(Quantiles::of(times(32)), Some(Quantiles { p50: 16.0, p99: 32.0 }));
        assert_eq!(
            Quantiles::of(times(200)),
            Some(Quantiles {
                p50: 100.0,
                p99: 198.0
            })
        );
    }

    #[test]
    fn chunks_of_several_servers_are_read() {
        let has_text = |json: &str| {
            let chunk: Chunk = serde_json::from_str(json).expect(json);
            chunk.choices.iter().any(|choice| choice.delta.has_text())
        };
        assert!(has_text(
            r#"{"choices":[{"delta":{"content":"a"}}],"usage":null}"#
        ));
        assert!(has_text(
            r#"{"choices":[{"delta":{"content":null,"reasoning":"a"}}]}"#
        ));
        assert!(!has_text(
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#
        ));
        assert!(!has_text(
            r#"{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#
        ));
    }
}
