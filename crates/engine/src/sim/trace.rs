//! Who asks what, and when: arrivals that a simulation replays.
//!
//! A [`Client`] is a conversation: each turn sends everything said so far and some more. One request
//! is a conversation of one turn. Everything is drawn from a seed, so that a trace is the same on
//! every machine.
//!
//! Not here: running it (the module above).

use std::str::FromStr;
use std::time::Duration;

/// One question and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Tokens that the client adds to what was said.
    pub n_new: u32,
    /// Tokens of the answer.
    pub n_answer: u32,
    /// Time between the answer and the next turn: a tool runs, or a person reads.
    pub pause: Duration,
}

/// A conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    /// Clients of one class are reported together.
    pub class: &'static str,
    /// When its first turn arrives.
    pub arrives: Duration,
    /// Tokens that it shares with all clients of the same number: a system prompt.
    pub shared: (u32, u32),
    /// Its turns; at least one.
    pub turns: Vec<Turn>,
}

/// Kinds of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceKind {
    /// Independent requests, four a second for two minutes; every other one has one of four system
    /// prompts.
    Poisson,
    /// The same kind of requests, 64 within a second, every 30 seconds.
    Bursts,
    /// Sixteen agents of 100 turns that use tools.
    Agents,
    /// Forty-eight people chatting while somebody sends a prompt of a million tokens.
    Long,
}

/// Names on the command line.
const KINDS: [(&str, TraceKind); 4] = [
    ("poisson", TraceKind::Poisson),
    ("bursts", TraceKind::Bursts),
    ("agents", TraceKind::Agents),
    ("long", TraceKind::Long),
];

/// No such kind of traffic.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no trace `{0}`, expected one of poisson, bursts, agents, long")]
pub struct UnknownTrace(String);

impl FromStr for TraceKind {
    type Err = UnknownTrace;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = KINDS.iter().find(|(known, _)| *known == name);
        known.map(|(_, kind)| *kind).ok_or_else(|| UnknownTrace(name.to_owned()))
    }
}

/// The clients of a trace, in order of arrival.
#[must_use]
pub fn clients(kind: TraceKind, seed: u64) -> Vec<Client> {
    let mut draw = Draw(seed);
    let mut clients = match kind {
        TraceKind::Poisson => poisson(&mut draw),
        TraceKind::Bursts => bursts(&mut draw),
        TraceKind::Agents => agents(&mut draw),
        TraceKind::Long => chats(&mut draw).into_iter().chain([million()]).collect(),
    };
    clients.sort_by_key(|client| client.arrives);
    clients
}

/// The chats of [`TraceKind::Long`] without the long prompt, to compare with.
#[must_use]
pub fn chats_alone(seed: u64) -> Vec<Client> {
    chats(&mut Draw(seed))
}

fn poisson(draw: &mut Draw) -> Vec<Client> {
    let mut now = 0.0;
    let mut clients = Vec::new();
    loop {
        now += -draw.fraction().max(1e-12).ln() / 4.0;
        if now > 120.0 {
            return clients;
        }
        clients.push(request(draw, now));
    }
}

fn bursts(draw: &mut Draw) -> Vec<Client> {
    let starts = (0..4).flat_map(|burst| std::iter::repeat_n(f64::from(burst) * 30.0, 64));
    starts
        .map(|start| {
            let at = start + draw.fraction();
            request(draw, at)
        })
        .collect()
}

fn request(draw: &mut Draw, at: f64) -> Client {
    let shared = if draw.below(2) == 0 { (draw.below(4) + 1, 2048) } else { (0, 0) };
    let turn =
        Turn { n_new: draw.log(64, 16_384), n_answer: draw.log(32, 1024), pause: Duration::ZERO };
    Client { class: "requests", arrives: Duration::from_secs_f64(at), shared, turns: vec![turn] }
}

fn agents(draw: &mut Draw) -> Vec<Client> {
    let turn = |draw: &mut Draw| Turn {
        n_new: draw.between(200, 1200),
        n_answer: draw.between(80, 400),
        pause: Duration::from_secs_f64(0.2 + 3.0 * draw.fraction()),
    };
    (0..16)
        .map(|_| Client {
            class: "agents",
            arrives: Duration::from_secs_f64(20.0 * draw.fraction()),
            shared: (1, 8192),
            turns: (0..100).map(|_| turn(draw)).collect(),
        })
        .collect()
}

fn chats(draw: &mut Draw) -> Vec<Client> {
    let turn = |draw: &mut Draw| Turn {
        n_new: draw.between(50, 500),
        n_answer: draw.between(200, 600),
        pause: Duration::from_secs_f64(1.0 + 2.0 * draw.fraction()),
    };
    (0..48)
        .map(|_| Client {
            class: "chats",
            arrives: Duration::from_secs_f64(5.0 * draw.fraction()),
            shared: (1, 1024),
            turns: (0..8).map(|_| turn(draw)).collect(),
        })
        .collect()
}

fn million() -> Client {
    let turn = Turn { n_new: 1_000_000, n_answer: 64, pause: Duration::ZERO };
    let arrives = Duration::from_secs(10);
    Client { class: "million", arrives, shared: (0, 0), turns: vec![turn] }
}

/// Numbers from a seed: splitmix64.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        super::scramble(self.0)
    }

    /// Below 1, at least 0.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, n: u32) -> u32 {
        (self.fraction() * f64::from(n)) as u32
    }

    fn between(&mut self, least: u32, most: u32) -> u32 {
        least + self.below(most - least + 1)
    }

    /// As often below as above any number, by ratio.
    fn log(&mut self, least: u32, most: u32) -> u32 {
        let ratio = f64::from(most) / f64::from(least);
        (f64::from(least) * ratio.powf(self.fraction())) as u32
    }
}
