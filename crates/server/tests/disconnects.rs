//! Clients that leave, and clients that do not read.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::connect;
use crate::rig::{Options, Rig, saying};

/// Sends a request that would be answered for a long time.
fn open(rig: &Rig, stream: bool) -> TcpStream {
    open_as(rig, "deepseek-v4-flash", stream)
}

fn open_as(rig: &Rig, model: &str, stream: bool) -> TcpStream {
    let change = json!({"model": model, "stream": stream, "max_tokens": 100_000});
    let body = saying("FOREVER", &change).to_string();
    let length = body.len();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {length}\r\n\r\n"
    );
    let mut connection = connect(rig.address);
    connection.write_all((head + &body).as_bytes()).unwrap();
    connection
}

fn long() -> Rig {
    Rig::with(Options { max_model_len: 120_000, ..Options::default() })
}

fn cancelled(rig: &Rig, phase: &str) -> f64 {
    let labels = format!("{{model=\"deepseek-v4-flash\",phase=\"{phase}\"}}");
    rig.metric(&format!("fathom_requests_cancelled_total{labels}"))
}

#[test]
fn a_stream_whose_reader_leaves_is_cancelled() {
    let rig = long();
    let mut reader = open(&rig, true);
    reader.read_exact(&mut [0; 2000]).unwrap();
    let left = Instant::now();
    drop(reader);
    rig.wait_until_idle();
    assert!(left.elapsed() < Duration::from_secs(1));
    assert_eq!(cancelled(&rig, "decode"), 1.0);
    assert_eq!(rig.engine.stats().kv.blocks_used, 0);
}

#[test]
fn a_whole_answer_that_nobody_waits_for_is_cancelled() {
    let rig = long();
    let waiting = open(&rig, false);
    while rig.metric("fathom_requests_running") < 1.0 {}
    drop(waiting);
    rig.wait_until_idle();
    let labels = "{model=\"deepseek-v4-flash\",endpoint=\"/v1/chat/completions\",status=\"499\"}";
    assert_eq!(rig.metric(&format!("fathom_requests_total{labels}")), 1.0);
}

#[test]
fn a_request_that_still_waits_is_cancelled_in_the_queue() {
    let rig = Rig::with(Options { max_model_len: 120_000, max_num_seqs: 1, ..Options::default() });
    let running = open(&rig, true);
    while rig.metric("fathom_requests_running") < 1.0 {}
    let mut waiting = open(&rig, true);
    waiting.read_exact(&mut [0; 12]).unwrap();
    assert_eq!(rig.metric("fathom_requests_waiting"), 1.0);
    drop(waiting);
    let began = Instant::now();
    while rig.metric("fathom_requests_waiting") > 0.0 {
        assert!(began.elapsed() < Duration::from_secs(1));
    }
    assert_eq!(cancelled(&rig, "queued"), 1.0);
    assert_eq!(rig.metric("fathom_requests_running"), 1.0);
    drop(running);
    rig.wait_until_idle();
}

#[test]
fn many_clients_leave_in_the_middle_and_the_rest_are_served() {
    let rig = Rig::with(Options { queue_len: 128, ..Options::default() });
    let leavers: Vec<TcpStream> = (0..16).map(|_| open(&rig, true)).collect();
    std::thread::scope(|scope| {
        let stayers: Vec<_> = (0..16)
            .map(|i| {
                let (rig, text) = (&rig, format!("answer number {i}"));
                scope.spawn(move || {
                    let answer = rig.say(&text, &json!({})).json();
                    assert_eq!(answer["choices"][0]["message"]["content"], text);
                })
            })
            .collect();
        drop(leavers);
        stayers.into_iter().for_each(|stayer| stayer.join().unwrap());
    });
    rig.wait_until_idle();
    assert_eq!(rig.get("/health").status, 200);
}

#[test]
fn a_reader_that_takes_nothing_is_given_up() {
    // Every chunk repeats the model's name, so a long one soon fills the sockets' buffers.
    let name = "n".repeat(50_000);
    let mut options = Options { max_model_len: 120_000, ..Options::default() };
    options.config.sse.write_timeout_s = 1;
    options.config.sse.buffer_bytes = 4096;
    options.config.models.aliases.insert(name.clone(), "deepseek-v4-flash".into());
    let rig = Rig::with(options);
    let lazy = open_as(&rig, &name, true);
    while rig.metric("fathom_requests_running") < 1.0 {}
    // Others are not held up meanwhile.
    assert_eq!(rig.say("Hi", &json!({})).status, 200);
    rig.wait_until_idle();
    assert_eq!(cancelled(&rig, "decode"), 1.0);
    drop(lazy);
}
