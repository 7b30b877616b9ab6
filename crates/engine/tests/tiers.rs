//! Prefixes that come back from host memory and from disk, also after a restart.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fathom_core::{TokenId, Usage};
use fathom_engine::stats::TierCounts;
use fathom_engine::{
    EngineConfig, EngineHandle, GenerateRequest, RunnerCapacity, ScriptedRunner, StartError,
    TierConfig,
};

use crate::support::{Ending, capacity, config, greedy, hashed_answer, prompt, read};

/// Bytes of a scripted block and snapshot on disk.
const BLOCK_FILE: u64 = 72 + 1024;
const SNAPSHOT_FILE: u64 = 72 + 12;

fn on_disk(path: &Path) -> TierConfig {
    TierConfig { directory: Some(path.to_owned()), ..TierConfig::default() }
}

fn start(tiers: TierConfig) -> EngineHandle {
    start_with(EngineConfig { tiers, ..config() }, capacity())
}

fn start_with(config: EngineConfig, capacity: RunnerCapacity) -> EngineHandle {
    EngineHandle::start(Box::new(ScriptedRunner::hashed(capacity)), config).unwrap()
}

/// Stops an engine, waits for its last write, and returns what it counted.
pub(crate) fn stop(engine: EngineHandle, drain: Duration) -> TierCounts {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(engine.shutdown(drain));
    engine.stats().tiers
}

fn ask_as(engine: &EngineHandle, request: GenerateRequest) -> u32 {
    let n = request.sampling.max_tokens as usize;
    let expected = hashed_answer(&request.prompt, n);
    let (tokens, ending) = read(engine.submit(request).unwrap());
    assert_eq!(tokens, expected);
    let Ending::Finished(_, Usage { cached_tokens, .. }) = ending else { panic!("{ending:?}") };
    cached_tokens
}

fn ask(engine: &EngineHandle, prompt: Vec<TokenId>) -> u32 {
    ask_as(engine, greedy(prompt, 5))
}

/// All files of cached state below a directory.
fn files(root: &Path) -> Vec<PathBuf> {
    let directories = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let lists = directories.filter(|path| path.is_dir()).map(|path| fs::read_dir(path).unwrap());
    lists.flatten().map(|file| file.unwrap().path()).collect()
}

#[test]
fn a_prompt_is_resumed_after_a_restart_and_nothing_is_written_twice() {
    let root = tempfile::tempdir().unwrap();
    let engine = start(on_disk(root.path()));
    assert_eq!(ask(&engine, prompt(1, 700)), 0);
    stop(engine, Duration::ZERO);
    // Two blocks and the snapshot at their end.
    assert_eq!(files(root.path()).len(), 3);

    let engine = start(on_disk(root.path()));
    assert_eq!(ask(&engine, prompt(1, 700)), 512);
    assert_eq!(ask(&engine, prompt(1, 700)), 512);
    assert_eq!(ask(&engine, prompt(2, 700)), 0);
    let counts = stop(engine, Duration::ZERO);
    assert_eq!((counts.loads, counts.disk_hits, counts.disk_misses), (1, 3, 0));
    assert_eq!(counts.disk_read_bytes, 2 * 1024 + 12);
    assert_eq!(files(root.path()).len(), 6);
}

#[test]
fn a_conversation_goes_on_after_restarts_between_its_turns() {
    let root = tempfile::tempdir().unwrap();
    let mut tokens = prompt(1, 300);
    let mut expected = 0;
    for turn in 0..5 {
        let engine = start(on_disk(root.path()));
        let (answer, ending) = read(engine.submit(greedy(tokens.clone(), 300)).unwrap());
        assert_eq!(answer, hashed_answer(&tokens, 300));
        assert!(
            matches!(ending, Ending::Finished(_, usage) if usage.cached_tokens == expected),
            "turn {turn}: {ending:?}"
        );
        stop(engine, Duration::ZERO);
        tokens.extend(answer);
        // The last token of an answer is sampled but not run.
        expected = (tokens.len() as u32 - 1) / 256 * 256;
        tokens.extend(prompt(turn, 60));
    }
}

#[test]
fn what_the_device_evicts_comes_back_from_host_memory() {
    let small = RunnerCapacity { n_blocks: 8, max_model_len: 2048, ..capacity() };
    let tiers = TierConfig { host_bytes: 1 << 20, ..TierConfig::default() };
    let engine = start_with(EngineConfig { tiers, ..config() }, small);
    for family in 1..5 {
        assert_eq!(ask(&engine, prompt(family, 1200)), 0);
    }
    for family in 1..5 {
        assert_eq!(ask(&engine, prompt(family, 1200)), 1024);
    }
    let counts = stop(engine, Duration::ZERO);
    assert_eq!((counts.loads, counts.host_misses, counts.disk_items), (4, 0, 0));
    assert!(counts.host_hits >= 16 && counts.host_bytes <= 1 << 20, "{counts:?}");
}

#[test]
fn host_memory_is_bounded_and_what_does_not_fit_is_computed() {
    let small = RunnerCapacity { n_blocks: 8, max_model_len: 2048, ..capacity() };
    let tiers = TierConfig { host_bytes: 3000, ..TierConfig::default() };
    let engine = start_with(EngineConfig { tiers, ..config() }, small);
    for family in [1, 2, 3, 1, 2, 3] {
        assert_eq!(ask(&engine, prompt(family, 1200)), 0);
    }
    assert!(stop(engine, Duration::ZERO).host_bytes <= 3000);
}

