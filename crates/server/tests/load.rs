//! Load and ill will: crowds that leave, clients that trickle, floods of connections. Loopback only.
//!
//! What holds afterwards: nothing in flight, no KV block in use beyond the cache, memory as before,
//! and everybody who behaved was served. Chance is seeded; time bounds are generous, for they are
//! about being stuck, not about being fast.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::client::connect;
use crate::rig::{Options, Rig, saying};

const CHAT: &str = "/v1/chat/completions";
/// Streams of one wave.
const CROWD: u64 = 1000;
/// What may remain of memory after a wave: buffers of the allocator and of the runtime.
const LEFT_OVER: u64 = 32 << 20;

/// A sequence of numbers without a pattern, the same in every run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (self.0 >> 33) % n
    }
}

/// Room for both ends of every connection of a wave in this process.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let current = limit.maximum.map_or(8192, |most| most.min(8192));
    setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..limit }).unwrap();
}

/// Bytes of memory that this process has in use.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn request(body: &str) -> String {
    let length = body.len();
    format!("POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-length: {length}\r\n\r\n{body}")
}

/// Everybody asks for a stream at once; three of ten leave at some point on the way. Returns how
/// many left.
async fn wave(address: SocketAddr, seed: u64) -> usize {
    let mut clients = JoinSet::new();
    for i in 0..CROWD {
        clients.spawn(visit(address, i, Chance(seed + i)));
    }
    let left = clients.join_all().await;
    left.into_iter().filter(|left| *left).count()
}

/// One client: reads its stream to the end, or leaves early. Returns whether it left.
async fn visit(address: SocketAddr, i: u64, mut chance: Chance) -> bool {
    let text = format!("This is answer number {i}.");
    let body = saying(&text, &json!({"stream": true})).to_string();
    let request = request(&body);
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    if chance.below(10) < 3 {
        // In the middle of the request, right after it, or in the middle of the answer.
        let whole = request.len() as u64;
        let sent = if chance.below(3) == 0 { chance.below(whole) } else { whole };
        stream.write_all(&request.as_bytes()[..sent as usize]).await.unwrap();
        let mut wanted = if chance.below(2) == 0 { 0 } else { chance.below(4000) };
        let mut buffer = [0; 512];
        while wanted > 0 && sent == whole {
            let n = stream.read(&mut buffer).await.unwrap();
            wanted = if n == 0 { 0 } else { wanted.saturating_sub(n as u64) };
        }
        return true;
    }
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !answer.ends_with(b"0\r\n\r\n") {
        let n = stream.read(&mut buffer).await.unwrap();
        assert!(n > 0, "cut off: {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&buffer[..n]);
    }
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("data: [DONE]"));
    false
}

/// Waves until `enough`; what must hold after each, holds.
fn waves(enough: impl Fn(u64) -> bool) {
    raise_file_limit();
    let rig = Rig::with(Options { max_num_seqs: 16, queue_len: 1024, ..Options::default() });
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut settled = None;
    for round in 0.. {
        let n_left = runtime.block_on(wave(rig.address, round * CROWD));
        assert!((200..400).contains(&n_left), "{n_left} of {CROWD} left");
        rig.wait_until_idle();
        assert_eq!(rig.engine.stats().kv.blocks_used, 0);
        assert_eq!(rig.get("/health").status, 200);
        // The first wave fills what is kept: the cache, the allocator's arenas.
        let now = resident();
        let settled = *settled.get_or_insert(now);
        assert!(now < settled + LEFT_OVER, "{} MiB more", (now - settled) >> 20);
        if round > 0 && enough(round) {
            return;
        }
    }
}

#[test]
fn a_thousand_streams_of_which_a_third_is_dropped_leave_nothing_behind() {
    waves(|_| true);
}

#[test]
#[ignore = "a minute of load: run by hand, with --run-ignored only"]
fn a_minute_of_a_thousand_streams_leaves_nothing_behind() {
    let began = Instant::now();
    waves(|_| began.elapsed() >= Duration::from_secs(60));
}

