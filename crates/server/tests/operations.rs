//! What operators ask: models, health, metrics, version, ids.

use async_openai::types::chat::CreateChatCompletionResponse;
use insta::assert_snapshot;
use serde_json::json;

use crate::client::exchange;
use crate::rig::{Options, Rig, saying};

#[test]
fn the_model_list_shows_canonical_ids_and_each_name_can_be_asked_for() {
    let rig =
        Rig::with(Options { ids: vec!["deepseek-v4-flash", "tiny/one"], ..Options::default() });
    for path in ["/v1/models", "/models", "/beta/models", "/anthropic/v1/models", "/v1/models/"] {
        let list = rig.get(path).json();
        assert_eq!(list["data"].as_array().unwrap().len(), 1, "{path}");
        assert_eq!(list["first_id"], "deepseek-v4-flash");
    }
    assert_snapshot!(rig.get("/v1/models").body, @r#"{"object":"list","data":[{"id":"deepseek-v4-flash","object":"model","created":1735000000,"owned_by":"deepseek-ai","type":"model","display_name":"deepseek-v4-flash","created_at":"2024-12-24T00:26:40Z","lifecycle":"active","max_model_len":4096,"max_output_tokens":4096,"max_input_tokens":4096,"max_tokens":4096}],"has_more":false,"first_id":"deepseek-v4-flash","last_id":"deepseek-v4-flash"}"#);
    for id in ["tiny/one", "tiny%2Fone", "deepseek-chat", "deepseek-ai/DeepSeek-V4-Flash"] {
        let model = rig.get(&format!("/v1/models/{id}")).json();
        assert_eq!(model["id"], id.replace("%2F", "/"));
    }
}

#[test]
fn aliases_are_listed_if_the_server_is_told_so() {
    let rig = Rig::configured(|config| {
        config.models.list_aliases = true;
        config.models.aliases.insert("mine".into(), "deepseek-v4-flash".into());
        config.models.aliases.insert("broken".into(), "nowhere".into());
    });
    let list = rig.get("/v1/models").json();
    let ids: Vec<&str> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap())
        .collect();
    assert_eq!(
        ids,
        [
            "deepseek-v4-flash",
            "mine",
            "deepseek/deepseek-v4-flash",
            "deepseek-ai/deepseek-v4-flash",
            "deepseek-ai/DeepSeek-V4-Flash",
            "deepseek-chat",
            "deepseek-reasoner"
        ]
    );
}

#[test]
fn a_head_request_gets_the_head_of_the_answer() {
    let rig = Rig::start();
    let response = exchange(rig.address, "HEAD /health HTTP/1.1", b"");
    assert_eq!((response.status, response.body.as_str()), (200, ""));
    assert_eq!(response.header("content-length"), Some("15"));
}

#[test]
fn a_failed_model_fails_health() {
    let rig = Rig::with(Options { loaded: false, ..Options::default() });
    rig.registry.set_progress(0.25);
    assert_eq!(rig.get("/ready").json(), json!({"status": "loading", "progress": 0.25}));
    rig.registry.fail("shard 3 is truncated");
    assert_eq!(rig.get("/health").status, 503);
    assert!(rig.get("/health").body.contains("shard 3 is truncated"));
    assert_eq!(rig.get("/ready").json()["status"], "error");
    let refused = rig.say("Hi", &json!({}));
    assert_eq!(refused.status, 500);
    assert!(!refused.body.contains("shard"));
}

#[test]
fn a_step_that_takes_too_long_fails_health_until_it_ends() {
    let rig = Rig::configured(|config| config.server.watchdog_s = 1);
    std::thread::scope(|scope| {
        let answered = scope.spawn(|| rig.say("PAUSE", &json!({})).status);
        while rig.get("/health").status == 200 {
            assert!(!answered.is_finished(), "the answer came before the watchdog barked");
        }
        assert_eq!(answered.join().unwrap(), 200);
    });
    assert_eq!(rig.get("/health").status, 200);
}

#[test]
fn a_clients_request_id_is_adopted_if_it_is_one() {
    let rig = Rig::start();
    let id = |sent: &str| {
        let head = format!("GET /health HTTP/1.1\r\nx-request-id: {sent}");
        let response = exchange(rig.address, &head, b"");
        assert_eq!(response.header("request-id"), response.header("x-request-id"));
        response.header("x-request-id").unwrap().to_owned()
    };
    assert_eq!(id("abc_DEF-123"), "abc_DEF-123");
    for refused in ["has space", &"x".repeat(129), "ünicode"] {
        let drawn = id(refused);
        assert!(drawn.len() == 32 && drawn.bytes().all(|b| b.is_ascii_hexdigit()), "{drawn}");
    }
    assert_ne!(id("?"), id("?"));
}

