//! Fields that chat and text completions share: length, sampling, stopping.

use std::sync::Arc;

use galerne_core::grammar::GrammarSession;
use galerne_core::guest::{SamplerFactory, SequenceInfo};
use galerne_core::ids::TokenId;
use galerne_core::pipeline::GenerateOptions;
use galerne_core::sampling::SamplingPlan;
use galerne_engine::request::Sampling;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, short};
use super::format::Format;
use super::state::{ApiState, ServedModel, Target};

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
    sampler: Option<Sampler>,
}

/// A sampling guest and what it is given.
#[derive(Clone)]
struct Sampler {
    factory: Arc<dyn SamplerFactory>,
    params_json: String,
    /// Where an error in the parameters lies.
    param: &'static str,
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler")
            .field("params_json", &self.params_json)
            .finish_non_exhaustive()
    }
}

/// What decides each token of one answer.
pub(super) struct Decoding {
    pub(super) sampling: Sampling,
    pub(super) grammar: Option<Box<dyn GrammarSession>>,
}

impl Params {
    pub(super) fn read(fields: &Fields<'_>, state: &ApiState, target: &Target) -> Result<Self, ApiError> {
        let tokens = |name| fields.integer(name, 1, u64::from(u32::MAX));
        let tokens_max = tokens("max_completion_tokens")?.or(tokens("max_tokens")?);
        let tokens_max = tokens_max.and_then(|tokens| u32::try_from(tokens).ok());
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
            tokens_max: limited(tokens_max, target)?,
            stops: stops(fields, state.limits().stops_max)?,
            seed: seed(fields)?.unwrap_or_else(|| state.unique()),
            ignore_eos: fields.flag("ignore_eos")?,
            return_token_ids: fields.flag("return_token_ids")?,
            stream,
            include_usage,
            format: Format::read(fields)?,
            plan: plan(fields, state.limits().biases_max, &target.model)?,
            sampler: sampler(fields, state, target)?,
        })
    }

    /// For an answer to these tokens. Blocks while the sampling guest starts and the grammar is compiled.
    pub(super) fn decoding(&self, model: &ServedModel, prompt: &[TokenId]) -> Result<Decoding, ApiError> {
        let grammar = self.format.as_ref().map(|format| format.session(model));
        Ok(Decoding {
            sampling: self.sampling(model, prompt)?,
            grammar: grammar.transpose()?,
        })
    }

    /// The same for what follows after `spent` output tokens of the request.
    pub(super) fn after(&self, spent: u32) -> Result<Self, ApiError> {
        let mut params = self.clone();
        if let Some(tokens_max) = self.tokens_max {
            let left = tokens_max.saturating_sub(spent);
            if left == 0 {
                return Err(ApiError::invalid(format!(
                    "the answers to tool calls used all of max_tokens ({tokens_max}) before the last answer; raise it"
                )));
            }
            params.tokens_max = Some(left);
        }
        Ok(params)
    }

    /// The same for one of a pipeline's outputs, the `number`th of its request.
    pub(super) fn of_output(
        &self,
        options: GenerateOptions,
        number: u32,
        target: &Target,
    ) -> Result<Self, ApiError> {
        let mut params = self.clone();
        if options.tokens_max.is_some() {
            params.tokens_max = limited(options.tokens_max, target)?;
        }
        if let Some(stops) = options.stop {
            params.stops = stops;
        }
        if let Some(plan) = options.plan {
            plan.check(target.model.engine.vocabulary(), 0)
                .map_err(|error| ApiError::invalid(error.to_string()))?;
            params.plan = plan;
            params.sampler = None;
        }
        if let Some(grammar) = options.grammar {
            params.format = Some(Format::of_pipeline(grammar)?);
        }
        // Equal prompts with equal seeds would give equal outputs.
        params.seed = options
            .seed
            .unwrap_or_else(|| self.seed.wrapping_add(u64::from(number)));
        Ok(params)
    }

    /// The plan, or a session of the sampling guest.
    fn sampling(&self, model: &ServedModel, prompt: &[TokenId]) -> Result<Sampling, ApiError> {
        let Some(sampler) = &self.sampler else {
            return Ok(Sampling::Plan(self.plan.clone()));
        };
        let engine = &model.engine;
        let info = SequenceInfo {
            prompt,
            constrained: self.format.is_some(),
            grammars: Some(&model.grammars),
            ..SequenceInfo::new(&sampler.params_json, engine.vocabulary(), self.seed)
        };
        let session = sampler.factory.session(&info, engine.waker());
        let session = session.map_err(|error| {
            let mut error = ApiError::from(error);
            error.param = Some(sampler.param.to_owned());
            error
        })?;
        Ok(Sampling::Guest(session))
    }
}

/// The output tokens a request may have, within what its deployment allows.
fn limited(wanted: Option<u32>, target: &Target) -> Result<Option<u32>, ApiError> {
    let deployment = target.live.as_ref().map(|live| &live.published.deployment);
    let Some(limit) = deployment.and_then(|deployment| deployment.limits.tokens_max) else {
        return Ok(wanted);
    };
    match wanted {
        Some(wanted) if wanted > limit => Err(ApiError::field(
            "max_tokens",
            &format!("at most {limit}, which is limits.tokens_max of this deployment"),
            wanted,
        )),
        wanted => Ok(Some(wanted.unwrap_or(limit))),
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

/// The sampling guest that the deployment brings or the request picks, if any.
fn sampler(fields: &Fields<'_>, state: &ApiState, target: &Target) -> Result<Option<Sampler>, ApiError> {
    let bound = target.live.as_ref().and_then(|live| live.sampler.as_ref());
    let Some(value) = fields.value("sampler") else {
        return Ok(bound.map(|bound| Sampler {
            factory: Arc::clone(&bound.guest),
            params_json: bound.params_json.clone(),
            param: "model",
        }));
    };
    if bound.is_some() {
        return Err(ApiError::field(
            "sampler",
            "nothing (this deployment brings its own)",
            "a value",
        ));
    }
    let sampler = Fields::of(value, "sampler")?;
    let factory = state.sampler(sampler.required_text("name")?)?;
    let params_json = match sampler.value("params") {
        None => "{}".to_owned(),
        Some(params) if params.is_object() => params.to_string(),
        Some(other) => return Err(ApiError::field("sampler.params", "an object", short(other))),
    };
    Ok(Some(Sampler {
        factory: Arc::clone(factory),
        params_json,
        param: "sampler.params",
    }))
}
