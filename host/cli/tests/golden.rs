//! Numbers and truth: the demo model against references made with independent software
//! (transformers in f32, llama.cpp's tokenizer), and the engine against itself.

mod common;

use std::io::Write as _;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, channel};

use common::{MODEL, alone, data, golden, plugins};
use galerne::config::{DeviceArgs, KvDtypeArg, PrecisionArg};
use galerne::load;
use galerne_core::chat::{ChatOptions, Message, Segment};
use galerne_core::ids::{BlockId, TenantId, TenantSalt, TokenId};
use galerne_core::sampling::SamplingPlan;
use galerne_engine::handle::{self, EngineHandle, EngineOptions};
use galerne_engine::request::{Event, EventSink, Request, Sampling};
use galerne_kernels::device::{LoadedProgram, SequenceSlice, StepBatch};
use galerne_store::package::Package;
use galerne_store::store::Store;
use serde_json::Value;

/// Below this gap of the two best reference logits either token is a right answer.
const GAP_MIN: f64 = 1e-2;
/// f32 sums of a few thousand terms in another order than the reference's.
const LOGIT_TOLERANCE: f64 = 2e-3;
const KL_MAX: f64 = 0.02;

fn package() -> Option<Package> {
    Some(Store::new(data()?).open(MODEL).expect("open the package"))
}

fn args(precision: PrecisionArg, step_tokens: usize) -> DeviceArgs {
    DeviceArgs {
        precision,
        kv_memory: NonZeroUsize::new(256),
        step_tokens: NonZeroUsize::new(step_tokens),
        ..DeviceArgs::default()
    }
}

fn model(package: &Package, args: &DeviceArgs) -> load::LoadedModel {
    let device = load::device(args).expect("make a device").device;
    load::load_program(package, plugins(), &*device, args).expect("load the demo model")
}

fn engine(package: &Package, precision: PrecisionArg, step_tokens: usize) -> EngineHandle {
    let model = model(package, &args(precision, step_tokens));
    let options = EngineOptions {
        limits: model.limits,
        check_integrity: true,
        ..EngineOptions::default()
    };
    handle::start(model.program, model.vocabulary, model.context_tokens_max, options)
}

fn ids(value: &Value) -> Vec<TokenId> {
    let number = |id: &Value| TokenId(u32::try_from(id.as_u64().expect("a token id")).expect("fits"));
    value
        .as_array()
        .expect("a list of ids")
        .iter()
        .map(number)
        .collect()
}

fn prompts() -> Vec<Value> {
    golden("smollm2-135m-instruct.json")["prompts"]
        .as_array()
        .expect("a list of prompts")
        .clone()
}

#[test]
fn tokenizer_gives_the_reference_ids() {
    let Some(package) = package() else { return };
    let _alone = alone();
    let tokenizer = package.tokenizer().expect("load the tokenizer");
    let cases = golden("smollm2-tokenizer.json");
    for case in cases["cases"].as_array().expect("a list of cases") {
        let text = case["text"].as_str().expect("a text");
        assert_eq!(
            tokenizer.encode(text).expect("encode"),
            ids(&case["ids_plain"]),
            "plain {text:?}"
        );
        assert_eq!(
            tokenizer.encode_special(text).expect("encode"),
            ids(&case["ids_parse_special"]),
            "with special tokens {text:?}"
        );
    }
}

#[test]
fn chat_guest_renders_the_reference_prompts() {
    let Some(package) = package() else { return };
    let _alone = alone();
    let tokenizer = package.tokenizer().expect("load the tokenizer");
    let guest = plugins()
        .load_chat("chat", &package.chat().expect("the package's chat guest"))
        .expect("load it");
    let options = ChatOptions {
        add_generation_prompt: true,
        template: package.manifest().chat.template.clone(),
    };
    for prompt in prompts() {
        let messages: Vec<Message> = prompt["messages"]
            .as_array()
            .expect("messages")
            .iter()
            .map(|message| Message {
                role: message["role"].as_str().expect("a role").to_owned(),
                content: message["content"].as_str().expect("a content").to_owned(),
                tool_calls: Vec::new(),
                tool_call_id: None,
            })
            .collect();
        let segments = guest.render(&messages, &[], &options).expect("render");
        let text: String = segments
            .iter()
            .map(|segment| match segment {
                Segment::Text(text) | Segment::Special(text) => text.as_str(),
            })
            .collect();
        assert_eq!(
            text,
            prompt["prompt_text"].as_str().expect("a prompt text"),
            "{}",
            prompt["name"]
        );
        assert_eq!(
            tokenizer.encode_segments(&segments).expect("encode"),
            ids(&prompt["prompt_ids"]),
            "{}",
            prompt["name"]
        );
    }
}

