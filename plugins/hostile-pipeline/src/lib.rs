//! A pipeline that does what a hostile author might, by the word `misbehave` in its parameters: for tests of the host.

use galerne_sdk::json::Value;
use galerne_sdk::pipeline::{
    Context, Delta, Error, Finish, Options, Pipeline, Refusal, Request, RequestInfo, as_asked, call_tool,
    collect, emit, emit_event,
};

struct Hostile;

impl Pipeline for Hostile {
    fn run(params: &Value, _: &RequestInfo, request: Request) -> Result<Finish, Refusal> {
        match params["misbehave"].as_str().unwrap_or_default() {
            "loop" => spin(),
            "trap" => panic!("the guest gives up"),
            "alloc" => hoard(),
            "recurse" => {
                recurse(1);
            }
            "status" => {
                return Err(Refusal {
                    status: 200,
                    reason: "all is well".to_owned(),
                });
            }
            "contexts" => contexts(),
            "fork" => fork(),
            "deep" => deep(),
            "generations" => generations(&request, 1),
            "tokens" => tokens(&request),
            "blocks" => blocks(),
            "emit" => loop {
                emit(&Delta::Content("more and more of it ".repeat(1_000)));
            },
            "event" => reported(emit_event("big", &format!("\"{}\"", "x".repeat(100_000)))),
            "bad-events" => {
                assert!(emit_event("no JSON", "1").is_err() && emit_event("fine", "{").is_err());
            }
            "busy" => busy(&request),
            "text" => reported(Context::from_text(&"word ".repeat(300_000)).map(drop)),
            "tokenize" => loop {
                reported(Context::from_text(&"a word or two ".repeat(2_000)).map(drop));
            },
            "roles" => {
                let mut messages = request.messages;
                messages[0].role = "root".to_owned();
                assert!(matches!(
                    Context::from_messages(&messages, &[]),
                    Err(Error::Invalid(_))
                ));
                assert!(matches!(Context::from_messages(&[], &[]), Err(Error::Invalid(_))));
            }
            "ask-for-ever" => loop {
                let context = Context::from_text("a").expect("a context");
                std::hint::black_box(context.length().expect("a length"));
            },
            "tools" => {
                assert!(call_tool("rm", "{}").is_err());
            }
            // Harms nobody: for tests that need a certain call.
            "call" => {
                let text = |name: &str| params[name].as_str().unwrap_or_default();
                let answer =
                    call_tool(text("name"), text("arguments")).unwrap_or_else(|error| format!("{error:?}"));
                emit(&Delta::Content(answer));
                return Ok(Finish::Stop);
            }
            "leave" => {
                // Ends while its outputs are on their way.
                generations(&request, 8);
            }
            other => panic!("misbehave: expected a known word, got \"{other}\""),
        }
        emit(&Delta::Content("done".to_owned()));
        Ok(Finish::Stop)
    }
}

galerne_sdk::export_pipeline!(Hostile);

/// An error is shown, so that a test sees which it was.
fn reported(result: Result<(), Error>) {
    if let Err(Error::Invalid(text) | Error::Failed(text)) = result {
        emit(&Delta::Content(text));
    }
}

fn spin() -> ! {
    let mut counter = 0_u64;
    loop {
        counter = std::hint::black_box(counter.wrapping_add(1));
    }
}

fn hoard() {
    let mut held: Vec<Vec<u8>> = Vec::new();
    while held.len() <= 256 {
        held.push(Vec::with_capacity(16 << 20));
        std::hint::black_box(&held);
    }
}

#[expect(unconditional_recursion, reason = "this guest overflows its stack on purpose")]
fn recurse(depth: u64) -> u64 {
    std::hint::black_box([depth; 64]);
    1 + recurse(std::hint::black_box(depth + 1))
}

fn contexts() {
    let mut held = Vec::new();
    loop {
        held.push(Context::from_text("a").expect("a context"));
    }
}

/// Twice as many with each round.
fn fork() {
    let mut held = vec![Context::from_text("a").expect("a context")];
    loop {
        let forks: Vec<Context> = held
            .iter()
            .map(|context| context.fork().expect("a fork"))
            .collect();
        held.extend(forks);
    }
}

/// Always only the last fork is kept.
fn deep() {
    let mut context = Context::from_text("a").expect("a context");
    loop {
        context = context.fork().expect("a fork");
    }
}

fn long() -> Options {
    Options {
        tokens_max: Some(200),
        ..as_asked()
    }
}

/// Starts outputs and waits for none, without end if `outputs` is 1.
fn generations(request: &Request, outputs: usize) {
    let context = Context::from_messages(&request.messages, &[]).expect("a context");
    let mut held = Vec::new();
    while outputs == 1 || held.len() < outputs {
        let fork = context.fork().expect("a fork");
        let generation = fork.generate(&long()).expect("a generation");
        held.push(generation);
    }
}

fn tokens(request: &Request) {
    let context = Context::from_messages(&request.messages, &[]).expect("a context");
    loop {
        let fork = context.fork().expect("a fork");
        let generation = fork.generate(&long()).expect("a generation");
        collect(&generation, |_| ()).expect("an output");
    }
}

/// Long contexts that share nothing.
fn blocks() {
    let mut held = Vec::new();
    for number in 0..8 {
        let context = Context::from_text(&format!("{number} and ").repeat(200)).expect("a context");
        let generation = context.generate(&long()).expect("a generation");
        held.push((context, generation));
    }
    for (_, generation) in &held {
        collect(generation, |_| ()).expect("an output");
    }
}

fn busy(request: &Request) {
    let context = Context::from_messages(&request.messages, &[]).expect("a context");
    let length = context.length().expect("a length");
    assert!(matches!(context.truncate(length + 1), Err(Error::Invalid(_))));
    let generation = context.generate(&long()).expect("a generation");
    assert!(matches!(context.append("x"), Err(Error::Invalid(_))));
    assert!(matches!(context.fork(), Err(Error::Invalid(_))));
    assert!(matches!(context.truncate(1), Err(Error::Invalid(_))));
    assert!(matches!(context.generate(&long()), Err(Error::Invalid(_))));
    drop(generation);
    context.append("x").expect("it is free again");
}
