//! Counters, and their rendering in the Prometheus text format 0.0.4.
//!
//! The names are part of the contract. Labels are bounded: a model label is a loaded model's
//! canonical id or `other`, an endpoint is a route's template; nothing a client sends becomes one.
//!
//! Not here: what the engine counts ([`fathom_engine::EngineStats`]); this module only renders it.

mod cache;
mod drafts;
mod failures;
mod vllm;

use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use fathom_engine::stats::Histogram;
use fathom_engine::{EngineStats, RequestTimes};
use fathom_protocol::openai::response::FinishDetails;

use crate::app::App;
use crate::error::Refusal;
use crate::record::Facts;
use crate::registry::ModelEntry;

const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0, 600.0,
];

/// Where in its life a request was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Queued,
    Prefill,
    Decode,
}

impl Phase {
    pub(crate) const fn of(times: &RequestTimes) -> Self {
        match (times.started, times.first_token) {
            (None, _) => Self::Queued,
            (Some(_), None) => Self::Prefill,
            (Some(_), Some(_)) => Self::Decode,
        }
    }
}

/// What the HTTP side counts.
#[derive(Default)]
pub(crate) struct Metrics {
    counters: Mutex<Counters>,
}

#[derive(Default)]
struct Counters {
    /// By model, endpoint and status.
    requests: BTreeMap<(String, &'static str, u16), u64>,
    models: BTreeMap<String, ModelCounters>,
}

struct ModelCounters {
    cancelled: [u64; 3],
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
    reasoning_tokens: u64,
    thought_only: u64,
    looping: u64,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    request: Histogram,
    queue: Histogram,
    prefill: Histogram,
}

impl Default for ModelCounters {
    fn default() -> Self {
        let seconds = || Histogram::new(SECONDS);
        Self {
            cancelled: [0; 3],
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
            reasoning_tokens: 0,
            thought_only: 0,
            looping: 0,
            time_to_first_token: seconds(),
            inter_token: seconds(),
            request: seconds(),
            queue: seconds(),
            prefill: seconds(),
        }
    }
}

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, Counters> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request that is over.
    pub(crate) fn count_request(
        &self,
        model: &str,
        endpoint: &'static str,
        status: u16,
        facts: &Facts,
        total: Duration,
    ) {
        let mut counters = self.lock();
        *counters.requests.entry((model.to_owned(), endpoint, status)).or_default() += 1;
        let Some(times) = facts.times else { return };
        let counters = counters.models.entry(model.to_owned()).or_default();
        counters.prompt_tokens += facts.prompt_tokens;
        counters.cached_tokens += facts.cached_tokens;
        counters.completion_tokens += facts.completion_tokens;
        counters.reasoning_tokens += facts.reasoning_tokens;
        counters.request.observe(total.as_secs_f64());
        let Some(started) = times.started else { return };
        let seconds = |later: std::time::Instant, earlier| {
            later.saturating_duration_since(earlier).as_secs_f64()
        };
        counters.queue.observe(seconds(started, times.submitted));
        let Some(first_token) = times.first_token else { return };
        counters.prefill.observe(seconds(first_token, started));
        counters.time_to_first_token.observe(seconds(first_token, times.submitted));
    }

    /// Counts times between two tokens of one choice.
    pub(crate) fn count_gaps(&self, model: &str, gaps: &[Duration]) {
        if gaps.is_empty() {
            return;
        }
        let mut counters = self.lock();
        let known = counters.models.entry(model.to_owned()).or_default();
        for gap in gaps {
            known.inter_token.observe(gap.as_secs_f64());
        }
    }

    /// Counts what was odd about an answer's ending.
    pub(crate) fn count_ending(&self, model: &str, details: FinishDetails) {
        if details.unless_plain().is_some() {
            let mut counters = self.lock();
            let counters = counters.models.entry(model.to_owned()).or_default();
            counters.thought_only += u64::from(details.thought_only);
            counters.looping += u64::from(details.token_loop.is_some());
        }
    }

    /// Counts a request whose client went away.
    pub(crate) fn count_cancelled(&self, model: &str, phase: Phase) {
        let mut counters = self.lock();
        counters.models.entry(model.to_owned()).or_default().cancelled[phase as usize] += 1;
    }
}

pub(crate) async fn scrape(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    if app.config.server.protect_metrics {
        app.keys.authenticate(&headers)?;
    }
    let content_type = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((content_type, render(&app)).into_response())
}

