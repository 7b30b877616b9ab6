//! What is on disk and where it goes: config.json, memory-mapped shards, weight formats and reports.
