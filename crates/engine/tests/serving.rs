//! What a healthy engine answers.

use fathom_core::{FinishReason, SamplingParams, Usage};
use fathom_engine::scripted::Reply;
use fathom_engine::{
    EngineConfig, EngineState, GenerateRequest, ScriptedRunner, SubmitError, TokenEvent,
};

use crate::support::{
    EOS, Ending, VOCABULARY, capacity, config, gated, greedy, hashed, hashed_answer, prompt, read,
    start,
};

#[test]
fn a_request_gets_its_tokens_and_one_final_event_with_exact_usage() {
    let engine = hashed();
    let (tokens, ending) = read(engine.submit(greedy(prompt(1, 300), 40)).unwrap());
    assert_eq!(tokens, hashed_answer(&prompt(1, 300), 40));
    let usage = Usage { prompt_tokens: 300, cached_tokens: 0, completion_tokens: 40 };
    assert_eq!(ending, Ending::Finished(FinishReason::Length, usage));
}

#[test]
fn requests_served_together_get_what_they_get_alone() {
    let engine = hashed();
    let streams: Vec<_> = (0..30)
        .map(|family| engine.submit(greedy(prompt(family, 20 + 40 * family), 30)).unwrap())
        .collect();
    for (family, stream) in (0..).zip(streams) {
        let (tokens, _) = read(stream);
        assert_eq!(tokens, hashed_answer(&prompt(family, 20 + 40 * family), 30));
    }
    let stats = engine.stats();
    assert_eq!((stats.requests_accepted, stats.ended.length), (30, 30));
    assert_eq!(stats.completion_tokens, 900);
    assert_eq!((stats.requests_running, stats.requests_waiting, stats.kv.blocks_used), (0, 0, 0));
    assert_eq!(stats.decode_tokens.sum() as u64, 30 * 29);
    assert_eq!(stats.prefill_tokens.sum() as u64, stats.prompt_tokens - stats.cached_prompt_tokens);
}

#[test]
fn an_identical_prompt_is_answered_from_the_cache() {
    let engine = hashed();
    let ask = || read(engine.submit(greedy(prompt(1, 600), 5)).unwrap());
    let (first, _) = ask();
    let (second, ending) = ask();
    assert_eq!(first, second);
    let Ending::Finished(_, usage) = ending else { panic!("{ending:?}") };
    assert_eq!(usage.cached_tokens, 512);
    let stats = engine.stats();
    assert_eq!((stats.cached_prompt_tokens, stats.cache.hits), (512, 1));
}

/// An engine that counts up from the prompt's last token.
fn counting() -> fathom_engine::EngineHandle {
    start(ScriptedRunner::new(capacity(), |tokens| {
        Reply::Token((tokens[tokens.len() - 1] + 1) % VOCABULARY)
    }))
}

#[test]
fn the_end_of_sequence_token_ends_the_answer_and_counts() {
    let engine = counting();
    let request = || GenerateRequest::new(vec![VOCABULARY - 2], SamplingParams::greedy(10));
    let (tokens, ending) = read(engine.submit(request()).unwrap());
    assert_eq!(tokens, [VOCABULARY - 1, 0, EOS]);
    let usage = Usage { prompt_tokens: 1, cached_tokens: 0, completion_tokens: 3 };
    assert_eq!(ending, Ending::Finished(FinishReason::Eos, usage));

    let mut ignoring = request();
    ignoring.sampling.ignore_eos = true;
    ignoring.sampling.stop_token_ids = vec![4];
    let (tokens, ending) = read(engine.submit(ignoring).unwrap());
    assert_eq!(tokens, [VOCABULARY - 1, 0, 1, 2, 3, 4]);
    assert!(matches!(ending, Ending::Finished(FinishReason::StopToken(4), _)));
}

#[test]
fn nothing_ends_an_answer_before_its_minimum_but_its_maximum() {
    let engine = counting();
    let mut request = GenerateRequest::new(vec![0], SamplingParams::greedy(5));
    request.sampling.min_tokens = 2;
    let (tokens, ending) = read(engine.submit(request).unwrap());
    // The scripted token is forbidden once, all others are equal: the lowest id wins.
    assert_eq!(tokens[0], 0);
    assert!(matches!(ending, Ending::Finished(_, usage) if usage.completion_tokens >= 2));
}