/// Logits of the wanted rows of one sequence that starts at position 0.
fn logits(program: &mut dyn LoadedProgram, tokens: &[TokenId], output_rows: Vec<usize>) -> Vec<f32> {
    let blocks = (0..u32::try_from(tokens.len().div_ceil(16)).expect("small"))
        .map(BlockId)
        .collect();
    let batch = StepBatch {
        tokens: tokens.to_vec(),
        sequences: vec![SequenceSlice {
            first_token: 0,
            tokens: tokens.len(),
            position: 0,
            blocks,
        }],
        generating: 0,
        output_rows,
    };
    program.submit(&batch).expect("submit");
    program.wait().expect("wait");
    program.read_output().expect("read the logits")
}

#[test]
fn f32_logits_agree_with_the_reference() {
    let Some(package) = package() else { return };
    let _alone = alone();
    let mut model = model(&package, &args(PrecisionArg::F32, 512));
    for prompt in prompts() {
        let tokens = ids(&prompt["prompt_ids"]);
        let got = logits(model.program.as_mut(), &tokens, vec![tokens.len() - 1]);
        for (rank, expected) in prompt["top10_last_prompt"]
            .as_array()
            .expect("ten")
            .iter()
            .enumerate()
        {
            let id = usize::try_from(expected["id"].as_u64().expect("an id")).expect("fits");
            let logit = expected["logit"].as_f64().expect("a logit");
            let difference = (f64::from(got[id]) - logit).abs();
            assert!(
                difference <= LOGIT_TOLERANCE,
                "{}: logit of token {id} (rank {rank}): expected {logit}, got {}",
                prompt["name"],
                got[id]
            );
        }
    }
}

struct Sink(std::sync::mpsc::Sender<Event>);

impl EventSink for Sink {
    fn send(&self, event: Event) {
        let _ = self.0.send(event);
    }
}

fn greedy(engine: &EngineHandle, prompt: Vec<TokenId>, tokens_max: u32, cache: bool) -> Receiver<Event> {
    let (sender, receiver) = channel();
    let request = Request {
        tenant: TenantId(1),
        salt: TenantSalt([7; 16]),
        prompt,
        tokens_max,
        stop_tokens: Vec::new(),
        ignore_eos: true,
        sampling: Sampling::Plan(SamplingPlan {
            temperature: 0.0,
            ..SamplingPlan::default()
        }),
        grammar: None,
        seed: 0,
        logprobs: None,
        use_prefix_cache: cache,
    };
    engine.submit(request, Box::new(Sink(sender))).expect("submit");
    receiver
}

fn output(events: &Receiver<Event>) -> (Vec<TokenId>, u32) {
    let mut tokens = Vec::new();
    loop {
        match events.recv().expect("the engine lives") {
            Event::Token { token, .. } => tokens.push(token),
            Event::Finished { usage, .. } => return (tokens, usage.cached_tokens),
            Event::Failed(error) => panic!("the sequence failed: {error}"),
        }
    }
}

#[test]
fn f32_greedy_reproduces_the_reference() {
    let Some(package) = package() else { return };
    let _alone = alone();
    let engine = engine(&package, PrecisionArg::F32, 512);
    let prompts = prompts();
    let running: Vec<_> = prompts
        .iter()
        .map(|prompt| greedy(&engine, ids(&prompt["prompt_ids"]), 64, false))
        .collect();
    for (prompt, events) in prompts.iter().zip(&running) {
        let (got, _) = output(events);
        for (step, (got, expected)) in got.iter().zip(ids(&prompt["greedy_ids"])).enumerate() {
            if *got == expected {
                continue;
            }
            let top = &prompt["steps_top5"][step];
            let gap = top[0][1].as_f64().expect("a logit") - top[1][1].as_f64().expect("a logit");
            assert!(
                gap <= GAP_MIN,
                "{} step {step}: expected token {expected}, got {got}, at a gap of {gap}",
                prompt["name"]
            );
            break;
        }
    }
    engine.check_integrity().expect("nothing leaks");
    engine.shutdown();
}

