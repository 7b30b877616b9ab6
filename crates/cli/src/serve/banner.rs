//! What `fathom serve` prints once it answers: what is loaded, memory, address, a line to try.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use fathom_engine::DraftMethod;

use super::config::ServeConfig;
use super::load::Loaded;
use crate::bytes::readable;

/// The text; its lines begin with a word that says what they are about.
pub(super) struct Banner {
    pub(super) names: Vec<String>,
    pub(super) source: String,
    pub(super) compute: String,
    pub(super) memory: Option<String>,
    pub(super) loading: Option<String>,
    pub(super) steps: String,
    pub(super) cache: String,
    pub(super) tiers: String,
    pub(super) took_s: f64,
    pub(super) url: String,
    pub(super) needs_key: bool,
}

impl Banner {
    /// The text about `loaded`, which answers at `address`.
    pub(super) fn new(config: &ServeConfig, loaded: &Loaded, address: SocketAddr) -> Self {
        let weights = readable(loaded.weight_bytes);
        let source = match &config.model {
            Some(directory) => format!(
                "{weights} in {} tensors, mapped from {}",
                loaded.n_tensors,
                directory.display()
            ),
            None => format!(
                "{weights} in {} tensors, embedded; random, so answers are noise",
                loaded.n_tensors
            ),
        };
        let limits = loaded.entry.engine.limits();
        Self {
            names: loaded.entry.ids.clone(),
            source,
            compute: match &loaded.gpu {
                None => format!(
                    "{} on the CPU, {}, {}",
                    config.numerics,
                    counted(loaded.n_threads, "thread"),
                    counted(config.tensor_parallel_size, "rank"),
                ),
                Some(gpu) => format!("{} on {}", config.numerics, gpu.about),
            },
            memory: loaded.gpu.as_ref().map(|gpu| gpu.plan.to_string()),
            loading: loaded.gpu.as_ref().map(|gpu| format!("weights {}", gpu.loading)),
            steps: format!(
                "{} tokens of context, {} sequences at once, {} tokens per step{}",
                limits.max_model_len,
                limits.max_num_seqs,
                limits.max_num_batched_tokens,
                guesses(config),
            ),
            cache: loaded.cache.to_string(),
            tiers: tiers(config),
            took_s: loaded.took.as_secs_f64(),
            url: reachable(address, config.server.server.tls_cert.is_some()),
            needs_key: !config.server.keys.is_empty() || config.server.server.keys_file.is_some(),
        }
    }
}

/// What the steps line says about tokens that are guessed ahead.
fn guesses(config: &ServeConfig) -> String {
    let speculation = &config.speculation;
    let who = match speculation.method {
        DraftMethod::Off => return String::new(),
        DraftMethod::Ngram => "the text so far",
        DraftMethod::Mtp => "the MTP block",
    };
    format!(", up to {} tokens guessed ahead by {who}", speculation.max_drafts)
}

/// Where cached prefixes are kept, beside the KV cache.
fn tiers(config: &ServeConfig) -> String {
    let tiers = &config.tiers;
    let host = (tiers.host_bytes > 0)
        .then(|| format!("up to {} of host memory", readable(tiers.host_bytes)));
    let disk = tiers.directory.as_ref().map(|directory| {
        format!("up to {} in {}", readable(tiers.disk_bytes), directory.display())
    });
    let below: Vec<String> = host.into_iter().chain(disk).collect();
    if below.is_empty() {
        return "kept in the KV cache only; --cache-dir keeps them through restarts".to_owned();
    }
    format!("kept in the KV cache, then {}", below.join(" and "))
}

fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// URL under which a client on this machine reaches `address`.
pub(super) fn reachable(address: SocketAddr, tls: bool) -> String {
    let ip = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let scheme = if tls { "https" } else { "http" };
    format!("{scheme}://{}", SocketAddr::new(ip, address.port()))
}

impl fmt::Display for Banner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, others) = self.names.split_first().expect("a model has a name");
        write!(f, "fathom {} serves {name}", env!("CARGO_PKG_VERSION"))?;
        if !others.is_empty() {
            write!(f, " (also called {})", others.join(", "))?;
        }
        writeln!(f)?;
        for (what, text) in [
            ("weights", Some(&self.source)),
            ("compute", Some(&self.compute)),
            ("memory", self.memory.as_ref()),
            ("limits", Some(&self.steps)),
            ("kv cache", Some(&self.cache)),
            ("prefixes", Some(&self.tiers)),
        ] {
            if let Some(text) = text {
                // Further lines are about the same.
                writeln!(f, "  {what:<9} {}", text.replace('\n', "\n            "))?;
            }
        }
        write!(f, "  loaded    in {:.2} s", self.took_s)?;
        if let Some(loading) = &self.loading {
            write!(f, "; {loading}")?;
        }
        writeln!(f)?;
        writeln!(f, "  listening {}", self.url)?;
        writeln!(f, "\ntry it:")?;
        let key = if self.needs_key { " -H 'Authorization: Bearer YOUR_KEY'" } else { "" };
        // The last name is the one that client examples use.
        let model = others.last().unwrap_or(name);
        write!(
            f,
            "  curl {}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{{\"model\": \
             \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}], \
             \"max_tokens\": 64}}'",
            self.url
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_is_one_that_a_local_client_can_use() {
        let url = |address: &str, tls| reachable(address.parse().unwrap(), tls);
        assert_eq!(url("0.0.0.0:80", false), "http://127.0.0.1:80");
        assert_eq!(url("[::]:80", false), "http://[::1]:80");
        assert_eq!(url("10.0.0.7:9", true), "https://10.0.0.7:9");
    }

    #[test]
    fn the_line_to_try_is_valid_json_and_mentions_a_key_only_if_one_is_needed() {
        let mut banner = Banner {
            names: vec!["nano".to_owned(), "deepseek-v4-flash".to_owned()],
            source: String::new(),
            compute: String::new(),
            memory: None,
            loading: None,
            steps: String::new(),
            cache: String::new(),
            tiers: String::new(),
            took_s: 0.0,
            url: "http://127.0.0.1:8000".to_owned(),
            needs_key: false,
        };
        let text = banner.to_string();
        let body = text.rsplit_once("-d '").unwrap().1.trim_end_matches('\'');
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["model"], "deepseek-v4-flash");
        assert!(!text.contains("Bearer"));
        banner.needs_key = true;
        assert!(banner.to_string().contains("Bearer"));
    }
}
