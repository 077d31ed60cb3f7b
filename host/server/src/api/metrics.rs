//! `/metrics` in Prometheus' text format, with vLLM's names and meanings where it has them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use galerne_core::guest::GuestStats;
use galerne_engine::stats::EngineStats;
use serde_json::Value;

use super::state::{ApiState, Target};
use crate::deployments::DEFAULT_TENANT;

/// Upper bounds in seconds, as in vLLM's first-token histogram.
const BUCKETS_S: [f64; 16] = [
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
];

/// Counters of all models together.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    stop: AtomicU64,
    length: AtomicU64,
    abort: AtomicU64,
    error: AtomicU64,
    first_token: Histogram,
    total: Histogram,
    // A std Mutex: held to count a request. By name and version; names are those of deployments, so there are few.
    deployments: Mutex<BTreeMap<(String, u32), u64>>,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS_S.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    fn observe(&self, value: Duration) {
        let seconds = value.as_secs_f64();
        let bucket = BUCKETS_S
            .iter()
            .position(|bound| seconds <= *bound)
            .unwrap_or(BUCKETS_S.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(
            u64::try_from(value.as_micros()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut count = 0;
        for (bucket, hits) in self.buckets.iter().enumerate() {
            count += hits.load(Ordering::Relaxed);
            let bound = BUCKETS_S
                .get(bucket)
                .map_or_else(|| "+Inf".to_owned(), f64::to_string);
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {count}");
        }
        let sum = self.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum {sum}\n{name}_count {count}");
    }
}

impl Metrics {
    /// A request ended with this finish reason, or with an error, or was given up by its client.
    pub(super) fn ended(&self, reason: &str) {
        let counter = match reason {
            "length" => &self.length,
            "abort" => &self.abort,
            "error" => &self.error,
            _ => &self.stop,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// This answers a request: counted if it is a version of a deployment.
    pub(super) fn chosen(&self, target: &Target) {
        if let Some(live) = &target.live {
            let name = live.published.deployment.name.clone();
            *self
                .deployments()
                .entry((name, live.published.version))
                .or_default() += 1;
        }
    }

    fn deployments(&self) -> MutexGuard<'_, BTreeMap<(String, u32), u64>> {
        self.deployments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn first_token(&self, after: Duration) {
        self.first_token.observe(after);
    }

    pub(super) fn total(&self, after: Duration) {
        self.total.observe(after);
    }
}

pub(super) async fn metrics(State(state): State<Arc<ApiState>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        render(&state),
    )
}

fn render(state: &ApiState) -> String {
    let mut out = String::new();
    engines(&mut out, state);
    requests(&mut out, state.metrics());
    guests(&mut out, &state.deployments().guest_stats());
    fuel(&mut out, &state.deployments().guest_fuel());
    limits(&mut out, state);
    out
}

/// A family's first two lines.
fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP galerne_{name} {help}\n# TYPE galerne_{name} {kind}");
}

/// A figure of an engine: name, kind, help, and the value from its numbers and the length of its queue.
type EngineFigure = (
    &'static str,
    &'static str,
    &'static str,
    fn(&EngineStats, usize) -> f64,
);

const ENGINE: [EngineFigure; 15] = [
    (
        "num_requests_running",
        "gauge",
        "Sequences in the batch.",
        |stats, _| stats.running as f64,
    ),
    (
        "num_requests_waiting",
        "gauge",
        "Sequences waiting for a place in the batch.",
        |stats, queued| stats.waiting.max(queued) as f64,
    ),
    (
        "kv_blocks_total",
        "gauge",
        "KV blocks in the pool.",
        |stats, _| stats.blocks_total as f64,
    ),
    (
        "kv_blocks_used",
        "gauge",
        "KV blocks held by sequences.",
        |stats, _| stats.blocks_used as f64,
    ),
    (
        "kv_blocks_cached",
        "gauge",
        "Free KV blocks the prefix index still knows.",
        |stats, _| stats.blocks_cached as f64,
    ),
    (
        "kv_cache_usage_perc",
        "gauge",
        "Held part of the KV pool; 1 is all.",
        |stats, _| stats.blocks_used as f64 / stats.blocks_total.max(1) as f64,
    ),
    (
        "prompt_tokens_total",
        "counter",
        "Prompt tokens computed.",
        |stats, _| stats.tokens_prefilled as f64,
    ),
    (
        "generation_tokens_total",
        "counter",
        "Output tokens.",
        |stats, _| stats.tokens_decoded as f64,
    ),
    (
        "prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
        |stats, _| stats.prefix_query_tokens as f64,
    ),
    (
        "prefix_cache_hits_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
        |stats, _| stats.prefix_hit_tokens as f64,
    ),
    (
        "spec_decode_num_draft_tokens_total",
        "counter",
        "Tokens computed because a sampling guest proposed them.",
        |stats, _| stats.tokens_proposed as f64,
    ),
    (
        "spec_decode_num_accepted_tokens_total",
        "counter",
        "Proposed tokens that were drawn.",
        |stats, _| stats.tokens_accepted as f64,
    ),
    (
        "num_preemptions_total",
        "counter",
        "Times a sequence gave way and was computed again.",
        |stats, _| stats.preemptions as f64,
    ),
    (
        "guest_sat_out_steps_total",
        "counter",
        "Steps a sequence sat out because its guest was late.",
        |stats, _| stats.sat_out_steps as f64,
    ),
    (
        "engine_integrity_ok",
        "gauge",
        "1 if the engine's self-check has never failed.",
        |stats, _| f64::from(u8::from(stats.integrity.is_none())),
    ),
];

fn engines(out: &mut String, state: &ApiState) {
    let models: Vec<_> = state
        .models()
        .values()
        .map(|model| (model.name.as_str(), model.engine.stats(), model.engine.queued()))
        .collect();
    for (name, kind, help, value) in ENGINE {
        family(out, name, kind, help);
        for (model, stats, queued) in &models {
            let _ = writeln!(
                out,
                "galerne_{name}{{model_name=\"{model}\"}} {}",
                value(stats, *queued)
            );
        }
    }
}

fn requests(out: &mut String, metrics: &Metrics) {
    family(
        out,
        "request_success_total",
        "counter",
        "Requests that ended, by reason.",
    );
    for (reason, counter) in [
        ("stop", &metrics.stop),
        ("length", &metrics.length),
        ("abort", &metrics.abort),
        ("error", &metrics.error),
    ] {
        let count = counter.load(Ordering::Relaxed);
        let _ = writeln!(
            out,
            "galerne_request_success_total{{finished_reason=\"{reason}\"}} {count}"
        );
    }
    family(
        out,
        "deployment_requests_total",
        "counter",
        "Requests a version of a deployment was chosen for.",
    );
    for ((name, version), count) in metrics.deployments().iter() {
        let _ = writeln!(
            out,
            "galerne_deployment_requests_total{{deployment=\"{name}\",version=\"{version}\"}} {count}"
        );
    }
    let name = "galerne_time_to_first_token_seconds";
    metrics
        .first_token
        .write(out, name, "From the request to its first token.");
    let name = "galerne_e2e_request_latency_seconds";
    metrics.total.write(out, name, "From the request to its end.");
}

fn guests(out: &mut String, stats: &GuestStats) {
    family(
        out,
        "guest_failures_total",
        "counter",
        "Guests' calls that ended their request, by why.",
    );
    for (kind, count) in [
        ("deadline", stats.deadlines),
        ("limit", stats.limits),
        ("trap", stats.traps),
        ("bad_answer", stats.bad_answers),
        ("process", stats.lost),
    ] {
        let _ = writeln!(out, "galerne_guest_failures_total{{kind=\"{kind}\"}} {count}");
    }
    family(
        out,
        "guest_busy_seconds_total",
        "counter",
        "Time guests' calls took in this process, without waiting; cells have processes of their own.",
    );
    let _ = writeln!(
        out,
        "galerne_guest_busy_seconds_total {}",
        stats.busy_us as f64 / 1e6
    );
    family(
        out,
        "guest_memory_peak_bytes",
        "gauge",
        "The most memory an instance in this process had after a call.",
    );
    let _ = writeln!(out, "galerne_guest_memory_peak_bytes {}", stats.memory_peak_bytes);
    family(out, "cells", "gauge", "Processes of tenants' guests that run.");
    let _ = writeln!(out, "galerne_cells {}", stats.cells);
    family(
        out,
        "cells_started_total",
        "counter",
        "Processes of tenants' guests that were started.",
    );
    let _ = writeln!(out, "galerne_cells_started_total {}", stats.cells_started);
}

/// Only a host that tests guests counts it.
fn fuel(out: &mut String, spent: &[(String, u64)]) {
    if spent.is_empty() {
        return;
    }
    let help = "Instructions that guests have executed, about.";
    family(out, "guest_fuel_total", "counter", help);
    for (guest, fuel) in spent {
        let _ = writeln!(out, "galerne_guest_fuel_total{{guest=\"{guest}\"}} {fuel}");
    }
}

/// Every bound a guest may meet, under its own name; times in seconds.
fn limits(out: &mut String, state: &ApiState) {
    family(
        out,
        "guest_limit",
        "gauge",
        "Bounds on guests, by name; times in seconds.",
    );
    let limits = serde_json::to_value(state.deployments().limits()).unwrap_or_default();
    for (of, limits) in limits.as_object().into_iter().flatten() {
        limit(out, of, "", limits);
    }
    family(
        out,
        "deployment_limit",
        "gauge",
        "Bounds that a deployment lowered, by name; times in milliseconds.",
    );
    for live in state.deployments().stable(DEFAULT_TENANT) {
        let (name, version) = (&live.published.deployment.name, live.published.version);
        for (limit, value, _) in live.capabilities.allowance().changed() {
            let _ = writeln!(
                out,
                "galerne_deployment_limit{{deployment=\"{name}\",version=\"{version}\",name=\"{limit}\"}} {value}"
            );
        }
    }
}

fn limit(out: &mut String, of: &str, name: &str, value: &Value) {
    let number = match value {
        // As serde writes a duration.
        Value::Object(fields) if fields.contains_key("nanos") => {
            let part = |field: &str| fields[field].as_f64().unwrap_or_default();
            part("secs") + part("nanos") / 1e9
        }
        Value::Object(fields) => {
            for (field, value) in fields {
                let name = if name.is_empty() {
                    field.clone()
                } else {
                    format!("{name}_{field}")
                };
                limit(out, of, &name, value);
            }
            return;
        }
        other => other.as_f64().unwrap_or_default(),
    };
    let _ = writeln!(out, "galerne_guest_limit{{of=\"{of}\",name=\"{name}\"}} {number}");
}
