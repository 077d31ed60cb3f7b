//! `/metrics` in Prometheus' text format, with vLLM's names and meanings where it has them.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;

use super::state::ApiState;

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
    let models: Vec<_> = state
        .models()
        .values()
        .map(|model| (model.name.as_str(), model.engine.stats(), model.engine.queued()))
        .collect();
    let mut family =
        |name: &str,
         kind: &str,
         help: &str,
         value: &dyn Fn(&galerne_engine::stats::EngineStats, usize) -> f64| {
            let _ = writeln!(out, "# HELP galerne_{name} {help}\n# TYPE galerne_{name} {kind}");
            for (model, stats, queued) in &models {
                let _ = writeln!(
                    out,
                    "galerne_{name}{{model_name=\"{model}\"}} {}",
                    value(stats, *queued)
                );
            }
        };
    family(
        "num_requests_running",
        "gauge",
        "Sequences in the batch.",
        &|stats, _| stats.running as f64,
    );
    family(
        "num_requests_waiting",
        "gauge",
        "Sequences waiting for a place in the batch.",
        &|stats, queued| stats.waiting.max(queued) as f64,
    );
    family(
        "kv_blocks_total",
        "gauge",
        "KV blocks in the pool.",
        &|stats, _| stats.blocks_total as f64,
    );
    family(
        "kv_blocks_used",
        "gauge",
        "KV blocks held by sequences.",
        &|stats, _| stats.blocks_used as f64,
    );
    family(
        "kv_blocks_cached",
        "gauge",
        "Free KV blocks the prefix index still knows.",
        &|stats, _| stats.blocks_cached as f64,
    );
    family(
        "kv_cache_usage_perc",
        "gauge",
        "Held part of the KV pool; 1 is all.",
        &|stats, _| stats.blocks_used as f64 / stats.blocks_total.max(1) as f64,
    );
    family(
        "prompt_tokens_total",
        "counter",
        "Prompt tokens computed.",
        &|stats, _| stats.tokens_prefilled as f64,
    );
    family(
        "generation_tokens_total",
        "counter",
        "Output tokens.",
        &|stats, _| stats.tokens_decoded as f64,
    );
    family(
        "prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
        &|stats, _| stats.prefix_query_tokens as f64,
    );
    family(
        "prefix_cache_hits_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
        &|stats, _| stats.prefix_hit_tokens as f64,
    );
    family(
        "num_preemptions_total",
        "counter",
        "Times a sequence gave way and was computed again.",
        &|stats, _| stats.preemptions as f64,
    );
    family(
        "guest_sat_out_steps_total",
        "counter",
        "Steps a sequence sat out because its guest was late.",
        &|stats, _| stats.sat_out_steps as f64,
    );
    family(
        "engine_integrity_ok",
        "gauge",
        "1 if the engine's self-check has never failed.",
        &|stats, _| f64::from(u8::from(stats.integrity.is_none())),
    );
    let metrics = state.metrics();
    let _ = writeln!(
        out,
        "# HELP galerne_request_success_total Requests that ended, by reason.\n# TYPE galerne_request_success_total counter"
    );
    for (reason, counter) in [
        ("stop", &metrics.stop),
        ("length", &metrics.length),
        ("abort", &metrics.abort),
        ("error", &metrics.error),
    ] {
        let _ = writeln!(
            out,
            "galerne_request_success_total{{finished_reason=\"{reason}\"}} {}",
            counter.load(Ordering::Relaxed)
        );
    }
    metrics.first_token.write(
        &mut out,
        "galerne_time_to_first_token_seconds",
        "From the request to its first token.",
    );
    metrics.total.write(
        &mut out,
        "galerne_e2e_request_latency_seconds",
        "From the request to its end.",
    );
    out
}