#[test]
fn damaged_files_are_misses_and_replaced() {
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, Damage); 4] = [
        ("a flipped bit", |file| file[200] ^= 4),
        ("a flipped bit in the header", |file| file[20] ^= 4),
        ("a missing end", |file| file.truncate(file.len() - 1)),
        ("zeros", |file| file.fill(0)),
    ];
    for (name, damage) in cases {
        let root = tempfile::tempdir().unwrap();
        let engine = start(on_disk(root.path()));
        ask(&engine, prompt(1, 700));
        stop(engine, Duration::ZERO);
        for path in files(root.path()) {
            let mut file = fs::read(&path).unwrap();
            if file.len() > 200 {
                damage(&mut file);
            }
            fs::write(&path, file).unwrap();
        }
        let engine = start(on_disk(root.path()));
        assert_eq!(ask(&engine, prompt(1, 700)), 0, "{name}");
        let counts = stop(engine, Duration::ZERO);
        assert_eq!(counts.disk_damaged, 2, "{name}");
        let engine = start(on_disk(root.path()));
        assert_eq!(ask(&engine, prompt(1, 700)), 512, "{name}");
        assert_eq!(stop(engine, Duration::ZERO).disk_damaged, 0, "{name}");
    }
}

#[test]
fn a_damaged_block_costs_no_more_than_what_comes_after_it() {
    let root = tempfile::tempdir().unwrap();
    let config = EngineConfig { tiers: on_disk(root.path()), snapshot_interval: 256, ..config() };
    let engine = start_with(config.clone(), capacity());
    ask(&engine, prompt(1, 600));
    ask(&engine, prompt(1, 1500));
    stop(engine, Duration::ZERO);
    // Of the five blocks, damage one; what comes before it is still used.
    let is_block = |path: &PathBuf| path.extension().is_some_and(|end| end == "block");
    let blocks = || files(root.path()).into_iter().filter(is_block);
    assert_eq!(blocks().count(), 5);
    let mut reused = Vec::new();
    for victim in blocks() {
        let whole = fs::read(&victim).unwrap();
        let mut damaged = whole.clone();
        damaged[500] ^= 1;
        fs::write(&victim, damaged).unwrap();
        let engine = start_with(config.clone(), capacity());
        reused.push(ask(&engine, prompt(1, 1500)));
        stop(engine, Duration::ZERO);
        assert_eq!(fs::read(&victim).unwrap(), whole, "it was computed and written again");
    }
    reused.sort_unstable();
    assert_eq!(reused, [0, 256, 512, 768, 1024]);
}

#[test]
fn a_directory_in_use_is_left_to_its_user() {
    let root = tempfile::tempdir().unwrap();
    let first = start(on_disk(root.path()));
    let second = start(on_disk(root.path()));
    assert_eq!(ask(&second, prompt(1, 700)), 0);
    assert_eq!(stop(second, Duration::ZERO), TierCounts::default());
    ask(&first, prompt(1, 700));
    stop(first, Duration::ZERO);
    assert_eq!(files(root.path()).len(), 3);
}

#[test]
fn a_directory_that_cannot_be_used_is_named_at_the_start() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("file");
    fs::write(&path, "").unwrap();
    let runner = Box::new(ScriptedRunner::hashed(capacity()));
    let config = EngineConfig { tiers: on_disk(&path), ..config() };
    let Err(error) = EngineHandle::start(runner, config) else { panic!("it cannot start") };
    assert!(matches!(error, StartError::CacheDirectory(_)));
    assert!(error.to_string().contains("file cannot be used"), "{error}");
}

#[test]
fn other_models_users_and_salts_find_nothing() {
    let root = tempfile::tempdir().unwrap();
    let tiers = || on_disk(root.path());
    let engine = start(tiers());
    let as_user = |user: Option<&str>, salt: Option<&str>| GenerateRequest {
        user: user.map(str::to_owned),
        cache_salt: salt.map(str::to_owned),
        ..greedy(prompt(1, 700), 5)
    };
    ask_as(&engine, as_user(Some("a"), Some("x")));
    stop(engine, Duration::ZERO);
    let other = EngineConfig { cache_namespace: "other".to_owned(), tiers: tiers(), ..config() };
    let engine = start_with(other, capacity());
    assert_eq!(ask_as(&engine, as_user(Some("a"), Some("x"))), 0);
    stop(engine, Duration::ZERO);

    let engine = start(tiers());
    assert_eq!(ask_as(&engine, as_user(Some("b"), Some("x"))), 0);
    assert_eq!(ask_as(&engine, as_user(Some("a"), Some("y"))), 0);
    assert_eq!(ask_as(&engine, as_user(Some("a"), None)), 0);
    assert_eq!(ask_as(&engine, as_user(Some("a"), Some("x"))), 512);
}

#[test]
fn the_disk_limit_holds() {
    let root = tempfile::tempdir().unwrap();
    let limit = 4 * BLOCK_FILE + 2 * SNAPSHOT_FILE;
    let tiers = TierConfig { disk_bytes: limit, ..on_disk(root.path()) };
    for family in 0..4 {
        let engine = start(tiers.clone());
        ask(&engine, prompt(family, 700));
        assert!(stop(engine, Duration::ZERO).disk_bytes <= limit);
        let bytes: u64 = files(root.path()).iter().map(|f| fs::metadata(f).unwrap().len()).sum();
        assert!(bytes <= limit);
    }
    let engine = start(tiers);
    assert_eq!(ask(&engine, prompt(0, 700)), 0);
    assert_eq!(ask(&engine, prompt(3, 700)), 512);
}

#[test]
fn without_a_prefix_cache_the_tiers_stay_unused() {
    let root = tempfile::tempdir().unwrap();
    let config = EngineConfig { prefix_cache: false, tiers: on_disk(root.path()), ..config() };
    let engine = start_with(config, capacity());
    assert_eq!(ask(&engine, prompt(1, 700)), 0);
    stop(engine, Duration::ZERO);
    assert!(fs::read_dir(root.path()).unwrap().next().is_none());
}