#[test]
fn metrics_count_requests_and_tokens_under_bounded_labels() {
    let rig = Rig::start();
    let said = rig.chat(&saying("hm</think>yes", &json!({"thinking": null})));
    let typed: CreateChatCompletionResponse = serde_json::from_str(&said.body).unwrap();
    let usage = typed.usage.unwrap();
    rig.say("Hi", &json!({"temperature": 9}));
    rig.say("Hi", &json!({"model": "made-up"}));
    rig.get("/made/up");
    rig.wait_until_idle();
    let model = "{model=\"deepseek-v4-flash\"}";
    let count = |name: &str| rig.metric(&format!("{name}{model}"));
    assert_eq!(count("fathom_prompt_tokens_total"), f64::from(usage.prompt_tokens));
    assert_eq!(count("fathom_completion_tokens_total"), f64::from(usage.completion_tokens));
    let reasoning = usage.completion_tokens_details.unwrap().reasoning_tokens.unwrap();
    assert_eq!(count("fathom_reasoning_tokens_total"), f64::from(reasoning));
    assert_eq!(count("fathom_time_to_first_token_seconds_count"), 1.0);
    assert_eq!(count("fathom_request_seconds_count"), 1.0);
    let page = rig.get("/metrics").body;
    for line in [
        "fathom_requests_total{model=\"deepseek-v4-flash\",endpoint=\"/v1/chat/completions\",status=\"200\"} 1",
        "fathom_requests_total{model=\"deepseek-v4-flash\",endpoint=\"/v1/chat/completions\",status=\"400\"} 1",
        "fathom_requests_total{model=\"other\",endpoint=\"/v1/chat/completions\",status=\"404\"} 1",
        "fathom_requests_total{model=\"other\",endpoint=\"other\",status=\"404\"} 1",
        "fathom_build_info{version=\"0.1.0\",weights=\"scripted\",dtype=\"none\",parallel=\"tp1ep1\"} 1",
        "fathom_requests_in_flight 0",
    ] {
        assert!(page.lines().any(|known| known == line), "{line} in\n{page}");
    }
    assert!(!page.contains("made"));
}

#[test]
fn every_metric_of_the_contract_is_there_and_typed() {
    let page = Rig::start().get("/metrics");
    assert!(page.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    let mut families: Vec<&str> =
        page.body.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    families.sort_unstable();
    assert_snapshot!(families.join("\n"), @r#"
fathom_answers_looping_total counter
fathom_answers_thought_only_total counter
fathom_batch_requests histogram
fathom_batch_tokens histogram
fathom_build_info gauge
fathom_cache_disk_damaged_total counter
fathom_cache_disk_dropped_total counter
fathom_cache_disk_read_bytes_total counter
fathom_cache_disk_write_errors_total counter
fathom_cache_disk_written_bytes_total counter
fathom_cache_loads_total counter
fathom_cache_tier_bytes gauge
fathom_cache_tier_hits_total counter
fathom_cache_tier_items gauge
fathom_cache_tier_misses_total counter
fathom_cached_prompt_tokens_total counter
fathom_completion_tokens_total counter
fathom_failed_generations_total counter
fathom_failed_steps_total counter
fathom_inter_token_seconds histogram
fathom_kv_blocks_cached gauge
fathom_kv_blocks_total gauge
fathom_kv_blocks_used gauge
fathom_preemptions_total counter
fathom_prefill_seconds histogram
fathom_prefix_cache_lookups_total counter
fathom_prompt_tokens_total counter
fathom_queue_seconds histogram
fathom_reasoning_tokens_total counter
fathom_request_seconds histogram
fathom_requests_cancelled_total counter
fathom_requests_in_flight gauge
fathom_requests_running gauge
fathom_requests_total counter
fathom_requests_waiting gauge
fathom_spec_decode_accepted_tokens_total counter
fathom_spec_decode_draft_tokens_total counter
fathom_spec_decode_drafts_total counter
fathom_time_to_first_token_seconds histogram
"#);
}

#[test]
fn autoscalers_of_vllm_find_their_series_if_the_server_is_told_so() {
    let of_vllm = |page: &str| -> Vec<String> {
        page.lines().filter(|line| line.starts_with("vllm:")).map(str::to_owned).collect()
    };
    assert_eq!(of_vllm(&Rig::start().get("/metrics").body), Vec::<String>::new());
    let rig = Rig::configured(|config| config.metrics.vllm_names = true);
    // The engine tells its totals with its first step.
    rig.say("Hi", &json!({}));
    rig.wait_until_idle();
    let label = "model_name=\"deepseek-v4-flash\"";
    let expected = [
        format!("vllm:num_requests_running{{{label}}} 0"),
        format!("vllm:num_requests_waiting{{{label}}} 0"),
        format!("vllm:kv_cache_usage_perc{{{label}}} 0"),
        format!("vllm:gpu_cache_usage_perc{{{label}}} 0"),
        format!("vllm:cache_config_info{{{label},block_size=\"256\",num_gpu_blocks=\"512\"}} 1"),
    ];
    assert_eq!(of_vllm(&rig.get("/metrics").body), expected);
}

#[test]
fn the_dashboard_shows_only_metrics_that_there_are() {
    let page = Rig::start().get("/metrics").body;
    let families: Vec<&str> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let dashboard = include_str!("../../../scripts/grafana/fathom.json");
    serde_json::from_str::<serde_json::Value>(dashboard).unwrap();
    let is_part = |c: char| c.is_ascii_lowercase() || c == '_';
    let names: Vec<&str> = dashboard
        .match_indices("fathom_")
        .map(|(at, _)| {
            let rest = &dashboard[at..];
            &rest[..rest.find(|c: char| !is_part(c)).unwrap_or(rest.len())]
        })
        .collect();
    assert!(names.len() > 30);
    for name in names {
        let suffixes = ["_bucket", "_sum", "_count"];
        let family = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
        assert!(families.contains(&family), "{name}");
    }
}

#[test]
fn the_api_describes_itself() {
    let response = Rig::start().get("/openapi.json");
    assert_eq!(response.header("content-type"), Some("application/json"));
    let document = response.json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    assert!(document["paths"]["/v1/chat/completions"]["post"].is_object());
}

#[test]
fn the_version_is_a_version() {
    let version = Rig::start().get("/version").json();
    assert_eq!(version["version"].as_str().unwrap().split('.').count(), 3);
}
