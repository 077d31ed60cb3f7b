//! Runs of prompts and answers through a real engine, and how fast their tokens came.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use galerne_core::grammar::{GrammarFactory, GrammarSession, GrammarSource};
use galerne_core::guest::{SamplerFactory, SequenceInfo};
use galerne_core::ids::{TenantId, TenantSalt, TokenId};
use galerne_core::sampling::SamplingPlan;
use galerne_engine::handle::EngineHandle;
use galerne_engine::request::{Event, EventSink, Request, Sampling};

/// What runs have in common.
pub(super) struct Runs<'a> {
    pub(super) engine: &'a EngineHandle,
    /// Where there are runs under a grammar.
    pub(super) grammars: Option<&'a dyn GrammarFactory>,
    /// Prompt tokens of each sequence of a decode run.
    pub(super) context: u32,
}

/// What decides the tokens of a run, beside a plan at temperature 1.
#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    Plain,
    Guest(&'a dyn SamplerFactory),
    Grammar(&'a GrammarSource),
}

/// What decides the tokens of one sequence.
type Decided = (Sampling, Option<Box<dyn GrammarSession>>);

/// Runs of which one must have had all sequences decode together.
const ATTEMPTS: usize = 8;

/// When each token of a sequence came.
struct Times {
    begin: Instant,
    tokens: Vec<Instant>,
}

impl Runs<'_> {
    /// Prompt tokens over the time to the first output token.
    pub(super) fn prefill(&self, tokens: u32) -> Result<f64> {
        let (sender, receiver) = channel();
        let begin = self.submit(0, tokens, 1, (Sampling::Plan(greedy()), None), sender)?;
        let times = collect(1, &receiver, &[begin])?;
        let first = times[0].tokens.first().context("no token came")?;
        Ok(f64::from(tokens) / (*first - times[0].begin).as_secs_f64())
    }

    /// Output tokens of all sequences over the time between the last first token and the first last token:
    /// only while all of them decode.
    pub(super) fn decode(&self, sequences: u32, tokens: u32, way: Way<'_>) -> Result<f64> {
        // Where a model is tiny and the machine busy, a sequence may end before another begins; then it is tried again.
        for _ in 0..ATTEMPTS {
            if let Some(rate) = self.decode_once(sequences, tokens, way)? {
                return Ok(rate);
            }
        }
        bail!("the sequences never decoded together; give a larger --decode")
    }

    /// `None` where the sequences never decoded together.
    fn decode_once(&self, sequences: u32, tokens: u32, way: Way<'_>) -> Result<Option<f64>> {
        // Sessions take time to make; so all are there before the first sequence begins.
        let decided: Vec<_> = (0..sequences).map(|_| self.decide(way)).collect::<Result<_>>()?;
        let (sender, receiver) = channel();
        let mut begins = Vec::new();
        for (index, decided) in (0..).zip(decided) {
            begins.push(self.submit(index, self.context, tokens, decided, sender.clone())?);
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
        Ok((counted > 0).then(|| counted as f64 / (*to - *from).as_secs_f64()))
    }

    fn decide(&self, way: Way<'_>) -> Result<Decided> {
        let plan = Sampling::Plan(SamplingPlan::default());
        let waker = self.engine.waker();
        Ok(match way {
            Way::Plain => (plan, None),
            Way::Guest(factory) => {
                let session =
                    factory.session(&SequenceInfo::new("{}", self.engine.vocabulary(), 1), waker)?;
                (Sampling::Guest(session), None)
            }
            Way::Grammar(source) => {
                let grammars = self.grammars.context("this model has no grammars")?;
                (plan, Some(grammars.session(source, waker)?))
            }
        })
    }

    fn submit(
        &self,
        index: u32,
        prompt_tokens: u32,
        tokens_max: u32,
        (sampling, grammar): Decided,
        sender: Sender<(usize, Arrival)>,
    ) -> Result<Instant> {
        let vocabulary = self.engine.vocabulary();
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
        self.engine.submit(
            request,
            Box::new(Sink {
                index: index as usize,
                sender,
            }),
        )?;
        Ok(begin)
    }
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