/// Sends `bytes` one by one until the server hangs up or answers; returns what it answered.
fn trickle(address: SocketAddr, first: &str, then: u8) -> Vec<u8> {
    let mut connection = connect(address);
    connection.write_all(first.as_bytes()).unwrap();
    connection.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let began = Instant::now();
    let mut answer = Vec::new();
    loop {
        assert!(began.elapsed() < Duration::from_secs(15), "nobody stops a trickle");
        let mut buffer = [0; 1024];
        match connection.read(&mut buffer) {
            Ok(0) => return answer,
            Ok(n) => answer.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return answer,
        }
        // The other end may be gone already.
        let _ = connection.write_all(&[then]);
    }
}

#[test]
fn heads_and_bodies_that_trickle_in_are_cut_off_and_hold_nothing() {
    let rig = Rig::configured(|config| {
        config.limits.head_s = 1;
        config.limits.body_idle_s = 1;
        config.limits.body_total_s = 1;
    });
    let address = rig.address;
    std::thread::scope(|scope| {
        let head = scope.spawn(move || trickle(address, "POST /v1/chat/completions HT", b'x'));
        let fields = "POST /v1/messages HTTP/1.1\r\nhost: t\r\nx-slow: ";
        let field = scope.spawn(move || trickle(address, fields, b'y'));
        let sized = "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 9999\r\n\r\n";
        let body = scope.spawn(move || trickle(address, sized, b' '));
        let idle = scope.spawn(move || {
            // Served once, kept alive, and silent ever after.
            let mut connection = connect(address);
            connection.write_all(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n").unwrap();
            let mut answer = Vec::new();
            connection.read_to_end(&mut answer).unwrap();
            answer
        });
        assert_eq!(rig.metric("fathom_requests_in_flight"), 0.0);
        assert_eq!(rig.say("Hi", &json!({})).status, 200);
        for slow in [head, field] {
            let answer = slow.join().unwrap();
            assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{answer:?}");
        }
        assert!(body.join().unwrap().starts_with(b"HTTP/1.1 408"));
        assert!(idle.join().unwrap().starts_with(b"HTTP/1.1 200"));
    });
}

#[test]
fn an_http2_client_that_says_nothing_more_is_dropped() {
    let rig = Rig::configured(|config| config.limits.head_s = 1);
    let mut connection = connect(rig.address);
    // The preface, an empty SETTINGS frame, and then silence: not even pings are answered.
    connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut taken = Vec::new();
    connection.read_to_end(&mut taken).expect("the server hangs up before the client does");
}

#[test]
fn floods_and_slow_readers_do_not_hurt_who_behaves() {
    raise_file_limit();
    let mut options = Options { max_num_seqs: 16, ..Options::default() };
    options.config.sse.buffer_bytes = 4096;
    let rig = Rig::with(options);
    let open = |bytes: &str| {
        let mut connection = connect(rig.address);
        connection.write_all(bytes.as_bytes()).unwrap();
        connection
    };
    let endless = json!({"stream": true, "max_tokens": 3000});
    let lazy = request(&saying("FOREVER", &endless).to_string());
    let half = &lazy[..lazy.len() - 10];
    let flood: Vec<TcpStream> = (0..400)
        .map(|i| match i % 50 {
            0 => open(&lazy),
            1..10 => open(half),
            10..30 => open("POST /v1/chat/completions HTTP/1.1\r\nx-"),
            _ => open(""),
        })
        .collect();
    for i in 0..50 {
        let asked = Instant::now();
        let text = format!("polite {i}");
        let answer = rig.say(&text, &json!({})).json();
        assert_eq!(answer["choices"][0]["message"]["content"], text);
        assert!(asked.elapsed() < Duration::from_secs(5), "an answer took {:?}", asked.elapsed());
    }
    // Bodies that never came hold nothing: only streams that were asked for may run.
    assert!(rig.metric("fathom_requests_in_flight") <= 8.0);
    drop(flood);
    rig.wait_until_idle();
    assert_eq!(rig.engine.stats().kv.blocks_used, 0);
}
