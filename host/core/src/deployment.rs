//! A deployment as plain data: which model, which guests, what they may use, what a request gets by default.
//! Opens no file and loads no guest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::capability::Grants;
use crate::limits::{Allowance, HostLimits};
use crate::name::{NAME_FORM, is_name};

/// Filters of one deployment.
const FILTERS_MAX: usize = 16;
/// Tools of one deployment.
const TOOLS_MAX: usize = 64;

/// Fields of a request that a deployment may give a default for.
const DEFAULTS: &[&str] = &[
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "stop",
    "seed",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "response_format",
    "ignore_eos",
];

/// `deployment.toml`. Its name is what clients put in `model`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deployment {
    /// `[a-z0-9][a-z0-9._-]{0,63}`; no served model may have it.
    pub name: String,
    /// A model of the host.
    pub model: String,
    /// Draws the tokens of every answer; without it the host does, as the request asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampler: Option<GuestUse>,
    /// A request passes them from the first to the last, its answer from the last to the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<GuestUse>,
    /// Called by the host when the model asks for one of their functions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<GuestUse>,
    /// Owns the loop between request and answer; without it the model answers, and calls tools, as the host has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<GuestUse>,
    /// What all guests of the deployment may do outside themselves.
    #[serde(default)]
    pub capabilities: Grants,
    /// Bounds on each request.
    #[serde(default)]
    pub limits: DeploymentLimits,
    /// Values for fields a request leaves out, by the request's own field names.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub defaults: Map<String, Value>,
}

/// A guest at work in a deployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestUse {
    /// The plugin's name: the tenant's own, or one that comes with the host.
    pub plugin: String,
    /// Its version; without it the highest there is when the deployment is published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// `sha256:` digest of the component. Publishing fills it in, and refuses another component than a given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Handed to the guest as JSON.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub params: Map<String, Value>,
}

impl GuestUse {
    /// The parameters as JSON text, `{}` if there are none.
    #[must_use]
    pub fn params_json(&self) -> String {
        Value::Object(self.params.clone()).to_string()
    }
}

/// Bounds on each request to a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeploymentLimits {
    /// Output tokens; a request may ask for fewer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_max: Option<u32>,
    /// Times the model may answer within one request: each round of tool calls takes one more.
    pub agent_steps_max: u32,
    /// Limits of the host's that are lower for this deployment, by the names of [`HostLimits::names`].
    #[serde(flatten)]
    pub lower: BTreeMap<String, u64>,
}

impl Default for DeploymentLimits {
    fn default() -> Self {
        Self {
            tokens_max: None,
            agent_steps_max: 8,
            lower: BTreeMap::new(),
        }
    }
}

/// What a deployment's text gets wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("deployment: {field}: expected {expected}, got {got}")]
pub struct DeploymentError {
    /// The field, by its path in `deployment.toml`.
    pub field: String,
    /// What may stand there.
    pub expected: String,
    /// What stands there.
    pub got: String,
}