fn render(app: &App) -> String {
    let mut page = Page::default();
    let entries = app.registry.loaded();
    let engines: Vec<(&ModelEntry, EngineStats)> =
        entries.iter().map(|entry| (&**entry, entry.engine.stats())).collect();
    render_engines(&mut page, &engines);
    render_requests(&mut page, &app.metrics.lock(), &entries);
    if app.config.metrics.vllm_names {
        vllm::render(&mut page, &engines);
    }
    page.text
}

fn render_engines(page: &mut Page, engines: &[(&ModelEntry, EngineStats)]) {
    let in_flight: u64 =
        engines.iter().map(|(_, stats)| stats.requests_running + stats.requests_waiting).sum();
    page.family("fathom_requests_in_flight", "gauge", "Generation requests waiting or running.");
    page.sample("fathom_requests_in_flight", &[], in_flight);
    let per_model = |page: &mut Page, name: &str, kind, help, of: fn(&EngineStats) -> u64| {
        page.family(name, kind, help);
        for (entry, stats) in engines {
            page.sample(name, &[("model", entry.canonical_id())], of(stats));
        }
    };
    per_model(page, "fathom_requests_running", "gauge", "Sequences that run.", |stats| {
        stats.requests_running
    });
    per_model(page, "fathom_requests_waiting", "gauge", "Sequences that wait to run.", |stats| {
        stats.requests_waiting
    });
    per_model(
        page,
        "fathom_preemptions_total",
        "counter",
        "Times a sequence gave its memory to another.",
        |stats| stats.preemptions,
    );
    type OfKv = fn(&fathom_engine::stats::KvUsage) -> u64;
    let kinds: [(&str, &str, OfKv, OfKv); 2] = [
        (
            "fathom_kv_blocks_total",
            "Units of KV memory.",
            |kv| kv.blocks_total,
            |kv| kv.snapshots_total,
        ),
        (
            "fathom_kv_blocks_used",
            "Units of KV memory in use.",
            |kv| kv.blocks_used,
            |kv| kv.snapshots_used,
        ),
    ];
    for (name, help, blocks, snapshots) in kinds {
        page.family(name, "gauge", help);
        for (entry, stats) in engines {
            let model = entry.canonical_id();
            page.sample(name, &[("model", model), ("kind", "block")], blocks(&stats.kv));
            page.sample(name, &[("model", model), ("kind", "snapshot")], snapshots(&stats.kv));
        }
    }
    page.family("fathom_kv_blocks_cached", "gauge", "Unused KV blocks kept for reuse.");
    for (entry, stats) in engines {
        let labels = [("model", entry.canonical_id()), ("kind", "block")];
        page.sample("fathom_kv_blocks_cached", &labels, stats.kv.blocks_cached);
    }
    cache::render(page, engines);
    drafts::render(page, engines);
    failures::render(page, engines);
    type OfStep = fn(&EngineStats) -> &Histogram;
    let batches: [(&str, &str, OfStep, OfStep); 2] = [
        (
            "fathom_batch_tokens",
            "Tokens per step.",
            |stats| &stats.prefill_tokens,
            |stats| &stats.decode_tokens,
        ),
        (
            "fathom_batch_requests",
            "Sequences per step.",
            |stats| &stats.prefill_requests,
            |stats| &stats.decode_requests,
        ),
    ];
    for (name, help, prefill, decode) in batches {
        page.family(name, "histogram", help);
        for (entry, stats) in engines {
            let model = entry.canonical_id();
            page.histogram(name, &[("model", model), ("phase", "prefill")], prefill(stats));
            page.histogram(name, &[("model", model), ("phase", "decode")], decode(stats));
        }
    }
    page.family("fathom_build_info", "gauge", "What is running; always 1.");
    for (entry, _) in engines {
        let labels = [
            ("version", env!("CARGO_PKG_VERSION")),
            ("weights", entry.build.weights.as_str()),
            ("dtype", entry.build.dtype.as_str()),
            ("parallel", entry.build.parallel.as_str()),
        ];
        page.sample("fathom_build_info", &labels, 1);
    }
}

