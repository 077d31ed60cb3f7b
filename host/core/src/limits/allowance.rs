//! What of the host's limits holds for the guests of one deployment, and who can raise it. Counts nothing itself.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{CapabilityLimits, GrammarLimits, GuestLimits, PipelineLimits};
use crate::capability::CapabilityError;

/// Every limit that guests meet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLimits {
    /// On instances and calls.
    pub guest: GuestLimits,
    /// On what guests do outside themselves.
    pub capability: CapabilityLimits,
    /// On what pipelines do with the model.
    pub pipeline: PipelineLimits,
    /// On grammars, a request's own and those of guests.
    pub grammar: GrammarLimits,
}

/// A limit as a whole number; times in milliseconds.
trait Number {
    fn get(&self) -> u64;
    fn set(&mut self, value: u64);
}

impl Number for u32 {
    fn get(&self) -> u64 {
        u64::from(*self)
    }

    fn set(&mut self, value: u64) {
        *self = Self::try_from(value).unwrap_or(Self::MAX);
    }
}

impl Number for u64 {
    fn get(&self) -> u64 {
        *self
    }

    fn set(&mut self, value: u64) {
        *self = value;
    }
}

impl Number for usize {
    fn get(&self) -> u64 {
        *self as u64
    }

    fn set(&mut self, value: u64) {
        *self = Self::try_from(value).unwrap_or(Self::MAX);
    }
}

impl Number for Duration {
    fn get(&self) -> u64 {
        u64::try_from(self.as_millis()).unwrap_or(u64::MAX)
    }

    fn set(&mut self, value: u64) {
        *self = Self::from_millis(value);
    }
}

type Place = fn(&mut HostLimits) -> &mut dyn Number;

/// The limits that have a name: an operator sets them, a deployment lowers them.
const NAMED: &[(&str, Place)] = &[
    ("step_ms_max", |limits| &mut limits.guest.step_deadline),
    ("request_ms_max", |limits| &mut limits.guest.request_deadline),
    ("tool_ms_max", |limits| &mut limits.guest.tool_deadline),
    ("wait_ms_max", |limits| &mut limits.guest.wait_max),
    ("memory_bytes_max", |limits| &mut limits.guest.memory_bytes_max),
    ("held_bytes_max", |limits| &mut limits.guest.held_bytes_max),
    ("filtered_bytes_max", |limits| {
        &mut limits.guest.filtered_bytes_max
    }),
    ("tool_answer_bytes_max", |limits| {
        &mut limits.guest.tool_answer_bytes_max
    }),
    ("log_request_bytes_max", |limits| {
        &mut limits.capability.log_request_bytes_max
    }),
    ("http_calls_max", |limits| &mut limits.capability.http_calls_max),
    ("http_request_bytes_max", |limits| {
        &mut limits.capability.http_request_bytes_max
    }),
    ("http_response_bytes_max", |limits| {
        &mut limits.capability.http_response_bytes_max
    }),
    ("http_ms_max", |limits| &mut limits.capability.http_time_max),
    ("http_redirects_max", |limits| {
        &mut limits.capability.http_redirects_max
    }),
    ("kv_value_bytes_max", |limits| {
        &mut limits.capability.kv.value_bytes_max
    }),
    ("kv_keys_max", |limits| &mut limits.capability.kv.keys_max),
    ("kv_bytes_max", |limits| {
        &mut limits.capability.kv.tenant_bytes_max
    }),
    ("pipeline_ms_max", |limits| &mut limits.guest.pipeline_deadline),
    ("pipeline_wait_ms_max", |limits| {
        &mut limits.guest.pipeline_wait_max
    }),
    ("pipeline_work_ms_max", |limits| &mut limits.pipeline.work_max),
    ("pipeline_contexts_max", |limits| {
        &mut limits.pipeline.contexts_max
    }),
    ("pipeline_fork_depth_max", |limits| {
        &mut limits.pipeline.fork_depth_max
    }),
    ("pipeline_generations_max", |limits| {
        &mut limits.pipeline.generations_max
    }),
    ("pipeline_tokens_max", |limits| &mut limits.pipeline.tokens_max),
    ("pipeline_blocks_max", |limits| &mut limits.pipeline.blocks_max),
    ("pipeline_text_bytes_max", |limits| {
        &mut limits.pipeline.text_bytes_max
    }),
    ("pipeline_emitted_bytes_max", |limits| {
        &mut limits.pipeline.emitted_bytes_max
    }),
    ("pipeline_event_bytes_max", |limits| {
        &mut limits.pipeline.event_bytes_max
    }),
    ("grammar_source_bytes_max", |limits| {
        &mut limits.grammar.source_bytes_max
    }),
    ("grammar_nesting_max", |limits| &mut limits.grammar.nesting_max),
    ("grammar_compiled_max", |limits| &mut limits.grammar.compiled_max),
    ("grammar_held_max", |limits| &mut limits.grammar.held_max),
    ("grammar_tokens_max", |limits| {
        &mut limits.grammar.accepted_tokens_max
    }),
];