#[test]
fn logprobs_come_with_every_token_if_asked_for() {
    let engine = counting();
    let mut request = greedy(vec![5], 3);
    request.sampling.logprobs = Some(2);
    let mut stream = engine.submit(request).unwrap();
    for expected in [6, 7, 8] {
        let Some(TokenEvent::Token { id, logprob: Some(logprob) }) = stream.blocking_recv() else {
            panic!("a token with log-probabilities")
        };
        assert_eq!((id, logprob.top[0].0, logprob.top[1].0), (expected, expected, 0));
        assert_eq!(logprob.top.len(), 2);
        assert!(logprob.logprob <= 0.0 && logprob.logprob > -1e-6);
    }
}

#[test]
fn times_are_in_order() {
    let (engine, gate) = gated(config());
    let mut stream = engine.submit(greedy(prompt(1, 3), 1)).unwrap();
    gate.wait();
    let times = stream.times();
    assert!(times.started.unwrap() >= times.submitted && times.first_token.is_none());
    gate.open();
    while stream.blocking_recv().is_some() {}
    let times = stream.times();
    assert!(times.first_token.unwrap() >= times.started.unwrap());
    assert!(times.finished.unwrap() >= times.first_token.unwrap());
}

#[test]
fn what_cannot_be_served_is_refused_at_once_and_says_why() {
    let engine = hashed();
    let refused = |request| engine.submit(request).unwrap_err().to_string();
    assert_eq!(refused(greedy(vec![], 5)), "the prompt is empty: at least one token is needed");
    assert_eq!(
        refused(greedy(vec![0; 4096], 5)),
        "the prompt has 4096 tokens, but prompt and answer share 4096"
    );
    assert_eq!(
        refused(greedy(vec![3, 97], 5)),
        "the prompt names token 97, but the vocabulary has 97"
    );
    let mut biased = greedy(vec![3], 5);
    biased.sampling.logit_bias = vec![(200, 1.0)];
    assert_eq!(refused(biased), "logit_bias names token 200, but the vocabulary has 97");
    assert_eq!(
        refused(greedy(vec![3], 0)),
        "max_tokens is 0: at least one token must be generated"
    );
}

#[test]
fn the_queue_is_limited_and_counts_only_requests_that_were_not_started() {
    let config = EngineConfig { max_num_seqs: 1, queue_len: 2, ..config() };
    let (engine, gate) = gated(config);
    let running = engine.submit(greedy(prompt(1, 3), 1)).unwrap();
    gate.wait();
    let waiting: Vec<_> = (0..2).map(|_| engine.submit(greedy(prompt(2, 3), 1)).unwrap()).collect();
    let full = engine.submit(greedy(prompt(3, 3), 1)).unwrap_err();
    assert_eq!(full, SubmitError::QueueFull { limit: 2 });
    assert_eq!(engine.stats().requests_waiting, 2);
    drop(gate);
    for stream in waiting.into_iter().chain([running]) {
        assert!(matches!(read(stream).1, Ending::Finished(..)));
    }
    assert_eq!(engine.stats().requests_waiting, 0);
    assert!(engine.submit(greedy(prompt(3, 3), 1)).is_ok());
}

#[test]
fn limits_are_those_of_the_runner_where_they_are_tighter() {
    let engine = hashed();
    let limits = engine.limits();
    assert_eq!((limits.max_num_seqs, limits.max_model_len, limits.vocab_size), (8, 4096, 97));
    assert_eq!(limits.kv_tokens, 64 * 256);
}

#[tokio::test]
async fn an_engine_is_ready_after_its_warm_up_and_idle_without_work() {
    let engine = hashed();
    assert_eq!(engine.started().await, EngineState::Ready);
    assert_eq!(engine.health().stalled_for, None);
}

#[test]
fn a_stalled_step_shows_in_the_health() {
    let (engine, gate) = gated(config());
    let stream = engine.submit(greedy(prompt(1, 3), 1)).unwrap();
    gate.wait();
    assert!(engine.health().stalled_for.is_some());
    drop(gate);
    read(stream);
}
