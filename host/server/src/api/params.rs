//! Fields that chat and text completions share: length, sampling, stopping.

use std::sync::Arc;

use galerne_core::grammar::GrammarSession;
use galerne_core::ids::TokenId;
use galerne_core::sampling::SamplingPlan;
use galerne_engine::request::Sampling;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, short};
use super::format::Format;
use super::state::{ApiState, ServedModel};

/// How an answer is generated, checked.
#[derive(Debug, Clone)]
pub(super) struct Params {
    pub(super) tokens_max: Option<u32>,
    pub(super) stops: Vec<String>,
    pub(super) seed: u64,
    pub(super) ignore_eos: bool,
    pub(super) return_token_ids: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) format: Option<Format>,
    plan: SamplingPlan,
    sampler: Option<(String, String)>,
}

/// What decides each token of one answer.
pub(super) struct Decoding {
    pub(super) sampling: Sampling,
    pub(super) grammar: Option<Box<dyn GrammarSession>>,
}

impl Params {
    pub(super) fn read(fields: &Fields<'_>, state: &ApiState, model: &ServedModel) -> Result<Self, ApiError> {
        let tokens = |name| fields.integer(name, 1, u64::from(u32::MAX));
        let tokens_max = tokens("max_completion_tokens")?.or(tokens("max_tokens")?);
        if fields.integer("n", 1, 128)?.is_some_and(|n| n != 1) {
            return Err(ApiError::field(
                "n",
                "1 (several answers at once are not supported yet)",
                "more",
            ));
        }
        let stream = fields.flag("stream")?;
        let include_usage = match fields.value("stream_options") {
            Some(options) => Fields::of(options, "stream_options")?.flag("include_usage")?,
            None => false,
        };
        Ok(Self {
            tokens_max: tokens_max.and_then(|tokens| u32::try_from(tokens).ok()),
            stops: stops(fields, state.limits().stops_max)?,
            seed: seed(fields)?.unwrap_or_else(|| state.unique()),
            ignore_eos: fields.flag("ignore_eos")?,
            return_token_ids: fields.flag("return_token_ids")?,
            stream,
            include_usage,
            format: Format::read(fields)?,
            plan: plan(fields, state.limits().biases_max, model)?,
            sampler: sampler(fields, state)?,
        })
    }

    /// Blocks while the sampling guest starts and the grammar is compiled.
    pub(super) fn decoding(&self, state: &ApiState, model: &ServedModel) -> Result<Decoding, ApiError> {
        let grammar = self.format.as_ref().map(|format| format.session(model));
        Ok(Decoding {
            sampling: self.sampling(state, model)?,
            grammar: grammar.transpose()?,
        })
    }

    /// The plan, or a session of the sampling guest.
    fn sampling(&self, state: &ApiState, model: &ServedModel) -> Result<Sampling, ApiError> {
        let Some((name, params)) = &self.sampler else {
            return Ok(Sampling::Plan(self.plan.clone()));
        };
        let factory = Arc::clone(state.sampler(name)?);
        let engine = &model.engine;
        let session = factory
            .session(params, engine.vocabulary(), self.seed, engine.waker())
            .map_err(|error| {
                let mut error = ApiError::from(error);
                error.param = Some("sampler.params".to_owned());
                error
            })?;
        Ok(Sampling::Guest(session))
    }
}

fn seed(fields: &Fields<'_>) -> Result<Option<u64>, ApiError> {
    match fields.value("seed") {
        None => Ok(None),
        Some(value) => value
            .as_u64()
            .or_else(|| value.as_i64().map(i64::cast_unsigned))
            .map(Some)
            .ok_or_else(|| ApiError::field("seed", "an integer", short(value))),
    }
}

fn stops(fields: &Fields<'_>, max: usize) -> Result<Vec<String>, ApiError> {
    let list = match fields.value("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => return Ok(vec![stop.clone()]),
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(ApiError::field(
                "stop",
                "a string or an array of strings",
                short(other),
            ));
        }
    };
    if list.len() > max {
        return Err(ApiError::field(
            "stop",
            &format!("at most {max} strings"),
            list.len(),
        ));
    }
    list.iter()
        .map(|stop| {
            stop.as_str()
                .map(str::to_owned)
                .ok_or_else(|| ApiError::field("stop", "an array of strings", short(stop)))
        })
        .collect()
}

fn plan(fields: &Fields<'_>, biases_max: usize, model: &ServedModel) -> Result<SamplingPlan, ApiError> {
    let vocabulary = model.engine.vocabulary();
    // vLLM spells "keep all" as -1.
    let top_k = match fields.value("top_k").and_then(Value::as_i64) {
        Some(-1) => 0,
        _ => fields.integer("top_k", 0, u64::from(u32::MAX))?.unwrap_or(0),
    };
    Ok(SamplingPlan {
        temperature: fields.number("temperature", 0.0, 2.0, 1.0)?,
        top_k: u32::try_from(top_k).unwrap_or(u32::MAX),
        top_p: fields.number("top_p", 0.0, 1.0, 1.0)?,
        min_p: fields.number("min_p", 0.0, 1.0, 0.0)?,
        repetition_penalty: fields.number("repetition_penalty", 0.01, 10.0, 1.0)?,
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0, 0.0)?,
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0, 0.0)?,
        bias: biases(fields, biases_max, vocabulary)?,
        ..SamplingPlan::default()
    })
}

fn biases(fields: &Fields<'_>, max: usize, vocabulary: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(value) = fields.value("logit_bias") else {
        return Ok(Vec::new());
    };
    let object = value
        .as_object()
        .ok_or_else(|| ApiError::field("logit_bias", "an object of token ids", short(value)))?;
    if object.len() > max {
        return Err(ApiError::field(
            "logit_bias",
            &format!("at most {max} entries"),
            object.len(),
        ));
    }
    object
        .iter()
        .map(|(token, bias)| {
            let id = token.parse().ok().filter(|id| *id < vocabulary);
            let id = id.ok_or_else(|| {
                ApiError::field(
                    "logit_bias",
                    &format!("token ids below {vocabulary}"),
                    format!("\"{token}\""),
                )
            })?;
            let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
            let bias =
                bias.ok_or_else(|| ApiError::field("logit_bias", "numbers from -100 to 100", token))?;
            Ok((TokenId(id), bias as f32))
        })
        .collect()
}

/// Name and parameters of the sampling guest, if the request picks one.
fn sampler(fields: &Fields<'_>, state: &ApiState) -> Result<Option<(String, String)>, ApiError> {
    let Some(value) = fields.value("sampler") else {
        return Ok(None);
    };
    let sampler = Fields::of(value, "sampler")?;
    let name = sampler.required_text("name")?;
    state.sampler(name)?;
    let params = match sampler.value("params") {
        None => "{}".to_owned(),
        Some(params) if params.is_object() => params.to_string(),
        Some(other) => return Err(ApiError::field("sampler.params", "an object", short(other))),
    };
    Ok(Some((name.to_owned(), params)))
}