fn place(name: &str) -> Option<Place> {
    let named = NAMED.iter().find(|(known, _)| *known == name);
    named.map(|(_, place)| *place)
}

impl HostLimits {
    /// The limits that can be set and lowered by name.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMED.iter().map(|(name, _)| *name)
    }

    /// The value of a limit, times in milliseconds. `None` if it has no such name.
    #[must_use]
    pub fn get(mut self, name: &str) -> Option<u64> {
        Some(place(name)?(&mut self).get())
    }

    /// Sets a limit. False if it has no such name.
    pub fn set(&mut self, name: &str, value: u64) -> bool {
        let place = place(name);
        if let Some(place) = place {
            place(self).set(value);
        }
        place.is_some()
    }
}

/// The limits of one deployment's guests: the host's, where the deployment does not lower them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowance {
    /// What holds.
    pub limits: HostLimits,
    host: HostLimits,
    /// The deployment that lowered some.
    deployment: String,
}

impl Allowance {
    /// The host's limits, none of them lowered.
    #[must_use]
    pub fn of_host(limits: HostLimits) -> Self {
        Self {
            limits,
            host: limits,
            deployment: String::new(),
        }
    }

    /// What is left of the host's limits where a deployment has its own. One above the host's changes nothing.
    #[must_use]
    pub fn lowered(host: HostLimits, deployment: &str, own: &BTreeMap<String, u64>) -> Self {
        let mut limits = host;
        for (name, own) in own {
            if host.get(name).is_some_and(|host| *own < host) {
                limits.set(name, *own);
            }
        }
        Self {
            limits,
            host,
            deployment: deployment.to_owned(),
        }
    }

    /// The same on a host with these limits of instances and calls, and of grammars.
    #[must_use]
    pub fn on(&self, guest: GuestLimits, grammar: GrammarLimits) -> Self {
        let own = self.changed().map(|(name, own, _)| (name.to_owned(), own));
        let host = HostLimits {
            guest,
            grammar,
            ..self.host
        };
        Self::lowered(host, &self.deployment, &own.collect())
    }

    /// The limits that the deployment lowered: name, what holds, the host's.
    pub fn changed(&self) -> impl Iterator<Item = (&'static str, u64, u64)> {
        let values = |name| Some((name, self.limits.get(name)?, self.host.get(name)?));
        HostLimits::names()
            .filter_map(values)
            .filter(|(_, own, host)| own < host)
    }

    /// Names a limit for who met it, and says who can raise it.
    #[must_use]
    pub fn who(&self, name: &str) -> String {
        match self.changed().find(|(changed, _, _)| *changed == name) {
            Some((_, _, host)) => format!(
                "limits.{name} of deployment \"{}\", which can raise it to the host's {host}",
                self.deployment
            ),
            None => format!("{name}, the host's operator can raise it"),
        }
    }

    /// Whether a key and a value may be as large as this.
    ///
    /// # Errors
    /// They may not.
    pub fn check_kv_sizes(&self, key: &str, value: &[u8]) -> Result<(), CapabilityError> {
        let limits = self.limits.capability.kv;
        let (key_bytes, value_bytes) = (key.len(), value.len());
        if !(1..=limits.key_bytes_max).contains(&key_bytes) {
            let max = limits.key_bytes_max;
            return Err(CapabilityError::Invalid(format!(
                "kv: expected a key of 1 to {max} bytes, got {key_bytes}"
            )));
        }
        if value_bytes > limits.value_bytes_max {
            return Err(CapabilityError::Limit(format!(
                "kv: expected a value of at most {} bytes ({}), got {value_bytes}",
                limits.value_bytes_max,
                self.who("kv_value_bytes_max")
            )));
        }
        Ok(())
    }

