//! OpenTelemetry: what a collector receives, read by a decoder that knows nothing but protobuf.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::thread::JoinHandle;
use std::time::Duration;

use fathom_server::ServerConfig;
use serde_json::json;

use crate::client::exchange;
use crate::rig::{Rig, saying};

/// A field of a message: its number and what it holds.
#[derive(Debug, Clone)]
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let (byte, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

/// The fields of a message.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let mut take = |n: usize| {
            let (taken, rest) = bytes.split_at(n);
            bytes = rest;
            taken.to_vec()
        };
        let field = match tag & 7 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(take(8).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes);
                let (taken, rest) = bytes.split_at(length as usize);
                bytes = rest;
                Field::Bytes(taken.to_vec())
            }
            5 => Field::Number(u32::from_le_bytes(take(4).try_into().unwrap()).into()),
            wire => panic!("wire type {wire}"),
        };
        fields.push((tag >> 3, field));
    }
    fields
}

/// All messages under a field number.
fn messages(bytes: &[u8], number: u64) -> Vec<Vec<u8>> {
    let fields = fields(bytes).into_iter().filter(|(found, _)| *found == number);
    let bytes = fields.filter_map(|(_, field)| match field {
        Field::Bytes(bytes) => Some(bytes),
        Field::Number(_) => None,
    });
    bytes.collect()
}

fn number(bytes: &[u8], number: u64) -> Option<u64> {
    fields(bytes).into_iter().find_map(|(found, field)| match field {
        Field::Number(value) if found == number => Some(value),
        _ => None,
    })
}

/// The attributes under a field number, their values as text.
fn attributes(bytes: &[u8], field: u64) -> Vec<(String, String)> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let pair = |pair: Vec<u8>| {
        let value = messages(&pair, 2).remove(0);
        let shown = match (messages(&value, 1).pop(), number(&value, 3)) {
            (Some(bytes), _) => text(bytes),
            (None, Some(integer)) => integer.to_string(),
            (None, None) => {
                let items = messages(&messages(&value, 5)[0], 1);
                items.iter().map(|item| text(messages(item, 1).remove(0))).collect()
            }
        };
        (text(messages(&pair, 1).remove(0)), shown)
    };
    messages(bytes, field).into_iter().map(pair).collect()
}

/// A collector of one batch: where it listens, and what it was sent.
fn collector() -> (String, JoinHandle<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        // A batch that never comes fails the test instead of holding it up.
        listener.set_nonblocking(true).unwrap();
        let accepted = (0..6000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            listener.accept().ok()
        });
        let (mut stream, _) = accepted.expect("a batch within a minute");
        stream.set_nonblocking(false).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            reader.read_line(&mut head).unwrap();
        }
        let length = head.to_lowercase();
        let length = length.split("content-length: ").nth(1).unwrap().split("\r\n").next().unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        reader.read_exact(&mut body).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
        (head, body)
    });
    (url, thread)
}

fn traced(url: &str) -> impl FnOnce(&mut ServerConfig) {
    move |config| {
        config.telemetry.otlp_endpoint = Some(url.to_owned());
        config.telemetry.service_name = "tested".to_owned();
    }
}

#[test]
fn a_request_becomes_a_span_with_its_phases_and_no_text() {
    let (url, received) = collector();
    let rig = Rig::configured(traced(&url));
    let body = saying("secretive words", &json!({})).to_string();
    let length = body.len();
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nx-request-id: traced-one\r\n\
         traceparent: 00-{trace}-{parent}-01\r\ncontent-length: {length}"
    );
    let usage = exchange(rig.address, &head, body.as_bytes()).json()["usage"].clone();
    // Neither a look at the server's health nor a trace that its sender does not sample is told.
    assert_eq!(rig.get("/health").status, 200);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\n\
         traceparent: 00-{trace}-{parent}-00\r\ncontent-length: {length}"
    );
    assert_eq!(exchange(rig.address, &head, body.as_bytes()).status, 200);
    // What waits is sent before the server ends.
    drop(rig);

    let (head, body) = received.join().unwrap();
    assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
    assert!(head.to_lowercase().contains("content-type: application/x-protobuf"), "{head}");
    assert!(!String::from_utf8_lossy(&body).contains("secretive"));
    let resource_spans = messages(&body, 1).remove(0);
    let resource = attributes(&messages(&resource_spans, 1)[0], 1);
    assert!(resource.contains(&("service.name".to_owned(), "tested".to_owned())), "{resource:?}");
    let spans = messages(&messages(&resource_spans, 2)[0], 2);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let name = |span: &Vec<u8>| String::from_utf8(messages(span, 5).remove(0)).unwrap();
    let names: Vec<String> = spans.iter().map(name).collect();
    assert_eq!(names, ["POST /v1/chat/completions", "queue", "prefill", "decode"]);
    let root = &spans[0];
    assert_eq!((hex(&messages(root, 4)[0]), number(root, 6)), (parent.to_owned(), Some(2)));
    for span in &spans {
        assert_eq!(hex(&messages(span, 1)[0]), trace);
        assert!(number(span, 7).unwrap() <= number(span, 8).unwrap());
    }
    for phase in &spans[1..] {
        assert_eq!(messages(phase, 4), messages(root, 2), "phases are parts of the request");
        assert!(number(root, 7) <= number(phase, 7) && number(phase, 8) <= number(root, 8));
    }
    assert_eq!(number(&spans[1], 8), number(&spans[2], 7), "prefill begins when the queue ends");
    let said = attributes(root, 9);
    for (name, value) in [
        ("http.route", "/v1/chat/completions".to_owned()),
        ("http.response.status_code", "200".to_owned()),
        ("fathom.request_id", "traced-one".to_owned()),
        ("gen_ai.request.model", "deepseek-v4-flash".to_owned()),
        ("gen_ai.usage.input_tokens", usage["prompt_tokens"].to_string()),
        ("gen_ai.usage.output_tokens", usage["completion_tokens"].to_string()),
        ("gen_ai.response.finish_reasons", "stop".to_owned()),
    ] {
        assert!(said.contains(&(name.to_owned(), value.clone())), "{name} = {value} in {said:?}");
    }
}

#[test]
fn a_failed_request_is_marked_and_a_new_trace_is_begun_for_it() {
    let (url, received) = collector();
    let rig = Rig::configured(traced(&url));
    assert_eq!(rig.say("NAN", &json!({})).status, 500);
    drop(rig);
    let (_, body) = received.join().unwrap();
    let spans = messages(&messages(&messages(&body, 1)[0], 2)[0], 2);
    let root = &spans[0];
    assert!(messages(root, 4).is_empty(), "nobody sent the request but its client");
    assert_eq!((messages(root, 1)[0].len(), messages(root, 2)[0].len()), (16, 8));
    assert_eq!(number(&messages(root, 15)[0], 3), Some(2));
}

#[test]
fn a_collector_that_is_gone_disturbs_nobody() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let rig = Rig::configured(traced(&format!("http://{free}/v1/traces")));
    assert_eq!(rig.say("Hi", &json!({})).status, 200);
    drop(rig);
}
