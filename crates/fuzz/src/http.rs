//! The whole server over loopback, in front of a model that answers noise.
//!
//! One server per process, started by the first input. Its model is a hash of the tokens so far, so
//! that control tokens come anywhere in an answer; its limits keep every input short.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use fathom_chat::{EffortProfile, Tokenizer};
use fathom_engine::{EngineConfig, EngineHandle, RunnerCapacity, ScriptedRunner};
use fathom_server::config::DefaultMaxTokens;
use fathom_server::{BuildInfo, ModelEntry, Registry, Server, ServerConfig};
use serde_json::Value;

/// Where bodies go; an input's first byte chooses.
const POSTED: [&str; 7] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/responses",
];
/// Longest an answer may take, on a machine that does other things, too.
const PATIENCE: Duration = Duration::from_secs(20);

struct Rig {
    address: SocketAddr,
    engine: EngineHandle,
}

static RIG: LazyLock<Rig> = LazyLock::new(start);

fn start() -> Rig {
    let json = include_bytes!("../../../models/nano/tokenizer.json");
    let tokenizer = Tokenizer::from_json(json).expect("the tokenizer of the tree is whole");
    let capacity = RunnerCapacity {
        n_slots: 16,
        n_blocks: 256,
        n_snapshots: 32,
        vocab_size: u32::try_from(tokenizer.vocab_size()).expect("a vocabulary"),
        max_model_len: 8192,
    };
    let config = EngineConfig {
        eos_token_ids: vec![tokenizer.special().eos()],
        max_num_seqs: 16,
        ..EngineConfig::default()
    };
    let runner = Box::new(ScriptedRunner::hashed(capacity));
    let engine = EngineHandle::start(runner, config).expect("the engine starts");

    let mut config = ServerConfig::default();
    config.server.port = 0;
    config.limits.max_output_tokens = 48;
    config.limits.default_max_tokens = DefaultMaxTokens::Tokens(24);
    config.limits.max_n = 3;
    let registry = Registry::default();
    registry.install(vec![ModelEntry {
        ids: vec!["deepseek-v4-flash".into()],
        tokenizer,
        engine: engine.clone(),
        effort_profile: EffortProfile::Preview,
        fingerprint: "fp_00000000".into(),
        created: 0,
        build: BuildInfo {
            weights: "hash".into(),
            dtype: "none".into(),
            parallel: "tp1ep1".into(),
        },
    }]);
    let (bound, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime starts").block_on(async {
            let server = Server::bind(config, registry).await.expect("loopback has a free port");
            bound.send(server.local_addr()).expect("the input waits for it");
            // Until the process ends.
            server.run(std::future::pending()).await;
        });
    });
    Rig { address: address.recv().expect("the server has started"), engine }
}

thread_local! {
    /// Connections are kept: a new one per input would soon run out of ports.
    static CONNECTION: RefCell<Option<TcpStream>> = const { RefCell::new(None) };
}

/// Any body at any endpoint is answered: well if it is a request, and with an error in its surface's
/// envelope if it is not. Never with a failure of the server, and never with markup.
///
/// # Panics
/// If the answer is none of these.
pub fn request_body(data: &[u8]) {
    let [choice, body @ ..] = data else { return };
    let path = POSTED[usize::from(choice.wrapping_sub(b'0')) % POSTED.len()];
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nhost: f\r\ncontent-length: {length}\r\n\r\n");
    let request = [head.as_bytes(), body].concat();
    let (status, text) = CONNECTION.with_borrow_mut(|kept| {
        let mut connection = kept.take().unwrap_or_else(connect);
        let answer = exchange(&mut connection, &request).or_else(|_| {
            // The server hung up on a connection that was silent for too long.
            connection = connect();
            exchange(&mut connection, &request)
        });
        let (status, closes, text) = answer.expect("every request is answered");
        *kept = (!closes).then_some(connection);
        (status, text)
    });
    if status != 200 {
        assert!(matches!(status, 400 | 404 | 413 | 422), "{path}: {status} {text}");
        let error: Value = serde_json::from_str(&text).expect("errors are JSON");
        let message = error["error"]["message"].as_str().expect("errors have a message");
        assert!(!message.is_empty() && message.len() < 1000, "{message}");
        return;
    }
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    for event in data.filter(|data| *data != "[DONE]") {
        shown(&serde_json::from_str(event).expect("events are JSON"));
    }
    if text.starts_with('{') {
        shown(&serde_json::from_str(&text).expect("answers are JSON"));
    }
}

