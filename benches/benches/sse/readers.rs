//! The other side: connections that read events, on a thread of their own, and what they saw.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::served::{ReadyTimes, request_body};
use crate::{Load, REACTOR};

/// Who is read from.
pub(crate) enum Target {
    /// The server, asked for a chat completion.
    Server { address: SocketAddr },
    /// The raw limit, which answers anything.
    Raw { address: SocketAddr },
}

/// What readers saw between the moment when all streams had begun and the first one's end.
pub(crate) struct Readings {
    n_events: usize,
    n_bytes: usize,
    n_reads: usize,
    cpu: Duration,
    elapsed: Duration,
    /// Sorted.
    gaps_ms: Vec<f64>,
}

impl Readings {
    pub(crate) const fn n_events(&self) -> usize {
        self.n_events
    }

    pub(crate) fn cpu_us_per_event(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.n_events as f64
    }

    pub(crate) fn events_per_second(&self) -> f64 {
        self.n_events as f64 / self.elapsed.as_secs_f64()
    }

    pub(crate) fn bytes_per_event(&self) -> f64 {
        self.n_bytes as f64 / self.n_events as f64
    }

    pub(crate) fn events_per_read(&self) -> f64 {
        self.n_events as f64 / self.n_reads as f64
    }

    /// A percentile of the time from a token to its bytes; NaN without times.
    pub(crate) fn gap_ms(&self, percent: f64) -> f64 {
        let index = (self.gaps_ms.len() as f64 * percent / 100.0) as usize;
        self.gaps_ms.get(index).copied().unwrap_or(f64::NAN)
    }
}

/// What all connections count together.
#[derive(Default)]
struct Counts {
    n_begun: AtomicUsize,
    n_ended: AtomicUsize,
    n_events: AtomicUsize,
    n_bytes: AtomicUsize,
    n_reads: AtomicUsize,
}

impl Counts {
    /// Events, bytes and reads so far.
    fn now(&self) -> [usize; 3] {
        [&self.n_events, &self.n_bytes, &self.n_reads].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Opens all streams and reads them to their ends.
pub(crate) fn read_all(target: &Target, load: &Load, times: &Arc<ReadyTimes>) -> Readings {
    let counts = Arc::new(Counts::default());
    let (address, is_server) = match *target {
        Target::Server { address } => (address, true),
        Target::Raw { address } => (address, false),
    };
    let (load, times) = (*load, Arc::clone(times));
    let counting = Arc::clone(&counts);
    let readers = std::thread::Builder::new().name("bench-readers".into());
    let reading = readers
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let mut streams = JoinSet::new();
                for stream in 0..load.n_streams {
                    let (counts, times) = (Arc::clone(&counting), Arc::clone(&times));
                    let body = if is_server { request_body(stream, &load) } else { String::new() };
                    streams.spawn(read(address, stream, body, counts, times));
                }
                let mut gaps = Vec::with_capacity(load.n_streams * load.n_events);
                while let Some(read) = streams.join_next().await {
                    gaps.append(&mut read.expect("a reader that does not fail"));
                }
                gaps
            })
        })
        .expect("a thread");
    let measured = measure(&counts, load.n_streams);
    let mut gaps_ms = reading.join().expect("readers that do not fail");
    gaps_ms.sort_by(f64::total_cmp);
    let ([n_events, n_bytes, n_reads], cpu, elapsed) = measured;
    Readings { n_events, n_bytes, n_reads, cpu, elapsed, gaps_ms }
}

/// Counts while all streams run.
fn measure(counts: &Counts, n_streams: usize) -> ([usize; 3], Duration, Duration) {
    let wait = || std::thread::sleep(Duration::from_millis(1));
    while counts.n_begun.load(Ordering::Relaxed) < n_streams {
        wait();
    }
    let (began, cpu, before) = (Instant::now(), reactor_cpu(), counts.now());
    while counts.n_ended.load(Ordering::Relaxed) == 0 {
        wait();
    }
    let (after, cpu, elapsed) = (counts.now(), reactor_cpu() - cpu, began.elapsed());
    (std::array::from_fn(|i| after[i] - before[i]), cpu, elapsed)
}

/// Sends a request and reads the events of its answer. Returns how old each token was, in ms.
async fn read(
    address: SocketAddr,
    stream: usize,
    body: String,
    counts: Arc<Counts>,
    times: Arc<ReadyTimes>,
) -> Vec<f64> {
    // The server's first event says who speaks.
    let n_before = usize::from(!body.is_empty());
    let mut connection = TcpStream::connect(address).await.expect("a listening server");
    let length = body.len();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n"
    );
    connection.write_all((head + &body).as_bytes()).await.expect("a server that reads");
    let mut gaps = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    let (mut n_seen, mut last) = (0_usize, 0);
    loop {
        let n = connection.read(&mut buffer).await.expect("a server that writes");
        let bytes = &buffer[..n];
        let mut n_new = 0;
        for &byte in bytes {
            n_new += usize::from(byte == b'\n' && last == b'\n');
            last = byte;
        }
        counts.n_events.fetch_add(n_new, Ordering::Relaxed);
        counts.n_bytes.fetch_add(n, Ordering::Relaxed);
        counts.n_reads.fetch_add(1, Ordering::Relaxed);
        if n_seen == 0 && n_new > 0 {
            counts.n_begun.fetch_add(1, Ordering::Relaxed);
        }
        gaps.extend((n_seen..n_seen + n_new).filter_map(|event| {
            times.since(stream, event.checked_sub(n_before)?).map(|gap| gap.as_secs_f64() * 1e3)
        }));
        n_seen += n_new;
        if n == 0 || bytes.ends_with(b"0\r\n\r\n") {
            assert!(n_seen > 0, "stream {stream} had no events");
            counts.n_ended.fetch_add(1, Ordering::Relaxed);
            return gaps;
        }
    }
}

/// CPU time of all threads named [`REACTOR`] so far.
fn reactor_cpu() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux").flatten();
    let of_task = |task: std::fs::DirEntry| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let times = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        let ns: u64 = times.split(' ').next()?.parse().ok()?;
        (name.trim_end() == REACTOR).then_some(Duration::from_nanos(ns))
    };
    tasks.filter_map(of_task).sum()
}
