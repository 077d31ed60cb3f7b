//! The world `galerne:pipeline/pipeline`: the loop between a request and its answer.

use serde_json::Value;

/// Generated from `wit/pipeline`.
#[allow(
    unsafe_code,
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod bindings {
    wit_bindgen::generate!({
        world: "pipeline",
        path: "../wit/pipeline/0.1.0",
        pub_export_macro: true,
        default_bindings_module: "galerne_sdk::pipeline::bindings",
    });
}

pub use bindings::exports::galerne::pipeline::pipelines::{Finish, Refusal, Request, RequestInfo};
pub use bindings::galerne::pipeline::inference::{
    Context, Delta, Error, Finish as OutputFinish, FunctionCall, Generation, Grammar, Message, Options,
    Outcome, Plan, Tool, ToolCall, call_tool, emit, emit_event, ready,
};

/// A pipeline.
pub trait Pipeline {
    /// Answers a request by [emitting](emit); `params` are the deployment's for this pipeline, an empty object if it
    /// gives none.
    ///
    /// # Errors
    /// There is no answer, or no more of it.
    fn run(params: &Value, info: &RequestInfo, request: Request) -> Result<Finish, Refusal>;
}

/// Everything as the client asked, or as the deployment says.
#[must_use]
pub fn as_asked() -> Options {
    Options {
        tokens_max: None,
        stop: None,
        plan: None,
        grammar: None,
        seed: None,
        logprobs: false,
    }
}

/// Draws from the model's own distribution at this temperature; 0 takes the best token.
#[must_use]
pub fn at_temperature(temperature: f32) -> Plan {
    Plan {
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        temperature,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
    }
}

/// All of an output.
#[derive(Debug, Clone)]
pub struct Output {
    /// Text for the reader.
    pub content: String,
    /// Text of the model's reasoning.
    pub reasoning: String,
    /// Calls the model asks for.
    pub calls: Vec<FunctionCall>,
    /// What it came to.
    pub outcome: Outcome,
}

impl Output {
    /// The mean over its tokens of the natural logarithm of their probability: how sure the model was. Minus infinity
    /// without tokens, or if [`Options::logprobs`] was not asked for.
    #[must_use]
    pub fn mean_logprob(&self) -> f64 {
        match (self.outcome.logprob, self.outcome.tokens) {
            (Some(sum), tokens) if tokens > 0 => sum / f64::from(tokens),
            _ => f64::NEG_INFINITY,
        }
    }
}

/// Waits for all of an output, which is then part of its context. `each` sees the parts as they come.
///
/// # Errors
/// It failed.
pub fn collect(generation: &Generation, mut each: impl FnMut(&Delta)) -> Result<Output, Error> {
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    loop {
        let deltas = generation.next()?;
        if deltas.is_empty() {
            break;
        }
        for delta in deltas {
            each(&delta);
            match delta {
                Delta::Content(text) => content.push_str(&text),
                Delta::Reasoning(text) => reasoning.push_str(&text),
                Delta::Call(call) => calls.push(call),
            }
        }
    }
    let lost = || Error::Failed("the generation ended without an outcome".to_owned());
    Ok(Output {
        content,
        reasoning,
        calls,
        outcome: generation.outcome().ok_or_else(lost)?,
    })
}

/// Several outputs from one context, computed together, each drawn anew. The context is left as it was.
///
/// # Errors
/// One of them failed.
pub fn sample(context: &Context, outputs: u32, options: &Options) -> Result<Vec<Output>, Error> {
    let mut forks = Vec::new();
    for _ in 0..outputs {
        let fork = context.fork()?;
        let generation = fork.generate(options)?;
        forks.push((fork, generation));
    }
    forks
        .iter()
        .map(|(_, generation)| collect(generation, |_| ()))
        .collect()
}

/// What a client is told of an error: what makes no sense is the request's fault, all else the host's.
#[must_use]
pub fn refusal(error: Error) -> Refusal {
    match error {
        Error::Invalid(reason) => Refusal { status: 400, reason },
        Error::Failed(reason) => Refusal { status: 500, reason },
    }
}

/// Parses the parameters and runs; what the exported function does.
///
/// # Errors
/// Parameters that are not JSON, and what [`Pipeline::run`] returns.
pub fn run_from_text<P: Pipeline>(info: &RequestInfo, request: Request) -> Result<Finish, Refusal> {
    let params = serde_json::from_str(&info.params_json).map_err(|error| Refusal {
        status: 500,
        reason: format!("params: not JSON: {error}"),
    })?;
    P::run(&params, info, request)
}

/// Makes a type that implements [`Pipeline`] this guest's export.
#[macro_export]
macro_rules! export_pipeline {
    ($pipeline:ty) => {
        const _: () = {
            use $crate::pipeline::bindings::exports::galerne::pipeline::pipelines as wit;

            struct Export;

            impl wit::Guest for Export {
                fn run(info: wit::RequestInfo, request: wit::Request) -> Result<wit::Finish, wit::Refusal> {
                    $crate::pipeline::run_from_text::<$pipeline>(&info, request)
                }
            }

    $crate::pipeline::bindings::export!(Export with_types_in $crate::pipeline::bindings);
        };
    };
}
