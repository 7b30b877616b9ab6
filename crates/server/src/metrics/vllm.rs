//! The series that Kubernetes' inference gateway and autoscaling set-ups read from vLLM, under the
//! names and with the meaning that vLLM gives them.
//!
//! The gateway's endpoint picker reads waiting and running requests, the share of KV memory in use
//! and, for its prefix-aware scoring, the size and number of blocks. KEDA and HPA examples scale on
//! the first three; the older of them know the share of memory as `gpu_cache_usage_perc`.

use fathom_engine::EngineStats;

use super::Page;
use crate::registry::ModelEntry;

type Of = fn(&EngineStats) -> f64;

/// Name, help, value.
const GAUGES: [(&str, &str, Of); 4] = [
    ("vllm:num_requests_running", "Requests that run.", |stats| stats.requests_running as f64),
    ("vllm:num_requests_waiting", "Requests that wait to run.", |stats| {
        stats.requests_waiting as f64
    }),
    ("vllm:kv_cache_usage_perc", "KV memory in use; 1 is all of it.", usage),
    ("vllm:gpu_cache_usage_perc", "The same under its older name.", usage),
];

fn usage(stats: &EngineStats) -> f64 {
    stats.kv.blocks_used as f64 / stats.kv.blocks_total.max(1) as f64
}

pub(super) fn render(page: &mut Page, engines: &[(&ModelEntry, EngineStats)]) {
    for (name, help, of) in GAUGES {
        page.family(name, "gauge", help);
        for (entry, stats) in engines {
            page.sample(name, &[("model_name", entry.canonical_id())], of(stats));
        }
    }
    page.family("vllm:cache_config_info", "gauge", "Size and number of KV blocks; always 1.");
    for (entry, stats) in engines {
        let n_blocks = stats.kv.blocks_total;
        // Not told before the first step.
        let Some(block_size) = entry.engine.limits().kv_tokens.checked_div(n_blocks) else {
            continue;
        };
        let labels = [
            ("model_name", entry.canonical_id()),
            ("block_size", &block_size.to_string()),
            ("num_gpu_blocks", &n_blocks.to_string()),
        ];
        page.sample("vllm:cache_config_info", &labels, 1);
    }
}