    /// Whether a store with this many other keys, and bytes of them and their values, has room for this.
    ///
    /// # Errors
    /// It has not.
    pub fn check_kv_room(
        &self,
        keys: u64,
        bytes: u64,
        key: &str,
        value: &[u8],
    ) -> Result<(), CapabilityError> {
        let limits = self.limits.capability.kv;
        if keys >= limits.keys_max {
            return Err(CapabilityError::Limit(format!(
                "kv: the tenant has {keys} keys of at most {} ({}); delete some",
                limits.keys_max,
                self.who("kv_keys_max")
            )));
        }
        let wanted = bytes.saturating_add((key.len() + value.len()) as u64);
        if wanted > limits.tenant_bytes_max {
            return Err(CapabilityError::Limit(format!(
                "kv: the tenant would have {wanted} bytes of at most {} ({}); delete some keys",
                limits.tenant_bytes_max,
                self.who("kv_bytes_max")
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(limits: &[(&str, u64)]) -> BTreeMap<String, u64> {
        let owned = |(name, value): &(&str, u64)| ((*name).to_owned(), *value);
        limits.iter().map(owned).collect()
    }

    #[test]
    fn every_name_reads_and_sets_a_limit_of_its_own() {
        let mut limits = HostLimits::default();
        for (value, name) in (7_001..).zip(HostLimits::names()) {
            assert!(limits.set(name, value));
        }
        for (value, name) in (7_001..).zip(HostLimits::names()) {
            assert_eq!(limits.get(name), Some(value), "{name}: set by another name too");
        }
        assert!(!limits.set("step_deadline", 1) && limits.get("step_deadline").is_none());
    }

    #[test]
    fn a_deployment_lowers_and_never_raises() {
        let host = HostLimits::default();
        let asked = own(&[
            ("http_calls_max", 2),
            ("tool_ms_max", 1_000_000),
            ("kv_bytes_max", 5),
        ]);
        let allowance = Allowance::lowered(host, "support", &asked);
        assert_eq!(allowance.limits.capability.http_calls_max, 2);
        assert_eq!(allowance.limits.guest.tool_deadline, host.guest.tool_deadline);
        assert_eq!(
            allowance.changed().collect::<Vec<_>>(),
            [("http_calls_max", 2, 16), ("kv_bytes_max", 5, 64 << 20)]
        );
        assert_eq!(
            allowance.who("http_calls_max"),
            "limits.http_calls_max of deployment \"support\", which can raise it to the host's 16"
        );
        assert_eq!(
            allowance.who("tool_ms_max"),
            "tool_ms_max, the host's operator can raise it"
        );
    }

    #[test]
    fn on_another_host_what_was_lowered_stays_low() {
        let asked = own(&[("http_calls_max", 2), ("tool_ms_max", 100), ("step_ms_max", 50)]);
        let allowance = Allowance::lowered(HostLimits::default(), "support", &asked);
        let guest = GuestLimits {
            tool_deadline: Duration::from_millis(200),
            step_deadline: Duration::from_millis(20),
            ..GuestLimits::default()
        };
        let there = allowance.on(guest, GrammarLimits::default());
        assert_eq!(there.limits.guest.tool_deadline, Duration::from_millis(100));
        assert_eq!(there.limits.guest.step_deadline, Duration::from_millis(20));
        assert_eq!(there.limits.capability.http_calls_max, 2);
        assert!(
            there
                .who("tool_ms_max")
                .contains("limits.tool_ms_max of deployment")
        );
        assert!(there.who("http_calls_max").contains("to the host's 16"));
    }

    #[test]
    fn a_full_store_says_whose_limit_it_is() {
        let allowance = Allowance::lowered(HostLimits::default(), "support", &own(&[("kv_bytes_max", 5)]));
        allowance.check_kv_room(1, 3, "a", b"1").expect("just room");
        let error = allowance.check_kv_room(1, 4, "a", b"1").expect_err("full");
        assert!(
            error
                .to_string()
                .contains("6 bytes of at most 5 (limits.kv_bytes_max of"),
            "{error}"
        );
        let error = allowance.check_kv_sizes("a", &[0; 1 << 20]).expect_err("large");
        assert!(
            error.to_string().contains("(kv_value_bytes_max, the host's"),
            "{error}"
        );
    }
}