impl DeploymentError {
    fn new(field: impl Into<String>, expected: impl Into<String>, got: impl std::fmt::Display) -> Self {
        Self {
            field: field.into(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }
}

impl Deployment {
    /// Checks everything that can be told without looking at models and plugins.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), DeploymentError> {
        let name = |field: &str, text: &str| match is_name(text) {
            true => Ok(()),
            false => Err(DeploymentError::new(field, NAME_FORM, format!("{text:?}"))),
        };
        name("name", &self.name)?;
        let counts = [
            ("filters", self.filters.len(), FILTERS_MAX),
            ("tools", self.tools.len(), TOOLS_MAX),
        ];
        for (field, got, max) in counts {
            if got > max {
                return Err(DeploymentError::new(field, format!("at most {max}"), got));
            }
        }
        for (field, guest) in self.guests() {
            name(&format!("{field}.plugin"), &guest.plugin)?;
        }
        if let Some(field) = self
            .defaults
            .keys()
            .find(|field| !DEFAULTS.contains(&field.as_str()))
        {
            let expected = format!("one of {}", DEFAULTS.join(", "));
            return Err(DeploymentError::new("defaults", expected, format!("{field:?}")));
        }
        if self.limits.tokens_max == Some(0) {
            return Err(DeploymentError::new("limits.tokens_max", "at least 1", 0));
        }
        for (name, value) in &self.limits.lower {
            if !HostLimits::names().any(|known| known == name) {
                let known: Vec<&str> = HostLimits::names().collect();
                let expected = format!("one of tokens_max, agent_steps_max, {}", known.join(", "));
                return Err(DeploymentError::new("limits", expected, format!("{name:?}")));
            }
            if *value == 0 {
                return Err(DeploymentError::new(format!("limits.{name}"), "at least 1", 0));
            }
        }
        if !(1..=64).contains(&self.limits.agent_steps_max) {
            let got = self.limits.agent_steps_max;
            return Err(DeploymentError::new(
                "limits.agent_steps_max",
                "from 1 to 64",
                got,
            ));
        }
        Ok(())
    }

    /// Checks that no limit is above the host's: what a deployment asks for must be what it gets.
    ///
    /// # Errors
    /// The first that is.
    pub fn check_limits(&self, host: &HostLimits) -> Result<(), DeploymentError> {
        for (name, value) in &self.limits.lower {
            if let Some(max) = host.get(name).filter(|max| value > max) {
                let expected = format!("at most {max}, the host's limit, which its operator can raise");
                return Err(DeploymentError::new(format!("limits.{name}"), expected, value));
            }
        }
        Ok(())
    }

    /// The limits of this deployment's guests on a host with these.
    #[must_use]
    pub fn allowance(&self, host: HostLimits) -> Allowance {
        Allowance::lowered(host, &self.name, &self.limits.lower)
    }

    /// All guests with their paths in `deployment.toml`.
    pub fn guests(&self) -> impl Iterator<Item = (String, &GuestUse)> {
        let many = |field: &'static str, guests: &'_ [GuestUse]| -> Vec<String> {
            (0..guests.len())
                .map(|index| format!("{field}[{index}]"))
                .collect()
        };
        let paths = self.sampler.iter().map(|_| "sampler".to_owned());
        let paths = paths
            .chain(many("filters", &self.filters))
            .chain(many("tools", &self.tools))
            .chain(self.pipeline.iter().map(|_| "pipeline".to_owned()));
        let guests = self.sampler.iter().chain(&self.filters).chain(&self.tools);
        paths.zip(guests.chain(&self.pipeline))
    }

    /// All guests, to change them, in the order of [`guests`](Self::guests).
    pub fn guests_mut(&mut self) -> impl Iterator<Item = &mut GuestUse> {
        self.sampler
            .iter_mut()
            .chain(&mut self.filters)
            .chain(&mut self.tools)
            .chain(&mut self.pipeline)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn deployment(extra: &Value) -> Result<(), String> {
        let mut value = json!({"name": "support", "model": "smollm2"});
        for (field, extra) in extra.as_object().expect("an object") {
            value[field] = extra.clone();
        }
        let deployment: Deployment = serde_json::from_value(value).map_err(|error| error.to_string())?;
        deployment.check().map_err(|error| error.to_string())
    }

    #[test]
    fn a_deployment_needs_a_name_and_a_model_only() {
        assert_eq!(deployment(&json!({})), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let many: Vec<Value> = (0..17).map(|_| json!({"plugin": "x"})).collect();
        let cases = [
            (json!({"name": "../etc"}), "name"),
            (json!({"sampler": {"plugin": "A"}}), "sampler.plugin"),
            (
                json!({"filters": [{"plugin": "a"}, {"plugin": ""}]}),
                "filters[1].plugin",
            ),
            (json!({"tools": [{"plugin": "a/b"}]}), "tools[0].plugin"),
            (json!({"filters": many}), "filters: expected at most 16, got 17"),
            (json!({"defaults": {"messages": []}}), "defaults"),
            (json!({"limits": {"tokens_max": 0}}), "limits.tokens_max"),
            (
                json!({"limits": {"pipeline_tokens_max": 0}}),
                "limits.pipeline_tokens_max",
            ),
            (
                json!({"limits": {"pipeline_blocks_max": 0}}),
                "limits.pipeline_blocks_max",
            ),
            (
                json!({"limits": {"agent_steps_max": 65}}),
                "limits.agent_steps_max",
            ),
            (json!({"filter": []}), "unknown field `filter`"),
            (
                json!({"limits": {"token_max": 5}}),
                "limits: expected one of tokens_max, agent_steps_max, step_ms_max",
            ),
            (json!({"limits": {"http_calls_max": -1}}), "integer `-1`"),
        ];
        for (extra, expected) in cases {
            let error = deployment(&extra).expect_err("it is wrong");
            assert!(error.contains(expected), "{extra}: {error}");
        }
    }

    #[test]
    fn limits_are_lowered_and_not_raised() {
        let toml = json!({"name": "a", "model": "m", "limits": {"tokens_max": 5, "http_calls_max": 3}});
        let deployment: Deployment = serde_json::from_value(toml).expect("a deployment");
        let written = serde_json::to_value(&deployment).expect("writes");
        assert_eq!(
            written["limits"],
            json!({"tokens_max": 5, "agent_steps_max": 8, "http_calls_max": 3})
        );
        let mut host = HostLimits::default();
        assert_eq!(deployment.check_limits(&host), Ok(()));
        assert_eq!(deployment.allowance(host).limits.capability.http_calls_max, 3);
        host.capability.http_calls_max = 2;
        let error = deployment.check_limits(&host).expect_err("above the host's");
        assert_eq!(
            error.to_string(),
            "deployment: limits.http_calls_max: expected at most 2, the host's limit, which its operator can raise, got 3"
        );
        assert_eq!(deployment.allowance(host).limits.capability.http_calls_max, 2);
    }
}
