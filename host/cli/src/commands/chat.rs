//! `galerne chat`: streams answers over HTTP/3 and says how fast they came.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Args;
use galerne_server::client::Client;
use galerne_server::client::connect::ClientOptions;
use http::{HeaderMap, Method};
use serde_json::{Value, json};

use super::connect::ServerArgs;
use crate::config::DataArgs;

/// Options of `galerne chat`.
#[derive(Debug, Args)]
#[command(
    after_help = "Without a PROMPT: a conversation. /reset forgets it, /exit or Ctrl-D ends it, Ctrl-C ends an answer."
)]
pub(super) struct ChatArgs {
    /// What to ask
    prompt: Option<String>,
    /// Model to ask [default: the host's only one]
    #[arg(short, long)]
    model: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 always takes the most likely token [default: 0.7, with a sampling guest its own]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Draw from the most likely tokens that reach this probability [default: 0.9, with a sampling guest its own]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Seed of the draw
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Longest answer, in tokens
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Sampling guest to draw with, for example mirostat
    #[arg(long, value_name = "NAME")]
    sampler: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) fn run(data: &DataArgs, args: &ChatArgs) -> Result<()> {
    // A thread of its own drives the connection, also while the prompt waits for the person.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let options = args.server.options(data)?;
    runtime.block_on(async {
        let client = Client::connect(options.clone()).await?;
        let model = match &args.model {
            Some(model) => model.clone(),
            None => only_model(&client).await?,
        };
        let mut conversation = Conversation::new(client, options, &model, args);
        if let Some(prompt) = &args.prompt {
            conversation.ask(prompt).await
        } else {
            println!("{model} at {}; /reset forgets, /exit ends", args.server.server);
            conversation.repl().await
        }
    })
}

async fn only_model(client: &Client) -> Result<String> {
    let body = client
        .request(Method::GET, "/v1/models", HeaderMap::new(), Bytes::new())
        .await?
        .bytes(1 << 20)
        .await?;
    let list: Value = serde_json::from_slice(&body).context("read the list of models")?;
    let names: Vec<&str> = list["data"]
        .as_array()
        .into_iter()
        .flatten()
        // A deployment stands for its model with something more; who wants that asks for it.
        .filter(|model| model["parent"].is_null())
        .filter_map(|model| model["id"].as_str())
        .collect();
    match names.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] => bail!("the host serves no models"),
        many => bail!(
            "the host serves several models; choose one with -m: {}",
            many.join(", ")
        ),
    }
}

/// The host closes connections that ask nothing for minutes; a conversation may pause longer.
const RECONNECT_AFTER: Duration = Duration::from_secs(60);

struct Conversation<'a> {
    client: Client,
    options: ClientOptions,
    used: Instant,
    model: &'a str,
    args: &'a ChatArgs,
    messages: Vec<Value>,
}

impl<'a> Conversation<'a> {
    fn new(client: Client, options: ClientOptions, model: &'a str, args: &'a ChatArgs) -> Self {
        let mut conversation = Self {
            client,
            options,
            used: Instant::now(),
            model,
            args,
            messages: Vec::new(),
        };
        conversation.reset();
        conversation
    }

    fn reset(&mut self) {
        self.messages.clear();
        if let Some(system) = &self.args.system {
            self.messages.push(json!({"role": "system", "content": system}));
        }
    }

    async fn repl(&mut self) -> Result<()> {
        let mut editor = rustyline::DefaultEditor::new()?;
        loop {
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(rustyline::error::ReadlineError::Interrupted) => continue,
                Err(rustyline::error::ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            match line.trim() {
                "" => continue,
                "/exit" => return Ok(()),
                "/reset" => {
                    self.reset();
                    continue;
                }
                _ => {}
            }
            let _ = editor.add_history_entry(&line);
            let before = self.messages.len();
            tokio::select! {
                asked = self.ask(&line) => if let Err(error) = asked {
                    eprintln!("\ngalerne: {}", crate::report(&error));
                },
                // Dropping the answer's stream resets it, and the host stops computing.
                _ = tokio::signal::ctrl_c() => println!("\n[stopped]"),
            }
            if self.messages.len() == before + 1 {
                self.messages.truncate(before);
            }
        }
    }

    async fn ask(&mut self, prompt: &str) -> Result<()> {
        if self.used.elapsed() > RECONNECT_AFTER {
            self.client = Client::connect(self.options.clone()).await?;
        }
        self.messages.push(json!({"role": "user", "content": prompt}));
        let answer = self.stream().await?;
        self.used = Instant::now();
        self.messages
            .push(json!({"role": "assistant", "content": answer}));
        Ok(())
    }

    fn body(&self) -> Value {
        let mut body = json!({
            "model": self.model, "messages": self.messages, "stream": true,
            "stream_options": {"include_usage": true},
        });
        let args = self.args;
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                body[name] = value;
            }
        };
        // Small models ramble when every token may come; a program that asks over HTTP gets the API's defaults instead.
        let unless_guest = |value| args.sampler.is_none().then_some(value);
        set(
            "temperature",
            args.temperature.or(unless_guest(0.7)).map(Value::from),
        );
        set("top_p", args.top_p.or(unless_guest(0.9)).map(Value::from));
        set("seed", args.seed.map(Value::from));
        set("max_tokens", args.max_tokens.map(Value::from));
        set(
            "sampler",
            args.sampler
                .as_ref()
                .map(|name| json!({"name": name, "params": {}})),
        );
        body
    }

    async fn stream(&self) -> Result<String> {
        let begin = Instant::now();
        let mut stream = self.client.sse("/v1/chat/completions", &self.body()).await?;
        let mut timing = Timing {
            begin,
            first: None,
            last: begin,
            tokens: 0,
        };
        let mut answer = String::new();
        while let Some(event) = stream.next().await? {
            let chunk: Value = serde_json::from_str(&event.data).context("read an event of the answer")?;
            if let Some(message) = chunk["error"]["message"].as_str() {
                bail!("{message}");
            }
            let delta = &chunk["choices"][0]["delta"];
            for field in ["reasoning_content", "content"] {
                if let Some(text) = delta[field].as_str().filter(|text| !text.is_empty()) {
                    timing.text();
                    print!("{text}");
                    std::io::stdout().flush()?;
                    if field == "content" {
                        answer.push_str(text);
                    }
                }
            }
            if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
                timing.tokens = tokens;
            }
        }
        println!("\n{}", timing.line("h3"));
        Ok(answer)
    }
}

struct Timing {
    begin: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: u64,
}

impl Timing {
    fn text(&mut self) {
        self.last = Instant::now();
        self.first.get_or_insert(self.last);
    }

    fn line(&self, transport: &str) -> String {
        let Some(first) = self.first else {
            return format!("[no text · {} tokens · {transport}]", self.tokens);
        };
        let ttft_ms = (first - self.begin).as_secs_f64() * 1e3;
        let decode_s = (self.last - first).as_secs_f64();
        let speed = if self.tokens > 1 && decode_s > 0.0 {
            format!(" · {:.1} tokens/s", (self.tokens - 1) as f64 / decode_s)
        } else {
            String::new()
        };
        format!(
            "[TTFT {ttft_ms:.0} ms · {} tokens{speed} · {transport}]",
            self.tokens
        )
    }
}