/// KL(reference || other) of two rows of logits, in nats.
fn kl(reference: &[f32], other: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        max + row
            .iter()
            .map(|logit| (f64::from(*logit) - max).exp())
            .sum::<f64>()
            .ln()
    };
    let (a, b) = (log_sum(reference), log_sum(other));
    reference
        .iter()
        .zip(other)
        .map(|(p, q)| {
            let p = f64::from(*p) - a;
            p.exp() * (p - (f64::from(*q) - b))
        })
        .sum()
}

#[test]
fn auto_precision_stays_close_to_f32() {
    let Some(package) = package() else { return };
    let _alone = alone();
    let mut exact = model(&package, &args(PrecisionArg::F32, 512));
    let vocabulary = exact.vocabulary as usize;
    let prompts: Vec<(Vec<TokenId>, Vec<f32>)> = prompts()
        .iter()
        .map(|prompt| {
            let mut tokens = ids(&prompt["prompt_ids"]);
            tokens.extend(ids(&prompt["greedy_ids"]));
            let expected = logits(exact.program.as_mut(), &tokens, (0..tokens.len()).collect());
            (tokens, expected)
        })
        .collect();
    for kv_dtype in [
        KvDtypeArg::Bf16,
        KvDtypeArg::F16,
        KvDtypeArg::Int8,
        KvDtypeArg::F32,
        KvDtypeArg::Fp8,
    ] {
        let args = DeviceArgs {
            kv_dtype,
            ..args(PrecisionArg::Auto, 512)
        };
        let mut fast = model(&package, &args);
        let (mut sum, mut positions, mut agree) = (0.0, 0_u32, 0_u32);
        for (tokens, a) in &prompts {
            let b = logits(fast.program.as_mut(), tokens, (0..tokens.len()).collect());
            for (a, b) in a.chunks(vocabulary).zip(b.chunks(vocabulary)) {
                sum += kl(a, b);
                positions += 1;
                agree += u32::from(argmax(a) == argmax(b));
            }
        }
        let mean = sum / f64::from(positions);
        let top1 = f64::from(agree) / f64::from(positions);
        // Straight to the terminal: a passing test's own prints are swallowed, and this figure is to be seen.
        let _ = writeln!(
            std::io::stderr(),
            "precision auto, KV in {kv_dtype:?}, against f32 over {positions} positions: mean KL {mean:.2e}, \
             top-1 {:.2}%",
            top1 * 100.0
        );
        assert!(
            mean < KL_MAX,
            "mean KL of precision auto with KV in {kv_dtype:?}: expected below {KL_MAX}, got {mean}"
        );
        assert!(
            mean > 0.0,
            "precision auto with KV in {kv_dtype:?} gives the f32 logits bit by bit: the comparison compares nothing"
        );
    }
}

fn argmax(row: &[f32]) -> usize {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(index, _)| index)
}

#[test]
fn batching_chunking_and_prefix_cache_do_not_change_tokens() {
    let Some(package) = package() else { return };
    let _alone = alone();
    let prompts: Vec<_> = prompts()
        .iter()
        .map(|prompt| ids(&prompt["prompt_ids"]))
        .collect();
    let whole = engine(&package, PrecisionArg::Auto, 512);
    let single: Vec<_> = prompts
        .iter()
        .map(|prompt| output(&greedy(&whole, prompt.clone(), 24, false)).0)
        .collect();
    let together: Vec<_> = prompts
        .iter()
        .map(|prompt| greedy(&whole, prompt.clone(), 24, false))
        .collect();
    let batched: Vec<_> = together.iter().map(|events| output(events).0).collect();
    assert_eq!(single, batched, "batch = single");

    let fill: Vec<_> = prompts
        .iter()
        .map(|prompt| output(&greedy(&whole, prompt.clone(), 24, true)).0)
        .collect();
    assert_eq!(single, fill, "filling the prefix cache");
    for (prompt, expected) in prompts.iter().zip(&single) {
        let (tokens, cached) = output(&greedy(&whole, prompt.clone(), 24, true));
        assert_eq!(&tokens, expected, "prefix cache on = off");
        assert!(
            cached >= 16,
            "a prompt of {} tokens: expected cached blocks, got {cached} tokens",
            prompt.len()
        );
    }
    whole.check_integrity().expect("nothing leaks");
    whole.shutdown();

    let chunked = engine(&package, PrecisionArg::Auto, 7);
    for (prompt, expected) in prompts.iter().zip(&single) {
        let (tokens, _) = output(&greedy(&chunked, prompt.clone(), 24, false));
        assert_eq!(&tokens, expected, "chunked = whole");
    }
    chunked.shutdown();
}