fn render_requests(page: &mut Page, counters: &Counters, entries: &[Arc<ModelEntry>]) {
    page.family("fathom_requests_total", "counter", "Finished requests.");
    for ((model, endpoint, status), count) in &counters.requests {
        let status = status.to_string();
        let labels = [("model", model.as_str()), ("endpoint", endpoint), ("status", &status)];
        page.sample("fathom_requests_total", &labels, *count);
    }
    // Loaded models show their zeros, so that a dashboard has its series from the start.
    let nothing = ModelCounters::default();
    let models: Vec<(&str, &ModelCounters)> = entries
        .iter()
        .map(|entry| entry.canonical_id())
        .map(|id| (id, counters.models.get(id).unwrap_or(&nothing)))
        .collect();
    page.family("fathom_requests_cancelled_total", "counter", "Requests whose client went away.");
    for (model, counters) in &models {
        for (phase, count) in ["queued", "prefill", "decode"].iter().zip(counters.cancelled) {
            let labels = [("model", *model), ("phase", phase)];
            page.sample("fathom_requests_cancelled_total", &labels, count);
        }
    }
    type Count = fn(&ModelCounters) -> u64;
    let counts: [(&str, &str, Count); 6] = [
        (
            "fathom_answers_thought_only_total",
            "Answers that ended after their reasoning, with nothing said.",
            |of| of.thought_only,
        ),
        ("fathom_answers_looping_total", "Answers that repeated themselves.", |of| of.looping),
        ("fathom_prompt_tokens_total", "Prompt tokens.", |of| of.prompt_tokens),
        ("fathom_cached_prompt_tokens_total", "Prompt tokens not computed again.", |of| {
            of.cached_tokens
        }),
        ("fathom_completion_tokens_total", "Tokens sampled.", |of| of.completion_tokens),
        ("fathom_reasoning_tokens_total", "Tokens sampled before the answer.", |of| {
            of.reasoning_tokens
        }),
    ];
    for (name, help, of) in counts {
        page.family(name, "counter", help);
        for (model, counters) in &models {
            page.sample(name, &[("model", model)], of(counters));
        }
    }
    type Times = fn(&ModelCounters) -> &Histogram;
    let times: [(&str, &str, Times); 5] = [
        ("fathom_time_to_first_token_seconds", "Submission to first token.", |of| {
            &of.time_to_first_token
        }),
        ("fathom_inter_token_seconds", "Between two tokens of a choice.", |of| &of.inter_token),
        ("fathom_request_seconds", "Whole requests.", |of| &of.request),
        ("fathom_queue_seconds", "Submission to first step.", |of| &of.queue),
        ("fathom_prefill_seconds", "First step to first token.", |of| &of.prefill),
    ];
    for (name, help, of) in times {
        page.family(name, "histogram", help);
        for (model, counters) in &models {
            page.histogram(name, &[("model", model)], of(counters));
        }
    }
}

/// A page of the text format.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels = written(labels, None);
        self.line(format_args!("{name}{labels} {value}"));
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        for (bound, count) in histogram.cumulative() {
            let labels = written(labels, Some(&bound.to_string()));
            self.line(format_args!("{name}_bucket{labels} {count}"));
        }
        let all = written(labels, Some("+Inf"));
        self.line(format_args!("{name}_bucket{all} {}", histogram.count()));
        let labels = written(labels, None);
        self.line(format_args!("{name}_sum{labels} {}", histogram.sum()));
        self.line(format_args!("{name}_count{labels} {}", histogram.count()));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        self.text.write_fmt(line).expect("a String takes all writes");
        self.text.push('\n');
    }
}

/// `{a="b",le="c"}`, with quotes, backslashes and line ends escaped; nothing without labels.
fn written(labels: &[(&str, &str)], le: Option<&str>) -> String {
    let escape =
        |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<String> = labels
        .iter()
        .copied()
        .chain(le.map(|bound| ("le", bound)))
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_histograms_are_cumulative() {
        let mut page = Page::default();
        let mut histogram = Histogram::new(&[0.5, 1.0]);
        for value in [0.25, 0.75, 3.0] {
            histogram.observe(value);
        }
        page.histogram("t", &[("model", "a\"\\\n")], &histogram);
        let expected = "t_bucket{model=\"a\\\"\\\\\\n\",le=\"0.5\"} 1\n\
                        t_bucket{model=\"a\\\"\\\\\\n\",le=\"1\"} 2\n\
                        t_bucket{model=\"a\\\"\\\\\\n\",le=\"+Inf\"} 3\n\
                        t_sum{model=\"a\\\"\\\\\\n\"} 4\n\
                        t_count{model=\"a\\\"\\\\\\n\"} 3\n";
        assert_eq!(page.text, expected);
    }
}