/// Asserts that none of the texts of an answer shows what belongs to the encoding.
fn shown(answer: &Value) {
    let choices = answer["choices"].as_array().into_iter().flatten();
    let messages = choices.flat_map(|choice| [&choice["message"], &choice["delta"]]);
    let blocks = answer["content"].as_array().into_iter().flatten();
    for part in messages.chain(blocks).chain([&answer["delta"]]) {
        for field in ["content", "reasoning_content", "text", "thinking"] {
            let text = part[field].as_str().unwrap_or_default();
            assert!(!text.contains("｜DSML｜"), "{field} shows a tag: {text}");
        }
    }
}

/// Streams that are read for a while and dropped, at once or one after another, leave nothing
/// running and no KV block in use. Each three bytes are a stream: its kind and how much is read.
///
/// # Panics
/// If something is left.
pub fn stream_disconnects(data: &[u8]) {
    let mut open = Vec::new();
    for group in data.chunks_exact(3).take(24) {
        let [kind, low, high] = [group[0], group[1], group[2]];
        let (path, rest) = match kind & 3 {
            0 => ("/v1/messages", "\"max_tokens\":48,\"thinking\":{\"type\":\"disabled\"}"),
            1 => ("/v1/completions", "\"prompt\":\"Once\",\"max_tokens\":48"),
            2 => ("/v1/chat/completions", "\"n\":2"),
            _ => ("/v1/chat/completions", "\"thinking\":{\"type\":\"disabled\"},\"logprobs\":true"),
        };
        let body = format!(
            "{{\"model\":\"deepseek-v4-flash\",\"stream\":{},\"messages\":[{{\"role\":\"user\",\
             \"content\":\"{}\"}}],{rest}}}",
            kind & 4 == 0,
            "word ".repeat(usize::from(high)),
        );
        let length = body.len();
        let request =
            format!("POST {path} HTTP/1.1\r\nhost: f\r\ncontent-length: {length}\r\n\r\n{body}");
        let sent =
            if kind & 8 == 0 { request.len() } else { request.len() - usize::from(low) % 40 };
        let mut connection = connect();
        connection.write_all(&request.as_bytes()[..sent]).expect("loopback takes it");
        if sent == request.len() && low > 0 {
            let mut buffer = [0; 256];
            // At least the head of the answer comes, however it ends.
            let n = connection.read(&mut buffer[..usize::from(low)]).expect("an answer comes");
            assert!(n > 0, "the server hung up");
        }
        if kind & 16 == 0 {
            open.push(connection);
        }
    }
    drop(open);
    let began = Instant::now();
    loop {
        let stats = RIG.engine.stats();
        if stats.requests_running + stats.requests_waiting + stats.kv.blocks_used == 0 {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "something is left: {stats:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn connect() -> TcpStream {
    let connection = TcpStream::connect(RIG.address).expect("the server listens");
    connection.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    connection.set_nodelay(true).expect("an option can be set");
    connection
}

/// Sends a request and reads its answer: status, whether the connection is over, and the body.
fn exchange(connection: &mut TcpStream, request: &[u8]) -> std::io::Result<(u16, bool, String)> {
    let broken = || std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
    connection.write_all(request)?;
    let mut bytes = Vec::new();
    let mut more = |bytes: &mut Vec<u8>| {
        let mut buffer = [0; 4096];
        let n = connection.read(&mut buffer)?;
        bytes.extend_from_slice(&buffer[..n]);
        if n == 0 { Err(broken()) } else { Ok(()) }
    };
    let split = loop {
        match bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            Some(split) => break split,
            None => more(&mut bytes)?,
        }
    };
    let head = String::from_utf8_lossy(&bytes[..split]).to_lowercase();
    let mut body = bytes.split_off(split + 4);
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    if let Some(length) = length {
        let length: usize = length.parse().expect("a length is a number");
        while body.len() < length {
            more(&mut body)?;
        }
    } else {
        while !body.ends_with(b"0\r\n\r\n") {
            more(&mut body)?;
        }
    }
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    // Chunk sizes stay in between: they stand on lines of their own, which nobody looks at.
    let text = String::from_utf8(body).expect("answers are UTF-8");
    Ok((status.expect("a status line"), head.contains("connection: close"), text))
}
