//! Graceful shutdown: what runs may end, what comes is refused, what lasts too long is cut.

use std::io::{Read, Write};

use serde_json::json;

use crate::client::{connect, read_response};
use crate::rig::{Options, Rig, saying};

fn open(rig: &Rig, text: &str, max_tokens: u32) -> std::net::TcpStream {
    let body = saying(text, &json!({"stream": true, "max_tokens": max_tokens})).to_string();
    let length = body.len();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {length}\r\n\r\n"
    );
    let mut connection = connect(rig.address);
    connection.write_all((head + &body).as_bytes()).unwrap();
    connection
}

#[test]
fn running_requests_end_and_new_ones_are_refused() {
    let mut rig = Rig::start();
    let mut running = open(&rig, "SLOWLY", 60);
    while rig.metric("fathom_requests_running") < 1.0 {}
    rig.begin_stop();
    while rig.get("/ready").status != 503 {}
    assert_eq!(rig.get("/ready").json()["status"], "draining");
    let refused = rig.say("Hi", &json!({}));
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("shutting_down")));
    let response = read_response(&mut running);
    assert!(response.complete && response.events().last() == Some(&"[DONE]"), "{}", response.body);
    rig.join();
    assert!(std::net::TcpStream::connect(rig.address).is_err());
}

#[test]
fn what_outlasts_the_drain_ends_with_an_error_event() {
    let mut options = Options { max_model_len: 120_000, ..Options::default() };
    options.config.server.drain_s = 0;
    let mut rig = Rig::with(options);
    let mut running = open(&rig, "FOREVER", 100_000);
    running.read_exact(&mut [0; 2000]).unwrap();
    rig.begin_stop();
    let mut rest = Vec::new();
    running.read_to_end(&mut rest).unwrap();
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.contains("\"code\":\"shutting_down\"") && !rest.contains("[DONE]"));
    rig.join();
}

#[test]
fn an_idle_connection_does_not_hold_up_the_end() {
    let mut rig = Rig::start();
    let mut idle = connect(rig.address);
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n").unwrap();
    idle.read_exact(&mut [0; 12]).unwrap();
    let began = std::time::Instant::now();
    rig.begin_stop();
    rig.join();
    assert!(began.elapsed().as_secs() < 2);
}

#[test]
fn a_cut_generation_can_end_with_the_hosted_finish_reason() {
    let mut options = Options { max_model_len: 120_000, ..Options::default() };
    options.config.server.drain_s = 0;
    options.config.compat.insufficient_resource = true;
    let mut rig = Rig::with(options);
    let mut running = open(&rig, "FOREVER", 100_000);
    running.read_exact(&mut [0; 2000]).unwrap();
    rig.begin_stop();
    let mut rest = Vec::new();
    running.read_to_end(&mut rest).unwrap();
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.contains("\"finish_reason\":\"insufficient_system_resource\""));
    assert!(rest.contains("data: [DONE]\n\n"));
    rig.join();
}
